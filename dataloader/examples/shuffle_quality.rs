//! Measures how well the order of samples is mixed, against a full shuffle.
//!
//! ```text
//! cargo run -p pollen-dataloader --example shuffle_quality > docs/shuffle.md
//! ```
#![allow(clippy::print_stdout, reason = "a program whose result is its output")]

use pollen_core::Seed;
use pollen_dataloader::{DatasetOrder, RowGroupFrames, Run};

const MIB: u64 = 1 << 20;
const BATCH: usize = 1024;

/// A dataset of equal episodes, in row groups of about 8 MiB.
struct Shape {
    name: &'static str,
    episodes: u64,
    frames: u64,
    frame_bytes: u64,
}

const SHAPES: [Shape; 3] = [
    Shape {
        name: "60,000 episodes of 35 frames, 15 kB each",
        episodes: 60_000,
        frames: 35,
        frame_bytes: 15_000,
    },
    Shape {
        name: "9,000 episodes of 280 frames, 25 kB each",
        episodes: 9_000,
        frames: 280,
        frame_bytes: 25_000,
    },
    Shape {
        name: "1,000 episodes of 120 frames, 30 kB each",
        episodes: 1_000,
        frames: 120,
        frame_bytes: 30_000,
    },
];

impl Shape {
    fn groups(&self) -> Vec<RowGroupFrames> {
        let per_group = (8 * MIB / (self.frames * self.frame_bytes)).max(1);
        let episodes: Vec<u64> = (0..self.episodes).collect();
        episodes
            .chunks(per_group as usize)
            .map(|episodes| RowGroupFrames {
                bytes: episodes.len() as u64 * self.frames * self.frame_bytes,
                runs: episodes
                    .iter()
                    .map(|&episode| Run {
                        episode,
                        first_row: episode * self.frames,
                        rows: self.frames,
                    })
                    .collect(),
            })
            .collect()
    }

    fn num_frames(&self) -> u64 {
        self.episodes * self.frames
    }
}

/// Figures of an order of frames.
struct Quality {
    neighbours: f64,
    drift: f64,
    episodes: f64,
    spread: f64,
    spread_drift: f64,
}

fn measure(shape: &Shape, order: &[u64]) -> Quality {
    // What the frames of an episode have in common: one random number each.
    let mut own = vec![0.0_f32; shape.episodes as usize];
    Seed::new(9).draws().fill_normal(&mut own);
    let own: Vec<f64> = own.into_iter().map(f64::from).collect();
    // What episodes stored near each other have in common.
    let place: Vec<f64> = (0..shape.episodes).map(|e| e as f64).collect();
    let values = |of: &[f64]| -> Vec<f64> {
        let frames = order.iter();
        frames
            .map(|frame| of[(frame / shape.frames) as usize])
            .collect()
    };
    let (own, place) = (values(&own), values(&place));
    let distinct: usize = order
        .chunks_exact(BATCH)
        .map(|batch| {
            let mut episodes: Vec<u64> = batch.iter().map(|frame| frame / shape.frames).collect();
            episodes.sort_unstable();
            episodes.dedup();
            episodes.len()
        })
        .sum();
    let batches = order.len() / BATCH;
    Quality {
        neighbours: correlation(&own),
        drift: correlation(&place),
        episodes: distinct as f64 / (batches * BATCH) as f64,
        spread: spread(&own),
        spread_drift: spread(&place),
    }
}

/// Correlation of each value with the next.
fn correlation(values: &[f64]) -> f64 {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let variance: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    let pairs = values
        .windows(2)
        .map(|pair| (pair[0] - mean) * (pair[1] - mean));
    pairs.sum::<f64>() / variance
}

/// Standard deviation of the batches' means.
fn spread(values: &[f64]) -> f64 {
    let means: Vec<f64> = values
        .chunks_exact(BATCH)
        .map(|batch| batch.iter().sum::<f64>() / BATCH as f64)
        .collect();
    let mean = means.iter().sum::<f64>() / means.len() as f64;
    (means.iter().map(|m| (m - mean).powi(2)).sum::<f64>() / means.len() as f64).sqrt()
}

fn main() {
    println!(
        "# Shuffle quality\n\n\
         Written by `cargo run -p pollen-dataloader --example shuffle_quality > docs/shuffle.md`.\n\n\
         The order of samples mixes the row groups of one window at a time (`data.window_bytes`). The table\n\
         compares an epoch of it with a full shuffle of the same frames, and with the order in storage; row\n\
         groups of whole episodes of about 8 MiB, batches of {BATCH}.\n\n\
         - *neighbours*: correlation of a random number that each episode has, between a sample and the next;\n\
         - *place*: the same of the episode's place in storage, for datasets that drift;\n\
         - *episodes*: distinct episodes in a batch, as a share of its samples;\n\
         - *spread*, *spread of place*: standard deviation of a batch's mean of either number, over that of\n  \
           the full shuffle: 1 is perfect, below 1 is more even than chance.\n\n\
         Neighbours are as good as uncorrelated with any window. What a small window costs is seen in the\n\
         batches: fewer episodes, and means that wander. `data.window_bytes` (1 GiB unless given) should hold\n\
         many more episodes than a batch has samples of the dataset; in a mixture a dataset gives a batch only\n\
         its share, so that these figures, of one dataset that fills the batch, are the worst case.\n"
    );
    for shape in &SHAPES {
        let bytes = shape.num_frames() * shape.frame_bytes;
        println!(
            "## {} ({:.1} GiB)\n",
            shape.name,
            bytes as f64 / 1024_f64.powi(3)
        );
        println!("| order | windows | neighbours | place | episodes | spread | spread of place |");
        println!("|---|---|---|---|---|---|---|");
        let full = Seed::new(3).permutation(shape.num_frames() as usize);
        let full: Vec<u64> = full.into_iter().map(u64::from).collect();
        let best = measure(shape, &full);
        let row = |name: &str, windows: &str, order: &[u64]| {
            let q = measure(shape, order);
            println!(
                "| {name} | {windows} | {:.4} | {:.4} | {:.3} | {:.2} | {:.2} |",
                q.neighbours,
                q.drift,
                q.episodes,
                q.spread / best.spread,
                q.spread_drift / best.spread_drift
            );
        };
        row("full shuffle", "", &full);
        for window in [4096, 1024, 256, 64]
            .map(|mib| mib * MIB)
            .into_iter()
            .filter(|&w| 3 * w < bytes)
        {
            let order = DatasetOrder::new(0, Seed::new(3), window, shape.groups());
            let frames: Vec<u64> = (0..order.num_frames()).map(|i| order.at(i).frame).collect();
            let windows = order.num_windows(0).to_string();
            row(
                &format!("window of {} MiB", window / MIB),
                &windows,
                &frames,
            );
        }
        let stored: Vec<u64> = (0..shape.num_frames()).collect();
        row("as stored", "", &stored);
        println!();
    }
}

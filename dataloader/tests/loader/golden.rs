//! Pins the order of samples: `tests/golden/sample_order.json` says what `ORDER_VERSION` means.
//!
//! A change that makes this fail reorders every run that resumes: raise `ORDER_VERSION` and write
//! the file anew with `POLLEN_WRITE_GOLDEN=1`.

use std::path::Path;

use pollen_core::Seed;
use pollen_dataloader::{
    Mixture, MixtureSource, ORDER_VERSION, RowGroupFrames, Run, SampleRef, WeightMeaning,
};
use serde::{Deserialize, Serialize};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Golden {
    order_version: u32,
    /// Root seed of the run.
    seed: u64,
    window_bytes: u64,
    datasets: Vec<GoldenDataset>,
    block_len: u64,
    /// [index, dataset, row group, episode, frame].
    samples: Vec<[u64; 5]>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct GoldenDataset {
    name: String,
    share: f64,
    /// Per row group: its bytes, then [episode, first row, rows] of each run.
    row_groups: Vec<(u64, Vec<[u64; 3]>)>,
}

fn dataset(name: &str, share: f64, groups: u64, rows: u64) -> GoldenDataset {
    let row_groups = (0..groups).map(|g| {
        let first = g * rows;
        // Two episodes meet in each row group; the first row belongs to a held-out one.
        let cut = 1 + rows / 3;
        let runs = vec![[g, first + 1, cut - 1], [g + 1, first + cut, rows - cut]];
        (1000 + 100 * (g % 3), runs)
    });
    GoldenDataset {
        name: name.into(),
        share,
        row_groups: row_groups.collect(),
    }
}

fn order() -> Golden {
    let (seed, window_bytes) = (20_250_101, 4500);
    let datasets = vec![dataset("bridge", 0.7, 11, 13), dataset("droid", 0.3, 6, 20)];
    let sources = datasets.iter().map(|dataset| MixtureSource {
        name: dataset.name.clone(),
        weight: dataset.share,
        groups: dataset
            .row_groups
            .iter()
            .map(|(bytes, runs)| RowGroupFrames {
                bytes: *bytes,
                runs: runs
                    .iter()
                    .map(|&[episode, first_row, rows]| Run {
                        episode,
                        first_row,
                        rows,
                    })
                    .collect(),
            })
            .collect(),
    });
    let mixture = Mixture::new(
        Seed::new(seed),
        sources.collect(),
        WeightMeaning::Share,
        window_bytes,
    )
    .unwrap();
    // The start, two epochs of the smaller dataset, and far jumps.
    let indices = (0..96).chain(400..416).chain([1_000_000, 123_456_789_012]);
    let samples = indices.map(|index| {
        let SampleRef {
            dataset,
            row_group,
            episode,
            frame,
        } = mixture.sample(index);
        [
            index,
            u64::from(dataset),
            u64::from(row_group),
            episode,
            frame,
        ]
    });
    Golden {
        order_version: ORDER_VERSION,
        seed,
        window_bytes,
        block_len: mixture.block_len(),
        samples: samples.collect(),
        datasets,
    }
}

#[test]
fn the_order_is_pinned() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/sample_order.json");
    let order = order();
    if std::env::var_os("POLLEN_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, serde_json::to_string(&order).unwrap() + "\n").unwrap();
    }
    let golden: Golden = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(order, golden);
}

//! The pictures of a step whose loss or gradient was not finite, each with its sample and loss.
//!
//! ```text
//! <run folder>/non_finite/step-00000007/rank-0.png    one tile a sample, its cameras side by side;
//!                                                     a red frame: its own loss is not finite
//!                                       rank-0.json   the captions, tile by tile
//! ```
//! Nothing is kept during training for this: the batches are loaded once more.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pollen_core::Seed;
use pollen_dataloader::{HostBatch, Loader, LoaderArgs};
use serde_json::json;

use crate::batch::next_micro_batch;
use crate::error::Error;
use crate::step::Trainer;

/// Tiles in a row.
const COLUMNS: usize = 8;
/// Pixels of a tile's frame.
const FRAME: usize = 2;
const FINE: [u8; 3] = [64, 64, 64];
const NOT_FINITE: [u8; 3] = [255, 0, 0];

/// Writes the sheet of this rank's part of the step that had number `step`; returns the step's
/// folder below `run_dir`.
pub(crate) fn write(trainer: &Trainer, step: u64, run_dir: &Path) -> Result<PathBuf, Error> {
    let below = PathBuf::from(format!("non_finite/step-{step:08}"));
    let folder = run_dir.join(&below);
    let rank = trainer.communicator.rank();
    let (mut sheet, mut captions) = (Sheet::default(), Vec::new());
    let mut loader = Loader::start(loader_args(trainer, step - 1), &trainer.runtime)?;
    for micro_batch in 0..trainer.accumulation {
        let host = next_micro_batch(&mut loader, step)?;
        let losses = sample_losses(trainer, &host, step - 1, micro_batch);
        for (slot, loss) in losses.into_iter().enumerate() {
            captions.push(caption(trainer, &host, slot, loss, captions.len()));
            sheet.add(&host, slot, loss.is_finite());
        }
    }
    let text = json!({
        "step": step,
        "rank": rank,
        "cameras": trainer.config.data.cameras,
        "tile": [sheet.tile.0, sheet.tile.1],
        "samples": captions,
    });
    let put = |path: PathBuf, bytes: Vec<u8>| {
        fs::write(&path, bytes).map_err(|source| Error::File {
            path: path.display().to_string(),
            source,
        })
    };
    fs::create_dir_all(&folder).map_err(|source| Error::File {
        path: folder.display().to_string(),
        source,
    })?;
    put(folder.join(format!("rank-{rank}.png")), sheet.png()?)?;
    put(
        folder.join(format!("rank-{rank}.json")),
        format!("{text:#}\n").into_bytes(),
    )?;
    Ok(below)
}

fn loader_args(trainer: &Trainer, step: u64) -> LoaderArgs {
    let train = &trainer.config.train;
    LoaderArgs {
        data: Arc::clone(&trainer.data),
        mixture: Arc::clone(&trainer.mixture),
        seed: Seed::new(trainer.config.seed),
        rank: trainer.communicator.rank() as usize,
        world_size: trainer.communicator.world_size() as usize,
        global_batch: train.global_batch as usize,
        micro_batch: train.micro_batch as usize,
        first_sample: step * u64::from(train.global_batch),
    }
}

/// Returns each sample's own mean squared error, with the noise and dropout it had in the step.
fn sample_losses(trainer: &Trainer, host: &HostBatch, step: u64, micro_batch: u32) -> Vec<f64> {
    let (pass, batch) = trainer.forward(host, step, micro_batch);
    let squares = (batch.noise - batch.actions - pass.velocity()).square() * batch.valid;
    let [samples, horizon, width] = squares.dims();
    let squares = crate::optim::host(squares.inner().reshape([samples * horizon * width]));
    let of = |slot: usize| slot * horizon * width..(slot + 1) * horizon * width;
    (0..samples)
        .map(|slot| {
            let valid = host.valid[of(slot)].iter().filter(|&&valid| valid != 0);
            let sum: f64 = squares[of(slot)].iter().map(|&x| f64::from(x)).sum();
            sum / valid.count().max(1) as f64
        })
        .collect()
}

fn caption(
    trainer: &Trainer,
    host: &HostBatch,
    slot: usize,
    loss: f64,
    number: usize,
) -> serde_json::Value {
    let sample = host.samples[slot];
    let dataset = &trainer.data.datasets()[sample.dataset as usize];
    json!({
        "row": number / COLUMNS,
        "column": number % COLUMNS,
        "sample": host.sample_indices[slot],
        "dataset": dataset.name(),
        "episode": sample.episode,
        "frame": sample.frame,
        "action_space": dataset.action_space().name,
        // `null` where it is not finite: JSON has no such number.
        "loss": loss,
    })
}

/// Tiles of one size, row by row.
#[derive(Default)]
struct Sheet {
    /// Width and height of a tile with its frame.
    tile: (usize, usize),
    tiles: Vec<Vec<u8>>,
}

impl Sheet {
    fn add(&mut self, host: &HostBatch, slot: usize, fine: bool) {
        let (cameras, side) = (host.dims.cameras, host.dims.image_size);
        let (width, height) = (cameras * side + 2 * FRAME, side + 2 * FRAME);
        self.tile = (width, height);
        let mut tile = if fine { FINE } else { NOT_FINITE }.repeat(width * height);
        for camera in 0..cameras {
            let planes = &host.images[(slot * cameras + camera) * 3 * side * side..];
            for (y, x, channel) in (0..side)
                .flat_map(|y| (0..side).map(move |x| (y, x)))
                .flat_map(|(y, x)| (0..3).map(move |channel| (y, x, channel)))
            {
                let at = (FRAME + y) * width + FRAME + camera * side + x;
                tile[3 * at + channel] = planes[(channel * side + y) * side + x];
            }
        }
        self.tiles.push(tile);
    }

    fn png(&self) -> Result<Vec<u8>, Error> {
        let (width, height) = self.tile;
        let columns = COLUMNS.min(self.tiles.len()).max(1);
        let rows = self.tiles.len().div_ceil(columns);
        let line = 3 * width;
        let mut pixels = vec![0; rows * height * columns * line];
        for (number, tile) in self.tiles.iter().enumerate() {
            let (row, column) = (number / columns, number % columns);
            for (y, pixels_of_line) in tile.chunks_exact(line).enumerate() {
                let at = ((row * height + y) * columns + column) * line;
                pixels[at..at + line].copy_from_slice(pixels_of_line);
            }
        }
        let failed = |error| Error::internal(format!("the contact sheet: {error}"));
        let size = |pixels: usize| u32::try_from(pixels).map_err(|_| failed("too large".into()));
        let mut bytes = Vec::new();
        let mut encoder =
            png::Encoder::new(&mut bytes, size(columns * width)?, size(rows * height)?);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let failed = |error: png::EncodingError| failed(error.to_string());
        let mut writer = encoder.write_header().map_err(failed)?;
        writer.write_image_data(&pixels).map_err(failed)?;
        writer.finish().map_err(failed)?;
        Ok(bytes)
    }
}

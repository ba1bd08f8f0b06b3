//! Measures how fast checkpoints are written and made durable, beside a plain write and fsync of
//! the same bytes in the same folder.
//!
//! ```text
//! make bench-checkpoint        or:  bench_checkpoint [--folder DIR] [--megabytes N] [--rounds N]
//! ```
//! A round writes the values of weights and both moments to one file by plain `write` in pieces of
//! 8 MiB and `fsync`, and as a checkpoint by the run's own writer: safetensors with crc32c and
//! sha256, fsync, MANIFEST and log entry. The two alternate, which is first too, because a disk has
//! a cache that whoever is first fills. Medians and the best rounds are compared.

#![allow(
    clippy::print_stdout,
    reason = "the result of a benchmark belongs on standard output"
)]

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use pollen_checkpoints::{Checkpoints, FlatSlice, ManifestHead, TensorSlice, Values};
use pollen_core::Seed;
use pollen_storage::{Silent, Storage, StorageConfig};

/// Values of one tensor of weights: 4 MiB.
const TENSOR: usize = 1 << 20;
/// Bytes of one plain write.
const PIECE: usize = 8 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let (mut folder, mut megabytes, mut rounds) = (std::env::temp_dir(), 400, 5);
    let mut args = std::env::args().skip(1);
    while let Some(flag) = args.next() {
        let value = args.next().ok_or(format!("{flag} needs a value"))?;
        match flag.as_str() {
            "--folder" => folder = PathBuf::from(value),
            "--megabytes" => megabytes = value.parse()?,
            "--rounds" => rounds = value.parse()?,
            _ => return Err(format!("{flag}: --folder, --megabytes or --rounds").into()),
        }
    }
    let place = tempfile::tempdir_in(folder)?;
    // A third each: weights, first and second moments. Random bits, which nothing can compress.
    let tensors = (megabytes * 1_000_000_usize / 12).div_ceil(TENSOR);
    let mut draws = Seed::new(1).draws();
    let mut random = |len| Arc::new((0..len).map(|_| draws.uniform_f32()).collect());
    let weights = (0..tensors).map(|_| random(TENSOR)).collect();
    let moments = [random(tensors * TENSOR), random(tensors * TENSOR)];
    let megabytes = 12.0 * (tensors * TENSOR) as f64 / 1e6;
    let bench = Bench::new(place.path(), weights, moments)?;
    println!("{megabytes:.0} MB a checkpoint, {rounds} rounds after one to warm up");
    let (mut plain, mut saved) = (Vec::new(), Vec::new());
    for round in 0..=rounds {
        let early = (round % 2 == 0).then(|| bench.plain()).transpose()?;
        let checkpoint = bench.checkpoint(round)?;
        let write = early.map_or_else(|| bench.plain(), Ok)?;
        let rates = [megabytes / write, megabytes / checkpoint];
        if round > 0 {
            println!(
                "round {round}: plain write + fsync {:.0} MB/s, checkpoint {:.0} MB/s",
                rates[0], rates[1]
            );
            plain.push(rates[0]);
            saved.push(rates[1]);
        }
    }
    for rates in [&mut plain, &mut saved] {
        rates.sort_by(|a, b| b.total_cmp(a));
    }
    for (what, place) in [("median", plain.len() / 2), ("best", 0)] {
        let (plain, saved) = (plain[place], saved[place]);
        println!(
            "{what}: plain write + fsync {plain:.0} MB/s, checkpoint {saved:.0} MB/s: {:.0}% of it",
            100.0 * saved / plain
        );
    }
    Ok(())
}

struct Bench {
    folder: PathBuf,
    weights: Vec<Arc<Vec<f32>>>,
    moments: [Arc<Vec<f32>>; 2],
    checkpoints: Checkpoints,
    claim: pollen_checkpoints::Claim,
    _runtime: tokio::runtime::Runtime,
}

impl Bench {
    fn new(
        folder: &Path,
        weights: Vec<Arc<Vec<f32>>>,
        moments: [Arc<Vec<f32>>; 2],
    ) -> Result<Self, Box<dyn Error>> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let url = format!("file://{}/checkpoints", folder.display());
        let storage = Storage::open(&url, &StorageConfig::default(), Arc::new(Silent))?;
        let checkpoints = Checkpoints::new(storage, runtime.handle().clone());
        let claim = checkpoints.claim(checkpoints.next_generation()?)?;
        Ok(Self {
            folder: folder.to_owned(),
            weights,
            moments,
            checkpoints,
            claim,
            _runtime: runtime,
        })
    }

    /// Returns the seconds of a plain write and fsync.
    fn plain(&self) -> Result<f64, Box<dyn Error>> {
        let path = self.folder.join("plain");
        let began = Instant::now();
        let mut file = File::create(&path)?;
        for values in self.weights.iter().chain(&self.moments) {
            for piece in values.chunks(PIECE / 4) {
                file.write_all(bytemuck::cast_slice(piece))?;
            }
        }
        file.sync_all()?;
        let seconds = began.elapsed().as_secs_f64();
        std::fs::remove_file(&path)?;
        Ok(seconds)
    }

    /// Returns the seconds until a checkpoint is published.
    fn checkpoint(&self, step: u64) -> Result<f64, Box<dyn Error>> {
        let tensors = self.weights.iter().enumerate();
        let tensors: Vec<TensorSlice<'_>> = tensors
            .map(|(index, values)| TensorSlice {
                name: format!("tensor.{index:04}"),
                shape: vec![values.len()],
                values: Values::From(values),
            })
            .collect();
        let flat: Vec<FlatSlice<'_>> = ["exp_avg", "exp_avg_sq"]
            .iter()
            .zip(&self.moments)
            .map(|(name, values)| FlatSlice {
                name: (*name).into(),
                global_len: values.len() as u64,
                offset: 0,
                values: Values::From(values),
            })
            .collect();
        let head = ManifestHead {
            step,
            updates: step,
            samples: step,
            world_size: 1,
            config_hash: "bench".into(),
            recipe_hash: "bench".into(),
            layout_hash: "bench".into(),
            order_version: 1,
            dataset_hashes: [].into(),
            gpu_hours_spent: 0.0,
            eval_error: None,
            extra: serde_json::Value::Null,
        };
        let began = Instant::now();
        let writer = self.checkpoints.writer(&self.claim, step, 0, 1);
        let files = writer.write_state(&tensors, &flat, None, || ())?;
        let published = self.checkpoints.publish(&self.claim, head, files)?;
        let seconds = began.elapsed().as_secs_f64();
        // Only what is measured stays on the disk.
        let path = published
            .url
            .strip_prefix("file://")
            .ok_or(published.url.clone())?;
        std::fs::remove_dir_all(path)?;
        Ok(seconds)
    }
}

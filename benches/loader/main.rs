//! Measures the loader on a corpus of frames, as one process of a comparison of loaders.
//!
//! ```text
//! bench_loader --data DIR|URL [--seconds 6] [--resume-at 0] [--threads 2] [--buffer 4096]
//!              [--batch 32] [--dump 0] [--image-size 224] [--resize bilinear_short_side] [--augment none]
//! ```
//!
//! Prints one line of JSON: `first_batch_s` from the start of loader construction, `samples_per_s`
//! after 16 batches of warm-up, `cpu_ms_per_sample` of the whole process, `samples`, `dup` (frames
//! seen twice in the window of measurement). `--dump N` writes the frames of N batches to standard
//! output in place of the figures, for `compare.py`.
#![allow(clippy::print_stdout, reason = "a program whose result is its output")]
#![allow(clippy::unwrap_used, reason = "a benchmark: a failure ends it")]

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pollen_core::{ActionSpace, ActionSpaceFile, Layered, Seed};
use pollen_dataloader::{Data, DataConfig, HostBatch, Loader, LoaderArgs, ModelShape};
use pollen_storage::{Silent, Storage, StorageConfig};
use serde::Deserialize;

const WARM_UP: usize = 16;
const SHAPE: ModelShape = ModelShape {
    action_horizon: 10,
    action_width: 7,
    proprio_width: 0,
};

fn main() {
    let start = Instant::now();
    let mut args: BTreeMap<String, String> = BTreeMap::new();
    let mut words = std::env::args().skip(1);
    while let Some(name) = words.next() {
        let value = words
            .next()
            .unwrap_or_else(|| panic!("{name} has no value"));
        args.insert(name.trim_start_matches('-').into(), value);
    }
    let number = |name: &str, default: f64| -> f64 {
        args.get(name).map_or(default, |text| text.parse().unwrap())
    };
    let seconds = number("seconds", 6.0);
    let batch = number("batch", 32.0) as usize;
    let url = args.get("data").expect("--data DIR or URL");
    let (threads, buffer) = (number("threads", 2.0), number("buffer", 4096.0));
    let word =
        |name: &str, default: &str| args.get(name).map_or(default, String::as_str).to_owned();
    let pixels = format!(
        "image_size = {}\nresize = \"{}\"\naugment = {{ kind = \"{}\" }}",
        number("image-size", 224.0),
        word("resize", "bilinear_short_side"),
        word("augment", "none")
    );
    let config = config(url, threads as usize, buffer as u64, &pixels);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let construction = Instant::now();
    let spaces = [space()];
    let data = Data::open(&config, &spaces, SHAPE, &open);
    let data = Arc::new(runtime.block_on(data).unwrap());
    let seed = Seed::new(1);
    let args_of_loader = LoaderArgs {
        mixture: Arc::new(data.mixture(seed).unwrap()),
        data,
        seed,
        rank: 0,
        world_size: 1,
        global_batch: batch,
        micro_batch: batch,
        first_sample: number("resume-at", 0.0) as u64,
    };
    let mut loader = Loader::start(args_of_loader, runtime.handle()).unwrap();
    let dump = number("dump", 0.0) as usize;
    if dump > 0 {
        let mut out = std::io::stdout().lock();
        for _ in 0..dump {
            write_frames(&mut out, &loader.next_micro_batch().unwrap());
        }
        return;
    }
    loader.next_micro_batch().unwrap();
    let mut result = format!(
        "{{\"first_batch_s\": {:.4}, \"start_to_first_s\": {:.4}",
        construction.elapsed().as_secs_f64(),
        start.elapsed().as_secs_f64()
    );
    if seconds > 0.0 {
        for _ in 0..WARM_UP {
            loader.next_micro_batch().unwrap();
        }
        let (mut seen, mut samples) = (HashSet::new(), 0);
        let (cpu, window) = (cpu_time(), Instant::now());
        while window.elapsed().as_secs_f64() < seconds {
            let batch = loader.next_micro_batch().unwrap();
            assert!(batch.bad.is_empty(), "{:?}", batch.bad);
            samples += batch.samples.len();
            seen.extend(batch.samples.iter().map(|sample| sample.frame));
        }
        let rate = samples as f64 / window.elapsed().as_secs_f64();
        let cpu = cpu_time().saturating_sub(cpu).as_secs_f64() * 1e3 / samples as f64;
        let dup = samples - seen.len();
        write!(
            result,
            ", \"samples_per_s\": {rate:.1}, \"samples\": {samples}, \"dup\": {dup}, \
             \"cpu_ms_per_sample\": {cpu:.4}"
        )
        .unwrap();
    }
    println!("{result}}}");
}

/// Two JPEG frames of the corpus: what a sample takes of a window.
const FRAME_BYTES: u64 = 29_500;

fn open(url: &str) -> Result<Storage, pollen_storage::Error> {
    Storage::open(url, &StorageConfig::default(), Arc::new(Silent))
}

#[derive(Deserialize)]
struct Recipe {
    data: DataConfig,
}

/// By default pixels as stored, no augmentation: what other loaders do, too.
fn config(url: &str, decode_threads: usize, buffer: u64, pixels: &str) -> DataConfig {
    let (root, name) = url
        .trim_end_matches('/')
        .rsplit_once('/')
        .expect("the dataset's folder has a parent");
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/tokenizer.json");
    let window = buffer * FRAME_BYTES;
    let text = format!(
        "[data]\nroot = \"{root}\"\ncameras = [\"primary\", \"wrist\"]\n{pixels}\n\
         window_bytes = {window}\ncache_bytes = \"160MiB\"\nprefetch_batches = 3\n\
         decode_threads = {decode_threads}\ntokenizer = \"{}\"\n\
         [data.datasets.{name}]\nembodiment = \"arm\"\nrobot = \"robot\"\n\
         cameras.primary = \"observation.images.primary\"\n\
         cameras.wrist = \"observation.images.wrist\"\n",
        tokenizer.display()
    );
    let layered = Layered::from_text(&text, "benchmark").unwrap();
    layered.parse::<Recipe>().unwrap().data
}

fn space() -> ActionSpace {
    let dims: Vec<String> = (0..7)
        .map(|i| format!("{{ name = \"d{i}\", unit = \"m\", normalize = \"quantiles\" }}"))
        .collect();
    let text = format!(
        "version = 1\n[action_space]\nname = \"arm\"\nprompt = \"Delta End-Effector\"\nnum_arms = 1\n\
         proprio_dim = 0\ndims = [{}]",
        dims.join(", ")
    );
    ActionSpaceFile::parse(&text, "arm").unwrap()
}

fn write_frames(out: &mut impl Write, batch: &HostBatch) {
    let images = batch
        .images
        .chunks_exact(batch.images.len() / batch.samples.len());
    for (sample, images) in batch.samples.iter().zip(images) {
        out.write_all(&sample.frame.to_le_bytes()).unwrap();
        out.write_all(images).unwrap();
    }
}

/// What all threads of this process have used.
fn cpu_time() -> Duration {
    let usage = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(usage.tv_sec as u64, usage.tv_nsec as u32)
}

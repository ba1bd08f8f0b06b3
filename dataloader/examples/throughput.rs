//! Measures how many samples a second the loader makes of the demo datasets, read from memory.
//!
//! ```text
//! cargo run -p pollen-dataloader --example throughput [image size]
//! ```
#![allow(clippy::print_stdout, reason = "a program whose result is its output")]
#![allow(clippy::unwrap_used, reason = "an example: a failure ends it")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use pollen_core::{ActionSpaceFile, Layered, Seed};
use pollen_dataloader::{Data, DataConfig, Loader, LoaderArgs, ModelShape};
use pollen_storage::{Silent, Storage, StorageConfig};
use serde::Deserialize;

const BATCH: usize = 32;
const STEPS: usize = 64;

#[derive(Deserialize)]
struct Recipe {
    data: DataConfig,
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .flat_map(|path| {
            if path.is_dir() {
                files(&path)
            } else {
                vec![path]
            }
        })
        .collect()
}

fn main() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let image_size: usize = std::env::args()
        .nth(1)
        .map_or(96, |text| text.parse().unwrap());
    let text = format!(
        "[data]\nroot = \"memory:///demo\"\ncameras = [\"primary\", \"wrist\"]\n\
         image_size = {image_size}\nresize = \"bilinear_short_side\"\n\
         tokenizer = \"{}\"\naugment = {{ kind = \"random_shift\", pads = {{ primary = 4 }} }}\n",
        workspace.join("demo/tokenizer.json").display()
    );
    let recipe = std::env::temp_dir().join(format!("throughput-{}.toml", std::process::id()));
    std::fs::write(&recipe, format!("extends = [\"mixtures/demo\"]\n{text}")).unwrap();
    let layered = Layered::load(&recipe, &workspace.join("configs")).unwrap();
    std::fs::remove_file(&recipe).unwrap();
    let mut config = layered.parse::<Recipe>().unwrap().data;
    config.prefetch_batches = 4;
    let spaces = ["eef_delta", "bimanual_eef_delta"].map(|name| {
        let path = workspace.join(format!("configs/embodiments/{name}.toml"));
        ActionSpaceFile::parse(&std::fs::read_to_string(path).unwrap(), name).unwrap()
    });
    let shape = ModelShape {
        action_horizon: 10,
        action_width: 16,
        proprio_width: 0,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let open = |url: &str| Storage::open(url, &StorageConfig::default(), Arc::new(Silent));
    let storage = open(&config.root).unwrap();
    let folder = workspace.join("demo/data");
    for path in files(&folder) {
        let name = path.strip_prefix(&folder).unwrap().to_str().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        runtime.block_on(storage.put(name, bytes.into())).unwrap();
    }
    for threads in [1, 2] {
        config.decode_threads = threads;
        let start = Instant::now();
        let data = Data::open(&config, &spaces, shape, &open);
        let data = Arc::new(runtime.block_on(data).unwrap());
        let opened = start.elapsed();
        let args = LoaderArgs {
            mixture: Arc::new(data.mixture(Seed::new(0)).unwrap()),
            data,
            seed: Seed::new(0),
            rank: 0,
            world_size: 1,
            global_batch: BATCH,
            micro_batch: BATCH,
            first_sample: 0,
        };
        let start = Instant::now();
        let mut loader = Loader::start(args, runtime.handle()).unwrap();
        loader.next_micro_batch().unwrap();
        let first = start.elapsed();
        let start = Instant::now();
        for _ in 0..STEPS {
            loader.next_micro_batch().unwrap();
        }
        let rate = (STEPS * BATCH) as f64 / start.elapsed().as_secs_f64();
        println!(
            "{threads} decode threads, {image_size} px, 2 cameras: {rate:.0} samples/s \
             (open {opened:.1?}, first batch {first:.1?})"
        );
    }
    let order = {
        config.decode_threads = 1;
        let data = Data::open(&config, &spaces, shape, &open);
        let data = runtime.block_on(data).unwrap();
        data.mixture(Seed::new(0)).unwrap()
    };
    let start = Instant::now();
    let sum: u64 = (0..1_000_000).map(|index| order.sample(index).frame).sum();
    let rate = 1.0 / start.elapsed().as_secs_f64();
    println!("order: {rate:.1} million samples/s (checksum {sum})");
}

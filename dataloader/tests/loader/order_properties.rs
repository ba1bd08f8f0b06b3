//! Properties of the order of samples as gathered from real loaders, over datasets drawn at random.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use bytesize::ByteSize;
use pollen_core::Seed;
use pollen_dataloader::{Data, DataConfig, Loader, LoaderArgs, SampleRef};
use pollen_storage::Storage;
use proptest::prelude::*;
use tokio::runtime::Runtime;

use crate::support::{SHAPE, Spec, config, demo_jpegs, open, open_storage, runtime, spaces};

const SEED: u64 = 5;
/// What 1, 2, 3, 8 and 64 ranks can share out.
const BATCH: usize = 192;
/// Samples of a micro-batch, by world size.
const WORLDS: [(usize, usize); 5] = [(1, 32), (2, 32), (3, 16), (8, 8), (64, 3)];

/// One camera, windows of a sixth of the smallest dataset.
fn section(root: &Path, specs: &[Spec], weights: &[f64]) -> DataConfig {
    let mut config = config(root, specs);
    config.cameras.truncate(1);
    for (dataset, weight) in config.datasets.values_mut().zip(weights) {
        dataset.weight = *weight;
    }
    let bytes = |spec: &Spec| {
        let folder = root.join(spec.name).join("data/chunk-000");
        let files = std::fs::read_dir(folder).unwrap();
        files
            .map(|file| file.unwrap().metadata().unwrap().len())
            .sum()
    };
    let smallest: u64 = specs.iter().map(bytes).min().unwrap();
    config.window_bytes = ByteSize(smallest / 6);
    config.cache_bytes = ByteSize(smallest);
    config
}

fn start(
    runtime: &Runtime,
    data: &Arc<Data>,
    (rank, world_size): (usize, usize),
    (global_batch, micro_batch): (usize, usize),
) -> Loader {
    let seed = Seed::new(SEED);
    let args = LoaderArgs {
        mixture: Arc::new(data.mixture(seed).unwrap()),
        data: Arc::clone(data),
        seed,
        rank,
        world_size,
        global_batch,
        micro_batch,
        first_sample: 0,
    };
    Loader::start(args, runtime.handle()).unwrap()
}

/// What all ranks of a world are handed in `steps` steps, in the order of the samples' numbers.
fn gather(
    runtime: &Runtime,
    data: &Arc<Data>,
    world_size: usize,
    micro_batch: usize,
    steps: usize,
) -> Vec<SampleRef> {
    let mut all = BTreeMap::new();
    for rank in 0..world_size {
        let mut loader = start(runtime, data, (rank, world_size), (BATCH, micro_batch));
        for micro in 0..steps * loader.micro_batches_per_step() {
            let step = micro / loader.micro_batches_per_step();
            let batch = loader.next_micro_batch().unwrap();
            assert!(batch.bad.is_empty(), "{:?}", batch.bad);
            for (index, sample) in batch.sample_indices.into_iter().zip(batch.samples) {
                assert_eq!(index as usize / BATCH, step, "a sample of another step");
                assert!(
                    all.insert(index, sample).is_none(),
                    "sample {index} came twice"
                );
            }
        }
    }
    assert!(all.keys().copied().eq(0..(steps * BATCH) as u64));
    all.into_values().collect()
}

#[derive(Clone, Debug)]
struct Drawn {
    episodes: Vec<u64>,
    rows_per_group: usize,
    episodes_per_file: usize,
    weight: f64,
}

fn drawn() -> impl Strategy<Value = Drawn> {
    let episodes = prop::collection::vec(5_u64..20, 7..10);
    (episodes, 3_usize..7, 2_usize..5, 0.5_f64..2.0).prop_map(
        |(episodes, rows_per_group, episodes_per_file, weight)| Drawn {
            episodes,
            rows_per_group,
            episodes_per_file,
            weight,
        },
    )
}

proptest! {
    // Each case runs 78 loaders; what a dataset may look like is drawn more often in unit tests.
    #![proptest_config(ProptestConfig { cases: 6, max_shrink_iters: 20, ..ProptestConfig::default() })]

    #[test]
    fn worlds_share_out_the_same_epochs(all in prop::collection::vec(drawn(), 1..4)) {
        let dir = tempfile::tempdir().unwrap();
        let runtime = runtime();
        let jpegs = Arc::new(demo_jpegs());
        let specs: Vec<Spec> = all.iter().zip(["alpha", "beta", "gamma"]).map(|(drawn, name)| Spec {
            episodes: drawn.episodes.clone(),
            rows_per_group: drawn.rows_per_group,
            episodes_per_file: drawn.episodes_per_file,
            ..Spec::new(name, &jpegs)
        }).collect();
        for spec in &specs {
            spec.write(dir.path());
        }
        let weights: Vec<f64> = all.iter().map(|drawn| drawn.weight).collect();
        let data = open(&runtime, &section(dir.path(), &specs, &weights)).unwrap();
        let mixture = data.mixture(Seed::new(SEED)).unwrap();
        let shares = mixture.shares();
        // Until the slowest dataset has had an epoch.
        let frames = |d: usize| mixture.order(d).num_frames();
        let longest = (0..specs.len()).map(|d| frames(d) as f64 / shares[d]).fold(0.0, f64::max);
        let steps = (longest as usize).div_ceil(BATCH) + 1;
        for (d, dataset) in data.datasets().iter().enumerate() {
            prop_assert!(dataset.num_row_groups() >= 10);
            prop_assert!(mixture.order(d).num_windows(0) > 3);
        }
        let stream = gather(&runtime, &data, WORLDS[0].0, WORLDS[0].1, steps);
        for (world_size, micro_batch) in &WORLDS[1..] {
            let other = gather(&runtime, &data, *world_size, *micro_batch, steps);
            prop_assert_eq!(&other, &stream, "{} ranks", world_size);
        }
        for (d, spec) in specs.iter().enumerate() {
            let own: Vec<u64> = stream.iter().filter(|s| s.dataset == d as u32).map(|s| s.frame).collect();
            // All frames but those of the episode that is held out.
            let mut row = 0;
            let mut eligible = Vec::new();
            for (episode, &length) in spec.episodes.iter().enumerate() {
                eligible.extend((row..row + length).filter(|_| episode != 2));
                row += length;
            }
            prop_assert!(own.len() >= eligible.len());
            for epoch in own.chunks(eligible.len()) {
                let mut epoch = epoch.to_vec();
                epoch.sort_unstable();
                if epoch.len() == eligible.len() {
                    prop_assert_eq!(&epoch, &eligible, "dataset {}", d);
                } else {
                    epoch.dedup();
                    prop_assert_eq!(epoch.len(), own.len() % eligible.len(), "a frame twice");
                }
            }
        }
        // Shares are exact at the end of every block.
        let block = mixture.block_len() as usize;
        for end in (block..=stream.len()).step_by(block) {
            let mut counts = vec![0_u64; specs.len()];
            for sample in &stream[..end] {
                counts[sample.dataset as usize] += 1;
            }
            prop_assert_eq!(counts, mixture.counts_before_block((end / block) as u64));
        }
    }
}

/// Eight nodes read an epoch, each with a cache of its own that holds its part of two windows.
#[test]
fn eight_nodes_read_little_more_than_the_data() {
    const NODES: usize = 8;
    const GROUPS: usize = 512;
    const ROWS: usize = 8;
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let spec = Spec {
        // One is held out.
        episodes: vec![ROWS as u64; GROUPS + 1],
        rows_per_group: ROWS,
        episodes_per_file: 128,
        // So that the size of a row group to its entry in the footer is more like that of real ones.
        wrist_padding: 20_000,
        ..Spec::new("alpha", &Arc::new(demo_jpegs()))
    };
    spec.write(dir.path());
    let mut config = section(dir.path(), std::slice::from_ref(&spec), &[1.0]);
    let data = open(&runtime, &config).unwrap();
    let bytes: u64 = data.datasets()[0]
        .frames(false)
        .iter()
        .map(|group| group.bytes)
        .sum();
    // A window of a quarter of the data, 128 row groups; a step takes half of its frames.
    let window = GROUPS / 4 * ROWS;
    let batch = window / 2;
    config.window_bytes = ByteSize(bytes / 4 + bytes / GROUPS as u64);
    // And the footers of its four files.
    config.cache_bytes = ByteSize(2 * config.window_bytes.as_u64() / NODES as u64 + (4 << 20));
    config.prefetch_batches = 1;
    let mut read = 0;
    let mut seen = vec![0_u32; GROUPS + 1];
    for node in 0..NODES {
        let storage: Storage = open_storage(&config.root).unwrap();
        let shared = storage.clone();
        let spaces = spaces();
        let open = move |_: &str| Ok(shared.clone());
        let data = runtime
            .block_on(Data::open(&config, &spaces, SHAPE, &open))
            .unwrap();
        let before = storage.counters().bytes_read;
        let mut loader = start(&runtime, &Arc::new(data), (node, NODES), (batch, 8));
        // The loader runs ahead into the last step of the epoch; more would count the next one.
        for _ in 0..7 * loader.micro_batches_per_step() {
            for sample in loader.next_micro_batch().unwrap().samples {
                seen[sample.row_group as usize] += 1;
            }
        }
        drop(loader);
        read += storage.counters().bytes_read - before;
    }
    assert_eq!(seen.iter().filter(|&&n| n > 0).count(), GROUPS);
    let share = read as f64 / bytes as f64;
    assert!((1.0..=1.2).contains(&share), "{share:.3} times the data");
}

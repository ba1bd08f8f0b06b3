//! The committed demo datasets, opened through the committed parts of the demo recipe.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use crate::support::{open_storage, runtime, workspace};
use pollen_core::{ActionSpaceFile, Layered, Seed};
use pollen_dataloader::{Data, DataConfig, Loader, LoaderArgs, ModelShape, Summary};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Recipe {
    data: DataConfig,
}

/// The demo's mixture over a copy of the data, so that the index is not written to the checkout.
fn demo_config(dir: &Path) -> DataConfig {
    for entry in walk(&workspace().join("demo/data")) {
        let below = entry.strip_prefix(workspace().join("demo/data")).unwrap();
        let target = dir.join("data").join(below);
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::copy(&entry, target).unwrap();
    }
    let recipe = dir.join("recipe.toml");
    let text = format!(
        "extends = [\"mixtures/demo\"]\n[data]\nroot = \"{}\"\ncameras = [\"primary\", \"wrist\"]\n\
         image_size = 64\ntokenizer = \"{}\"\n",
        dir.join("data").display(),
        workspace().join("demo/tokenizer.json").display()
    );
    std::fs::write(&recipe, text).unwrap();
    let layered = Layered::load(&recipe, &workspace().join("configs")).unwrap();
    layered.parse::<Recipe>().unwrap().data
}

fn walk(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(walk(&path));
        } else if path.file_name().is_some_and(|name| name != "pollen.json") {
            files.push(path);
        }
    }
    files
}

#[test]
fn the_demo_loads() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let config = demo_config(dir.path());
    let spaces = ["eef_delta", "bimanual_eef_delta"].map(|name| {
        let path = workspace().join(format!("configs/embodiments/{name}.toml"));
        let text = std::fs::read_to_string(path).unwrap();
        ActionSpaceFile::parse(&text, name).unwrap()
    });
    let shape = ModelShape {
        action_horizon: 8,
        action_width: 16,
        proprio_width: 0,
    };
    let data = runtime
        .block_on(Data::open(&config, &spaces, shape, &open_storage))
        .unwrap();
    let data = Arc::new(data);
    let seed = Seed::new(0);
    let mixture = Arc::new(data.mixture(seed).unwrap());
    let summary = Summary::new(&data, &mixture);
    let figures: Vec<_> = summary
        .datasets
        .iter()
        .map(|d| (d.name.as_str(), d.episodes, d.row_groups, d.share))
        .collect();
    assert_eq!(
        figures,
        [("lift", 3, 8, 0.5), ("two_arm_handover", 7, 43, 0.5)]
    );
    assert!(summary.datasets.iter().all(|d| d.windows > 1));
    let all: u64 = data
        .datasets()
        .iter()
        .map(|d| d.sidecar().num_frames())
        .sum();
    assert_eq!(all, 692 + 1390);
    let held_out = data.holdout(1).len() as u64;
    assert_eq!(summary.frames + held_out, all);

    let args = LoaderArgs {
        data: Arc::clone(&data),
        mixture,
        seed,
        rank: 0,
        world_size: 1,
        global_batch: 16,
        micro_batch: 16,
        first_sample: 0,
    };
    let mut loader = Loader::start(args, runtime.handle()).unwrap();
    let mut frames = BTreeSet::new();
    let mut prompts = BTreeSet::new();
    for _ in 0..8 {
        let batch = loader.next_micro_batch().unwrap();
        assert!(batch.camera_present.iter().all(|&present| present));
        assert!(batch.actions.iter().all(|x| x.abs() <= 1.0));
        for image in batch.images.chunks_exact(3 * 64 * 64) {
            let (low, high) = (image.iter().min().unwrap(), image.iter().max().unwrap());
            assert!(high - low > 50, "a rendered frame has contrast");
        }
        for (i, sample) in batch.samples.iter().enumerate() {
            let width = [7, 14][sample.dataset as usize];
            assert_eq!(batch.spaces[i], sample.dataset);
            let valid = &batch.valid[i * 8 * 16..(i + 1) * 8 * 16];
            let expected = |entry: usize| u8::from(entry % 16 < width);
            assert!(
                valid
                    .iter()
                    .enumerate()
                    .all(|(entry, &v)| v == expected(entry))
            );
            frames.insert((sample.dataset, sample.frame));
            let ids = &batch.input_ids[i * 50..(i + 1) * 50];
            assert!(!ids.contains(&3), "no unknown token");
            prompts.insert(ids.to_vec());
        }
    }
    assert_eq!(frames.len(), 128, "no frame twice within an epoch");
    assert_eq!(prompts.len(), 2);
}

//! Every file of `configs/datasets` and `configs/mixtures`, through the real loader.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use pollen_core::{ActionSpace, ActionSpaceFile, Layered, Seed};
use pollen_dataloader::{
    Data, DataConfig, DatasetConfig, HoldoutLoader, Instruction, ModelShape, SampleRef,
};
use pollen_processing::Stored;
use serde::Deserialize;

use super::support::{Spec, config, demo_jpegs, open_storage, runtime, workspace};

/// A field whose width the file does not know is stored so wide.
const UNKNOWN_WIDTH: usize = 9;

#[derive(Deserialize)]
struct Part {
    data: Datasets,
}

#[derive(Deserialize)]
struct Datasets {
    datasets: BTreeMap<String, DatasetConfig>,
}

#[derive(Deserialize)]
struct Recipe {
    data: DataConfig,
}

fn files(folder: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(workspace().join("configs").join(folder)).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "toml")
    });
    files.retain(|path| !path.to_string_lossy().contains("demo"));
    files.sort();
    files
}

fn datasets() -> BTreeMap<String, DatasetConfig> {
    let configs = workspace().join("configs");
    let mut all = BTreeMap::new();
    for path in files("datasets") {
        let part: Part = Layered::load(&path, &configs).unwrap().parse().unwrap();
        let stem = path.file_stem().unwrap().to_str().unwrap();
        let (name, dataset) = part.data.datasets.into_iter().next().unwrap();
        assert_eq!(
            name, stem,
            "a file holds the dataset that it is named after"
        );
        all.insert(name, dataset);
    }
    all
}

fn spaces() -> Vec<ActionSpace> {
    let read = |name: &str| {
        let path = workspace().join(format!("configs/embodiments/{name}.toml"));
        ActionSpaceFile::parse(&std::fs::read_to_string(path).unwrap(), name).unwrap()
    };
    ["joint_single", "eef_delta", "bimanual_nav"]
        .map(read)
        .to_vec()
}

fn stored_width(fields: &[(String, usize)]) -> usize {
    let widths = fields.iter().map(|(_, width)| match width {
        0 => UNKNOWN_WIDTH,
        width => *width,
    });
    widths.sum()
}

#[test]
fn every_dataset_loads_a_fixture_with_the_fields_it_declares() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let jpegs = Arc::new(demo_jpegs());
    let mut config = config(dir.path(), &[]);
    config.cameras = ["primary", "secondary", "wrist"].map(String::from).to_vec();
    config.augment = pollen_dataloader::Augment::None;
    config.datasets = datasets();
    config
        .datasets
        .retain(|_, dataset| dataset.refused.is_empty());
    for (name, dataset) in &mut config.datasets {
        dataset.weight = 1.0;
        if dataset.instruction == Instruction::None {
            assert!(dataset.filters.unlabelled, "{name}: as in the reference");
            dataset.filters.unlabelled = false;
        }
        let place = if dataset.url.is_empty() {
            name
        } else {
            &dataset.url
        };
        let cameras: BTreeSet<String> = dataset.cameras.values().cloned().collect();
        let mut spec = Spec::new(place.clone().leak(), &jpegs);
        spec.cameras = cameras.into_iter().collect();
        spec.action_dim = stored_width(&dataset.source.action);
        spec.state_dim = stored_width(&dataset.source.state).max(1);
        spec.episodes = vec![25, 14];
        if !dir.path().join(place).exists() {
            spec.write(dir.path());
        }
    }
    assert!(config.datasets.len() > 60, "{}", config.datasets.len());
    let shape = ModelShape {
        action_horizon: 6,
        action_width: 16,
        proprio_width: 16,
    };
    let spaces = spaces();
    let data = Data::open(&config, &spaces, shape, &open_storage);
    let data = Arc::new(runtime.block_on(data).unwrap());
    assert_eq!(data.datasets().len(), config.datasets.len());
    let samples = data.datasets().iter().enumerate().map(|(d, dataset)| {
        let groups = dataset.frames(false);
        let run = groups[0].runs[0];
        let sample = SampleRef {
            dataset: d as u32,
            row_group: 0,
            episode: run.episode,
            frame: run.first_row,
        };
        (d as u64, sample)
    });
    let mut loader =
        HoldoutLoader::start(Arc::clone(&data), samples.collect(), 1, runtime.handle());
    for dataset in data.datasets() {
        let name = dataset.name();
        let batch = loader.next_batch().unwrap().unwrap();
        assert!(batch.bad.is_empty(), "{name}: {:?}", batch.bad);
        let space = dataset.action_space();
        for step in batch.actions.chunks(16) {
            for (dim, value) in space.dims.iter().zip(step) {
                assert!(value.is_finite(), "{name}: {}", dim.name);
                let scaled = dim.normalize == pollen_core::action_space::Normalize::Quantiles;
                assert!(
                    !scaled || value.abs() <= 1.0,
                    "{name}: {} = {value}",
                    dim.name
                );
            }
        }
        assert_eq!(batch.num_valid() as usize, 6 * space.dim(), "{name}");
        let roles = config.cameras.iter();
        let expected: Vec<bool> = roles
            .map(|r| dataset.config().cameras.contains_key(r))
            .collect();
        assert_eq!(batch.camera_present, expected, "{name}");
        let words = batch.text_mask.iter().filter(|&&mask| mask > 0).count();
        let wordless = dataset.config().instruction == Instruction::None;
        assert_eq!(words > 2, !wordless, "{name}: {words} tokens");
        let hz = dataset.config().hz as f32;
        assert_eq!(
            batch.frequency_hz[0],
            if hz > 0.0 { hz } else { 10.0 },
            "{name}"
        );
        assert!(
            batch.proprio.iter().all(|value| value.is_finite()),
            "{name}"
        );
    }
    let mixture = data.mixture(Seed::new(1)).unwrap();
    assert!(mixture.shares().iter().all(|&share| share > 0.0));
}

#[track_caller]
fn close(found: &[f32], expected: &[f32]) {
    let near = found
        .iter()
        .zip(expected)
        .all(|(a, b)| (a - b).abs() < 1e-6);
    assert!(
        near && found.len() == expected.len(),
        "{found:?} {expected:?}"
    );
}

/// A dataset's file against its line in the specification, on numbers worked by hand.
#[test]
fn actions_of_the_pretraining_datasets_by_hand() {
    let all = datasets();
    let action = |name: &str, action: &[&[f32]], state: &[&[f32]]| {
        let dataset = &all[name];
        assert_eq!(
            stored_width(&dataset.source.action),
            action[0].len(),
            "{name}"
        );
        let stored = Stored {
            action: &action.concat(),
            action_width: action[0].len(),
            state: &state.concat(),
            state_width: state.first().map_or(0, |row| row.len()),
        };
        dataset
            .transform
            .widths(stored.action_width, stored.state_width)
            .unwrap();
        dataset.transform.apply(stored).unwrap().action
    };
    let moved = action(
        "bridge_dataset",
        &[
            &[9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 0.5],
            &[9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 0.0],
        ],
        &[
            &[0.1, 0.2, 0.3, 0.0, 0.0, 3.0, 1.0],
            &[0.2, 0.2, 0.1, 0.5, 0.0, 3.1, 1.0],
        ],
    );
    close(&moved[..7], &[0.1, 0.0, -0.2, 0.5, 0.0, 0.1, 0.0]);
    let relative = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    let row = |last: f32| [&relative[..], &[last]].concat();
    let rt1 = action(
        "fractal20220817_data",
        &[&row(0.0), &row(1.0), &row(-1.0)],
        &[],
    );
    close(&rt1, &[row(1.0), row(0.0), row(1.0)].concat());
    let libero = action("libero_10_no_noops", &[&row(-1.0), &row(1.0)], &[]);
    close(&libero, &[row(1.0), row(0.0)].concat());
    let hydra = action("stanford_hydra", &[&row(0.25)], &[&[0.0; 27]]);
    close(&hydra, &row(0.75));
    close(&action("dobbe", &[&row(0.25)], &[&[0.0; 7]]), &row(0.25));
    let play: [f32; 9] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
    let play = action("cmu_play_fusion", &[&play], &[&[0.0; 8]]);
    close(&play, &[0.0, 1.0, 2.0, 5.0, 6.0, 7.0, 8.0]);
    let mut waypoints = [0.0; 70];
    for at in [0, 1, 2, 30, 31, 32] {
        waypoints[at] = at as f32;
    }
    waypoints[60] = 1.0;
    let waypoints = action("bc_z", &[&waypoints], &[&[0.0; 7]]);
    close(&waypoints, &[0.0, 1.0, 2.0, 30.0, 31.0, 32.0, 0.0]);
    let droid: Vec<f32> = (0..20).map(|i| i as f32).chain([0.97]).collect();
    let joints = action("droid", &[&droid], &[&[0.0; 14]]);
    close(&joints, &[6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 0.0]);
    let velocities = action("eef_droid", &[&droid], &[&[0.0; 14]]);
    close(&velocities, &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 0.03]);
    let joints = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7];
    let deltas = [&joints[..], &[1.0]].concat();
    let robo = action("robo_set", &[&deltas], &[&deltas]);
    close(&robo, &[0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 0.0]);
}

#[test]
fn every_mixture_names_datasets_that_exist_and_refuses_those_that_cannot_be_trained_on() {
    let configs = workspace().join("configs");
    let all = datasets();
    let mut refused = BTreeSet::new();
    let mut names = BTreeSet::new();
    for path in files("mixtures") {
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let mut layered = Layered::load(&path, &configs).unwrap();
        for text in [
            "data.root=s3://bucket/data",
            "data.cameras=[\"primary\", \"wrist\"]",
            "data.image_size=224",
            "data.tokenizer=configs/tokenizers/bart.json",
        ] {
            layered.set(text).unwrap();
        }
        let config = layered.parse::<Recipe>().unwrap().data;
        let expected = config
            .datasets
            .keys()
            .filter(|d| !all[*d].refused.is_empty());
        let expected: Vec<&String> = expected.collect();
        match config.validate() {
            Ok(()) => assert!(expected.is_empty(), "{name}"),
            // A mixture whose every dataset is refused or has no instruction.
            Err(error) => {
                let error = error.to_string();
                assert!(!expected.is_empty(), "{name}: {error}");
                for dataset in expected {
                    let part = format!("data.datasets.{dataset} cannot be trained on: ");
                    assert!(error.contains(&part), "{name}: {error}");
                    refused.insert(dataset.clone());
                }
            }
        }
        if name == "cross_x" {
            let weights: Vec<f64> = config.datasets.values().map(|d| d.weight).collect();
            let expected = [0.8, 4.2, 6.0, 2.0, 0.45, 2.2, 24.0, 16.0, 16.0, 3.0, 6.0];
            assert_eq!(weights, expected);
            assert_eq!(config.used().count(), 11);
        }
        names.insert(name);
    }
    assert_eq!(names.len(), 41);
    assert!(refused.contains("gnm_dataset") && refused.contains("maniskill"));
}

/// What the reference erases the instruction of, and then drops for want of one.
#[test]
fn wordless_datasets_take_no_part() {
    let mut all = datasets();
    all.retain(|_, dataset| dataset.instruction == Instruction::None);
    assert_eq!(all.len(), 9, "{:?}", all.keys());
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), &[Spec::new("alpha", &Arc::new(Vec::new()))]);
    config.datasets.extend(all);
    let used: Vec<&String> = config.used().map(|(name, _)| name).collect();
    assert_eq!(used, ["alpha"]);
}

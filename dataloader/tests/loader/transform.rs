//! Transforms, filters and chunk lengths through the real loader.

use std::path::Path;
use std::sync::Arc;

use pollen_core::ErrorClass;
use pollen_dataloader::{ChunkLength, Data, DataConfig, SampleRef};
use pollen_processing::{ActionStats, Transform};
use tokio::runtime::Runtime;

use super::support::{SHAPE, Spec, config, demo_jpegs, open, runtime};

/// Bridge's relabelling on two dimensions of the state, then stored actions, the gripper inverted.
const RELABEL: &str = r#"action = [
    { from = "state", dims = [0, 2], ops = [{ kind = "difference" }] },
    { from = "action", dims = [2, 6] },
    { from = "action", dims = [6], ops = [{ kind = "invert" }] },
]"#;

fn relabelled(root: &Path, spec: &Spec, text: &str) -> DataConfig {
    let mut config = config(root, std::slice::from_ref(spec));
    let section = config.datasets.get_mut(spec.name).unwrap();
    let table: toml::Table = text.parse().unwrap();
    section.transform = table.try_into::<Transform>().unwrap();
    config
}

fn spec() -> Spec {
    Spec::new("alpha", &Arc::new(demo_jpegs()))
}

/// Rows that samples of the training episodes start at.
fn starts(data: &Data) -> Vec<u64> {
    let groups = data.datasets()[0].frames(false);
    let runs = groups.iter().flat_map(|group| &group.runs);
    runs.flat_map(|run| run.first_row..run.first_row + run.rows)
        .collect()
}

fn sample(data: &Data, row: u64) -> SampleRef {
    let groups = data.datasets()[0].frames(false);
    let found = groups.iter().enumerate().find_map(|(g, group)| {
        let run = group
            .runs
            .iter()
            .find(|run| (run.first_row..run.first_row + run.rows).contains(&row))?;
        Some((g as u32, run.episode))
    });
    let (row_group, episode) = found.unwrap();
    SampleRef {
        dataset: 0,
        row_group,
        episode,
        frame: row,
    }
}

/// The chunk of a row as the loader makes it, normalisation undone.
fn chunk(runtime: &Runtime, data: &Arc<Data>, row: u64) -> (Vec<f32>, Vec<u8>) {
    use pollen_dataloader::HoldoutLoader;
    let samples = vec![(0, sample(data, row))];
    let mut loader = HoldoutLoader::start(Arc::clone(data), samples, 1, runtime.handle());
    let batch = loader.next_batch().unwrap().unwrap();
    assert!(batch.bad.is_empty(), "{:?}", batch.bad);
    let contract = data.contract();
    let normalizer = contract.datasets["alpha"].action_normalizer().unwrap();
    let mut actions = Vec::new();
    for step in batch.actions.chunks(SHAPE.action_width) {
        actions.extend_from_slice(&step[..7]);
    }
    normalizer.unnormalize(&mut actions);
    (actions, batch.valid)
}

#[test]
fn actions_are_transformed_before_statistics_and_chunks() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let spec = spec();
    spec.write(dir.path());
    let data = open(&runtime, &relabelled(dir.path(), &spec, RELABEL)).unwrap();
    // The last row of each episode has no action: 23, 31, (17 held out), 40, 29, 12, 35.
    let mut expected = Vec::new();
    let mut transformed = Vec::new();
    let mut first = 0;
    let state = |row: u64| [row as f32, (row % 7) as f32];
    let action = |row: u64| {
        let (now, next, stored) = (state(row), state(row + 1), spec.action(row));
        let mut action = vec![next[0] - now[0], next[1] - now[1]];
        action.extend(&stored[2..6]);
        action.push(1.0 - stored[6]);
        action
    };
    for (e, &length) in spec.episodes.iter().enumerate() {
        let steps = first..first + length - 1;
        transformed.extend(steps.clone().flat_map(action));
        if e != 2 {
            expected.extend(steps);
        }
        first += length;
    }
    assert_eq!(starts(&data), expected);
    let stats = ActionStats::of(&transformed, 7).unwrap();
    assert_eq!(data.datasets()[0].sidecar().action, stats);
    // A chunk over the end of episode 0: the last action repeats, not the row without one.
    let (chunk, _) = chunk(&runtime, &data, 20);
    for (step, found) in chunk.chunks(7).enumerate() {
        let wanted = action((20 + step as u64).min(21));
        for dim in 0..7 {
            let clipped = wanted[dim].clamp(stats.q01[dim], stats.q99[dim]);
            let wanted = if dim == 6 { wanted[6] } else { clipped };
            assert!((found[dim] - wanted).abs() < 1e-5, "{step} {dim}");
        }
    }
}

#[test]
fn every_third_frame_is_a_step() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let spec = spec();
    spec.write(dir.path());
    let mut config = relabelled(dir.path(), &spec, "every = 3");
    config.mask_padding = true;
    let data = open(&runtime, &config).unwrap();
    let starts = starts(&data);
    assert_eq!(starts[..9], [0, 3, 6, 9, 12, 15, 18, 21, 23]);
    let (chunk, valid) = chunk(&runtime, &data, 15);
    let last = spec.action(21);
    assert_eq!(
        chunk[3 * 7 + 6],
        last[6],
        "15, 18, 21, then the last repeats"
    );
    assert_eq!(chunk[7 + 6], spec.action(18)[6]);
    assert_eq!(valid[..7], [1; 7]);
    let counted: u64 = valid.iter().map(|&v| u64::from(v)).sum();
    assert_eq!(counted, 3 * 7);
    assert_eq!(counted, data.valid_entries(sample(&data, 15)));
}

#[test]
fn a_dataset_may_count_fewer_steps_than_the_model_predicts() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let spec = spec();
    spec.write(dir.path());
    let mut config = config(dir.path(), std::slice::from_ref(&spec));
    config.datasets.get_mut("alpha").unwrap().chunk_length = 2;
    let data = open(&runtime, &config).unwrap();
    assert_eq!(data.valid_entries(sample(&data, 0)), 6 * 7);
    config.chunk_length = ChunkLength::Dataset;
    let data = open(&runtime, &config).unwrap();
    let (_, valid) = chunk(&runtime, &data, 0);
    assert_eq!(valid.iter().map(|&v| u64::from(v)).sum::<u64>(), 2 * 7);
    assert_eq!(data.valid_entries(sample(&data, 0)), 2 * 7);
}

#[test]
fn filters_leave_out_frames_and_name_them_in_the_sidecar() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let mut spec = spec();
    spec.task = " ";
    spec.write(dir.path());
    let mut config = config(dir.path(), std::slice::from_ref(&spec));
    let all = open(&runtime, &config).unwrap();
    let filters = &mut config.datasets.get_mut("alpha").unwrap().filters;
    filters.idle_below = 0.5;
    let moving = open(&runtime, &config).unwrap();
    // No row of the fixture keeps all seven dimensions below a half.
    assert_eq!(starts(&moving), starts(&all));
    config.datasets.get_mut("alpha").unwrap().filters.unlabelled = true;
    let none = open(&runtime, &config).unwrap();
    assert!(starts(&none).is_empty());
    // One run for each file.
    let left_out = &none.datasets()[0].sidecar().left_out;
    assert_eq!(*left_out, [(0, 71), (71, 81), (152, 35)]);
    assert_ne!(none.hashes(), all.hashes());
}

/// Two datasets of a recipe may read one store with different transforms.
#[test]
fn statistics_of_a_second_transform_are_kept_and_checked() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let spec = spec();
    spec.write(dir.path());
    open(&runtime, &config(dir.path(), std::slice::from_ref(&spec))).unwrap();
    let relabelled = relabelled(dir.path(), &spec, RELABEL);
    let first = open(&runtime, &relabelled).unwrap();
    let meta = dir.path().join("alpha/meta");
    let kept = std::fs::read_dir(&meta).unwrap().find_map(|entry| {
        let path = entry.unwrap().path();
        path.file_name()?
            .to_str()?
            .starts_with("pollen-")
            .then_some(path)
    });
    let kept = kept.expect("statistics beside the index");
    let text = std::fs::read_to_string(&kept).unwrap();
    let again = open(&runtime, &relabelled).unwrap();
    assert_eq!(first.datasets()[0].sidecar(), again.datasets()[0].sidecar());
    let hash = first.datasets()[0].sidecar().dataset_hash.clone();
    for (from, to, reason) in [
        (hash, "0".repeat(64), "other data"),
        (
            r#""dims":[0,2]"#.into(),
            r#""dims":[1,3]"#.into(),
            "another transform",
        ),
        (
            r#""version":1"#.into(),
            r#""version":7"#.into(),
            "version 7",
        ),
    ] {
        assert!(text.contains(&from), "{from}");
        std::fs::write(&kept, text.replacen(&from, &to, 1)).unwrap();
        let error = open(&runtime, &relabelled).unwrap_err();
        assert_eq!(error.class(), ErrorClass::User);
        let error = error.to_string();
        assert!(
            error.contains(reason) && error.contains("delete the file"),
            "{error}"
        );
    }
    // The index itself says with what it was made, and is held to it.
    let index = meta.join("pollen.json");
    let text = std::fs::read_to_string(&index).unwrap();
    let other = text.replacen("observation.state", "observation.stats", 1);
    std::fs::write(&index, other).unwrap();
    let error = open(&runtime, &relabelled).unwrap_err().to_string();
    assert!(error.contains("does not have the hash"), "{error}");
}

#[test]
fn a_transform_that_does_not_fit_is_refused_before_any_data_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let spec = spec();
    spec.write(dir.path());
    let fault = |text: &str| {
        let error = open(&runtime, &relabelled(dir.path(), &spec, text)).unwrap_err();
        assert_eq!(error.class(), ErrorClass::User);
        error.to_string()
    };
    let text = fault(r#"action = [{ from = "action", dims = [0, 6] }]"#);
    assert!(
        text.contains("transform.action makes 6 dimensions"),
        "{text}"
    );
    let text = fault(r#"action = [{ from = "state", dims = [0, 9] }]"#);
    assert!(
        text.contains("alpha.transform.action[0]: of the state"),
        "{text}"
    );
    let text = fault(r#"state = [{ from = "state", dims = [0, 2] }]"#);
    assert!(text.contains("does not have the 3 dimensions"), "{text}");
}

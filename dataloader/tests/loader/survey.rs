//! A look at a dataset by its columns alone.

use std::sync::Arc;

use pollen_dataloader::{ColumnTransform, Dimension, DimensionCheck, Survey, index_dataset};
use pollen_processing::ActionStats;

use super::support::{PRIMARY, Spec, config, demo_jpegs, open, open_storage, runtime, spaces};

fn spec() -> Spec {
    Spec::new("alpha", &Arc::new(demo_jpegs()))
}

fn as_stored() -> ColumnTransform {
    ColumnTransform::columns("action", "observation.state")
}

/// Statistics of the dataset, and the bytes that they cost.
fn take(
    root: &std::path::Path,
    transform: &ColumnTransform,
) -> (
    pollen_dataloader::Result<pollen_dataloader::Statistics>,
    u64,
) {
    let runtime = runtime();
    let storage = open_storage(&format!("file://{}/alpha", root.display())).unwrap();
    let index_dir = root.join("index");
    let survey = Survey::open(storage.clone(), "alpha", &index_dir);
    let survey = runtime.block_on(survey).unwrap();
    let before = storage.counters().bytes_read;
    let statistics = runtime.block_on(survey.statistics(transform));
    (statistics, storage.counters().bytes_read - before)
}

#[test]
fn statistics_read_no_image_and_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = spec();
    // Images far larger than the footers and columns.
    spec.wrist_padding = 60_000;
    spec.write(dir.path());
    let images = spec.num_frames() * spec.wrist_padding as u64;
    let (taken, bytes) = take(dir.path(), &as_stored());
    let taken = taken.unwrap();
    assert!(bytes * 10 < images, "{bytes} bytes of {images} were read");
    let actions: Vec<f32> = (0..spec.num_frames())
        .flat_map(|row| spec.action(row))
        .collect();
    assert_eq!(taken.action, ActionStats::of(&actions, 7).unwrap());
    assert_eq!(taken.proprio.as_ref().unwrap().dim(), 3);
    assert!(!dir.path().join("alpha/meta/pollen.json").exists());
    let (again, kept_bytes) = take(dir.path(), &as_stored());
    assert_eq!(again.unwrap(), taken);
    assert!(kept_bytes < bytes, "{kept_bytes} bytes for what is kept");
}

#[test]
fn statistics_are_those_of_the_loader() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec();
    spec.write(dir.path());
    let taken = take(dir.path(), &as_stored()).0.unwrap();
    let config = config(dir.path(), &[spec]);
    let data = open(&runtime(), &config).unwrap();
    let sidecar = data.datasets()[0].sidecar();
    assert_eq!(
        (&taken.action, &taken.proprio),
        (&sidecar.action, &sidecar.proprio)
    );
    // With an index, its statistics are taken and no data file is opened.
    let (indexed, bytes) = take(dir.path(), &as_stored());
    assert_eq!(indexed.unwrap().action, taken.action);
    let index = std::fs::metadata(dir.path().join("alpha/meta/pollen.json")).unwrap();
    assert_eq!(bytes, index.len());
}

#[test]
fn kept_statistics_of_other_contents_are_refused_and_of_other_data_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = spec();
    spec.write(dir.path());
    let first = take(dir.path(), &as_stored()).0.unwrap();
    let kept = || {
        let meta = std::fs::read_dir(dir.path().join("alpha/meta")).unwrap();
        let found = meta.map(|entry| entry.unwrap().path()).find(|path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            name.starts_with("pollen-columns-")
        });
        found.unwrap()
    };
    let text = std::fs::read_to_string(kept()).unwrap();
    let other = text.replacen(&first.dataset_hash, &"0".repeat(64), 1);
    assert_ne!(other, text);
    std::fs::write(kept(), other).unwrap();
    let error = take(dir.path(), &as_stored()).0.unwrap_err().to_string();
    assert!(
        error.contains("alpha") && error.contains("it was made of other data"),
        "{error}"
    );
    // New data has another hash: what was kept is not found, new statistics are taken.
    spec.episodes.push(50);
    spec.write(dir.path());
    let new = take(dir.path(), &as_stored()).0.unwrap();
    assert_eq!(new.action.count, spec.num_frames());
    assert_ne!(new.dataset_hash, first.dataset_hash);
}

#[test]
fn a_second_pass_finds_what_statistics_do_not_tell() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let mut spec = spec();
    spec.nan_action = Some(23 + 4);
    spec.write(dir.path());
    let storage = open_storage(&format!("file://{}/alpha", dir.path().display())).unwrap();
    let survey = Survey::open(storage, "alpha", dir.path());
    let survey = runtime.block_on(survey).unwrap();
    let space = &spaces()[1];
    let section = spec.config();
    let transform = survey.transform(&section, space).unwrap();
    let statistics = runtime.block_on(survey.statistics(&transform)).unwrap();
    let dims = Dimension::of_space(space);
    let mut check = DimensionCheck::new("action", &statistics.action, &dims);
    let visit = survey.visit(&transform, |columns| {
        let columns = survey.transformed(&transform, columns).unwrap();
        check.push(&columns, &columns.action);
    });
    runtime.block_on(visit).unwrap();
    let found = check.finish();
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(
        (found[0].check, &*found[0].subject),
        ("not_finite", "action 0 `d0`")
    );
    assert!(found[0].evidence.contains("1 frames"), "{found:?}");
    assert!(
        found[0].evidence.contains("frame 4 of episode 1"),
        "{found:?}"
    );
    // A section that does not fit the dataset is refused.
    let mut other = section;
    other
        .cameras
        .insert("primary".into(), "observation.images.front".into());
    let error = survey.transform(&other, space).unwrap_err().to_string();
    assert!(
        error.contains("front") && error.contains(PRIMARY),
        "{error}"
    );
}

#[test]
fn an_index_with_another_transform_keeps_its_statistics_apart() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let spec = spec();
    spec.write(dir.path());
    let storage = open_storage(&format!("file://{}/alpha", dir.path().display())).unwrap();
    let sidecar = runtime
        .block_on(index_dataset(&storage, "alpha", &as_stored()))
        .unwrap();
    std::fs::write(dir.path().join("alpha/meta/pollen.json"), sidecar.to_json()).unwrap();
    let stateless = ColumnTransform::columns("action", "");
    let (statistics, _) = take(dir.path(), &stateless);
    let statistics = statistics.unwrap();
    assert_eq!(statistics.dataset_hash, sidecar.dataset_hash);
    assert_eq!(
        (statistics.proprio, statistics.action),
        (None, sidecar.action)
    );
}

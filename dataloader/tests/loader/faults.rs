//! Broken data: each fault is named with its place and has a class.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::support::{GLOBAL_BATCH, Spec, config, demo_jpegs, loader, open, runtime};
use pollen_core::ErrorClass;
use pollen_dataloader::{BadSample, Data, Error, SIDECAR_PATH};
use tokio::runtime::Runtime;

fn spec() -> Spec {
    Spec::new("alpha", &Arc::new(demo_jpegs()))
}

fn opened(dir: &Path, spec: &Spec, runtime: &Runtime) -> pollen_dataloader::Result<Arc<Data>> {
    open(runtime, &config(dir, std::slice::from_ref(spec)))
}

/// Loads an epoch; returns the samples in quarantine and the number of micro-batches that came.
fn epoch(runtime: &Runtime, data: &Arc<Data>, spec: &Spec) -> (Vec<BadSample>, usize) {
    let mut loader = loader(runtime, data, (0, 1), 0);
    let steps = (spec.num_frames() as usize).div_ceil(GLOBAL_BATCH);
    let mut bad = Vec::new();
    let batches = steps * loader.micro_batches_per_step();
    for _ in 0..batches {
        let batch = loader.next_micro_batch().unwrap();
        let entries = batch.actions.len() / batch.samples.len();
        for sample in &batch.bad {
            let slot = sample.slot * entries..(sample.slot + 1) * entries;
            assert!(batch.valid[slot.clone()].iter().all(|&valid| valid == 0));
            assert!(batch.actions[slot].iter().all(|&action| action == 0.0));
            assert_eq!(sample.frame, batch.samples[sample.slot].frame);
        }
        let expected = batch
            .samples
            .iter()
            .map(|&sample| data.valid_entries(sample));
        let in_quarantine: u64 = batch.bad.iter().map(|sample| sample.entries).sum();
        assert_eq!(batch.num_valid() + in_quarantine, expected.sum::<u64>());
        bad.extend(batch.bad);
    }
    (bad, batches)
}

fn assert_bad(samples: &[BadSample], parts: &[&str]) {
    assert!(!samples.is_empty(), "nothing is in quarantine");
    for sample in samples {
        assert_eq!(sample.dataset, "alpha");
        for part in parts {
            assert!(sample.reason.contains(part), "{sample:?} lacks {part}");
        }
    }
}

fn data_file(dir: &Path, file: usize) -> PathBuf {
    dir.join(format!("alpha/data/chunk-000/file-{file:03}.parquet"))
}

fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).unwrap();
    change(&mut bytes);
    std::fs::write(path, bytes).unwrap();
}

fn assert_corrupt(errors: &[Error], parts: &[&str]) {
    assert!(!errors.is_empty(), "no error");
    for error in errors {
        let text = error.to_string();
        assert_eq!(error.class(), ErrorClass::Corrupt, "{text}");
        for part in parts {
            assert!(text.contains(part), "{text} lacks {part}");
        }
    }
}

#[test]
fn broken_images_are_named() {
    let mut short = demo_jpegs()[3].clone();
    short.truncate(short.len() / 2);
    let wrong_size = {
        // Height 96 -> 95 in the frame header (marker, length, precision, height).
        let mut jpeg = demo_jpegs()[3].clone();
        let at = jpeg
            .windows(2)
            .position(|pair| pair == [0xff, 0xc0])
            .unwrap();
        jpeg[at + 6] -= 1;
        jpeg
    };
    for (jpeg, reason) in [
        (short, "cannot be decoded"),
        (Vec::new(), "is empty"),
        (b"\x89PNG\r\n\x1a\n".to_vec(), "pollen data convert"),
        (wrong_size, "95 x 96, info.json says 96 x 96"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let runtime = runtime();
        let spec = Spec {
            bad_image: Some((30, jpeg)),
            ..spec()
        };
        spec.write(dir.path());
        let data = opened(dir.path(), &spec, &runtime).unwrap();
        let (bad, batches) = epoch(&runtime, &data, &spec);
        assert_eq!(bad.len(), 1, "{bad:?}");
        assert!(batches > 30);
        assert_eq!((bad[0].episode, bad[0].frame), (1, 30));
        assert_bad(&bad, &["camera `primary`", reason]);
    }
}

#[test]
fn an_action_that_is_no_number_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let spec = Spec {
        nan_action: Some(30),
        ..spec()
    };
    spec.write(dir.path());
    let data = opened(dir.path(), &spec, &runtime).unwrap();
    let stats = &data.datasets()[0].sidecar().action;
    assert_eq!(stats.count, spec.num_frames() - 1);
    let (bad, _) = epoch(&runtime, &data, &spec);
    assert!(bad.iter().all(|sample| sample.episode == 1), "{bad:?}");
    assert_bad(&bad, &["NaN in dimension 0"]);
}

#[test]
fn a_flipped_byte_is_found_by_the_checksum() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let spec = spec();
    spec.write(dir.path());
    opened(dir.path(), &spec, &runtime).unwrap();
    edit(&data_file(dir.path(), 1), |bytes| bytes[1000] ^= 1);
    let data = opened(dir.path(), &spec, &runtime).unwrap();
    let (bad, _) = epoch(&runtime, &data, &spec);
    assert!((bad.len() as u64) < spec.num_frames() / 2, "one row group");
    assert_bad(&bad, &["file-001.parquet: row group 0: crc32c is"]);
}

#[test]
fn a_truncated_file_is_named_before_and_after_indexing() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let spec = spec();
    spec.write(dir.path());
    let path = data_file(dir.path(), 1);
    let whole = std::fs::read(&path).unwrap();
    edit(&path, |bytes| bytes.truncate(5000));
    let error = opened(dir.path(), &spec, &runtime).unwrap_err();
    assert_corrupt(&[error], &["alpha", "file-001.parquet", "truncated"]);
    std::fs::write(&path, &whole).unwrap();
    let data = opened(dir.path(), &spec, &runtime).unwrap();
    // Truncated while it is being read ...
    edit(&path, |bytes| bytes.truncate(5000));
    let (bad, _) = epoch(&runtime, &data, &spec);
    assert_bad(&bad, &["file-001.parquet"]);
    // ... and at the next start.
    let error = opened(dir.path(), &spec, &runtime).unwrap_err();
    assert_corrupt(
        &[error],
        &["alpha", "changed since it was indexed", "5000 bytes"],
    );
}

#[test]
fn a_missing_object_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let spec = spec();
    spec.write(dir.path());
    let data = opened(dir.path(), &spec, &runtime).unwrap();
    std::fs::remove_file(data_file(dir.path(), 2)).unwrap();
    let (bad, _) = epoch(&runtime, &data, &spec);
    assert_bad(&bad, &["file-002.parquet: the object is missing"]);
    let error = opened(dir.path(), &spec, &runtime).unwrap_err();
    assert_corrupt(&[error], &["changed since it was indexed", "is missing"]);
    let error = opened(Path::new("/nowhere"), &spec, &runtime).unwrap_err();
    assert!(error.to_string().contains("meta/info.json"), "{error}");
}

#[test]
fn rows_that_contradict_the_episodes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let spec = spec();
    spec.write(dir.path());
    let mut other = spec.clone();
    other.episodes[1] -= 1;
    let elsewhere = tempfile::tempdir().unwrap();
    other.write(elsewhere.path());
    let episodes = "alpha/meta/episodes/chunk-000/file-000.parquet";
    std::fs::copy(elsewhere.path().join(episodes), dir.path().join(episodes)).unwrap();
    let error = opened(dir.path(), &spec, &runtime).unwrap_err();
    assert_corrupt(&[error], &["file-000.parquet", "meta/episodes says"]);
}

#[test]
fn wrong_recipes_are_explained() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let spec = spec();
    spec.write(dir.path());
    let fault = |change: &dyn Fn(&mut pollen_dataloader::DataConfig)| {
        let mut config = config(dir.path(), std::slice::from_ref(&spec));
        change(&mut config);
        let error = open(&runtime, &config).unwrap_err();
        assert_eq!(error.class(), ErrorClass::User, "{error}");
        error.to_string()
    };
    let dataset = "alpha".to_owned();
    let text = fault(&|config| {
        let section = config.datasets.get_mut(&dataset).unwrap();
        section.action = "actions".into();
        section.cameras.insert("wrist".into(), "left".into());
    });
    assert!(text.contains("alpha.action = \"actions\""), "{text}");
    assert!(text.contains("alpha.cameras.wrist = \"left\""), "{text}");
    let text = fault(&|config| {
        config.datasets.get_mut(&dataset).unwrap().embodiment = "two".into();
    });
    assert!(
        text.contains("7 dimensions, the action space `two` has 14"),
        "{text}"
    );
    let text = fault(&|config| {
        config.datasets.get_mut(&dataset).unwrap().embodiment = "three".into();
    });
    assert!(text.contains("[\"two\", \"one\"]"), "{text}");
    let text = fault(&|config| {
        config.datasets.get_mut(&dataset).unwrap().holdout_episodes = [70].into();
    });
    assert!(text.contains("episode 70"), "{text}");
    let text = fault(&|config| config.tokenizer = "nowhere.json".into());
    assert!(text.contains("nowhere.json"), "{text}");
}

#[test]
fn the_sidecar_is_kept_beside_the_data_or_else_in_the_index_folder() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let spec = spec();
    spec.write(dir.path());
    let first = opened(dir.path(), &spec, &runtime).unwrap();
    let beside = dir.path().join("alpha").join(SIDECAR_PATH);
    let text = std::fs::read(&beside).unwrap();
    let again = opened(dir.path(), &spec, &runtime).unwrap();
    assert_eq!(first.datasets()[0].sidecar(), again.datasets()[0].sidecar());
    assert_eq!(first.hashes(), again.hashes());
    // A folder in the sidecar's place: the put fails, and the index goes to `index_dir`.
    std::fs::remove_file(&beside).unwrap();
    std::fs::create_dir_all(beside.join("full")).unwrap();
    let local = opened(dir.path(), &spec, &runtime).unwrap();
    assert_eq!(first.hashes(), local.hashes());
    let kept: Vec<PathBuf> = std::fs::read_dir(dir.path().join("index"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(kept.len(), 1);
    assert_eq!(std::fs::read(&kept[0]).unwrap(), text);
    // It is used, not made again: a change in it shows.
    let other = String::from_utf8(text)
        .unwrap()
        .replacen("\"fps\":10", "\"fps\":11", 1);
    std::fs::write(&kept[0], other).unwrap();
    let local = opened(dir.path(), &spec, &runtime).unwrap();
    assert_eq!(local.datasets()[0].sidecar().fps, 11.0);
}

#[test]
fn loaders_stop_when_they_are_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let spec = spec();
    spec.write(dir.path());
    let data = opened(dir.path(), &spec, &runtime).unwrap();
    for taken in [0, 1, 5] {
        let mut loader = loader(&runtime, &data, (0, 1), 0);
        for _ in 0..taken {
            loader.next_micro_batch().unwrap();
        }
        drop(loader);
    }
    drop(runtime);
    // Every task and thread has let go of the data.
    assert_eq!(Arc::strong_count(&data), 1);
}

#[test]
fn a_runtime_that_ends_early_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let spec = spec();
    spec.write(dir.path());
    let data = opened(dir.path(), &spec, &runtime).unwrap();
    let mut loader = loader(&runtime, &data, (0, 1), 0);
    drop(runtime);
    let error = loop {
        match loader.next_micro_batch() {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.class(), ErrorClass::Fatal, "{error}");
}

/// A full loader that nobody empties must not hold up others who need the same data: the trainer
/// reads the mean chunks, and evaluates, beside a loader that has run ahead.
#[test]
fn a_full_loader_blocks_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec();
    spec.write(dir.path());
    let (done, finished) = std::sync::mpsc::channel();
    let root = dir.path().to_owned();
    std::thread::spawn(move || {
        let runtime = runtime();
        for round in 0..20 {
            let data = opened(&root, &spec, &runtime).unwrap();
            let mixture = data.mixture(pollen_core::Seed::new(round)).unwrap();
            let mut loader = loader(&runtime, &data, (0, 1), round);
            let means = runtime.block_on(data.mean_chunks(&mixture)).unwrap();
            let held_out = data.holdout(1);
            let batches =
                pollen_dataloader::HoldoutLoader::start(data, held_out, 4, runtime.handle());
            assert!(batches.map(Result::unwrap).count() > 0 && !means.is_empty());
            loader.next_micro_batch().unwrap();
        }
        done.send(()).unwrap();
    });
    // Takes about a second; a loader that blocks others hangs for ever.
    finished
        .recv_timeout(std::time::Duration::from_mins(2))
        .expect("somebody waits for ever");
}

#[test]
fn a_broken_row_group_is_not_fetched_for_each_of_its_samples() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let spec = Spec {
        rows_per_group: 100,
        ..spec()
    };
    spec.write(dir.path());
    let mut config = config(dir.path(), std::slice::from_ref(&spec));
    // No room beside one micro-batch's row groups: whoever needs one again must fetch it again.
    config.cache_bytes = bytesize::ByteSize::b(8);
    let read_by_an_epoch = || {
        let first = std::sync::Mutex::new(None);
        let open = |url: &str| {
            let storage = crate::support::open_storage(url)?;
            first.lock().unwrap().get_or_insert(storage.clone());
            Ok(storage)
        };
        let spaces = crate::support::spaces();
        let data = Data::open(&config, &spaces, crate::support::SHAPE, &open);
        let data = Arc::new(runtime.block_on(data).unwrap());
        let storage = first.lock().unwrap().clone().unwrap();
        let before = storage.counters().bytes_read;
        let (bad, _) = epoch(&runtime, &data, &spec);
        let group = data.datasets()[0].sidecar().files[0].row_groups[0].clone();
        (bad, storage.counters().bytes_read - before, group)
    };
    let (none, healthy, group) = read_by_an_epoch();
    assert!(none.is_empty() && group.rows == 71, "{group:?}");
    edit(&data_file(dir.path(), 0), |bytes| bytes[3000] ^= 1);
    let (bad, broken, _) = read_by_an_epoch();
    assert!(
        bad.len() >= 40,
        "{} samples of {} rows",
        bad.len(),
        group.rows
    );
    assert_bad(&bad, &["crc32c"]);
    // At most four samples a micro-batch: at least ten of them needed the group, and each fetched it
    // while it was whole; broken, it is fetched for the 1st, 2nd, 4th and 8th.
    let saved = healthy - broken;
    assert!(
        saved >= 5 * group.bytes,
        "{saved} bytes of {healthy}, {group:?}"
    );
}

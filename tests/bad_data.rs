//! Data that went bad in the store: named, left out of the loss, and counted against a cap.

#![allow(clippy::unwrap_used, reason = "tests")]

mod lab;

use std::path::{Path, PathBuf};

use lab::{Lab, root};
use pollen_observe::Event;

fn bad_samples(events: &[pollen_observe::Record]) -> Vec<(String, u64, u64)> {
    let named = events.iter().filter_map(|record| match &record.event {
        Event::BadSample {
            dataset,
            episode,
            frame,
            reason,
        } => {
            assert!(reason.contains("crc32c"), "{reason}");
            Some((dataset.clone(), *episode, *frame))
        }
        _ => None,
    });
    named.collect()
}

#[test]
fn a_corrupt_row_group_is_left_out_until_the_cap() {
    let lab = Lab::folder();
    // Uploads the data and their index.
    lab.launch("first", 1)
        .set(&["train.steps=1"])
        .run()
        .expect(0);
    let data = lab.path("bucket/datasets/lift/data/chunk-000/file-000.parquet");
    let mut bytes = std::fs::read(&data).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&data, bytes).unwrap();

    let mut seen = Vec::new();
    for (name, workers) in [("one", 1), ("two", 2)] {
        let run = lab
            .launch(name, workers)
            .set(&["train.steps=12"])
            .run()
            .expect(0);
        let mut bad = bad_samples(&run.events());
        bad.sort_unstable();
        assert!(!bad.is_empty() && bad.len() < 12 * 8, "{bad:?}");
        seen.push(bad);
    }
    assert_eq!(
        seen[0], seen[1],
        "the same samples for any number of workers"
    );

    let capped = lab
        .launch("capped", 2)
        .set(&["train.steps=12", "data.max_bad_samples=0"])
        .run()
        .expect(93);
    let said = capped.stderr + &capped.stdout;
    assert!(said.contains("data.max_bad_samples = 0"), "{said}");
}

/// A copy of the demo's data, to be damaged before anything has read them; returns the key that has
/// it uploaded and the data file of `lift`.
fn source(lab: &Lab) -> (String, PathBuf) {
    fn copy(from: &Path, to: &Path) {
        std::fs::create_dir_all(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            let to = to.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                copy(&entry.path(), &to);
            } else {
                std::fs::copy(entry.path(), to).unwrap();
            }
        }
    }
    let folder = lab.path("source");
    copy(&root().join("demo/data"), &folder);
    let key = format!("run.stage_from={}", folder.display());
    (key, folder.join("lift/data/chunk-000/file-000.parquet"))
}

/// A file that was cut off, as an upload that broke leaves it.
#[test]
fn a_truncated_file_is_named_and_ends_the_run_for_good() {
    let lab = Lab::folder();
    let (key, file) = source(&lab);
    let length = std::fs::metadata(&file).unwrap().len();
    let open = std::fs::File::options().write(true).open(&file).unwrap();
    open.set_len(length / 2).unwrap();
    let run = lab.launch("cut", 1).set(&[&key]).run().expect(93);
    let line = "dataset `lift`: data/chunk-000/file-000.parquet: does not end like a Parquet file";
    assert!(run.stderr.contains(line), "{}", run.stderr);
}

/// A picture that is no JPEG any more, in a Parquet file that is whole.
#[test]
fn a_corrupt_picture_is_left_out_and_named() {
    let lab = Lab::folder();
    let (key, file) = source(&lab);
    let mut bytes = std::fs::read(&file).unwrap();
    // Start of image, then its first segment.
    let starts: Vec<usize> = (0..bytes.len() - 3)
        .filter(|&at| bytes[at..at + 3] == [0xff, 0xd8, 0xff])
        .collect();
    assert!(
        starts.len() > 100,
        "JPEGs are stored as they are: {starts:?}"
    );
    for &at in starts.iter().step_by(2) {
        bytes[at..at + 3].fill(0);
    }
    std::fs::write(&file, bytes).unwrap();
    let run = lab.launch("spoilt", 1).set(&[&key]).run().expect(0);
    let reasons: Vec<String> = run
        .events()
        .into_iter()
        .filter_map(|record| match record.event {
            Event::BadSample {
                dataset, reason, ..
            } => {
                assert_eq!(dataset, "lift");
                Some(reason)
            }
            _ => None,
        })
        .collect();
    assert!(!reasons.is_empty());
    assert!(
        reasons
            .iter()
            .all(|reason| reason.to_lowercase().contains("jpeg")),
        "{reasons:?}"
    );
}

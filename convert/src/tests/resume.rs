use std::ops::ControlFlow;
use std::path::Path;

use pollen_core::ByteSize;

use super::rlds::{episode, mapping, write};
use super::{Dataset, args, convert_all, run, tree};
use crate::{ConvertArgs, Error, Report, convert};

const EPISODES: u32 = 24;

fn source(folder: &Path) {
    let broken = crate::example::writing::example(&[]);
    let record = |number: u32| match number {
        7 | 23 => broken.clone(),
        _ => episode(number, 3 + number % 4, false),
    };
    let records: Vec<Vec<u8>> = (0..EPISODES).map(record).collect();
    let shards: Vec<Vec<Vec<u8>>> = records.chunks(5).map(<[_]>::to_vec).collect();
    write(folder, &shards, true);
}

fn small_files(source: &Path, out: &Path) -> ConvertArgs {
    let mut args = args(source, out);
    args.mapping = mapping();
    args.fps = Some(10.0);
    args.writer.file_bytes = ByteSize::kib(12);
    args.writer.row_group_bytes = ByteSize::kib(4);
    args
}

fn stop_after(args: &ConvertArgs, files: u64) -> Error {
    let stop = |progress: &crate::Progress| {
        if progress.files >= files {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    };
    run(convert(args, stop)).unwrap_err()
}

fn same(a: &Report, b: &Report) {
    assert_eq!(
        (a.episodes, a.frames, a.bytes, a.files, &a.dropped),
        (b.episodes, b.frames, b.bytes, b.files, &b.dropped)
    );
}

#[test]
fn a_conversion_that_was_stopped_anywhere_ends_with_the_same_bytes() {
    let temp = tempfile::tempdir().unwrap();
    let (from, whole) = (temp.path().join("toy"), temp.path().join("whole"));
    source(&from);
    let expected = convert_all(&small_files(&from, &whole)).unwrap();
    assert_eq!((expected.episodes, expected.dropped.len()), (22, 2));
    assert!(expected.files >= 5, "{expected:?}");
    let expected_tree = tree(&whole);
    assert!(
        expected_tree
            .keys()
            .all(|path| !path.starts_with("conversion/"))
    );
    for files in 1..expected.files {
        let out = temp.path().join(format!("stopped-{files}"));
        let mut args = small_files(&from, &out);
        args.jobs = std::num::NonZeroUsize::new(1 + files as usize % 3).unwrap();
        assert!(matches!(stop_after(&args, files), Error::Stopped { .. }));
        assert!(!out.join("meta/info.json").exists());
        let first = out.join("data/chunk-000/file-000.parquet");
        let written = std::fs::metadata(&first).unwrap().modified().unwrap();
        let report = convert_all(&args).unwrap();
        same(&report, &expected);
        assert_eq!(
            std::fs::metadata(&first).unwrap().modified().unwrap(),
            written
        );
        let found = tree(&out);
        assert_eq!(
            found.keys().collect::<Vec<_>>(),
            expected_tree.keys().collect::<Vec<_>>()
        );
        for (path, bytes) in &expected_tree {
            assert!(
                found[path] == *bytes,
                "{path} differs after a stop behind file {files}"
            );
        }
    }
}

#[test]
fn a_finished_conversion_is_not_done_again() {
    let temp = tempfile::tempdir().unwrap();
    let (from, out) = (temp.path().join("toy"), temp.path().join("out"));
    source(&from);
    let args = small_files(&from, &out);
    let first = convert_all(&args).unwrap();
    let mut heard = 0;
    let again = run(convert(&args, |_| {
        heard += 1;
        ControlFlow::Continue(())
    }));
    same(&first, &again.unwrap());
    assert_eq!(heard, 0);
    // Another conversion to the same place is refused.
    let mut other = args;
    other.resize = Some(8);
    assert!(
        convert_all(&other)
            .unwrap_err()
            .to_string()
            .contains("delete it")
    );
}

#[test]
fn other_arguments_do_not_continue_an_unfinished_conversion() {
    let temp = tempfile::tempdir().unwrap();
    let (from, out) = (temp.path().join("toy"), temp.path().join("out"));
    source(&from);
    let mut args = small_files(&from, &out);
    stop_after(&args, 2);
    args.fps = Some(11.0);
    let error = convert_all(&args).unwrap_err().to_string();
    assert!(error.contains("unfinished conversion"), "{error}");
}

#[test]
fn a_data_file_that_is_gone_or_cut_is_made_again() {
    let temp = tempfile::tempdir().unwrap();
    let (from, out) = (temp.path().join("toy"), temp.path().join("out"));
    source(&from);
    let args = small_files(&from, &out);
    stop_after(&args, 4);
    let second = out.join("data/chunk-000/file-001.parquet");
    let bytes = std::fs::read(&second).unwrap();
    std::fs::write(&second, &bytes[..100]).unwrap();
    let report = convert_all(&args).unwrap();
    assert_eq!(std::fs::read(&second).unwrap(), bytes);
    assert_eq!(
        Dataset::read(&out).integers("index").len() as u64,
        report.frames
    );
}

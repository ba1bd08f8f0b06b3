use std::path::Path;

use super::{Dataset, args, convert_all, jpeg, png};
use crate::example::writing::{byte_strings, example, floats, integers};
use crate::tfrecord::frame;
use crate::{Error, Mapping};

/// `features.json` of the generated dataset.
const FEATURES: &str = r#"{"pythonClassName": "x.FeaturesDict", "featuresDict": {"features": {
  "steps": {"pythonClassName": "x.Dataset", "sequence": {"length": "-1", "feature":
    {"featuresDict": {"features": {
      "is_first": {"tensor": {"shape": {}, "dtype": "bool"}},
      "language_instruction": {"text": {}},
      "action": {"featuresDict": {"features": {
        "world_vector": {"tensor": {"shape": {"dimensions": ["3"]}, "dtype": "float32"}},
        "gripper": {"tensor": {"shape": {"dimensions": ["1"]}, "dtype": "int32"}},
        "packed": {"tensor": {"shape": {"dimensions": ["2"]}, "dtype": "float64",
                   "encoding": "bytes"}}}}},
      "boxes": {"sequence": {"feature": {"tensor": {"shape": {}, "dtype": "float32"}}}},
      "observation": {"featuresDict": {"features": {
        "image": {"image": {"encodingFormat": "jpeg"}},
        "depth": {"image": {"encodingFormat": "png"}},
        "state": {"tensor": {"shape": {"dimensions": ["2"]}, "dtype": "float32"}}}}}
}}}}}}}}"#;

/// One episode of `steps` steps; `number` makes it differ.
pub(super) fn episode(number: u32, steps: u32, with_png: bool) -> Vec<u8> {
    let image = |step| {
        if with_png {
            png(16, 20, 100 * number + step).bytes
        } else {
            jpeg(16, 20, 100 * number + step).bytes
        }
    };
    let images: Vec<_> = (0..steps).map(image).collect();
    let images: Vec<&[u8]> = images.iter().map(AsRef::as_ref).collect();
    let text = format!("task {}", number % 3);
    let n = number as f32;
    let numbers = |width: u32| {
        (0..steps * width)
            .map(|i| n + i as f32 / 8.0)
            .collect::<Vec<_>>()
    };
    let packed: Vec<Vec<u8>> = (0..steps)
        .map(|step| {
            [f64::from(step), -2.5]
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .collect()
        })
        .collect();
    let packed: Vec<&[u8]> = packed.iter().map(Vec::as_slice).collect();
    let first: Vec<i64> = (0..steps).map(|step| i64::from(step == 0)).collect();
    let gripper: Vec<i64> = (0..steps).map(|step| -i64::from(step % 2)).collect();
    example(&[
        ("steps/is_first", integers(&first, true)),
        (
            "steps/language_instruction",
            byte_strings(&vec![text.as_bytes(); steps as usize]),
        ),
        ("steps/action/world_vector", floats(&numbers(3), true)),
        ("steps/action/gripper", integers(&gripper, false)),
        ("steps/action/packed", byte_strings(&packed)),
        ("steps/observation/state", floats(&numbers(2), false)),
        ("steps/observation/image", byte_strings(&images)),
    ])
}

/// Writes a dataset with the episodes of each shard.
pub(super) fn write(folder: &Path, shards: &[Vec<Vec<u8>>], features: bool) {
    std::fs::create_dir_all(folder).unwrap();
    let lengths: Vec<String> = shards.iter().map(|shard| shard.len().to_string()).collect();
    let info = serde_json::json!({
        "name": "toy", "version": "1.0.0", "fileFormat": "tfrecord",
        "splits": [{"name": "train", "shardLengths": lengths}],
    });
    std::fs::write(folder.join("dataset_info.json"), info.to_string()).unwrap();
    if features {
        std::fs::write(folder.join("features.json"), FEATURES).unwrap();
    }
    for (i, shard) in shards.iter().enumerate() {
        let name = format!("toy-train.tfrecord-{i:05}-of-{:05}", shards.len());
        let file: Vec<u8> = shard.iter().flat_map(|record| frame(record)).collect();
        std::fs::write(folder.join(name), file).unwrap();
    }
}

pub(super) fn mapping() -> Mapping {
    let action = ["action/world_vector", "action/packed", "action/gripper"];
    Mapping {
        cameras: vec![("observation/image".into(), "primary".into())],
        action: action.map(String::from).into(),
        ..Mapping::default()
    }
}

#[test]
fn nested_packed_and_integer_fields_become_one_action() {
    let temp = tempfile::tempdir().unwrap();
    let (source, out) = (temp.path().join("toy/1.0.0"), temp.path().join("out"));
    let shards = [
        vec![episode(0, 3, true), episode(1, 2, true)],
        vec![episode(2, 4, true)],
    ];
    write(&source, &shards, true);
    // The parent is given: the one dataset below it is found.
    let mut args = args(&temp.path().join("toy"), &out);
    args.mapping = mapping();
    args.fps = Some(4.0);
    let report = convert_all(&args).unwrap();
    assert_eq!((report.episodes, report.frames), (3, 9));
    assert!(
        report.notes.iter().any(|note| note.contains("PNG")),
        "{:?}",
        report.notes
    );
    let dataset = Dataset::read(&out);
    assert_eq!(
        dataset.rows("action")[0],
        [0.0, 0.125, 0.25, 0.0, -2.5, 0.0]
    );
    assert_eq!(
        dataset.rows("action")[1],
        [0.375, 0.5, 0.625, 1.0, -2.5, -1.0]
    );
    assert_eq!(dataset.rows("observation.state")[3], [1.0, 1.125]);
    assert_eq!(dataset.integers("index"), (0..9).collect::<Vec<_>>());
    assert_eq!(
        dataset.integers("episode_index"),
        [0, 0, 0, 1, 1, 2, 2, 2, 2]
    );
    assert_eq!(dataset.instructions()[3..6], ["task 1", "task 1", "task 2"]);
    // Declared as JPEG, stored as PNG: the bytes decide, and stay.
    assert_eq!(dataset.images("primary")[4], png(16, 20, 101).bytes);
    assert_eq!(dataset.rows("timestamp")[2], [0.5]);
    assert_eq!(
        dataset.info["features"]["action"]["shape"],
        serde_json::json!([6])
    );
    assert_eq!(dataset.stats["action"]["max"][0], 3.125);
}

#[test]
fn a_dataset_without_features_json_is_understood_by_its_first_record() {
    let temp = tempfile::tempdir().unwrap();
    let (source, out) = (temp.path().join("toy"), temp.path().join("out"));
    write(&source, &[vec![episode(5, 3, false)]], false);
    let mut args = args(&source, &out);
    args.mapping.action = vec!["action/world_vector".into()];
    args.fps = Some(10.0);
    args.jpeg_quality = Some(90);
    let report = convert_all(&args).unwrap();
    assert_eq!(report.frames, 3);
    let dataset = Dataset::read(&out);
    assert_eq!(dataset.images("image")[2], jpeg(16, 20, 502).bytes);
    assert_eq!(dataset.rows("observation.state").len(), 3);
    assert_eq!(dataset.instructions()[0], "task 2");
}

#[test]
fn what_cannot_be_used_is_dropped_with_the_reason() {
    let temp = tempfile::tempdir().unwrap();
    let (source, out) = (temp.path().join("toy"), temp.path().join("out"));
    let short = example(&[
        ("steps/is_first", integers(&[1, 0], true)),
        ("steps/action/world_vector", floats(&[1.0; 5], true)),
        ("steps/observation/state", floats(&[1.0; 4], true)),
        ("steps/language_instruction", byte_strings(&[b"a", b"a"])),
    ]);
    let mut blank = episode(3, 2, false);
    let magic = blank
        .windows(3)
        .position(|bytes| bytes == [0xff, 0xd8, 0xff])
        .unwrap();
    blank[magic] = 0;
    let empty = example(&[("steps/is_first", vec![])]);
    let shards = [vec![
        short,
        episode(1, 2, false),
        blank,
        empty,
        episode(4, 3, false),
    ]];
    write(&source, &shards, true);
    let mut args = args(&source, &out);
    args.mapping = mapping();
    args.fps = Some(10.0);
    let report = convert_all(&args).unwrap();
    assert_eq!((report.episodes, report.frames), (2, 5));
    let why: Vec<&str> = report
        .dropped
        .iter()
        .map(|dropped| dropped.why.as_str())
        .collect();
    assert!(
        why[0].contains("steps/action/world_vector, byte"),
        "{why:?}"
    );
    assert!(why[0].contains("5 values are not 2 x 3"), "{why:?}");
    assert!(why[1].contains("neither JPEG nor PNG"), "{why:?}");
    assert!(why[2].contains("no steps"), "{why:?}");
    assert!(
        report.dropped[1].what.ends_with("#2"),
        "{:?}",
        report.dropped
    );
}

#[test]
fn ragged_fields_are_refused_by_name_when_asked_for() {
    let temp = tempfile::tempdir().unwrap();
    let (source, out) = (temp.path().join("toy"), temp.path().join("out"));
    write(&source, &[vec![episode(0, 2, false)]], true);
    let mut args = args(&source, &out);
    args.mapping = mapping();
    args.mapping.state = vec!["boxes".into()];
    args.fps = Some(10.0);
    let error = convert_all(&args).unwrap_err().to_string();
    assert!(
        error.contains("`boxes`") && error.contains("different lengths"),
        "{error}"
    );
}

#[test]
fn broken_files_name_file_and_offset() {
    let temp = tempfile::tempdir().unwrap();
    let (source, out) = (temp.path().join("toy"), temp.path().join("out"));
    write(
        &source,
        &[vec![episode(0, 2, false), episode(1, 2, false)]],
        true,
    );
    let shard = source.join("toy-train.tfrecord-00000-of-00001");
    let whole = std::fs::read(&shard).unwrap();
    let second = frame(&episode(0, 2, false)).len();
    std::fs::write(&shard, &whole[..whole.len() - 7]).unwrap();
    let mut args = args(&source, &out);
    args.mapping = mapping();
    args.fps = Some(10.0);
    match convert_all(&args).unwrap_err() {
        Error::Corrupt { file, offset, .. } => {
            assert!(file.ends_with("00000-of-00001"), "{file}");
            assert_eq!(offset, second as u64);
        }
        other => panic!("{other}"),
    }
    // A record that is whole and no message: the offset is that of the field.
    std::fs::write(&shard, frame(&[0x0a, 0x7f, 1, 2])).unwrap();
    match convert_all(&args).unwrap_err() {
        Error::Corrupt { offset, .. } => assert_eq!(offset, 14),
        other => panic!("{other}"),
    }
    // A whole file with fewer records than promised.
    std::fs::write(&shard, &whole[..second]).unwrap();
    let error = convert_all(&args).unwrap_err().to_string();
    assert!(
        error.contains("holds 1 records") && error.contains("says 2"),
        "{error}"
    );
}

#[test]
fn wrong_arguments_say_what_there_is() {
    let temp = tempfile::tempdir().unwrap();
    let (source, out) = (temp.path().join("toy"), temp.path().join("out"));
    write(&source, &[vec![episode(0, 2, false)]], true);
    let mut args = args(&source, &out);
    let error = convert_all(&args).unwrap_err().to_string();
    assert!(
        error.contains("which fields are the action") && error.contains("action/gripper"),
        "{error}"
    );
    args.mapping = mapping();
    let error = convert_all(&args).unwrap_err().to_string();
    assert!(error.contains("frames a second"), "{error}");
    args.split = Some("test".into());
    assert!(
        convert_all(&args)
            .unwrap_err()
            .to_string()
            .contains("it has train")
    );
    args.split = None;
    args.mapping.cameras[0].0 = "observation/img".into();
    assert!(
        convert_all(&args)
            .unwrap_err()
            .to_string()
            .contains("it has observation/depth")
    );
    assert!(!out.exists(), "nothing was written");
}

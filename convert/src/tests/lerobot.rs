use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use arrow_array::builder::{Float64Builder, ListBuilder};
use arrow_array::{ArrayRef, Int64Array, RecordBatch, StructArray};
use parquet::arrow::ArrowWriter;
use pollen_core::ByteSize;

use super::{Dataset, args, convert_all, jpeg, png, tree};
use crate::SourceKind;

/// Writes one episode of a v2.1 dataset: snappy, nested lists, PNG images.
fn write_v21_episode(folder: &Path, episode: i64, frames: u32, first: i64) {
    let files: Vec<bytes::Bytes> = (0..frames)
        .map(|i| png(8, 8, first as u32 + i).bytes)
        .collect();
    let bytes = arrow_array::BinaryArray::from_iter_values(&files);
    let image: ArrayRef = Arc::new(StructArray::from(vec![(
        Arc::new(arrow_schema::Field::new(
            "bytes",
            arrow_schema::DataType::Binary,
            true,
        )),
        Arc::new(bytes) as ArrayRef,
    )]));
    let list = |width: u32| -> ArrayRef {
        let mut list = ListBuilder::new(Float64Builder::new());
        for i in 0..frames {
            for k in 0..width {
                list.values()
                    .append_value(f64::from(100 * i + k) + episode as f64);
            }
            list.append(true);
        }
        Arc::new(list.finish())
    };
    let constant =
        |value: i64| -> ArrayRef { Arc::new(Int64Array::from(vec![value; frames as usize])) };
    let columns = [
        ("action", list(3)),
        ("observation.state", list(2)),
        ("observation.images.front", image),
        ("episode_index", constant(episode)),
        ("task_index", constant(7 + episode % 2)),
    ];
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let path = folder.join(format!("data/chunk-000/episode_{episode:06}.parquet"));
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let properties = parquet::file::properties::WriterProperties::builder()
        .set_compression(parquet::basic::Compression::SNAPPY)
        .build();
    let file = File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

fn write_v21(folder: &Path, video: bool) {
    let mut features = serde_json::json!({
        "action": {"dtype": "float64", "shape": [3], "names": {"motors": ["a", "b", "c"]}},
        "observation.state": {"dtype": "float64", "shape": [2]},
        "observation.images.front": {"dtype": "image", "shape": [8, 8, 3]},
    });
    if video {
        features["observation.images.film"] =
            serde_json::json!({"dtype": "video", "shape": [32, 48, 3]});
    }
    let info = serde_json::json!({
        "codebase_version": "v2.1", "fps": 15, "robot_type": "so100", "total_episodes": 3,
        "chunks_size": 1000, "features": features,
    });
    std::fs::create_dir_all(folder.join("meta")).unwrap();
    std::fs::write(folder.join("meta/info.json"), info.to_string()).unwrap();
    let tasks =
        "{\"task_index\": 7, \"task\": \"sort\"}\n{\"task_index\": 8, \"task\": \"stack\"}\n";
    std::fs::write(folder.join("meta/tasks.jsonl"), tasks).unwrap();
    // Episode 1 is missing, as happens after a clean-up.
    write_v21_episode(folder, 0, 3, 0);
    write_v21_episode(folder, 2, 4, 3);
    write_v21_episode(folder, 3, 2, 7);
}

#[test]
fn v21_with_a_hole_between_its_episodes() {
    let temp = tempfile::tempdir().unwrap();
    let (source, out) = (temp.path().join("v21"), temp.path().join("out"));
    write_v21(&source, false);
    let report = convert_all(&args(&source, &out)).unwrap();
    assert_eq!(
        (report.kind, report.episodes, report.frames),
        (SourceKind::LeRobot, 3, 9)
    );
    let dataset = Dataset::read(&out);
    assert_eq!(
        dataset.integers("episode_index"),
        [0, 0, 0, 1, 1, 1, 1, 2, 2]
    );
    assert_eq!(dataset.rows("action")[4], [102.0, 103.0, 104.0]);
    assert_eq!(dataset.instructions()[2..4], ["sort", "sort"]);
    assert_eq!(dataset.instructions()[8], "stack");
    assert_eq!(dataset.images("front")[8], png(8, 8, 8).bytes);
    assert_eq!(dataset.info["robot_type"], "so100");
    assert_eq!(
        dataset.info["features"]["action"]["names"],
        serde_json::json!(["a", "b", "c"])
    );
}

#[test]
fn a_converted_dataset_converts_to_itself() {
    let temp = tempfile::tempdir().unwrap();
    let [source, once, twice] = ["toy", "once", "twice"].map(|name| temp.path().join(name));
    let records: Vec<Vec<u8>> = (0..9)
        .map(|n| super::rlds::episode(n, 4 + n, false))
        .collect();
    super::rlds::write(&source, &[records], true);
    let mut first = args(&source, &once);
    first.mapping = super::rlds::mapping();
    first.fps = Some(10.0);
    first.writer.file_bytes = ByteSize::kib(16);
    first.writer.row_group_bytes = ByteSize::kib(4);
    convert_all(&first).unwrap();
    let mut second = args(&once, &twice);
    second.writer = first.writer;
    convert_all(&second).unwrap();
    let (mut once, mut twice) = (tree(&once), tree(&twice));
    // It says where the dataset came from.
    once.remove("meta/conversion.json");
    twice.remove("meta/conversion.json");
    assert!(once.len() > 5);
    for (path, bytes) in &once {
        if path != "meta/info.json" {
            assert!(twice[path] == *bytes, "{path}");
        }
    }
}

#[test]
fn a_stopped_conversion_of_v3_finds_its_place_inside_a_row_group() {
    let temp = tempfile::tempdir().unwrap();
    let [toy, source, whole, stopped] =
        ["toy", "source", "whole", "stopped"].map(|name| temp.path().join(name));
    let records: Vec<Vec<u8>> = (0..12).map(|n| super::rlds::episode(n, 4, false)).collect();
    super::rlds::write(&toy, &[records], true);
    let mut first = args(&toy, &source);
    first.mapping = super::rlds::mapping();
    first.fps = Some(10.0);
    convert_all(&first).unwrap();
    let small = |out: &Path| {
        let mut args = args(&source, out);
        args.writer.file_bytes = ByteSize::kib(8);
        args
    };
    let report = convert_all(&small(&whole)).unwrap();
    assert!(report.files > 3, "{report:?}");
    let stop = |progress: &crate::Progress| {
        if progress.files >= 2 {
            std::ops::ControlFlow::Break(())
        } else {
            std::ops::ControlFlow::Continue(())
        }
    };
    super::run(crate::convert(&small(&stopped), stop)).unwrap_err();
    convert_all(&small(&stopped)).unwrap();
    assert!(tree(&whole) == tree(&stopped));
}

#[test]
fn resize_changes_images_and_features() {
    let temp = tempfile::tempdir().unwrap();
    let (source, out) = (temp.path().join("v21"), temp.path().join("out"));
    write_v21(&source, false);
    let mut args = args(&source, &out);
    args.resize = Some(12);
    args.jpeg_quality = Some(90);
    convert_all(&args).unwrap();
    let dataset = Dataset::read(&out);
    let shape = &dataset.info["features"]["observation.images.front"]["shape"];
    assert_eq!(*shape, serde_json::json!([12, 12, 3]));
    assert_ne!(dataset.images("front")[0], jpeg(8, 8, 0).bytes);
}

fn ffmpeg() -> Option<std::ffi::OsString> {
    let program = std::env::var_os(crate::video::PROGRAM).unwrap_or_else(|| "ffmpeg".into());
    let runs = Command::new(&program).arg("-version").output().is_ok();
    runs.then_some(program)
}

#[test]
fn videos_need_ffmpeg_and_say_so() {
    let temp = tempfile::tempdir().unwrap();
    let (source, out) = (temp.path().join("v21"), temp.path().join("out"));
    write_v21(&source, true);
    let videos = source.join("videos/chunk-000/observation.images.film");
    std::fs::create_dir_all(&videos).unwrap();
    let files = [0, 2, 3].map(|episode| videos.join(format!("episode_{episode:06}.mp4")));
    for file in &files {
        std::fs::write(file, b"no video").unwrap();
    }
    let error = convert_all(&args(&source, &out)).unwrap_err().to_string();
    let Some(program) = ffmpeg() else {
        assert!(error.contains("apt-get install ffmpeg"), "{error}");
        return;
    };
    assert!(error.contains("the video ends before frame 0"), "{error}");
    for file in &files {
        // Frame k is about 20 k grey.
        let made = Command::new(&program)
            .args(["-v", "error", "-y", "-f", "lavfi", "-i"])
            .arg("color=c=black:s=48x32:r=15:d=1,geq=lum='16+20*N':cb=128:cr=128,format=yuv420p")
            .args(["-frames:v", "6", "-c:v", "mpeg4", "-q:v", "2"])
            .arg(file)
            .status();
        assert!(made.unwrap().success());
    }
    let report = convert_all(&args(&source, &out)).unwrap();
    assert_eq!(report.frames, 9);
    let dataset = Dataset::read(&out);
    let grey = |image: &bytes::Bytes| {
        let frame = crate::Frame::new(image.clone()).unwrap();
        assert_eq!((frame.header.height, frame.header.width), (32, 48));
        i32::from(frame.decode().unwrap()[0])
    };
    let greys: Vec<i32> = dataset.images("film").iter().map(grey).collect();
    for (grey, k) in greys.iter().zip([0, 1, 2, 0, 1, 2, 3, 0, 1]) {
        let expected = k * 20 * 255 / 219;
        assert!((grey - expected).abs() < 6, "{greys:?}");
    }
}

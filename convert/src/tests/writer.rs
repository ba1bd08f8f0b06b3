use std::sync::Arc;

use parquet::basic::{Compression, Encoding};
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaDataReader, RowGroupMetaData};
use pollen_core::ByteSize;
use pollen_storage::{Silent, Storage, StorageConfig};

use super::{jpeg, read_parquet, run};
use crate::finalize::finalize;
use crate::picture::ColorHistogram;
use crate::reader::{Reader, blocking};
use crate::{
    CameraFeature, DatasetSpec, DatasetWriter, Episode, Error, FileRecord, Matrix, NumberFeature,
    WriterConfig,
};

fn spec() -> DatasetSpec {
    let camera = |name: &str| CameraFeature {
        name: format!("observation.images.{name}"),
        height: 16,
        width: 16,
    };
    DatasetSpec {
        fps: 2.5,
        robot_type: "toy".into(),
        cameras: vec![camera("primary"), camera("wrist")],
        numbers: vec![NumberFeature {
            name: "action".into(),
            width: 2,
            names: Some(vec!["x".into(), "gripper".into()]),
        }],
    }
}

fn episode(number: u32, frames: u32) -> Episode {
    let camera = |offset: u32| {
        (0..frames)
            .map(|i| jpeg(16, 16, number + offset + i))
            .collect()
    };
    Episode {
        name: format!("toy {number}"),
        task: format!("task {}", number % 2),
        num_frames: frames as usize,
        numbers: vec![Matrix {
            width: 2,
            values: (0..2 * frames).map(|i| (number * 10 + i) as f32).collect(),
        }],
        cameras: vec![camera(0), camera(1000)],
        histograms: vec![ColorHistogram::default(); 2],
    }
}

fn config() -> WriterConfig {
    WriterConfig {
        row_group_bytes: ByteSize::kib(16),
        file_bytes: ByteSize::kib(200),
    }
}

/// Writes episodes of the given numbers of frames.
fn write(folder: &std::path::Path, lengths: &[u32]) -> Vec<FileRecord> {
    run(async {
        let mut files = Vec::new();
        let mut writer = DatasetWriter::new(open(folder), spec(), config(), &[]);
        for (i, frames) in lengths.iter().enumerate() {
            let record = writer
                .add(&episode(i as u32, *frames), i as u64)
                .await
                .unwrap();
            files.extend(record);
        }
        files.extend(writer.finish().await.unwrap().0);
        files
    })
}

fn open(folder: &std::path::Path) -> Storage {
    let url = folder.to_str().unwrap();
    Storage::open(url, &StorageConfig::default(), Arc::new(Silent)).unwrap()
}

fn check(folder: &std::path::Path, files: &[FileRecord]) -> Result<(), Error> {
    run(async {
        let reader = Reader::new(open(folder));
        let files = files.to_vec();
        blocking(move || finalize(&reader, &spec(), config(), &files)).await
    })
}

#[test]
fn layout_of_data_files() {
    let temp = tempfile::tempdir().unwrap();
    let files = write(temp.path(), &[4, 4, 90, 4, 60, 3]);
    assert!(files.len() >= 2, "{files:?}");
    let mut rows = 0;
    for file in &files {
        let bytes = bytes::Bytes::from(std::fs::read(temp.path().join(&file.path)).unwrap());
        assert_eq!(bytes.len() as u64, file.bytes);
        let metadata = ParquetMetaDataReader::new()
            .parse_and_finish(&bytes)
            .unwrap();
        assert_eq!(metadata.file_metadata().version(), 1);
        let pairs = metadata.file_metadata().key_value_metadata().unwrap();
        let pair = pairs.iter().find(|pair| pair.key == "huggingface").unwrap();
        let value: serde_json::Value = serde_json::from_str(pair.value.as_ref().unwrap()).unwrap();
        let features = &value["info"]["features"];
        assert_eq!(features["observation.images.wrist"]["_type"], "Image");
        assert_eq!(features["action"]["length"], 2);
        for group in metadata.row_groups() {
            rows += group.num_rows();
            let size: i64 = group
                .columns()
                .iter()
                .map(ColumnChunkMetaData::compressed_size)
                .sum();
            assert!(size < 40 << 10, "a row group of {size} bytes");
            for column in group.columns() {
                let image = column.column_path().string().contains("observation.images");
                let plain = column.compression() == Compression::UNCOMPRESSED;
                assert_eq!(image, plain, "{}", column.column_path());
                assert_eq!(column.dictionary_page_offset(), None);
                assert!(column.offset_index_offset().is_some());
                assert!(
                    column
                        .encodings()
                        .any(|encoding| encoding == Encoding::PLAIN)
                );
                assert_eq!(column.statistics().is_none(), image);
            }
        }
    }
    assert_eq!(rows, 165);
}

#[test]
fn small_episodes_share_a_row_group_and_long_ones_are_cut_evenly() {
    let temp = tempfile::tempdir().unwrap();
    let files = write(temp.path(), &[1, 1, 1, 100]);
    let groups = |file: &FileRecord| -> Vec<i64> {
        let bytes = bytes::Bytes::from(std::fs::read(temp.path().join(&file.path)).unwrap());
        let metadata = ParquetMetaDataReader::new()
            .parse_and_finish(&bytes)
            .unwrap();
        metadata
            .row_groups()
            .iter()
            .map(RowGroupMetaData::num_rows)
            .collect()
    };
    let groups: Vec<i64> = files.iter().flat_map(groups).collect();
    assert_eq!(groups[0], 3, "{groups:?}");
    let (least, most) = (
        groups[1..].iter().min().unwrap(),
        groups[1..].iter().max().unwrap(),
    );
    assert!(groups.len() > 4 && most - least <= 2, "{groups:?}");
}

#[test]
fn metadata_is_exact() {
    let temp = tempfile::tempdir().unwrap();
    let files = write(temp.path(), &[4, 90, 4, 60]);
    check(temp.path(), &files).unwrap();
    let json = |path: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(temp.path().join(path)).unwrap()).unwrap()
    };
    let info = json("meta/info.json");
    assert_eq!(
        (&info["total_episodes"], &info["total_frames"]),
        (&4.into(), &158.into())
    );
    assert_eq!(
        (&info["fps"], &info["splits"]["train"]),
        (&2.5.into(), &"0:4".into())
    );
    assert_eq!(info["features"]["action"]["names"][1], "gripper");
    let stats = json("meta/stats.json");
    assert_eq!(stats["index"]["mean"][0], 78.5);
    assert_eq!(stats["index"]["q01"][0], 1.57);
    assert_eq!(stats["action"]["count"][0], 158);
    let tasks = std::fs::read(temp.path().join("meta/tasks.parquet")).unwrap();
    let text = String::from_utf8_lossy(&tasks);
    assert!(text.contains(r#""index_columns":["task"]"#));
    let episodes = read_parquet(&temp.path().join("meta/episodes/chunk-000/file-000.parquet"));
    let column = |name: &str| crate::columns::numbers(&episodes, name).unwrap().values;
    assert_eq!(column("dataset_from_index"), [0.0, 4.0, 94.0, 98.0]);
    assert_eq!(column("dataset_to_index"), [4.0, 94.0, 98.0, 158.0]);
    assert_eq!(
        column("stats/action/max"),
        [6.0, 7.0, 188.0, 189.0, 26.0, 27.0, 148.0, 149.0]
    );
    assert_eq!(column("stats/action/count"), [4.0, 90.0, 4.0, 60.0]);
}

#[test]
fn damage_after_writing_is_found() {
    let temp = tempfile::tempdir().unwrap();
    let files = write(temp.path(), &[20, 5]);
    let path = temp.path().join(&files[0].path);
    let whole = std::fs::read(&path).unwrap();
    let mut damaged = 0;
    // A byte of an image's pixels, of a header, of a number's page.
    for at in [200, 5_000, whole.len() / 2, whole.len() * 3 / 4] {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x55;
        std::fs::write(&path, &bytes).unwrap();
        match check(temp.path(), &files) {
            Err(Error::Verification { file, .. } | Error::Corrupt { file, .. }) => {
                assert!(file.ends_with("file-000.parquet"), "{file}");
                damaged += 1;
            }
            other => panic!("byte {at}: {other:?}"),
        }
    }
    assert_eq!(damaged, 4);
    std::fs::write(&path, &whole).unwrap();
    check(temp.path(), &files).unwrap();
}

#[test]
fn episodes_that_do_not_fit_are_refused_with_the_difference() {
    let temp = tempfile::tempdir().unwrap();
    run(async {
        let mut writer = DatasetWriter::new(open(temp.path()), spec(), config(), &[]);
        let mut bad = episode(0, 3);
        bad.cameras[1][2] = jpeg(8, 16, 0);
        let error = writer.add(&bad, 0).await.unwrap_err().to_string();
        assert!(error.contains("wrist is 8 x 16 at frame 2"), "{error}");
        let mut bad = episode(0, 3);
        bad.numbers[0].values[3] = f32::NAN;
        let error = writer.add(&bad, 0).await.unwrap_err().to_string();
        assert!(error.contains("action is NaN at frame 1"), "{error}");
        writer.add(&episode(1, 3), 1).await.unwrap();
        let (record, _) = writer.finish().await.unwrap();
        assert_eq!(record.unwrap().episodes.len(), 1);
    });
}

#[test]
fn a_writer_that_is_dropped_leaves_no_data_file() {
    let temp = tempfile::tempdir().unwrap();
    run(async {
        let mut writer = DatasetWriter::new(open(temp.path()), spec(), config(), &[]);
        writer.add(&episode(1, 80), 0).await.unwrap();
        drop(writer);
    });
    let found = super::tree(temp.path());
    assert!(
        !found.contains_key("data/chunk-000/file-000.parquet"),
        "{:?}",
        found.keys()
    );
}

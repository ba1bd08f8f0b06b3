//! The files below `meta/`.

use std::collections::HashMap;
use std::sync::Arc;

use arrow_array::builder::{Float64Builder, Int64Builder, ListBuilder, StringBuilder};
use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use arrow_schema::Schema;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use serde::Serialize;
use serde_json::json;

use crate::error::{Error, Result};
use crate::schema::{DatasetSpec, Ordered};
use crate::stats::FeatureStats;
use crate::writer::{CHUNK_FILES, FileRecord, WriterConfig};

pub(crate) const INFO: &str = "meta/info.json";
pub(crate) const STATS: &str = "meta/stats.json";
pub(crate) const TASKS: &str = "meta/tasks.parquet";

/// Readers look a task up by row and take its text from the pandas index that this declares.
const PANDAS: &str = r#"{"index_columns":["task"],"column_indexes":[],"columns":[{"name":"task_index","field_name":"task_index","pandas_type":"int64","numpy_type":"int64","metadata":null},{"name":"task","field_name":"task","pandas_type":"unicode","numpy_type":"object","metadata":null}],"pandas_version":"2.3.3"}"#;

/// One row of `meta/episodes`.
#[derive(Clone, Debug)]
pub(crate) struct EpisodeRow {
    pub(crate) episode: u64,
    pub(crate) task: String,
    pub(crate) length: u64,
    pub(crate) data_file: u64,
    /// Global number of the first frame.
    pub(crate) from: u64,
    /// By column of numbers.
    pub(crate) stats: Vec<FeatureStats>,
}

/// Returns a JSON file.
pub(crate) fn to_json<T: Serialize>(value: &T) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(value).expect("its keys are strings");
    text.push(b'\n');
    text
}

/// Returns `info.json`.
pub(crate) fn info(
    spec: &DatasetSpec,
    config: WriterConfig,
    files: &[FileRecord],
    num_tasks: usize,
) -> Vec<u8> {
    let num_episodes: usize = files.iter().map(|file| file.episodes.len()).sum();
    let num_frames: u64 = files.iter().map(FileRecord::num_frames).sum();
    let megabytes = config.file_bytes.as_u64().div_ceil(1 << 20);
    let fps = if spec.fps.fract() == 0.0 {
        json!(spec.fps as u64)
    } else {
        json!(spec.fps)
    };
    let data_path = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet";
    let mut info: Vec<(String, serde_json::Value)> = [
        ("codebase_version", json!("v3.0")),
        ("robot_type", json!(spec.robot_type)),
        ("total_episodes", json!(num_episodes)),
        ("total_frames", json!(num_frames)),
        ("total_tasks", json!(num_tasks)),
        ("chunks_size", json!(CHUNK_FILES)),
        ("data_files_size_in_mb", json!(megabytes)),
        ("video_files_size_in_mb", json!(200)),
        ("fps", fps),
        ("splits", json!({"train": format!("0:{num_episodes}")})),
        ("data_path", json!(data_path)),
        ("video_path", json!(null)),
    ]
    .map(|(key, value)| (key.to_string(), value))
    .into();
    info.push(("features".into(), json!(spec.features())));
    to_json(&Ordered(info))
}

/// Returns `tasks.parquet`.
pub(crate) fn tasks(tasks: &[&str]) -> Result<Vec<u8>> {
    let index = Int64Array::from_iter_values(0..tasks.len() as i64);
    let columns: [(&str, ArrayRef); 2] = [
        ("task_index", Arc::new(index)),
        ("task", Arc::new(StringArray::from(tasks.to_vec()))),
    ];
    table(columns, Some(("pandas", PANDAS))).map_err(|source| Error::Write {
        file: TASKS.into(),
        source,
    })
}

/// Returns a file of `meta/episodes`, number `file`; `names` are those of the statistics' columns.
pub(crate) fn episodes(names: &[&str], rows: &[EpisodeRow], file: u64) -> Result<Vec<u8>> {
    let integers = |value: &dyn Fn(&EpisodeRow) -> u64| -> ArrayRef {
        Arc::new(Int64Array::from_iter_values(
            rows.iter().map(|row| value(row) as i64),
        ))
    };
    let mut tasks = ListBuilder::new(StringBuilder::new());
    for row in rows {
        tasks.values().append_value(&row.task);
        tasks.append(true);
    }
    let mut columns: Vec<(String, ArrayRef)> = vec![
        ("episode_index".into(), integers(&|row| row.episode)),
        ("tasks".into(), Arc::new(tasks.finish())),
        ("length".into(), integers(&|row| row.length)),
        (
            "data/chunk_index".into(),
            integers(&|row| row.data_file / CHUNK_FILES),
        ),
        (
            "data/file_index".into(),
            integers(&|row| row.data_file % CHUNK_FILES),
        ),
        ("dataset_from_index".into(), integers(&|row| row.from)),
        (
            "dataset_to_index".into(),
            integers(&|row| row.from + row.length),
        ),
    ];
    for (i, name) in names.iter().enumerate() {
        let statistics = rows
            .first()
            .map(|row| row.stats[i].named().map(|(key, _)| key));
        for (k, key) in statistics.into_iter().flatten().enumerate() {
            let mut list = ListBuilder::new(Float64Builder::new());
            for row in rows {
                list.values().append_slice(row.stats[i].named()[k].1);
                list.append(true);
            }
            columns.push((format!("stats/{name}/{key}"), Arc::new(list.finish())));
        }
        let mut counts = ListBuilder::new(Int64Builder::new());
        for row in rows {
            counts.values().append_slice(&row.stats[i].count);
            counts.append(true);
        }
        columns.push((format!("stats/{name}/count"), Arc::new(counts.finish())));
    }
    columns.push(("meta/episodes/chunk_index".into(), integers(&|_| 0)));
    columns.push(("meta/episodes/file_index".into(), integers(&|_| file)));
    table(columns, None).map_err(|source| Error::Write {
        file: "meta/episodes".into(),
        source,
    })
}

fn table<K: AsRef<str>>(
    columns: impl IntoIterator<Item = (K, ArrayRef)>,
    metadata: Option<(&str, &str)>,
) -> Result<Vec<u8>, ParquetError> {
    let columns = columns.into_iter().map(|(name, array)| (name, array, true));
    let batch = RecordBatch::try_from_iter_with_nullable(columns)?;
    let schema = Schema::clone(&batch.schema());
    let stored = metadata.map(|(key, value)| (key.to_string(), value.to_string()));
    let schema = Arc::new(schema.with_metadata(stored.into_iter().collect::<HashMap<_, _>>()));
    let batch = RecordBatch::try_new(Arc::clone(&schema), batch.columns().to_vec())?;
    let level = ZstdLevel::try_new(3).expect("3 is a level of zstd");
    let pairs = metadata.map(|(key, value)| vec![KeyValue::new(key.into(), value.to_string())]);
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(level))
        .set_key_value_metadata(pairs)
        .build();
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, schema, Some(properties))?;
    writer.write(&batch)?;
    writer.close()?;
    Ok(bytes)
}

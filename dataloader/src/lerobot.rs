//! The metadata of a LeRobotDataset v3.0: `info.json`, tasks and episodes.

use std::collections::BTreeMap;

use arrow_array::cast::AsArray;
use arrow_array::types::{Int32Type, Int64Type};
use arrow_array::{Array, RecordBatch};
use bytes::Bytes;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::errors::ParquetError;
use pollen_core::no_panic;
use pollen_storage::Storage;
use serde::Deserialize;

use crate::error::Result;
use crate::parquet_file::FileName;

/// Above this, `fps` is no frequency of a robot.
const MAX_FPS: f64 = 1e6;

/// What Pollen reads of `meta/info.json`; other keys are ignored, as LeRobot does.
#[derive(Clone, Debug, Deserialize)]
pub struct Info {
    /// Version of the layout, `v3.0`.
    pub codebase_version: String,
    /// Frames a second.
    pub fps: f64,
    /// Number of episodes.
    pub total_episodes: u64,
    /// Number of frames.
    pub total_frames: u64,
    /// What robot it was, if the dataset says.
    #[serde(default)]
    pub robot_type: Option<String>,
    /// Features by name.
    pub features: BTreeMap<String, Feature>,
}

/// One feature of `meta/info.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Feature {
    /// `image`, `video`, `string` or a number type.
    pub dtype: String,
    /// Shape of one frame's value.
    pub shape: Vec<usize>,
    /// Names of its dimensions, as writers put them: a list, or a table with one.
    #[serde(default)]
    pub names: serde_json::Value,
}

impl Feature {
    /// Returns height and width of an image feature: the shape without its three channels.
    pub fn image_size(&self) -> Option<(usize, usize)> {
        match self.shape[..] {
            [height, width, 3] | [3, height, width] => Some((height, width)),
            _ => None,
        }
    }

    /// Returns the number of values of one frame.
    pub fn width(&self) -> usize {
        let product = |all: usize, &n: &usize| all.saturating_mul(n);
        self.shape.iter().fold(1, product)
    }

    /// Returns a name for each dimension of a vector, if the dataset gives them.
    pub fn dim_names(&self) -> Option<Vec<String>> {
        let found = match &self.names {
            serde_json::Value::Object(table) => table.values().next()?,
            other => other,
        };
        let names = found.as_array()?.iter();
        let names: Option<Vec<String>> = names.map(|n| n.as_str().map(str::to_owned)).collect();
        names.filter(|names| names.len() == self.width())
    }
}

/// Where an episode lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Episode {
    /// Number.
    pub episode: u64,
    /// Number of frames.
    pub length: u64,
    /// Global row of its first frame.
    pub first_row: u64,
}

/// The metadata of one dataset.
#[derive(Clone, Debug)]
pub struct Metadata {
    /// `meta/info.json`.
    pub info: Info,
    /// Instructions by task index.
    pub tasks: Vec<String>,
}

/// Reads `meta/info.json` and `meta/tasks.parquet`.
pub(crate) async fn read_metadata(storage: &Storage, dataset: &str) -> Result<Metadata> {
    let name = file(dataset, "meta/info.json");
    let bytes = get(storage, &name).await?;
    let info: Info = serde_json::from_slice(&bytes).map_err(|e| name.bad(e.to_string()))?;
    if !info.codebase_version.starts_with("v3.") {
        return Err(name.bad(format!(
            "codebase_version is {}; Pollen reads v3.0, convert it with `pollen data convert`",
            info.codebase_version
        )));
    }
    if !(info.fps > 0.0 && info.fps <= MAX_FPS) {
        return Err(name.bad(format!("fps = {} is not a frequency", info.fps)));
    }
    let name = file(dataset, "meta/tasks.parquet");
    let tasks = parse_tasks(get(storage, &name).await?, &name)?;
    Ok(Metadata { info, tasks })
}

/// Reads the table of episodes, in the order of their numbers.
pub(crate) async fn read_episodes(storage: &Storage, dataset: &str) -> Result<Vec<Episode>> {
    let mut episodes = Vec::new();
    for object in parquet_files(storage, dataset, "meta/episodes").await? {
        let name = file(dataset, &object.path);
        let bytes = get(storage, &name).await?;
        episodes.extend(parse_episodes(bytes, &name)?);
    }
    episodes.sort_by_key(|episode| episode.episode);
    Ok(episodes)
}

/// A file of a dataset and its size.
#[derive(Debug)]
pub(crate) struct StoredFile {
    pub(crate) path: String,
    pub(crate) size: u64,
}

/// Lists the Parquet files below a folder of the dataset, in order of their paths.
pub(crate) async fn parquet_files(
    storage: &Storage,
    dataset: &str,
    folder: &str,
) -> Result<Vec<StoredFile>> {
    let failed = |source| file(dataset, folder).failed(source);
    if storage.can_list() {
        let objects = storage.list(folder).await.map_err(failed)?.into_iter();
        let files = objects.map(|object| StoredFile {
            path: object.path,
            size: object.size,
        });
        return Ok(files
            .filter(|file| file.path.ends_with(".parquet"))
            .collect());
    }
    // LeRobot numbers chunks and files from 0 without holes.
    let mut objects = Vec::new();
    for chunk in 0.. {
        let before = objects.len();
        for number in 0.. {
            let path = format!("{folder}/chunk-{chunk:03}/file-{number:03}.parquet");
            match storage.head(&path).await {
                Ok(size) => objects.push(StoredFile { path, size }),
                Err(error) if error.is_not_found() => break,
                Err(error) => return Err(failed(error)),
            }
        }
        if objects.len() == before {
            break;
        }
    }
    Ok(objects)
}

fn file(dataset: &str, path: &str) -> FileName {
    FileName {
        dataset: dataset.into(),
        path: path.into(),
    }
}

async fn get(storage: &Storage, name: &FileName) -> Result<Bytes> {
    storage.get(&name.path).await.map_err(|source| {
        if source.is_not_found() {
            name.bad(format!(
                "is missing in {}; is this the folder of a LeRobotDataset v3.0?",
                storage.url()
            ))
        } else {
            name.failed(source)
        }
    })
}

fn parse_tasks(bytes: Bytes, name: &FileName) -> Result<Vec<String>> {
    let mut tasks = BTreeMap::new();
    for batch in read_columns(bytes, name, &["task_index", "task", "__index_level_0__"])? {
        let numbers = integers(&batch, "task_index", name)?;
        let column = batch
            .column_by_name("task")
            .or_else(|| batch.column_by_name("__index_level_0__"))
            .ok_or_else(|| name.bad("has no column `task`"))?;
        let texts: Vec<&str> = if let Some(texts) = column.as_string_opt::<i32>() {
            texts.iter().flatten().collect()
        } else if let Some(texts) = column.as_string_opt::<i64>() {
            texts.iter().flatten().collect()
        } else {
            return Err(name.bad("its column `task` does not hold texts"));
        };
        if texts.len() != numbers.len() {
            return Err(name.bad("its column `task` has empty rows"));
        }
        tasks.extend(
            numbers
                .into_iter()
                .zip(texts.into_iter().map(str::to_owned)),
        );
    }
    if tasks.keys().copied().ne(0..tasks.len() as u64) {
        return Err(name.bad("its task_index does not count from 0 without holes"));
    }
    Ok(tasks.into_values().collect())
}

fn parse_episodes(bytes: Bytes, name: &FileName) -> Result<Vec<Episode>> {
    let columns = ["episode_index", "length", "dataset_from_index"];
    let mut episodes = Vec::new();
    for batch in read_columns(bytes, name, &columns)? {
        let numbers = integers(&batch, columns[0], name)?;
        let lengths = integers(&batch, columns[1], name)?;
        let starts = integers(&batch, columns[2], name)?;
        for ((episode, length), first_row) in numbers.into_iter().zip(lengths).zip(starts) {
            episodes.push(Episode {
                episode,
                length,
                first_row,
            });
        }
    }
    Ok(episodes)
}

/// Reads some root columns of a small Parquet file.
fn read_columns(bytes: Bytes, name: &FileName, columns: &[&str]) -> Result<Vec<RecordBatch>> {
    let bad = |error: ParquetError| name.bad(error.to_string());
    let read = || {
        let builder = ParquetRecordBatchReaderBuilder::try_new(bytes).map_err(bad)?;
        let mask = ProjectionMask::columns(builder.parquet_schema(), columns.iter().copied());
        let reader = builder.with_projection(mask).build().map_err(bad)?;
        reader
            .map(|batch| batch.map_err(|e| name.bad(e.to_string())))
            .collect()
    };
    no_panic(read, |said| name.bad(said))
}

/// Returns a column of whole numbers of at least 0.
fn integers(batch: &RecordBatch, column: &str, name: &FileName) -> Result<Vec<u64>> {
    let array = batch
        .column_by_name(column)
        .ok_or_else(|| name.bad(format!("has no column `{column}`")))?;
    let values: Option<Vec<i64>> = if array.null_count() > 0 {
        None
    } else if let Some(array) = array.as_primitive_opt::<Int64Type>() {
        Some(array.values().to_vec())
    } else {
        array
            .as_primitive_opt::<Int32Type>()
            .map(|array| array.values().iter().copied().map(i64::from).collect())
    };
    values
        .and_then(|values| values.into_iter().map(|v| u64::try_from(v).ok()).collect())
        .ok_or_else(|| name.bad(format!("its column `{column}` is not a list of counts")))
}

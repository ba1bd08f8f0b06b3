//! Whole conversions of generated and of real datasets.
//!
//! The real ones are `octo-bridge-debug` and `robosuite-lift-demos` below the folder that
//! `POLLEN_TEST_DATA` names; without it their tests say so and check nothing.
#![allow(clippy::unwrap_used, reason = "tests")]

mod calvin;
mod hdf5;
mod lerobot;
mod real;
mod resume;
mod rlds;
mod writer;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use arrow_array::RecordBatch;
use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, Int64Type};
use bytes::Bytes;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::picture::{Frame, PictureRule};
use crate::{ConvertArgs, Error, Report, convert};

fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime.unwrap().block_on(future)
}

fn convert_all(args: &ConvertArgs) -> Result<Report, Error> {
    run(convert(args, |_| ControlFlow::Continue(())))
}

/// Returns arguments for local folders.
fn args(source: &Path, destination: &Path) -> ConvertArgs {
    ConvertArgs::new(source.to_str().unwrap(), destination.to_str().unwrap())
}

/// Returns a folder of the real data, if there is any.
fn real_data(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("POLLEN_TEST_DATA").map(|root| PathBuf::from(root).join(name));
    let found = folder.filter(|folder| folder.exists());
    if found.is_none() {
        // Straight to the stream: the test harness hides what the print macros write.
        let text = format!("NOT CHECKED: {name} is absent; POLLEN_TEST_DATA names its parent\n");
        std::io::stderr().write_all(text.as_bytes()).unwrap();
    }
    found
}

/// Returns all files below a folder with their bytes.
fn tree(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path
                    .strip_prefix(folder)
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .to_string();
                files.insert(name, std::fs::read(path).unwrap());
            }
        }
    }
    files
}

fn read_parquet(path: &Path) -> Vec<RecordBatch> {
    let file = File::open(path).unwrap();
    let reader = ParquetRecordBatchReaderBuilder::try_new(file)
        .unwrap()
        .build()
        .unwrap();
    reader.map(Result::unwrap).collect()
}

/// A converted dataset, all of it in memory.
struct Dataset {
    info: serde_json::Value,
    stats: serde_json::Value,
    tasks: Vec<String>,
    batches: Vec<RecordBatch>,
}

impl Dataset {
    fn read(root: &Path) -> Self {
        let json =
            |path: &str| serde_json::from_slice(&std::fs::read(root.join(path)).unwrap()).unwrap();
        let tasks = read_parquet(&root.join("meta/tasks.parquet"));
        let tasks = tasks
            .iter()
            .flat_map(|b| crate::columns::texts(b.column_by_name("task").unwrap()));
        let data = tree(&root.join("data"));
        let batches = data
            .keys()
            .flat_map(|path| read_parquet(&root.join("data").join(path)));
        Self {
            info: json("meta/info.json"),
            stats: json("meta/stats.json"),
            tasks: tasks.collect(),
            batches: batches.collect(),
        }
    }

    fn integers(&self, name: &str) -> Vec<i64> {
        let columns = self
            .batches
            .iter()
            .map(|batch| batch.column_by_name(name).unwrap());
        columns
            .flat_map(|c| c.as_primitive::<Int64Type>().values().to_vec())
            .collect()
    }

    /// Returns the rows of a feature.
    fn rows(&self, name: &str) -> Vec<Vec<f32>> {
        let columns = self
            .batches
            .iter()
            .map(|batch| batch.column_by_name(name).unwrap());
        let rows = columns.flat_map(|column| match column.as_fixed_size_list_opt() {
            Some(list) => {
                let width = list.value_length() as usize;
                let values = list
                    .values()
                    .as_primitive::<Float32Type>()
                    .values()
                    .to_vec();
                values
                    .chunks(width)
                    .map(<[f32]>::to_vec)
                    .collect::<Vec<_>>()
            }
            None => column
                .as_primitive::<Float32Type>()
                .values()
                .iter()
                .map(|v| vec![*v])
                .collect(),
        });
        rows.collect()
    }

    fn images(&self, camera: &str) -> Vec<Bytes> {
        crate::columns::images(&self.batches, &format!("observation.images.{camera}")).unwrap()
    }

    /// Returns the instruction of every frame.
    fn instructions(&self) -> Vec<&str> {
        let tasks = self.integers("task_index");
        tasks
            .into_iter()
            .map(|task| self.tasks[task as usize].as_str())
            .collect()
    }
}

/// Returns pixels [height, width, 3] that differ between frames.
fn pixels(height: u32, width: u32, frame: u32) -> Vec<u8> {
    let value = |i: u32| (i.wrapping_mul(37) ^ frame.wrapping_mul(101) ^ (i >> 5)) as u8;
    (0..height * width * 3).map(value).collect()
}

fn png(height: u32, width: u32, frame: u32) -> Frame {
    PictureRule::default()
        .pixels(height, width, pixels(height, width, frame))
        .unwrap()
}

fn jpeg(height: u32, width: u32, frame: u32) -> Frame {
    let rule = PictureRule {
        jpeg_quality: Some(90),
        ..PictureRule::default()
    };
    rule.pixels(height, width, pixels(height, width, frame))
        .unwrap()
}

//! Reads everything back, checks it, and writes the metadata of a dataset.
//!
//! ```text
//! data files -> checksum, rows, header of every image -> moments, statistics of each episode
//!     again, columns of numbers only, three times     -> quantiles
//! all of it  -> meta/tasks.parquet, meta/episodes/, meta/stats.json, meta/info.json
//! ```

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, Int64Type};
use arrow_array::{Array, RecordBatch};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::data_file::hex;
use crate::error::{Error, Result};
use crate::metadata::{self, EpisodeRow};
use crate::parquet_file::ParquetFile;
use crate::picture::{ColorHistogram, Frame};
use crate::reader::Reader;
use crate::schema::{DatasetSpec, INDEX_COLUMNS};
use crate::stats::{Column, FeatureStats, Numbers, image_stats};
use crate::writer::{FileRecord, WriterConfig};

/// Episodes of one file below `meta/episodes`.
const EPISODES_A_FILE: usize = 10_000;

/// Verifies the data files and writes all that stands beside them; `info.json` comes last.
pub(crate) fn finalize(
    reader: &Reader,
    spec: &DatasetSpec,
    config: WriterConfig,
    files: &[FileRecord],
) -> Result<()> {
    let names = spec.number_columns();
    let mut columns: Vec<Column> = names.iter().map(|name| column_of(spec, name)).collect();
    let mut episodes = Episodes::new(reader, spec);
    for file in files {
        verify(reader, spec, file, |numbers| {
            for (column, (_, rows)) in columns.iter_mut().zip(&numbers) {
                column.measure(rows);
            }
            episodes.push(file, &numbers)
        })?;
        episodes.end_of(file)?;
    }
    episodes.flush()?;
    columns.iter_mut().for_each(Column::start);
    for _ in 0..Column::PASSES {
        for file in files {
            let parquet = ParquetFile::open(reader, &file.path)?;
            for row_group in 0..parquet.num_row_groups() {
                for batch in parquet.read(row_group, Some(&names))? {
                    let numbers = numbers_of(spec, &batch).map_err(|e| bad(reader, file, e))?;
                    for (column, (_, rows)) in columns.iter_mut().zip(&numbers) {
                        column.count(rows);
                    }
                }
            }
        }
        columns.iter_mut().for_each(Column::descend);
    }

    let num_frames = files.iter().map(FileRecord::num_frames).sum();
    let mut stats: Vec<(String, Value)> = Vec::new();
    for (camera, feature) in spec.cameras.iter().enumerate() {
        let mut all = ColorHistogram::default();
        for file in files {
            all.merge(&file.histograms[camera]);
        }
        stats.push((feature.name.clone(), image_stats(&all, num_frames)));
    }
    for (name, column) in names.iter().zip(&columns) {
        stats.push(((*name).into(), json!(column.finish())));
    }
    reader.put(
        metadata::STATS,
        metadata::to_json(&crate::schema::Ordered(stats)),
    )?;
    let tasks: Vec<&str> = files
        .iter()
        .flat_map(|f| &f.new_tasks)
        .map(String::as_str)
        .collect();
    reader.put(metadata::TASKS, metadata::tasks(&tasks)?)?;
    reader.put(
        metadata::INFO,
        metadata::info(spec, config, files, tasks.len()),
    )
}

/// A column's values as 64-bit floats, and how many a frame has.
type Values = (usize, Vec<f64>);

fn column_of(spec: &DatasetSpec, name: &str) -> Column {
    if INDEX_COLUMNS.contains(&name) {
        return Column::new(1, Numbers::Integers);
    }
    let number = spec.numbers.iter().find(|number| number.name == name);
    Column::new(number.map_or(1, |number| number.width), Numbers::Floats)
}

fn bad(reader: &Reader, file: &FileRecord, reason: impl Into<String>) -> Error {
    Error::Verification {
        file: reader.name(&file.path),
        reason: reason.into(),
    }
}

/// Reads a data file once, in pieces of one row group each, and compares it with its record.
fn verify(
    reader: &Reader,
    spec: &DatasetSpec,
    file: &FileRecord,
    mut each: impl FnMut(Vec<Values>) -> Result<()>,
) -> Result<()> {
    let parquet = ParquetFile::open(reader, &file.path)?;
    let groups = parquet.num_row_groups();
    if (parquet.num_bytes(), groups as u64) != (file.bytes, file.row_groups) {
        let found = format!("{} bytes, {groups} row groups", parquet.num_bytes());
        let wrote = format!("{} and {} were written", file.bytes, file.row_groups);
        return Err(bad(reader, file, format!("it has {found}; {wrote}")));
    }
    let mut sha256 = Sha256::new();
    let (mut offset, mut frame) = (0, file.first_frame);
    for row_group in 0..groups {
        let next = row_group + 1;
        let end = if next == groups {
            file.bytes
        } else {
            parquet.span(next, None).start
        };
        let piece = reader.get_range(&file.path, offset..end.max(offset))?;
        sha256.update(&piece);
        for batch in parquet.decode(row_group, None, offset, piece)? {
            check_images(spec, &batch).map_err(|e| bad(reader, file, e))?;
            let numbers = numbers_of(spec, &batch).map_err(|e| bad(reader, file, e))?;
            // `index` is the last but one of the columns.
            let (_, index) = &numbers[numbers.len() - 2];
            for value in index {
                if *value != frame as f64 {
                    let reason = format!("frame {frame} is stored as {value}");
                    return Err(bad(reader, file, reason));
                }
                frame += 1;
            }
            each(numbers)?;
        }
        offset = end;
    }
    let found = frame - file.first_frame;
    if found != file.num_frames() {
        let reason = format!("it has {found} frames, {} were written", file.num_frames());
        return Err(bad(reader, file, reason));
    }
    if hex(&sha256.finalize()) != file.sha256 {
        return Err(bad(reader, file, "its checksum differs"));
    }
    Ok(())
}

fn check_images(spec: &DatasetSpec, batch: &RecordBatch) -> Result<(), String> {
    for camera in &spec.cameras {
        let images = batch
            .column_by_name(&camera.name)
            .and_then(|c| c.as_struct_opt());
        let bytes = images.and_then(|images| images.column_by_name("bytes").cloned());
        let bytes = bytes.ok_or_else(|| format!("{} has no bytes", camera.name))?;
        let bytes = bytes.as_binary_opt::<i32>();
        for image in bytes.ok_or_else(|| format!("{} has no bytes", camera.name))? {
            let image = bytes::Bytes::copy_from_slice(image.unwrap_or_default());
            let header = Frame::new(image)
                .map_err(|e| format!("{}: {e}", camera.name))?
                .header;
            if (header.height, header.width) != (camera.height, camera.width) {
                let (height, width) = (header.height, header.width);
                return Err(format!(
                    "{} has an image of {height} x {width}",
                    camera.name
                ));
            }
        }
    }
    Ok(())
}

/// Returns the values of all columns of numbers, in the order of the columns.
fn numbers_of(spec: &DatasetSpec, batch: &RecordBatch) -> Result<Vec<Values>, String> {
    let columns = spec.number_columns().into_iter().map(|name| {
        let column = batch
            .column_by_name(name)
            .ok_or_else(|| format!("{name} is missing"))?;
        let (width, values) = match column.as_fixed_size_list_opt() {
            Some(list) => (list.value_length() as usize, Arc::clone(list.values())),
            None => (1, Arc::clone(column)),
        };
        let values: Vec<f64> = if let Some(floats) = values.as_primitive_opt::<Float32Type>() {
            floats
                .values()
                .iter()
                .map(|value| f64::from(*value))
                .collect()
        } else if let Some(integers) = values.as_primitive_opt::<Int64Type>() {
            integers
                .values()
                .iter()
                .map(|value| *value as f64)
                .collect()
        } else {
            return Err(format!("{name} is {}", values.data_type()));
        };
        if values.len() == width * batch.num_rows() && column.null_count() == 0 {
            Ok((width, values))
        } else {
            Err(format!("{name} has {} values", values.len()))
        }
    });
    columns.collect()
}

/// Collects the rows of `meta/episodes`.
struct Episodes<'a> {
    reader: &'a Reader,
    names: Vec<&'a str>,
    /// Instructions so far.
    tasks: Vec<String>,
    /// Values of the episode under way, by column.
    pending: Vec<Values>,
    pending_rows: usize,
    /// Number of the next episode in its data file.
    next: usize,
    rows: Vec<EpisodeRow>,
    files: usize,
    from: u64,
}

impl<'a> Episodes<'a> {
    fn new(reader: &'a Reader, spec: &'a DatasetSpec) -> Self {
        Self {
            reader,
            names: spec.number_columns(),
            tasks: Vec::new(),
            pending: Vec::new(),
            pending_rows: 0,
            next: 0,
            rows: Vec::new(),
            files: 0,
            from: 0,
        }
    }

    /// Takes rows of a data file; they may end in the middle of an episode.
    fn push(&mut self, file: &FileRecord, numbers: &[Values]) -> Result<()> {
        if self.next == 0 && self.pending_rows == 0 {
            self.tasks.extend(file.new_tasks.iter().cloned());
        }
        let rows = numbers.last().map_or(0, |(_, task)| task.len());
        let mut start = 0;
        while start < rows {
            let Some(episode) = file.episodes.get(self.next) else {
                return Err(bad(
                    self.reader,
                    file,
                    "it has more frames than were written",
                ));
            };
            let end = rows.min(start + episode.length as usize - self.pending_rows);
            if self.pending.is_empty() {
                self.pending = numbers
                    .iter()
                    .map(|(width, _)| (*width, Vec::new()))
                    .collect();
            }
            for ((width, pending), (_, values)) in self.pending.iter_mut().zip(numbers) {
                pending.extend_from_slice(&values[start * *width..end * *width]);
            }
            self.pending_rows += end - start;
            start = end;
            if self.pending_rows as u64 == episode.length {
                self.end_episode(file)?;
            }
        }
        Ok(())
    }

    fn end_episode(&mut self, file: &FileRecord) -> Result<()> {
        let record = &file.episodes[self.next];
        let wanted = (file.first_episode + self.next as u64) as f64;
        // The last columns are frame_index, episode_index, index, task_index.
        if let [.., (_, frame), (_, episode), _, (_, task)] = &self.pending[..] {
            let numbered = frame
                .iter()
                .zip(0_u32..)
                .all(|(frame, i)| *frame == f64::from(i));
            let tasked = task.iter().all(|task| *task == record.task as f64);
            if !numbered || !tasked || episode.iter().any(|episode| *episode != wanted) {
                let reason = format!("the indices of episode {wanted} differ from those written");
                return Err(bad(self.reader, file, reason));
            }
        }
        let stats = self
            .pending
            .drain(..)
            .map(|(width, rows)| FeatureStats::of(width, &rows));
        self.rows.push(EpisodeRow {
            episode: file.first_episode + self.next as u64,
            task: self.tasks[record.task as usize].clone(),
            length: record.length,
            data_file: file.index,
            from: self.from,
            stats: stats.collect(),
        });
        self.from += record.length;
        self.pending_rows = 0;
        self.next += 1;
        match self.rows.len() {
            EPISODES_A_FILE => self.flush(),
            _ => Ok(()),
        }
    }

    fn end_of(&mut self, file: &FileRecord) -> Result<()> {
        if self.next != file.episodes.len() || self.pending_rows > 0 {
            return Err(bad(
                self.reader,
                file,
                "it has fewer episodes than were written",
            ));
        }
        self.next = 0;
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if !self.rows.is_empty() {
            let path = format!("meta/episodes/chunk-000/file-{:03}.parquet", self.files);
            let bytes = metadata::episodes(&self.names, &self.rows, self.files as u64)?;
            self.reader.put(&path, bytes)?;
            self.files += 1;
            self.rows.clear();
        }
        Ok(())
    }
}

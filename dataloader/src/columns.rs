//! The low-dimensional columns of row groups: actions, states, episodes, frames and tasks.
//!
//! They are a few thousandths of the bytes. With the images of a row group they come in the same
//! request; alone, for indexes and statistics, they are read by small ones.

use std::ops::Range;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, Float64Type, Int32Type, Int64Type};
use arrow_array::{Array, RecordBatch};
use futures::{StreamExt, TryStreamExt};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder};
use parquet::file::metadata::ParquetMetaData;
use pollen_core::no_panic;
use pollen_storage::Storage;

use crate::error::Result;
use crate::parquet_file::{FileName, Ranges, leaves_of};

/// Ranges closer than this are fetched together.
const COALESCE: u64 = 32 << 10;
const REQUESTS: usize = 8;
const BATCH_ROWS: usize = 8192;

/// Which columns hold what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ColumnNames {
    pub(crate) action: String,
    /// Empty for none.
    pub(crate) state: String,
}

/// Rows of numbers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows {
    /// Dimensions of a row.
    pub width: usize,
    /// The values, [rows, width].
    pub values: Vec<f32>,
}

impl Rows {
    /// Returns one row, `width` values.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.width..(row + 1) * self.width]
    }

    pub(crate) fn len(&self) -> usize {
        self.values.len().checked_div(self.width).unwrap_or(0)
    }
}

/// The low-dimensional columns of consecutive rows of a file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Columns {
    /// Actions, stored or transformed.
    pub action: Rows,
    /// Proprioception; of width 0 where there is none.
    pub state: Rows,
    /// Number of each row's episode.
    pub episode: Vec<u64>,
    /// Number of each row in its episode.
    pub frame: Vec<u64>,
    /// Number of each row's task.
    pub task: Vec<u64>,
}

impl Columns {
    /// Appends the rows of a batch that has the named columns.
    pub(crate) fn append(
        &mut self,
        batch: &RecordBatch,
        columns: &ColumnNames,
        name: &FileName,
    ) -> Result<()> {
        self.episode.extend(integers(batch, "episode_index", name)?);
        self.frame.extend(integers(batch, "frame_index", name)?);
        self.task.extend(integers(batch, "task_index", name)?);
        append(&mut self.action, batch, &columns.action, name)?;
        if !columns.state.is_empty() {
            append(&mut self.state, batch, &columns.state, name)?;
        }
        Ok(())
    }

    /// Joins consecutive rows; nothing when they are not of the same widths.
    pub(crate) fn and(mut self, mut next: Self) -> Option<Self> {
        if self.episode.is_empty() {
            return Some(next);
        }
        for (rows, next) in [
            (&mut self.action, &mut next.action),
            (&mut self.state, &mut next.state),
        ] {
            if !next.values.is_empty() && next.width != rows.width {
                return None;
            }
            rows.values.reserve_exact(next.values.len());
            rows.values.append(&mut next.values);
        }
        for (numbers, next) in [
            (&mut self.episode, &mut next.episode),
            (&mut self.frame, &mut next.frame),
            (&mut self.task, &mut next.task),
        ] {
            numbers.reserve_exact(next.len());
            numbers.append(next);
        }
        Some(self)
    }

    /// Drops the first rows.
    pub(crate) fn skip(&mut self, rows: usize) {
        if rows == 0 {
            return;
        }
        for column in [&mut self.action, &mut self.state] {
            column.values = column.values.split_off(rows * column.width);
        }
        for numbers in [&mut self.episode, &mut self.frame, &mut self.task] {
            *numbers = numbers.split_off(rows);
        }
    }

    /// Drops all but the first rows.
    pub(crate) fn truncate(&mut self, rows: usize) {
        for column in [&mut self.action, &mut self.state] {
            column.values.truncate(rows * column.width);
        }
        for numbers in [&mut self.episode, &mut self.frame, &mut self.task] {
            numbers.truncate(rows);
        }
    }

    /// Returns what it takes in memory.
    pub(crate) fn bytes(&self) -> u64 {
        let floats = self.action.values.capacity() + self.state.values.capacity();
        let numbers = self.episode.capacity() + self.frame.capacity() + self.task.capacity();
        (4 * floats + 8 * numbers) as u64
    }
}

/// Returns the leaves of a file that hold the columns.
pub(crate) fn column_leaves(
    name: &FileName,
    metadata: &ParquetMetaData,
    columns: &ColumnNames,
) -> Result<Vec<usize>> {
    let mut roots = vec![
        "episode_index",
        "frame_index",
        "task_index",
        &columns.action,
    ];
    if !columns.state.is_empty() {
        roots.push(&columns.state);
    }
    let mut leaves = Vec::new();
    for root in roots {
        let found = leaves_of(metadata, root);
        if found.is_empty() {
            return Err(name.bad(format!("has no column `{root}`")));
        }
        leaves.extend(found);
    }
    Ok(leaves)
}

/// Reads the columns of consecutive row groups of a file with ranged requests.
pub(crate) async fn read_columns(
    storage: &Storage,
    name: &FileName,
    footer: &ArrowReaderMetadata,
    file_bytes: u64,
    columns: &ColumnNames,
    row_groups: Range<usize>,
) -> Result<Columns> {
    let metadata = footer.metadata();
    let leaves = column_leaves(name, metadata, columns)?;
    let groups = metadata
        .row_groups()
        .get(row_groups.clone())
        .ok_or_else(|| name.bad("its footer has fewer row groups than the index"))?;
    let chunks = groups.iter().flat_map(|group| {
        leaves.iter().map(|&leaf| {
            let (start, len) = group.column(leaf).byte_range();
            start..start + len
        })
    });
    let fetches = coalesce(chunks.collect()).into_iter().map(|range| {
        let start = range.start;
        async move {
            let bytes = storage.get_range(&name.path, range).await;
            bytes
                .map(|bytes| (start, bytes))
                .map_err(|e| name.failed(e))
        }
    });
    let fetched: Vec<_> = futures::stream::iter(fetches)
        .buffered(REQUESTS)
        .try_collect()
        .await?;
    let ranges = Ranges::new(file_bytes, fetched);
    let decode = || decode_columns(name, footer, ranges, (leaves, row_groups), columns);
    no_panic(decode, |said| name.bad(said))
}

fn decode_columns(
    name: &FileName,
    footer: &ArrowReaderMetadata,
    ranges: Ranges,
    (leaves, row_groups): (Vec<usize>, Range<usize>),
    columns: &ColumnNames,
) -> Result<Columns> {
    let schema = footer.metadata().file_metadata().schema_descr();
    let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(ranges, footer.clone())
        .with_projection(ProjectionMask::leaves(schema, leaves))
        .with_row_groups(row_groups.collect())
        .with_batch_size(BATCH_ROWS)
        .build()
        .map_err(|e| name.bad(e.to_string()))?;
    let mut all = Columns::default();
    for batch in reader {
        let batch = batch.map_err(|e| name.bad(e.to_string()))?;
        all.append(&batch, columns, name)?;
    }
    Ok(all)
}

/// Joins ranges that touch or nearly do.
fn coalesce(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end + COALESCE => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

fn integers(batch: &RecordBatch, column: &str, name: &FileName) -> Result<Vec<u64>> {
    let array = batch
        .column_by_name(column)
        .ok_or_else(|| name.bad(format!("has no column `{column}`")))?;
    let values: Vec<i64> = if let Some(array) = array.as_primitive_opt::<Int64Type>() {
        array.values().to_vec()
    } else if let Some(array) = array.as_primitive_opt::<Int32Type>() {
        array.values().iter().copied().map(i64::from).collect()
    } else {
        return Err(name.bad(format!("its column `{column}` does not hold whole numbers")));
    };
    if array.null_count() > 0 || values.iter().any(|&v| v < 0) {
        return Err(name.bad(format!("its column `{column}` has empty or negative rows")));
    }
    Ok(values.into_iter().map(|v| v as u64).collect())
}

/// Appends a batch's rows of a list (or plain number) column.
fn append(rows: &mut Rows, batch: &RecordBatch, column: &str, name: &FileName) -> Result<()> {
    let array = batch
        .column_by_name(column)
        .ok_or_else(|| name.bad(format!("has no column `{column}`")))?;
    let uneven = || {
        name.bad(format!(
            "its column `{column}` has rows of different lengths"
        ))
    };
    let (width, values) = if let Some(list) = array.as_fixed_size_list_opt() {
        (list.value_length() as usize, list.values())
    } else if let Some(list) = array.as_list_opt::<i32>() {
        let lengths = list.offsets().windows(2).map(|pair| pair[1] - pair[0]);
        (even(lengths).ok_or_else(uneven)?, list.values())
    } else if let Some(list) = array.as_list_opt::<i64>() {
        let lengths = list.offsets().windows(2).map(|pair| pair[1] - pair[0]);
        (even(lengths).ok_or_else(uneven)?, list.values())
    } else {
        (1, array)
    };
    if batch.num_rows() == 0 {
        return Ok(());
    }
    if array.null_count() > 0 || values.null_count() > 0 {
        return Err(name.bad(format!("its column `{column}` has empty rows or values")));
    }
    if rows.width != 0 && rows.width != width || values.len() != width * batch.num_rows() {
        return Err(uneven());
    }
    rows.width = width;
    if let Some(values) = values.as_primitive_opt::<Float32Type>() {
        rows.values.extend_from_slice(values.values());
    } else if let Some(values) = values.as_primitive_opt::<Float64Type>() {
        rows.values
            .extend(values.values().iter().map(|&v| v as f32));
    } else {
        return Err(name.bad(format!(
            "its column `{column}` holds {}, not float32 or float64",
            values.data_type()
        )));
    }
    Ok(())
}

/// Returns the one length that all rows have.
fn even<T: PartialEq + TryInto<usize>>(mut lengths: impl Iterator<Item = T>) -> Option<usize> {
    let first = lengths.next()?;
    lengths
        .all(|length| length == first)
        .then(|| first.try_into().ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_joined_when_near() {
        let near = 100..200;
        let next = 200 + COALESCE..300 + COALESCE;
        let far = 10 * COALESCE..10 * COALESCE + 5;
        let joined = coalesce(vec![far.clone(), next.clone(), near.clone(), 7..7]);
        assert_eq!(joined, [near.start..next.end, far]);
    }

    #[test]
    fn consecutive_rows_are_joined_and_skipped() {
        let columns = |width: usize, episodes: &[u64]| Columns {
            action: Rows {
                width,
                values: (0..width * episodes.len()).map(|v| v as f32).collect(),
            },
            episode: episodes.to_vec(),
            frame: episodes.to_vec(),
            task: episodes.to_vec(),
            ..Columns::default()
        };
        let none = Columns::default;
        let joined = none()
            .and(columns(2, &[3, 4]))
            .and_then(|c| c.and(columns(2, &[5])));
        let mut joined = joined.and_then(|c| c.and(none())).expect("widths agree");
        assert_eq!(joined.action.values, [0.0, 1.0, 2.0, 3.0, 0.0, 1.0]);
        assert_eq!(joined.bytes(), 4 * 6 + 8 * 9);
        joined.skip(1);
        assert_eq!(joined.action.values, [2.0, 3.0, 0.0, 1.0]);
        assert_eq!((joined.episode, joined.task), (vec![4, 5], vec![4, 5]));
        assert!(columns(2, &[1]).and(columns(3, &[1])).is_none());
    }

    #[test]
    fn rows_must_have_one_length() {
        assert_eq!(even([3_i32, 3, 3].into_iter()), Some(3));
        assert_eq!(even([3_i32, 2].into_iter()), None);
        assert_eq!(even(std::iter::empty::<i32>()), None);
    }
}

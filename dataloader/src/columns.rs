//! The low-dimensional columns of one data file: actions, states, episodes, frames and tasks.
//!
//! They are a few thousandths of the bytes and are read once per file, because an action chunk may
//! reach into the next row group.

use std::ops::Range;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, Float64Type, Int32Type, Int64Type};
use arrow_array::{Array, RecordBatch};
use futures::{StreamExt, TryStreamExt};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder};
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

/// Rows of numbers, each `width` wide.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Rows {
    pub(crate) width: usize,
    pub(crate) values: Vec<f32>,
}

impl Rows {
    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.width..(row + 1) * self.width]
    }

    pub(crate) fn len(&self) -> usize {
        self.values.len().checked_div(self.width).unwrap_or(0)
    }
}

/// The low-dimensional columns of one data file, row by row.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct FileColumns {
    pub(crate) action: Rows,
    pub(crate) state: Rows,
    pub(crate) episode: Vec<u64>,
    pub(crate) frame: Vec<u64>,
    pub(crate) task: Vec<u64>,
}

/// Reads the columns of a file with ranged requests.
pub(crate) async fn read_columns(
    storage: &Storage,
    name: &FileName,
    footer: &ArrowReaderMetadata,
    file_bytes: u64,
    columns: &ColumnNames,
) -> Result<FileColumns> {
    let metadata = footer.metadata();
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
    let chunks = metadata.row_groups().iter().flat_map(|group| {
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
    let decode = || decode_columns(name, footer, ranges, leaves, columns);
    no_panic(decode, |said| name.bad(said))
}

fn decode_columns(
    name: &FileName,
    footer: &ArrowReaderMetadata,
    ranges: Ranges,
    leaves: Vec<usize>,
    columns: &ColumnNames,
) -> Result<FileColumns> {
    let schema = footer.metadata().file_metadata().schema_descr();
    let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(ranges, footer.clone())
        .with_projection(ProjectionMask::leaves(schema, leaves))
        .with_batch_size(BATCH_ROWS)
        .build()
        .map_err(|e| name.bad(e.to_string()))?;
    let mut all = FileColumns::default();
    for batch in reader {
        let batch = batch.map_err(|e| name.bad(e.to_string()))?;
        all.episode.extend(integers(&batch, "episode_index", name)?);
        all.frame.extend(integers(&batch, "frame_index", name)?);
        all.task.extend(integers(&batch, "task_index", name)?);
        append(&mut all.action, &batch, &columns.action, name)?;
        if !columns.state.is_empty() {
            append(&mut all.state, &batch, &columns.state, name)?;
        }
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
    fn rows_must_have_one_length() {
        assert_eq!(even([3_i32, 3, 3].into_iter()), Some(3));
        assert_eq!(even([3_i32, 2].into_iter()), None);
        assert_eq!(even(std::iter::empty::<i32>()), None);
    }
}

//! Parquet footers, and readers over ranges of a file that were fetched before.

use std::io::Cursor;
use std::ops::Range;
use std::sync::Arc;

use arrow_schema::{DataType, Field, Fields, Schema};
use bytes::Bytes;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use parquet::file::reader::{ChunkReader, Length};
use pollen_core::no_panic;
use pollen_storage::Storage;

use crate::error::{Error, Result};

/// Fetched with the first request; covers the footer of a file of about 40 row groups.
const FOOTER_GUESS: u64 = 64 << 10;
const TAIL: u64 = 8;
/// Most rows of a row group: what the usual writers make at most. A group is decoded as a whole,
/// so that a broken count must not be believed.
pub(crate) const MAX_ROWS: u64 = 1 << 20;

/// Names a file of a dataset in errors.
#[derive(Clone, Debug)]
pub(crate) struct FileName {
    pub(crate) dataset: String,
    pub(crate) path: String,
}

impl FileName {
    pub(crate) fn bad(&self, reason: impl Into<String>) -> Error {
        Error::File {
            dataset: self.dataset.clone(),
            path: self.path.clone(),
            reason: reason.into(),
        }
    }

    /// A file that the index names but storage lacks, or that ends early, is corrupt data.
    pub(crate) fn failed(&self, source: pollen_storage::Error) -> Error {
        if source.is_not_found() {
            return self.bad("the object is missing; restore it or index the dataset again");
        }
        Error::Storage {
            dataset: self.dataset.clone(),
            source,
        }
    }
}

/// Reads a file's footer. Image bytes come out as views of the fetched ranges.
pub(crate) async fn read_footer(
    storage: &Storage,
    name: &FileName,
    file_bytes: u64,
) -> Result<ArrowReaderMetadata> {
    let bytes = read_footer_bytes(storage, name, file_bytes).await?;
    let parse = || {
        let bad = |error: ParquetError| name.bad(error.to_string());
        let metadata = ParquetMetaDataReader::decode_metadata(&bytes).map_err(bad)?;
        check_sizes(&metadata, file_bytes).map_err(|reason| name.bad(reason))?;
        with_views(Arc::new(metadata)).map_err(bad)
    };
    no_panic(parse, |said| name.bad(said))
}

/// Reads the bytes that describe a file: where its columns lie, how long and of what range they are.
pub(crate) async fn read_footer_bytes(
    storage: &Storage,
    name: &FileName,
    file_bytes: u64,
) -> Result<Bytes> {
    let failed = |source| name.failed(source);
    let start = file_bytes.saturating_sub(FOOTER_GUESS);
    let tail = storage
        .get_range(&name.path, start..file_bytes)
        .await
        .map_err(failed)?;
    let footer = footer_len(&tail).ok_or_else(|| {
        name.bad("does not end like a Parquet file; it is truncated or of another format")
    })?;
    let footer_start = file_bytes
        .checked_sub(TAIL + footer)
        .ok_or_else(|| name.bad("its footer is longer than the file"))?;
    if footer_start >= start {
        return Ok(tail.slice((footer_start - start) as usize..tail.len() - TAIL as usize));
    }
    let footer = storage.get_range(&name.path, footer_start..file_bytes - TAIL);
    footer.await.map_err(failed)
}

/// Checks the numbers that readers take for offsets and lengths.
fn check_sizes(metadata: &ParquetMetaData, file_bytes: u64) -> Result<(), String> {
    for (number, group) in metadata.row_groups().iter().enumerate() {
        if !(0..=MAX_ROWS as i64).contains(&group.num_rows()) {
            return Err(format!(
                "its row group {number} has {} rows; write {MAX_ROWS} at most",
                group.num_rows()
            ));
        }
        for column in group.columns() {
            let start = column
                .dictionary_page_offset()
                .unwrap_or_else(|| column.data_page_offset());
            let end = start.checked_add(column.compressed_size());
            let inside = end.is_some_and(|end| start <= end && end as u64 <= file_bytes);
            if start < 0 || !inside || column.num_values() < 0 {
                return Err(format!(
                    "its footer contradicts itself at row group {number}, column `{}`",
                    column.column_path()
                ));
            }
        }
    }
    Ok(())
}

fn footer_len(tail: &[u8]) -> Option<u64> {
    let (length, magic) = tail.last_chunk::<8>()?.split_at(4);
    (magic == b"PAR1").then(|| {
        u64::from(u32::from_le_bytes([
            length[0], length[1], length[2], length[3],
        ]))
    })
}

/// Asks for views in place of copies wherever the schema has strings or bytes.
fn with_views(metadata: Arc<ParquetMetaData>) -> Result<ArrowReaderMetadata, ParquetError> {
    let plain = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    let stored = ArrowReaderMetadata::try_new(Arc::clone(&metadata), plain)?;
    let schema = Schema::new(view_fields(stored.schema().fields()));
    let options = ArrowReaderOptions::new().with_schema(Arc::new(schema));
    ArrowReaderMetadata::try_new(metadata, options)
}

fn view_fields(fields: &Fields) -> Fields {
    fields
        .iter()
        .map(|field| Field::clone(field).with_data_type(view_type(field.data_type())))
        .collect()
}

fn view_type(data_type: &DataType) -> DataType {
    match data_type {
        DataType::Binary => DataType::BinaryView,
        DataType::Utf8 => DataType::Utf8View,
        DataType::Struct(fields) => DataType::Struct(view_fields(fields)),
        other => other.clone(),
    }
}

/// Returns the bytes a row group takes in its file: the span of all its column chunks.
pub(crate) fn row_group_range(metadata: &ParquetMetaData, row_group: usize) -> Range<u64> {
    let columns = metadata.row_group(row_group).columns();
    let spans = columns.iter().map(|column| {
        let (start, len) = column.byte_range();
        start..start + len
    });
    spans
        .reduce(|all, one| all.start.min(one.start)..all.end.max(one.end))
        .unwrap_or(0..0)
}

/// Returns the leaf columns below the root column `name`.
pub(crate) fn leaves_of(metadata: &ParquetMetaData, name: &str) -> Vec<usize> {
    let schema = metadata.file_metadata().schema_descr();
    (0..schema.num_columns())
        .filter(|&leaf| schema.get_column_root(leaf).name() == name)
        .collect()
}

/// A file of which some ranges are in memory.
#[derive(Clone, Debug)]
pub(crate) struct Ranges {
    file_bytes: u64,
    /// Sorted, disjoint.
    ranges: Vec<(u64, Bytes)>,
}

impl Ranges {
    pub(crate) fn new(file_bytes: u64, mut ranges: Vec<(u64, Bytes)>) -> Self {
        ranges.sort_unstable_by_key(|(start, _)| *start);
        Self { file_bytes, ranges }
    }

    fn from(&self, start: u64) -> Result<Bytes, ParquetError> {
        let at = self.ranges.partition_point(|(first, _)| *first <= start);
        let found = at.checked_sub(1).map(|i| &self.ranges[i]);
        found
            .and_then(|(first, bytes)| {
                let skip = (start - first) as usize;
                (skip < bytes.len()).then(|| bytes.slice(skip..))
            })
            .ok_or_else(|| ParquetError::EOF(format!("byte {start} was not fetched")))
    }
}

impl Length for Ranges {
    fn len(&self) -> u64 {
        self.file_bytes
    }
}

impl ChunkReader for Ranges {
    type T = Cursor<Bytes>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        Ok(Cursor::new(self.from(start)?))
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        let bytes = self.from(start)?;
        if bytes.len() < length {
            let end = start + length as u64;
            return Err(ParquetError::EOF(format!("byte {end} was not fetched")));
        }
        Ok(bytes.slice(..length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_answer_only_for_what_they_hold() {
        let bytes = Bytes::from_static(b"0123456789");
        let ranges = Ranges::new(100, vec![(50, bytes.slice(5..)), (10, bytes.slice(..5))]);
        assert_eq!(ranges.get_bytes(11, 3).expect("held"), "123");
        assert_eq!(ranges.get_bytes(50, 5).expect("held"), "56789");
        for (start, length) in [(9, 1), (15, 1), (13, 3), (55, 1)] {
            assert!(ranges.get_bytes(start, length).is_err(), "{start} {length}");
        }
    }

    #[test]
    fn a_footer_needs_the_magic() {
        assert_eq!(footer_len(b"....\x02\x01\0\0PAR1"), Some(258));
        assert_eq!(footer_len(b"\x02\x01\0\0PAR2"), None);
        assert_eq!(footer_len(b"PAR1"), None);
    }
}

//! Reads Parquet files row group by row group, with one request each.

use std::io::Cursor;
use std::ops::Range;
use std::sync::Arc;

use arrow_array::RecordBatch;
use bytes::Bytes;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder,
};
use parquet::errors::ParquetError;
use parquet::file::metadata::{PageIndexPolicy, ParquetMetaDataReader, RowGroupMetaData};
use parquet::file::reader::{ChunkReader, Length};
use pollen_core::no_panic;

use crate::error::{Error, Result};
use crate::reader::Reader;

/// Fetched with the first request; covers most footers.
const FOOTER_GUESS: u64 = 256 << 10;
const TAIL: usize = 8;

/// A Parquet file and its footer.
#[derive(Clone, Debug)]
pub(crate) struct ParquetFile {
    reader: Reader,
    path: String,
    bytes: u64,
    metadata: ArrowReaderMetadata,
}

impl ParquetFile {
    pub(crate) fn open(reader: &Reader, path: &str) -> Result<Self> {
        let bytes = reader.head(path)?;
        let start = bytes.saturating_sub(FOOTER_GUESS);
        let tail = reader.get_range(path, start..bytes)?;
        let broken =
            |reason: &dyn ToString| Error::corrupt(reader.name(path), bytes, reason.to_string());
        let footer = match tail.last_chunk::<TAIL>() {
            Some([a, b, c, d, b'P', b'A', b'R', b'1']) => u32::from_le_bytes([*a, *b, *c, *d]),
            _ => {
                return Err(broken(
                    &"it does not end like a Parquet file; it may be cut off",
                ));
            }
        };
        let footer_start = bytes
            .checked_sub(TAIL as u64 + u64::from(footer))
            .ok_or_else(|| broken(&"its footer is longer than the file"))?;
        let footer = if footer_start >= start {
            tail.slice((footer_start - start) as usize..tail.len() - TAIL)
        } else {
            reader.get_range(path, footer_start..bytes - TAIL as u64)?
        };
        let parse = || {
            let metadata =
                ParquetMetaDataReader::decode_metadata(&footer).map_err(|e| broken(&e))?;
            let groups = metadata.row_groups().iter();
            for column in groups.flat_map(RowGroupMetaData::columns) {
                let start = column.dictionary_page_offset();
                let start = start.unwrap_or_else(|| column.data_page_offset());
                if start < 0 || column.compressed_size() < 0 {
                    return Err(broken(&"its footer contradicts itself"));
                }
            }
            let options = ArrowReaderOptions::new().with_page_index_policy(PageIndexPolicy::Skip);
            ArrowReaderMetadata::try_new(Arc::new(metadata), options).map_err(|e| broken(&e))
        };
        let metadata = no_panic(parse, |said| broken(&said))?;
        Ok(Self {
            reader: reader.clone(),
            path: path.into(),
            bytes,
            metadata,
        })
    }

    /// Returns the name for messages.
    pub(crate) fn name(&self) -> String {
        self.reader.name(&self.path)
    }

    pub(crate) fn num_bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn num_row_groups(&self) -> usize {
        self.metadata.metadata().num_row_groups()
    }

    /// Returns whether the file has the root column.
    pub(crate) fn has(&self, column: &str) -> bool {
        self.metadata.schema().column_with_name(column).is_some()
    }

    /// Returns the bytes that the columns of a row group span in the file; no columns means all.
    pub(crate) fn span(&self, row_group: usize, columns: Option<&[&str]>) -> Range<u64> {
        let metadata = self.metadata.metadata();
        let schema = metadata.file_metadata().schema_descr();
        let chunks = metadata.row_group(row_group).columns().iter().enumerate();
        let wanted = chunks.filter(|(leaf, _)| {
            columns.is_none_or(|columns| columns.contains(&schema.get_column_root(*leaf).name()))
        });
        let spans = wanted.map(|(_, chunk)| {
            let (start, length) = chunk.byte_range();
            start..start.saturating_add(length)
        });
        spans
            .reduce(|all, one| all.start.min(one.start)..all.end.max(one.end))
            .unwrap_or(0..0)
    }

    /// Reads columns of a row group; no columns means all.
    pub(crate) fn read(
        &self,
        row_group: usize,
        columns: Option<&[&str]>,
    ) -> Result<Vec<RecordBatch>> {
        let span = self.span(row_group, columns);
        if span.end > self.bytes {
            let reason = format!("row group {row_group} lies behind the end of the file");
            return Err(Error::corrupt(self.name(), self.bytes, reason));
        }
        let piece = self.reader.get_range(&self.path, span.clone())?;
        self.decode(row_group, columns, span.start, piece)
    }

    /// Decodes columns of a row group whose bytes were fetched before.
    pub(crate) fn decode(
        &self,
        row_group: usize,
        columns: Option<&[&str]>,
        offset: u64,
        piece: Bytes,
    ) -> Result<Vec<RecordBatch>> {
        let input = Piece {
            file_bytes: self.bytes,
            offset,
            bytes: piece,
        };
        let broken = |e: &dyn ToString| {
            let reason = format!("row group {row_group}: {}", e.to_string());
            Error::corrupt(self.name(), offset, reason)
        };
        let mut builder =
            ParquetRecordBatchReaderBuilder::new_with_metadata(input, self.metadata.clone())
                .with_row_groups(vec![row_group])
                .with_batch_size(1024);
        if let Some(columns) = columns {
            let schema = self.metadata.metadata().file_metadata().schema_descr();
            let leaves = (0..schema.num_columns())
                .filter(|leaf| columns.contains(&schema.get_column_root(*leaf).name()));
            let mask = ProjectionMask::leaves(schema, leaves);
            builder = builder.with_projection(mask);
        }
        let decode = || {
            let batches = builder.build().map_err(|e| broken(&e))?;
            batches.map(|batch| batch.map_err(|e| broken(&e))).collect()
        };
        no_panic(decode, |said| broken(&said))
    }
}

/// A part of a file that is in memory.
struct Piece {
    file_bytes: u64,
    offset: u64,
    bytes: Bytes,
}

impl Length for Piece {
    fn len(&self) -> u64 {
        self.file_bytes
    }
}

impl ChunkReader for Piece {
    type T = Cursor<Bytes>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        let start = self.index(start, 0)?;
        Ok(Cursor::new(self.bytes.slice(start..)))
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        let start = self.index(start, length)?;
        Ok(self.bytes.slice(start..start + length))
    }
}

impl Piece {
    fn index(&self, start: u64, length: usize) -> Result<usize, ParquetError> {
        let outside = || ParquetError::EOF(format!("byte {start} is outside the column"));
        let start = start.checked_sub(self.offset).ok_or_else(outside)? as usize;
        let end = start.checked_add(length).ok_or_else(outside)?;
        (end <= self.bytes.len())
            .then_some(start)
            .ok_or_else(outside)
    }
}

//! One Parquet data file that goes to storage while it is being made.
//!
//! ```text
//! frames -> ArrowWriter (holds one row group) -> flush -> sink -> channel of 2 -> put_stream
//!                                                           \-> sha256, crc32c
//! ```

use std::io::{self, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use arrow_array::builder::{BinaryBuilder, StringBuilder};
use arrow_array::{
    ArrayRef, FixedSizeListArray, Float32Array, Int64Array, RecordBatch, StructArray,
};
use arrow_schema::SchemaRef;
use bytes::Bytes;
use futures::channel::mpsc::{Receiver, Sender, channel};
use futures::{SinkExt, Stream, StreamExt};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties, WriterVersion};
use pollen_storage::Storage;
use sha2::{Digest, Sha256};
use tokio::task::JoinHandle;

use crate::episode::{Episode, Matrix};
use crate::error::{Error, Result};
use crate::picture::{Frame, PictureKind};
use crate::schema::{DatasetSpec, element, image_fields};

const PAGE_BYTES: usize = 1 << 20;
/// Values between two looks at the size of a page; a frame has some ten kilobytes.
const VALUES_A_BATCH: usize = 16;

/// Where an episode stands in its dataset.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) episode: u64,
    /// Global number of the episode's first frame.
    pub(crate) first_frame: u64,
    pub(crate) task: u64,
}

/// What is known of a file once it is complete.
#[derive(Clone, Debug)]
pub(crate) struct Finished {
    pub(crate) bytes: u64,
    pub(crate) sha256: String,
    pub(crate) row_groups: u64,
}

#[derive(Clone, Debug, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Sink {
    fn take(&self) -> Bytes {
        let mut buffer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *buffer).into()
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut buffer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        buffer.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file under way. Dropping it abandons the upload: nothing appears under its name.
pub(crate) struct DataFile {
    path: String,
    spec: DatasetSpec,
    schema: SchemaRef,
    writer: ArrowWriter<Sink>,
    sink: Sink,
    /// `None` ends the file; a channel that closes without it abandons the file.
    pieces: Sender<Option<Bytes>>,
    upload: JoinHandle<pollen_storage::Result<u64>>,
    sha256: Sha256,
    bytes: u64,
    row_groups: u64,
}

impl DataFile {
    pub(crate) fn create(storage: &Storage, path: String, spec: &DatasetSpec) -> Result<Self> {
        let schema = spec.arrow();
        let sink = Sink::default();
        let writer =
            ArrowWriter::try_new(sink.clone(), Arc::clone(&schema), Some(properties(spec)))
                .map_err(|source| Error::Write {
                    file: path.clone(),
                    source,
                })?;
        let (pieces, receiver) = channel(1);
        let (storage, name) = (storage.clone(), path.clone());
        let upload = tokio::spawn(async move {
            let pieces = Box::pin(until_end(receiver));
            storage.put_stream(&name, pieces).await
        });
        Ok(Self {
            path,
            spec: spec.clone(),
            schema,
            writer,
            sink,
            pieces,
            upload,
            sha256: Sha256::new(),
            bytes: 0,
            row_groups: 0,
        })
    }

    /// Adds frames to the row group under way.
    pub(crate) fn write(
        &mut self,
        episode: &Episode,
        rows: Range<usize>,
        place: Place,
    ) -> Result<()> {
        let mut start = rows.start;
        while start < rows.end {
            // A batch is copied before it is encoded: keep it small.
            let mut end = start;
            let mut bytes = 0;
            while end < rows.end && bytes < PAGE_BYTES as u64 {
                bytes += episode.frame_bytes(end);
                end += 1;
            }
            let batch = self.batch(episode, start..end, place);
            let written = batch.and_then(|batch| self.writer.write(&batch));
            written.map_err(|source| self.failed(source))?;
            start = end;
        }
        Ok(())
    }

    /// Ends the row group under way and sends it off.
    pub(crate) async fn flush(&mut self) -> Result<()> {
        if self.writer.in_progress_rows() == 0 {
            return Ok(());
        }
        let flushed = self.writer.flush();
        flushed.map_err(|source| self.failed(source))?;
        self.row_groups += 1;
        self.send().await
    }

    /// Writes the footer and waits until the file is stored.
    pub(crate) async fn finish(mut self) -> Result<Finished> {
        self.flush().await?;
        let ended = self.writer.finish();
        ended.map_err(|source| self.failed(source))?;
        self.send().await?;
        let sent = self.pieces.send(None).await;
        let stored = join(self.upload).await?;
        if sent.is_err() || stored != self.bytes {
            return Err(Error::Verification {
                file: self.path,
                reason: format!("{stored} of {} bytes were taken", self.bytes),
            });
        }
        Ok(Finished {
            bytes: self.bytes,
            sha256: hex(&self.sha256.finalize()),
            row_groups: self.row_groups,
        })
    }

    async fn send(&mut self) -> Result<()> {
        let piece = self.sink.take();
        self.sha256.update(&piece);
        self.bytes += piece.len() as u64;
        if self.pieces.send(Some(piece)).await.is_ok() {
            return Ok(());
        }
        // The upload has ended before the file: its result says why.
        let stored = join(&mut self.upload).await?;
        Err(Error::Verification {
            file: self.path.clone(),
            reason: format!("the upload ended after {stored} bytes"),
        })
    }

    fn failed(&self, source: ParquetError) -> Error {
        Error::Write {
            file: self.path.clone(),
            source,
        }
    }

    fn batch(
        &self,
        episode: &Episode,
        rows: Range<usize>,
        place: Place,
    ) -> Result<RecordBatch, ParquetError> {
        let mut columns: Vec<ArrayRef> = Vec::with_capacity(self.schema.fields().len());
        for frames in &episode.cameras {
            columns.push(images(&frames[rows.clone()], rows.start));
        }
        for numbers in &episode.numbers {
            columns.push(floats(numbers, rows.clone()));
        }
        let fps = self.spec.fps as f32;
        let timestamps = rows.clone().map(|frame| frame as f32 / fps);
        columns.push(Arc::new(Float32Array::from_iter_values(timestamps)));
        let frames = rows.clone().map(|frame| frame as i64);
        columns.push(Arc::new(Int64Array::from_iter_values(frames)));
        let constant = |value: u64| Int64Array::from(vec![value as i64; rows.len()]);
        columns.push(Arc::new(constant(place.episode)));
        let index = rows
            .clone()
            .map(|frame| (place.first_frame + frame as u64) as i64);
        columns.push(Arc::new(Int64Array::from_iter_values(index)));
        columns.push(Arc::new(constant(place.task)));
        Ok(RecordBatch::try_new(Arc::clone(&self.schema), columns)?)
    }
}

fn images(frames: &[Frame], first: usize) -> ArrayRef {
    let size = frames.iter().map(|frame| frame.bytes.len()).sum();
    let mut bytes = BinaryBuilder::with_capacity(frames.len(), size);
    let mut paths = StringBuilder::with_capacity(frames.len(), 16 * frames.len());
    for (i, frame) in frames.iter().enumerate() {
        bytes.append_value(&frame.bytes);
        let extension = match frame.header.kind {
            PictureKind::Jpeg => "jpg",
            PictureKind::Png => "png",
        };
        paths.append_value(format!("frame-{:06}.{extension}", first + i));
    }
    let columns: Vec<ArrayRef> = vec![Arc::new(bytes.finish()), Arc::new(paths.finish())];
    Arc::new(StructArray::new(image_fields(), columns, None))
}

fn floats(matrix: &Matrix, rows: Range<usize>) -> ArrayRef {
    let width = matrix.width;
    let values = matrix.values[rows.start * width..rows.end * width].to_vec();
    let values = Arc::new(Float32Array::from(values));
    if width == 1 {
        return values;
    }
    Arc::new(FixedSizeListArray::new(
        element(),
        width as i32,
        values,
        None,
    ))
}

/// Images plain and uncompressed, all else zstd; no dictionaries.
fn properties(spec: &DatasetSpec) -> WriterProperties {
    let level = ZstdLevel::try_new(3).expect("3 is a level of zstd");
    let mut properties = WriterProperties::builder()
        .set_writer_version(WriterVersion::PARQUET_1_0)
        .set_compression(Compression::ZSTD(level))
        .set_dictionary_enabled(false)
        .set_encoding(Encoding::PLAIN)
        .set_statistics_enabled(EnabledStatistics::Page)
        .set_data_page_size_limit(PAGE_BYTES)
        .set_write_batch_size(VALUES_A_BATCH)
        .set_max_row_group_row_count(None)
        .set_key_value_metadata(Some(vec![KeyValue::new(
            "huggingface".into(),
            spec.hugging_face(),
        )]));
    for leaf in spec.image_leaves() {
        properties = properties
            .set_column_compression(leaf.clone(), Compression::UNCOMPRESSED)
            .set_column_statistics_enabled(leaf, EnabledStatistics::None);
    }
    properties.build()
}

/// Yields pieces until the end is announced; a silent end is an error.
fn until_end(receiver: Receiver<Option<Bytes>>) -> impl Stream<Item = io::Result<Bytes>> + Send {
    futures::stream::unfold(Some(receiver), |state| async {
        let mut receiver = state?;
        match receiver.next().await {
            Some(Some(piece)) => Some((Ok(piece), Some(receiver))),
            Some(None) => None,
            None => Some((Err(io::Error::other("the file was abandoned")), None)),
        }
    })
}

async fn join<T, F>(task: F) -> Result<T>
where
    F: Future<Output = Result<pollen_storage::Result<T>, tokio::task::JoinError>>,
{
    let outcome = task.await.map_err(|error| Error::Panicked {
        reason: error.to_string(),
    })?;
    Ok(outcome?)
}

/// Returns bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

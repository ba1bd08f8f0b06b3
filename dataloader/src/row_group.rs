//! Open row groups: fetched by one request each, checked, and read without copying image bytes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use arrow_array::cast::AsArray;
use arrow_array::{Array, BinaryViewArray};
use bytes::Bytes;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder};
use parquet::basic::Compression;
use pollen_core::no_panic;
use tokio::sync::OnceCell;

use crate::error::Result;
use crate::parquet_file::{FileName, Ranges, leaves_of};
use crate::sidecar::RowGroup;

/// The images of a row group, as views of the fetched bytes.
#[derive(Debug)]
pub(crate) struct OpenRowGroup {
    /// Per camera asked for.
    images: Vec<BinaryViewArray>,
    /// What it keeps in memory.
    bytes: u64,
}

impl OpenRowGroup {
    /// Checks and reads the fetched `bytes` of row group `number` of a file.
    pub(crate) fn read(
        name: &FileName,
        footer: &ArrowReaderMetadata,
        file_bytes: u64,
        number: usize,
        expected: &RowGroup,
        bytes: Bytes,
        features: &[String],
    ) -> Result<Self> {
        let bad = |reason: String| name.bad(format!("row group {number}: {reason}"));
        let found = crc32c::crc32c(&bytes);
        if found != expected.crc32c {
            return Err(bad(format!(
                "crc32c is {found:08x}, the index says {:08x}; restore the file",
                expected.crc32c
            )));
        }
        let metadata = footer.metadata();
        if number >= metadata.num_row_groups() {
            return Err(bad("is not in the file's footer".into()));
        }
        let mut leaves = Vec::new();
        let mut held = bytes.len() as u64;
        for feature in features {
            let found = image_leaf(metadata, feature)
                .ok_or_else(|| bad(format!("the file has no image column `{feature}`")))?;
            let column = metadata.row_group(number).column(found);
            if column.compression() != Compression::UNCOMPRESSED {
                held += column.uncompressed_size().max(0) as u64;
            }
            leaves.push(found);
        }
        let ranges = Ranges::new(file_bytes, vec![(expected.offset, bytes)]);
        let decode = || decode_images(footer, ranges, number, expected.rows, leaves, features);
        let images = no_panic(decode, |said| said).map_err(bad)?;
        Ok(Self {
            images,
            bytes: held,
        })
    }

    /// Returns the encoded image of a camera (numbered as asked for) in a row of this group.
    pub(crate) fn image(&self, camera: usize, row: usize) -> Option<&[u8]> {
        let images = &self.images[camera];
        (row < images.len() && images.is_valid(row)).then(|| images.value(row))
    }
}

/// Reads the image columns of a row group of `rows` rows.
fn decode_images(
    footer: &ArrowReaderMetadata,
    ranges: Ranges,
    number: usize,
    rows: u64,
    leaves: Vec<usize>,
    features: &[String],
) -> Result<Vec<BinaryViewArray>, String> {
    let schema = footer.metadata().file_metadata().schema_descr();
    let mut reader = ParquetRecordBatchReaderBuilder::new_with_metadata(ranges, footer.clone())
        .with_projection(ProjectionMask::leaves(schema, leaves))
        .with_row_groups(vec![number])
        .with_batch_size(rows as usize)
        .build()
        .map_err(|e| e.to_string())?;
    let batch = reader
        .next()
        .ok_or("has no rows")?
        .map_err(|e| e.to_string())?;
    if batch.num_rows() as u64 != rows {
        return Err(format!(
            "has {} rows, the index says {rows}",
            batch.num_rows()
        ));
    }
    features
        .iter()
        .map(|feature| {
            let column = batch.column_by_name(feature)?;
            let bytes = match column.as_struct_opt() {
                Some(image) => image.column_by_name("bytes")?,
                None => column,
            };
            bytes.as_binary_view_opt().cloned()
        })
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| "an image column does not hold bytes".into())
}

/// Returns the leaf that holds a feature's encoded images: `<feature>.bytes`, or the column itself.
fn image_leaf(metadata: &parquet::file::metadata::ParquetMetaData, feature: &str) -> Option<usize> {
    let leaves = leaves_of(metadata, feature);
    let schema = metadata.file_metadata().schema_descr();
    match leaves[..] {
        [only] => Some(only),
        _ => leaves
            .into_iter()
            .find(|&leaf| schema.column(leaf).name() == "bytes"),
    }
}

/// (dataset, row group).
pub(crate) type Key = (u32, u32);

/// Open row groups, the least recently used forgotten above a number of bytes.
///
/// A row group in use stays in memory after it was forgotten here; how many those are is bounded by
/// the micro-batches made ahead.
#[derive(Debug)]
pub(crate) struct RowGroupCache {
    capacity: u64,
    slots: Mutex<Slots>,
}

#[derive(Debug, Default)]
struct Slots {
    open: HashMap<Key, Slot>,
    bytes: u64,
    clock: u64,
}

#[derive(Debug, Default)]
struct Slot {
    cell: Arc<OnceCell<Arc<OpenRowGroup>>>,
    /// Counted above; 0 until open.
    bytes: u64,
    used: u64,
}

impl RowGroupCache {
    pub(crate) fn new(capacity: u64) -> Self {
        Self {
            capacity,
            slots: Mutex::default(),
        }
    }

    /// Returns a row group; `open` runs once, however many ask at the same time.
    pub(crate) async fn get<F>(
        &self,
        key: Key,
        open: impl FnOnce() -> F,
    ) -> Result<Arc<OpenRowGroup>>
    where
        F: Future<Output = Result<OpenRowGroup>>,
    {
        let cell = {
            let mut slots = self.lock();
            slots.clock += 1;
            let used = slots.clock;
            let slot = slots.open.entry(key).or_default();
            slot.used = used;
            Arc::clone(&slot.cell)
        };
        let group = cell
            .get_or_try_init(|| async { open().await.map(Arc::new) })
            .await?;
        self.account(key, group.bytes);
        Ok(Arc::clone(group))
    }

    /// Returns the bytes held.
    pub(crate) fn bytes(&self) -> u64 {
        self.lock().bytes
    }

    fn account(&self, key: Key, bytes: u64) {
        let mut slots = self.lock();
        let Some(slot) = slots.open.get_mut(&key).filter(|slot| slot.bytes == 0) else {
            return;
        };
        slot.bytes = bytes.max(1);
        slots.bytes += bytes.max(1);
        while slots.bytes > self.capacity {
            let others = slots.open.iter();
            let others = others.filter(|(k, slot)| slot.bytes > 0 && **k != key);
            let Some(oldest) = others.min_by_key(|(_, slot)| slot.used).map(|(k, _)| *k) else {
                break;
            };
            if let Some(slot) = slots.open.remove(&oldest) {
                slots.bytes -= slot.bytes;
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Slots> {
        // Nothing here panics between two writes that belong together.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parquet_file::{read_footer, row_group_range};
    use pollen_storage::{Silent, Storage, StorageConfig};
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn group(bytes: u64) -> OpenRowGroup {
        OpenRowGroup {
            images: Vec::new(),
            bytes,
        }
    }

    #[tokio::test]
    async fn images_are_views_of_the_fetched_bytes() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../demo/data/lift");
        let storage = Storage::open(folder, &StorageConfig::default(), Arc::new(Silent));
        let storage = storage.expect("a folder");
        let name = FileName {
            dataset: "lift".into(),
            path: "data/chunk-000/file-000.parquet".into(),
        };
        let size = storage.head(&name.path).await.expect("committed");
        let footer = read_footer(&storage, &name, size).await.expect("Parquet");
        let range = row_group_range(footer.metadata(), 3);
        let bytes = storage
            .get_range(&name.path, range.clone())
            .await
            .expect("inside");
        let expected = RowGroup {
            offset: range.start,
            bytes: range.end - range.start,
            rows: footer.metadata().row_group(3).num_rows() as u64,
            crc32c: crc32c::crc32c(&bytes),
            episodes: Vec::new(),
        };
        let features = ["observation.images.wrist", "observation.images.primary"];
        let features = features.map(str::to_owned);
        let open = |expected: &RowGroup, features: &[String]| {
            OpenRowGroup::read(&name, &footer, size, 3, expected, bytes.clone(), features)
        };
        let group = open(&expected, &features).expect("whole");
        let fetched = bytes.as_ptr_range();
        for camera in 0..2 {
            for row in 0..expected.rows as usize {
                let image = group.image(camera, row).expect("an image");
                let view = image.as_ptr_range();
                assert!(image.starts_with(&[0xff, 0xd8]), "a JPEG");
                assert!(
                    fetched.start <= view.start && view.end <= fetched.end,
                    "no copy"
                );
            }
            assert!(group.image(camera, expected.rows as usize).is_none());
        }
        assert_eq!(group.bytes, expected.bytes);
        let mut flipped = expected.clone();
        flipped.crc32c ^= 1;
        let error = open(&flipped, &features).expect_err("wrong").to_string();
        assert!(error.contains("row group 3: crc32c"), "{error}");
        let error = open(&expected, &["left".to_owned()])
            .expect_err("none")
            .to_string();
        assert!(error.contains("no image column `left`"), "{error}");
    }

    #[tokio::test]
    async fn keeps_what_fits_and_forgets_the_oldest() {
        let cache = RowGroupCache::new(100);
        let opened = AtomicUsize::new(0);
        let opened_ref = &opened;
        let get = |key: u32, bytes: u64| {
            cache.get((0, key), move || async move {
                opened_ref.fetch_add(1, Ordering::Relaxed);
                Ok(group(bytes))
            })
        };
        for key in [1, 2, 1] {
            get(key, 40).await.expect("opens");
        }
        assert_eq!((opened.load(Ordering::Relaxed), cache.bytes()), (2, 80));
        get(3, 40).await.expect("opens");
        assert_eq!(cache.bytes(), 80, "2 was the oldest");
        get(1, 40).await.expect("kept");
        assert_eq!(opened.load(Ordering::Relaxed), 3);
        get(2, 40).await.expect("opens again");
        assert_eq!(opened.load(Ordering::Relaxed), 4);
        get(9, 500).await.expect("larger than all");
        assert_eq!(cache.bytes(), 500);
    }

    #[tokio::test]
    async fn one_opening_serves_all_who_wait() {
        let cache = RowGroupCache::new(100);
        let opened = AtomicUsize::new(0);
        let get = || {
            cache.get((0, 1), || async {
                opened.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
                Ok(group(10))
            })
        };
        let (a, b) = tokio::join!(get(), get());
        assert!(Arc::ptr_eq(&a.expect("opens"), &b.expect("opens")));
        assert_eq!((opened.load(Ordering::Relaxed), cache.bytes()), (1, 10));
    }

    #[tokio::test]
    async fn a_failure_is_not_kept() {
        let cache = RowGroupCache::new(100);
        let failed = cache
            .get((0, 1), || async { Err(crate::Error::config("once")) })
            .await;
        assert!(failed.is_err());
        assert!(cache.get((0, 1), || async { Ok(group(1)) }).await.is_ok());
    }
}

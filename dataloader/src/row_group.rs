//! Open row groups: fetched by one request each, checked, and read without copying image bytes.

use arrow_array::cast::AsArray;
use arrow_array::{Array, BinaryViewArray};
use bytes::Bytes;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder};
use parquet::basic::Compression;
use parquet::file::metadata::ParquetMetaData;
use pollen_core::no_panic;

use crate::byte_cache::Held;
use crate::columns::{ColumnNames, Columns, column_leaves};
use crate::error::Result;
use crate::parquet_file::{FileName, Ranges, leaves_of};
use crate::sidecar::RowGroup;

/// Which row group of which file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    pub(crate) file: &'a FileName,
    pub(crate) footer: &'a ArrowReaderMetadata,
    pub(crate) file_bytes: u64,
    /// Number in its file.
    pub(crate) number: usize,
    /// Its entry in the index.
    pub(crate) expected: &'a RowGroup,
}

/// The images of a row group, as views of the fetched bytes, and its low-dimensional columns.
#[derive(Debug)]
pub(crate) struct OpenRowGroup {
    /// Per camera asked for.
    images: Vec<BinaryViewArray>,
    /// From its first row to the end of its last episode.
    columns: Columns,
    image_bytes: u64,
}

impl OpenRowGroup {
    /// Checks and reads the fetched `bytes` of a row group.
    pub(crate) fn read(
        place: Place,
        bytes: Bytes,
        features: &[String],
        names: &ColumnNames,
    ) -> Result<Self> {
        let Place {
            file,
            footer,
            file_bytes,
            number,
            expected,
        } = place;
        let bad = |reason: String| file.bad(format!("row group {number}: {reason}"));
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
        let mut leaves = column_leaves(file, metadata, names)?;
        // Pages that are stored as they are stay views of the fetched bytes; of others only the
        // unpacked pages are kept.
        let (mut fetched, mut unpacked) = (0, 0);
        for feature in features {
            let found = image_leaf(metadata, feature)
                .ok_or_else(|| bad(format!("the file has no image column `{feature}`")))?;
            let column = metadata.row_group(number).column(found);
            if column.compression() == Compression::UNCOMPRESSED {
                fetched = bytes.len() as u64;
            } else {
                unpacked += column.uncompressed_size().max(0) as u64;
            }
            leaves.push(found);
        }
        let ranges = Ranges::new(file_bytes, vec![(expected.offset, bytes)]);
        let decode = || decode(place, ranges, leaves, features, names);
        let (images, columns) = no_panic(decode, bad)?;
        Ok(Self {
            images,
            columns,
            image_bytes: fetched + unpacked,
        })
    }

    /// Returns the encoded image of a camera (numbered as asked for) in a row of this group.
    pub(crate) fn image(&self, camera: usize, row: usize) -> Option<&[u8]> {
        let images = &self.images[camera];
        (row < images.len() && images.is_valid(row)).then(|| images.value(row))
    }

    /// Returns the low-dimensional columns of its rows.
    pub(crate) fn columns(&self) -> &Columns {
        &self.columns
    }

    /// Puts in what becomes of its columns.
    pub(crate) fn with_columns(
        self,
        make: impl FnOnce(Columns) -> Result<Columns>,
    ) -> Result<Self> {
        Ok(Self {
            columns: make(self.columns)?,
            ..self
        })
    }
}

impl Held for OpenRowGroup {
    fn held_bytes(&self) -> u64 {
        self.image_bytes + self.columns.bytes()
    }
}

/// Reads images and columns of a row group whose bytes are in memory.
fn decode(
    place: Place,
    ranges: Ranges,
    leaves: Vec<usize>,
    features: &[String],
    names: &ColumnNames,
) -> Result<(Vec<BinaryViewArray>, Columns)> {
    let Place {
        file,
        footer,
        number,
        expected,
        ..
    } = place;
    let bad = |reason: String| file.bad(format!("row group {number}: {reason}"));
    let schema = footer.metadata().file_metadata().schema_descr();
    let mut reader = ParquetRecordBatchReaderBuilder::new_with_metadata(ranges, footer.clone())
        .with_projection(ProjectionMask::leaves(schema, leaves))
        .with_row_groups(vec![number])
        .with_batch_size(expected.rows as usize)
        .build()
        .map_err(|e| bad(e.to_string()))?;
    let batch = reader
        .next()
        .ok_or_else(|| bad("has no rows".into()))?
        .map_err(|e| bad(e.to_string()))?;
    if batch.num_rows() as u64 != expected.rows {
        return Err(bad(format!(
            "has {} rows, the index says {}",
            batch.num_rows(),
            expected.rows
        )));
    }
    let images = features
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
        .ok_or_else(|| bad("an image column does not hold bytes".into()))?;
    let mut columns = Columns::default();
    columns.append(&batch, names, file)?;
    Ok((images, columns))
}

/// Returns the leaf that holds a feature's encoded images: `<feature>.bytes`, or the column itself.
pub(crate) fn image_leaf(metadata: &ParquetMetaData, feature: &str) -> Option<usize> {
    let leaves = leaves_of(metadata, feature);
    let schema = metadata.file_metadata().schema_descr();
    match leaves[..] {
        [only] => Some(only),
        _ => leaves
            .into_iter()
            .find(|&leaf| schema.column(leaf).name() == "bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parquet_file::{read_footer, row_group_range};
    use pollen_storage::{Silent, Storage, StorageConfig};
    use std::sync::Arc;

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
        let names = ColumnNames {
            action: "action".into(),
            state: "observation.state".into(),
        };
        let open = |expected: &RowGroup, features: &[String]| {
            let place = Place {
                file: &name,
                footer: &footer,
                file_bytes: size,
                number: 3,
                expected,
            };
            OpenRowGroup::read(place, bytes.clone(), features, &names)
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
        assert_eq!(group.columns().episode.len() as u64, expected.rows);
        assert_eq!(group.held_bytes(), expected.bytes + group.columns().bytes());
        let mut flipped = expected.clone();
        flipped.crc32c ^= 1;
        let error = open(&flipped, &features).expect_err("wrong").to_string();
        assert!(error.contains("row group 3: crc32c"), "{error}");
        let error = open(&expected, &["left".to_owned()])
            .expect_err("none")
            .to_string();
        assert!(error.contains("no image column `left`"), "{error}");
    }
}

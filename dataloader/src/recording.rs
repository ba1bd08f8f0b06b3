//! Single episodes with some of their pictures, for people to look at.

use std::collections::BTreeMap;
use std::ops::Range;

use arrow_array::Array;
use arrow_array::cast::AsArray;
use bytes::Bytes;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder};
use pollen_core::no_panic;
use pollen_storage::Storage;

use crate::columns::{ColumnNames, Columns, read_columns};
use crate::error::{Error, Result};
use crate::lerobot::{Episode, StoredFile, read_episodes};
use crate::parquet_file::{FileName, Ranges, read_footer};
use crate::row_group::image_leaf;
use crate::transform::ColumnTransform;

/// One episode as it is stored.
#[derive(Clone, Debug)]
pub struct Recording {
    /// Its number.
    pub episode: u64,
    /// Its rows, as stored.
    pub columns: Columns,
    /// Evenly spaced frames, the first and the last among them.
    pub pictures: Vec<Picture>,
}

/// The images of one frame.
#[derive(Clone, Debug)]
pub struct Picture {
    /// Number in the episode.
    pub frame: u64,
    /// Encoded images in the order asked for; `None` where the row has none.
    pub images: Vec<Option<Bytes>>,
}

/// What is to be read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) episodes: &'a [u64],
    pub(crate) transform: &'a ColumnTransform,
    /// Image features.
    pub(crate) features: &'a [String],
    /// Frames of an episode.
    pub(crate) frames: usize,
}

/// Reads episodes in the order of their numbers, with the row groups that they lie in and no others.
pub(crate) async fn record(
    storage: &Storage,
    dataset: &str,
    files: &[StoredFile],
    wanted: Wanted<'_>,
) -> Result<Vec<Recording>> {
    let all = read_episodes(storage, dataset).await?;
    let mut left: BTreeMap<u64, Episode> = BTreeMap::new();
    for &number in wanted.episodes {
        let found = all.iter().find(|episode| episode.episode == number);
        let found = found.ok_or_else(|| {
            Error::config(format!(
                "--episodes names episode {number}; the dataset `{dataset}` has {}",
                all.len()
            ))
        })?;
        left.insert(found.first_row, found.clone());
    }
    let mut recordings = Vec::new();
    let mut file_start = 0;
    for file in files {
        if left.is_empty() {
            break;
        }
        let name = FileName {
            dataset: dataset.into(),
            path: file.path.clone(),
        };
        let footer = read_footer(storage, &name, file.size).await?;
        let rows = footer.metadata().row_groups().iter();
        let rows: Vec<u64> = rows.map(|group| group.num_rows() as u64).collect();
        let file_end = file_start + rows.iter().sum::<u64>();
        let open = File {
            storage,
            name: &name,
            bytes: file.size,
            footer: &footer,
            rows: &rows,
        };
        while let Some((&first, _)) = left.range(..file_end).next() {
            let episode = left.remove(&first).expect("it was found");
            recordings.push(open.recording(&episode, first - file_start, wanted).await?);
        }
        file_start = file_end;
    }
    if let Some((_, episode)) = left.pop_first() {
        return Err(Error::File {
            dataset: dataset.into(),
            path: "data".into(),
            reason: format!("holds no rows of episode {}", episode.episode),
        });
    }
    Ok(recordings)
}

/// An open data file.
#[derive(Clone, Copy)]
struct File<'a> {
    storage: &'a Storage,
    name: &'a FileName,
    bytes: u64,
    footer: &'a ArrowReaderMetadata,
    /// Of each row group.
    rows: &'a [u64],
}

impl File<'_> {
    async fn recording(
        &self,
        episode: &Episode,
        start: u64,
        wanted: Wanted<'_>,
    ) -> Result<Recording> {
        let end = start + episode.length;
        let groups = self.groups(start..end)?;
        let names = ColumnNames::of(wanted.transform);
        let (storage, name) = (self.storage, self.name);
        let around = groups.first().map_or(0, |group| group.1.start);
        let numbers = groups.first().map_or(0, |g| g.0)..groups.last().map_or(0, |g| g.0 + 1);
        let mut columns =
            read_columns(storage, name, self.footer, self.bytes, &names, numbers).await?;
        columns.skip((start - around) as usize);
        columns.truncate(episode.length as usize);
        let fits = columns.episode.len() as u64 == episode.length
            && columns
                .episode
                .iter()
                .all(|&number| number == episode.episode);
        if !fits {
            return Err(name.bad(format!(
                "from row {start} on it does not hold the {} frames of episode {} that \
                 meta/episodes promises",
                episode.length, episode.episode
            )));
        }
        let mut pictures = Vec::new();
        let frames = spread(episode.length, wanted.frames);
        for (number, range) in groups {
            let inside: Vec<u64> = frames
                .iter()
                .copied()
                .filter(|frame| range.contains(&(start + frame)))
                .collect();
            if inside.is_empty() || wanted.features.is_empty() {
                continue;
            }
            let rows = inside
                .iter()
                .map(|frame| (start + frame - range.start) as usize);
            let images = self.images(number, rows.collect(), wanted.features).await?;
            for (frame, images) in inside.into_iter().zip(images) {
                pictures.push(Picture { frame, images });
            }
        }
        Ok(Recording {
            episode: episode.episode,
            columns,
            pictures,
        })
    }

    /// Returns the row groups with any of the rows, each with its own rows.
    fn groups(&self, rows: Range<u64>) -> Result<Vec<(usize, Range<u64>)>> {
        let mut at = 0;
        let mut found = Vec::new();
        for (number, &len) in self.rows.iter().enumerate() {
            let range = at..at + len;
            if range.start < rows.end && rows.start < range.end {
                found.push((number, range.clone()));
            }
            at = range.end;
        }
        if rows.end > at {
            return Err(self.name.bad(format!(
                "ends at row {at}, meta/episodes has an episode up to row {}",
                rows.end
            )));
        }
        Ok(found)
    }

    /// Reads the images of some rows of a row group: the column chunks that hold them.
    async fn images(
        &self,
        number: usize,
        rows: Vec<usize>,
        features: &[String],
    ) -> Result<Vec<Vec<Option<Bytes>>>> {
        let (name, metadata) = (self.name, self.footer.metadata());
        let mut leaves = Vec::new();
        let mut fetched = Vec::new();
        for feature in features {
            let leaf = image_leaf(metadata, feature)
                .ok_or_else(|| name.bad(format!("has no image column `{feature}`")))?;
            let (start, len) = metadata.row_group(number).column(leaf).byte_range();
            let bytes = self.storage.get_range(&name.path, start..start + len).await;
            fetched.push((start, bytes.map_err(|e| name.failed(e))?));
            leaves.push(leaf);
        }
        let ranges = Ranges::new(self.bytes, fetched);
        let schema = metadata.file_metadata().schema_descr();
        let decode = || {
            let reader =
                ParquetRecordBatchReaderBuilder::new_with_metadata(ranges, self.footer.clone())
                    .with_projection(ProjectionMask::leaves(schema, leaves))
                    .with_row_groups(vec![number])
                    .with_batch_size(self.rows[number] as usize)
                    .build()
                    .map_err(|e| name.bad(e.to_string()))?
                    .next()
                    .ok_or_else(|| name.bad(format!("row group {number} has no rows")))?;
            let batch = reader.map_err(|e| name.bad(e.to_string()))?;
            let mut columns = Vec::new();
            for feature in features {
                let column = batch.column_by_name(feature);
                let bytes = column.and_then(|column| match column.as_struct_opt() {
                    Some(image) => image.column_by_name("bytes")?.as_binary_view_opt().cloned(),
                    None => column.as_binary_view_opt().cloned(),
                });
                columns.push(bytes.ok_or_else(|| {
                    name.bad(format!("its column `{feature}` does not hold bytes"))
                })?);
            }
            let image = |row: usize| {
                let of = |column: &arrow_array::BinaryViewArray| {
                    let there = row < column.len() && column.is_valid(row);
                    there.then(|| Bytes::copy_from_slice(column.value(row)))
                };
                columns.iter().map(of).collect()
            };
            Ok(rows.iter().map(|&row| image(row)).collect())
        };
        no_panic(decode, |said| name.bad(said))
    }
}

/// Returns `wanted` frames of `length`, evenly spaced from the first to the last.
fn spread(length: u64, wanted: usize) -> Vec<u64> {
    let wanted = (wanted as u64).min(length);
    match (length, wanted) {
        (0, _) | (_, 0) => Vec::new(),
        (_, 1) => vec![0],
        _ => (0..wanted)
            .map(|i| i * (length - 1) / (wanted - 1))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::spread;

    #[test]
    fn frames_reach_from_the_first_to_the_last() {
        assert_eq!(spread(100, 4), [0, 33, 66, 99]);
        assert_eq!(spread(3, 8), [0, 1, 2]);
        assert_eq!(spread(9, 1), [0]);
        assert!(spread(0, 4).is_empty());
    }
}

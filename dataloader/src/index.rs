//! Makes the sidecar of a dataset from its data, and finds it again at the next start.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use futures::StreamExt;
use parquet::arrow::arrow_reader::ArrowReaderMetadata;
use pollen_storage::Storage;
use sha2::{Digest, Sha256};

use crate::columns::{ColumnNames, Columns, read_columns};
use crate::error::{Error, Result};
use crate::lerobot::{Episode, Metadata, StoredFile, parquet_files, read_episodes, read_metadata};
use crate::parquet_file::{FileName, read_footer, row_group_range};
use crate::sidecar::{
    DataFile, RowGroup, SIDECAR_PATH, SIDECAR_VERSION, Sidecar, dataset_hash, hex,
};
use crate::statistics::{Statistics, StatisticsPass, take_statistics};
use crate::transform::ColumnTransform;

/// Pieces of a file fetched ahead of the checksum.
const AHEAD: usize = 4;
/// Longest request for bytes outside row groups.
const PIECE: u64 = 8 << 20;

/// Reads every byte of a dataset once and returns its sidecar, without storing it.
///
/// `dataset` names it in errors. Frames whose action is not finite are left out of the statistics
/// and reported when they are loaded.
pub async fn index_dataset(
    storage: &Storage,
    dataset: &str,
    transform: &ColumnTransform,
) -> Result<Sidecar> {
    let metadata = read_metadata(storage, dataset).await?;
    let episodes = read_episodes(storage, dataset).await?;
    let mut files = Vec::new();
    let mut columns = Vec::new();
    let mut pass = StatisticsPass::new(dataset, transform, &metadata.tasks);
    for object in data_files(storage, dataset).await? {
        let name = FileName {
            dataset: dataset.into(),
            path: object.path.clone(),
        };
        let footer = read_footer(storage, &name, object.size).await?;
        let names = ColumnNames::of(transform);
        let all = 0..footer.metadata().num_row_groups();
        let values = read_columns(storage, &name, &footer, object.size, &names, all).await?;
        files.push(checksum(storage, &name, &footer, object.size, &values.episode).await?);
        columns.push(Columns {
            episode: values.episode.clone(),
            frame: values.frame.clone(),
            ..Columns::default()
        });
        pass.push(&name, values)?;
    }
    check_episodes(dataset, &episodes, &files, &columns)?;
    let statistics = pass.finish(dataset_hash(metadata.info.fps, &metadata.tasks, &files))?;
    let sidecar = Sidecar {
        version: SIDECAR_VERSION,
        dataset_hash: statistics.dataset_hash,
        fps: metadata.info.fps,
        transform: statistics.transform,
        action: statistics.action,
        proprio: statistics.proprio,
        left_out: statistics.left_out,
        files,
    };
    // Numbers as a later start will read them, to the last bit.
    Sidecar::parse(&sidecar.to_json()).map_err(|reason| Error::File {
        dataset: dataset.into(),
        path: SIDECAR_PATH.into(),
        reason,
    })
}

/// Returns the sidecar: from beside the dataset, from `index_dir`, or made now and stored in the
/// first of the two that can be written to.
pub(crate) async fn load_sidecar(
    storage: &Storage,
    dataset: &str,
    metadata: &Metadata,
    transform: &ColumnTransform,
    index_dir: &Path,
) -> Result<Sidecar> {
    let objects = data_files(storage, dataset).await?;
    let kept = local_path(index_dir, &storage.url(), dataset, &objects);
    let found = stored_sidecar(storage, dataset, metadata, &objects, &kept).await?;
    if let Some(sidecar) = found {
        if sidecar.transform == *transform {
            return Ok(sidecar);
        }
        let statistics = load_statistics(storage, dataset, metadata, &sidecar, transform, &kept);
        return Ok(sidecar.clone().with_statistics(statistics.await?));
    }
    tracing::info!(dataset, "indexing: reading every byte once");
    let sidecar = index_dataset(storage, dataset, transform).await?;
    keep(storage, dataset, SIDECAR_PATH, &kept, sidecar.to_json()).await;
    Ok(sidecar)
}

/// Returns the sidecar that is kept beside the dataset or at `kept`, if there is one; one of other
/// data is refused.
pub(crate) async fn stored_sidecar(
    storage: &Storage,
    dataset: &str,
    metadata: &Metadata,
    objects: &[StoredFile],
    kept: &Path,
) -> Result<Option<Sidecar>> {
    let stored = find_kept(storage, dataset, SIDECAR_PATH, kept).await?;
    let Some((text, path)) = stored else {
        return Ok(None);
    };
    let sidecar = Sidecar::parse(&text).map_err(|reason| Error::File {
        dataset: dataset.into(),
        path,
        reason,
    })?;
    check_unchanged(dataset, &sidecar, metadata, objects)?;
    Ok(Some(sidecar))
}

/// Returns a file that [`keep`] stored, and where it was found.
async fn find_kept(
    storage: &Storage,
    dataset: &str,
    path: &str,
    local: &Path,
) -> Result<Option<(Vec<u8>, String)>> {
    match storage.get(path).await {
        Ok(text) => Ok(Some((text.to_vec(), format!("{}/{path}", storage.url())))),
        Err(error) if error.is_not_found() => Ok(std::fs::read(local)
            .ok()
            .map(|text| (text, local.display().to_string()))),
        Err(source) => Err(Error::Storage {
            dataset: dataset.into(),
            source,
        }),
    }
}

/// Stores a file beside the dataset, or locally where that cannot be written to.
async fn keep(storage: &Storage, dataset: &str, path: &str, local: &Path, text: Vec<u8>) {
    if let Err(error) = storage.put(path, text.clone().into()).await {
        let written = local
            .parent()
            .map_or(Ok(()), std::fs::create_dir_all)
            .and_then(|()| std::fs::write(local, &text));
        match written {
            Ok(()) => tracing::info!(dataset, %error, path = %local.display(), "index kept here"),
            Err(local) => tracing::warn!(dataset, %error, %local, "index not kept"),
        }
    }
}

/// Returns the statistics for another transform than the index was made with: kept ones, or taken
/// now. Kept ones that are not of this data and this transform are refused.
pub(crate) async fn load_statistics(
    storage: &Storage,
    dataset: &str,
    metadata: &Metadata,
    sidecar: &Sidecar,
    transform: &ColumnTransform,
    kept: &Path,
) -> Result<Statistics> {
    let place = StatisticsPlace {
        path: Statistics::path(transform),
        local: kept.with_extension(format!("{}.json", &transform.hash[..16])),
    };
    let files = sidecar.files.iter();
    let files = files.map(|file| (file.path.clone(), file.bytes));
    let hash = sidecar.dataset_hash.clone();
    let how = (&*metadata.tasks, transform);
    place.find_or_take(storage, dataset, hash, files, how).await
}

/// Where statistics are kept.
pub(crate) struct StatisticsPlace {
    /// Beside the dataset.
    pub(crate) path: String,
    /// On this machine, if the dataset's folder cannot be written to.
    pub(crate) local: PathBuf,
}

impl StatisticsPlace {
    /// Returns the statistics kept here, or takes them now and keeps them. Kept ones of other data
    /// (`hash`) or another transform are refused.
    pub(crate) async fn find_or_take(
        &self,
        storage: &Storage,
        dataset: &str,
        hash: String,
        files: impl Iterator<Item = (String, u64)>,
        (tasks, transform): (&[String], &ColumnTransform),
    ) -> Result<Statistics> {
        let refused = |path: &str, reason: String| Error::Statistics {
            dataset: dataset.into(),
            path: path.into(),
            reason,
        };
        if let Some((text, from)) = find_kept(storage, dataset, &self.path, &self.local).await? {
            let kept = Statistics::parse(&text).map_err(|reason| refused(&from, reason))?;
            return match kept.mismatch(&hash, transform) {
                None => Ok(kept),
                Some(reason) => Err(refused(&from, reason)),
            };
        }
        tracing::info!(dataset, "taking statistics: reading every column once");
        let taken = take_statistics(storage, dataset, hash, files, tasks, transform).await?;
        let text = taken.to_json();
        // Numbers as a later reader will see them, to the last bit.
        let taken = Statistics::parse(&text).map_err(|reason| refused(&self.path, reason))?;
        keep(storage, dataset, &self.path, &self.local, text).await;
        Ok(taken)
    }
}

pub(crate) async fn data_files(storage: &Storage, dataset: &str) -> Result<Vec<StoredFile>> {
    let objects = parquet_files(storage, dataset, "data").await?;
    if objects.is_empty() {
        return Err(Error::File {
            dataset: dataset.into(),
            path: format!("{}/data", storage.url()),
            reason: "holds no Parquet file".into(),
        });
    }
    Ok(objects)
}

/// Names the local copy after all that the listing shows, so that a stale one is not found.
pub(crate) fn local_path(
    index_dir: &Path,
    url: &str,
    dataset: &str,
    objects: &[StoredFile],
) -> PathBuf {
    let mut hash = Sha256::new();
    hash.update(url.as_bytes());
    for object in objects {
        hash.update(format!("\n{} {}", object.path, object.size).as_bytes());
    }
    let hash = hex(&hash.finalize());
    index_dir.join(format!("{dataset}-{}.json", &hash[..16]))
}

fn check_unchanged(
    dataset: &str,
    sidecar: &Sidecar,
    metadata: &Metadata,
    objects: &[StoredFile],
) -> Result<()> {
    let changed = |reason: String| {
        Err(Error::Changed {
            dataset: dataset.into(),
            reason,
        })
    };
    let sizes: HashMap<&str, u64> = objects.iter().map(|o| (&*o.path, o.size)).collect();
    for file in &sidecar.files {
        match sizes.get(&*file.path) {
            None => return changed(format!("{} is missing", file.path)),
            Some(&size) if size != file.bytes => {
                return changed(format!(
                    "{} has {size} bytes in place of {}",
                    file.path, file.bytes
                ));
            }
            Some(_) => {}
        }
    }
    if objects.len() != sidecar.files.len() {
        return changed(format!(
            "it has {} data files in place of {}",
            objects.len(),
            sidecar.files.len()
        ));
    }
    let hash = dataset_hash(metadata.info.fps, &metadata.tasks, &sidecar.files);
    if hash != sidecar.dataset_hash {
        return changed("its tasks or its frames a second are others".into());
    }
    Ok(())
}

/// Reads a file from end to end and makes its entry.
async fn checksum(
    storage: &Storage,
    name: &FileName,
    footer: &ArrowReaderMetadata,
    file_bytes: u64,
    episodes: &[u64],
) -> Result<DataFile> {
    let metadata = footer.metadata();
    let ranges: Vec<Range<u64>> = (0..metadata.num_row_groups())
        .map(|group| row_group_range(metadata, group))
        .collect();
    let mut pieces: Vec<(Range<u64>, Option<usize>)> = Vec::new();
    let mut at = 0;
    for (group, range) in ranges.iter().enumerate() {
        if range.start < at || range.end > file_bytes {
            return Err(name.bad(format!("its row group {group} overlaps what is before it")));
        }
        gap(at..range.start, &mut pieces);
        pieces.push((range.clone(), Some(group)));
        at = range.end;
    }
    gap(at..file_bytes, &mut pieces);
    let fetches = pieces.into_iter().map(|(range, group)| async move {
        let bytes = storage.get_range(&name.path, range).await;
        bytes
            .map(|bytes| (bytes, group))
            .map_err(|e| name.failed(e))
    });
    let mut fetched = futures::stream::iter(fetches).buffered(AHEAD);
    let mut sha256 = Sha256::new();
    let mut row_groups = Vec::new();
    let mut row = 0;
    let mut frame_of: HashMap<u64, u64> = HashMap::new();
    while let Some(piece) = fetched.next().await {
        let (bytes, group) = piece?;
        sha256.update(&bytes);
        let Some(group) = group else { continue };
        let rows = metadata.row_group(group).num_rows() as usize;
        let in_group = episodes
            .get(row..row + rows)
            .ok_or_else(|| name.bad("its columns have fewer rows than its row groups"))?;
        row_groups.push(RowGroup {
            offset: ranges[group].start,
            bytes: bytes.len() as u64,
            rows: rows as u64,
            crc32c: crc32c::crc32c(&bytes),
            episodes: spans(in_group, &mut frame_of),
        });
        row += rows;
    }
    Ok(DataFile {
        path: name.path.clone(),
        bytes: file_bytes,
        sha256: hex(&sha256.finalize()),
        row_groups,
    })
}

fn gap(range: Range<u64>, pieces: &mut Vec<(Range<u64>, Option<usize>)>) {
    let mut start = range.start;
    while start < range.end {
        let end = range.end.min(start + PIECE);
        pieces.push((start..end, None));
        start = end;
    }
}

/// Cuts the rows of a row group into episodes; `frame_of` counts the frames seen of each.
fn spans(episodes: &[u64], frame_of: &mut HashMap<u64, u64>) -> Vec<(u64, u64, u64)> {
    episodes
        .chunk_by(|a, b| a == b)
        .map(|run| {
            let seen = frame_of.entry(run[0]).or_default();
            let first = *seen;
            *seen += run.len() as u64;
            (run[0], first, run.len() as u64)
        })
        .collect()
}

/// Checks that rows, the frames' numbers and the table of episodes tell the same story.
fn check_episodes(
    dataset: &str,
    episodes: &[Episode],
    files: &[DataFile],
    columns: &[Columns],
) -> Result<()> {
    let mut row = 0;
    let mut next = 0;
    for (file, columns) in files.iter().zip(columns) {
        let name = FileName {
            dataset: dataset.into(),
            path: file.path.clone(),
        };
        let mut start = 0;
        for run in columns.episode.chunk_by(|a, b| a == b) {
            let frames = &columns.frame[start..start + run.len()];
            let stored = episodes.get(next).cloned();
            let found = Episode {
                episode: run[0],
                length: run.len() as u64,
                first_row: row,
            };
            if stored.as_ref() != Some(&found) {
                return Err(name.bad(format!(
                    "from row {row} on it holds {} frames of episode {}, but meta/episodes says \
                     {stored:?}; episodes must be whole, in order and in one file",
                    found.length, found.episode
                )));
            }
            if frames.iter().copied().ne(0..found.length) {
                return Err(name.bad(format!(
                    "the frame_index of episode {} does not count from 0",
                    found.episode
                )));
            }
            start += run.len();
            row += found.length;
            next += 1;
        }
    }
    if next != episodes.len() {
        return Err(Error::File {
            dataset: dataset.into(),
            path: "meta/episodes".into(),
            reason: format!(
                "names {} episodes, the data files hold {next}",
                episodes.len()
            ),
        });
    }
    Ok(())
}

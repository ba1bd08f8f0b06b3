//! Makes the sidecar of a dataset from its data, and finds it again at the next start.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use futures::StreamExt;
use parquet::arrow::arrow_reader::ArrowReaderMetadata;
use pollen_processing::ActionStats;
use pollen_storage::{ObjectInfo, Storage};
use sha2::{Digest, Sha256};

use crate::columns::{ColumnNames, FileColumns, Rows, read_columns};
use crate::error::{Error, Result};
use crate::lerobot::{Episode, Metadata, read_episodes, read_metadata};
use crate::parquet_file::{FileName, read_footer, row_group_range};
use crate::sidecar::{
    DataFile, RowGroup, SIDECAR_PATH, SIDECAR_VERSION, Sidecar, Transform, dataset_hash, hex,
};

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
    transform: &Transform,
) -> Result<Sidecar> {
    let metadata = read_metadata(storage, dataset).await?;
    let episodes = read_episodes(storage, dataset).await?;
    let mut files = Vec::new();
    let mut columns = Vec::new();
    for object in data_files(storage, dataset).await? {
        let name = FileName {
            dataset: dataset.into(),
            path: object.path.clone(),
        };
        let footer = read_footer(storage, &name, object.size).await?;
        let names = ColumnNames::of(transform);
        let values = read_columns(storage, &name, &footer, object.size, &names).await?;
        files.push(checksum(storage, &name, &footer, object.size, &values.episode).await?);
        columns.push(values);
    }
    check_episodes(dataset, &episodes, &files, &columns)?;
    let (action, proprio) = statistics(dataset, transform, &columns)?;
    let sidecar = Sidecar {
        version: SIDECAR_VERSION,
        dataset_hash: dataset_hash(metadata.info.fps, &metadata.tasks, &files),
        fps: metadata.info.fps,
        transform: transform.clone(),
        action,
        proprio,
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
    transform: &Transform,
    index_dir: &Path,
) -> Result<Sidecar> {
    let objects = data_files(storage, dataset).await?;
    let kept = local_path(index_dir, &storage.url(), dataset, &objects);
    let stored = match storage.get(SIDECAR_PATH).await {
        Ok(text) => Some((text.to_vec(), format!("{}/{SIDECAR_PATH}", storage.url()))),
        Err(error) if error.is_not_found() => std::fs::read(&kept)
            .ok()
            .map(|text| (text, kept.display().to_string())),
        Err(source) => {
            return Err(Error::Storage {
                dataset: dataset.into(),
                source,
            });
        }
    };
    if let Some((text, path)) = stored {
        let sidecar = Sidecar::parse(&text).map_err(|reason| Error::File {
            dataset: dataset.into(),
            path,
            reason,
        })?;
        check_unchanged(dataset, &sidecar, metadata, &objects)?;
        if sidecar.transform == *transform {
            return Ok(sidecar);
        }
        return with_statistics(storage, dataset, sidecar, transform).await;
    }
    tracing::info!(dataset, "indexing: reading every byte once");
    let sidecar = index_dataset(storage, dataset, transform).await?;
    let text = sidecar.to_json();
    if let Err(error) = storage.put(SIDECAR_PATH, text.clone().into()).await {
        let written = kept
            .parent()
            .map_or(Ok(()), std::fs::create_dir_all)
            .and_then(|()| std::fs::write(&kept, &text));
        match written {
            Ok(()) => tracing::info!(dataset, %error, path = %kept.display(), "index kept here"),
            Err(local) => tracing::warn!(dataset, %error, %local, "index not kept"),
        }
    }
    Ok(sidecar)
}

impl ColumnNames {
    pub(crate) fn of(transform: &Transform) -> Self {
        Self {
            action: transform.action.clone(),
            state: transform.state.clone(),
        }
    }
}

/// Recomputes the statistics for other columns than the sidecar was made for.
async fn with_statistics(
    storage: &Storage,
    dataset: &str,
    mut sidecar: Sidecar,
    transform: &Transform,
) -> Result<Sidecar> {
    tracing::warn!(
        dataset,
        action = transform.action,
        state = transform.state,
        "the index was made for other columns; taking statistics again"
    );
    let names = ColumnNames::of(transform);
    let mut columns = Vec::new();
    for file in &sidecar.files {
        let name = FileName {
            dataset: dataset.into(),
            path: file.path.clone(),
        };
        let footer = read_footer(storage, &name, file.bytes).await?;
        columns.push(read_columns(storage, &name, &footer, file.bytes, &names).await?);
    }
    (sidecar.action, sidecar.proprio) = statistics(dataset, transform, &columns)?;
    sidecar.transform = transform.clone();
    // The same text as a sidecar made for these columns would have, and so the same numbers.
    Sidecar::parse(&sidecar.to_json()).map_err(|reason| Error::File {
        dataset: dataset.into(),
        path: SIDECAR_PATH.into(),
        reason,
    })
}

async fn data_files(storage: &Storage, dataset: &str) -> Result<Vec<ObjectInfo>> {
    let mut objects = storage
        .list("data")
        .await
        .map_err(|source| Error::Storage {
            dataset: dataset.into(),
            source,
        })?;
    objects.retain(|object| object.path.ends_with(".parquet"));
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
fn local_path(index_dir: &Path, url: &str, dataset: &str, objects: &[ObjectInfo]) -> PathBuf {
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
    objects: &[ObjectInfo],
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
    columns: &[FileColumns],
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

type Stats = (ActionStats, Option<ActionStats>);

fn statistics(dataset: &str, transform: &Transform, columns: &[FileColumns]) -> Result<Stats> {
    let of = |column: &str, rows: Rows| {
        ActionStats::of(&rows.values, rows.width).map_err(|error| Error::File {
            dataset: dataset.into(),
            path: format!("column `{column}`"),
            reason: error.to_string(),
        })
    };
    let actions = finite(
        dataset,
        &transform.action,
        columns.iter().map(|c| &c.action),
    );
    let action = of(&transform.action, actions)?;
    if transform.state.is_empty() {
        return Ok((action, None));
    }
    let states = finite(dataset, &transform.state, columns.iter().map(|c| &c.state));
    Ok((action, Some(of(&transform.state, states)?)))
}

/// Joins the files' rows, without those that hold a NaN or an infinity.
fn finite<'a>(dataset: &str, column: &str, files: impl Iterator<Item = &'a Rows>) -> Rows {
    let mut all = Rows {
        width: 1,
        values: Vec::new(),
    };
    let mut left_out = 0;
    for rows in files.filter(|rows| rows.width > 0) {
        all.width = rows.width;
        for row in rows.values.chunks_exact(rows.width) {
            if row.iter().all(|value| value.is_finite()) {
                all.values.extend_from_slice(row);
            } else {
                left_out += 1;
            }
        }
    }
    if left_out > 0 {
        tracing::warn!(
            dataset,
            column,
            frames = left_out,
            "not finite: left out of statistics"
        );
    }
    all
}

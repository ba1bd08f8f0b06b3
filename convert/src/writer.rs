//! Writes a LeRobotDataset v3.0 episode by episode.
//!
//! Memory is bounded by one row group (at most twice [`WriterConfig::row_group_bytes`]) beside the
//! episode that is handed over. After each finished data file a [`FileRecord`] comes back; a writer
//! made from the records so far goes on behind them and makes the same bytes.

use std::collections::HashMap;
use std::fmt;

use pollen_core::ByteSize;
use pollen_storage::Storage;
use serde::{Deserialize, Serialize};

use crate::data_file::{DataFile, Place};
use crate::episode::Episode;
use crate::error::{Error, Result};
use crate::picture::{ColorHistogram, PictureKind};
use crate::schema::DatasetSpec;

/// Data files a folder holds.
pub(crate) const CHUNK_FILES: u64 = 1000;

/// Sizes of what is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriterConfig {
    /// Target of a row group: whole episodes where they fit, else frames of one episode.
    pub row_group_bytes: ByteSize,
    /// A data file ends before the episode that would take it beyond this.
    pub file_bytes: ByteSize,
}

impl Default for WriterConfig {
    fn default() -> Self {
        Self {
            row_group_bytes: ByteSize::mib(8),
            file_bytes: ByteSize::mib(512),
        }
    }
}

/// An episode in a finished data file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpisodeRecord {
    /// The source's name of it.
    pub name: String,
    /// Number of frames.
    pub length: u64,
    /// Its instruction.
    pub task: u64,
}

/// An episode that was left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// The episode, as its source names it.
    pub what: String,
    /// Why.
    pub why: String,
}

/// What is known of a finished data file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Number of the file, over all chunks.
    pub index: u64,
    /// Path inside the dataset.
    pub path: String,
    /// Size.
    pub bytes: u64,
    /// Checksum of the whole file.
    pub sha256: String,
    /// Number of row groups.
    pub row_groups: u64,
    /// Number of its first episode.
    pub first_episode: u64,
    /// Global number of its first frame.
    pub first_frame: u64,
    /// Episodes in order.
    pub episodes: Vec<EpisodeRecord>,
    /// Instructions met for the first time.
    pub new_tasks: Vec<String>,
    /// Whether any image is a PNG.
    pub has_png: bool,
    /// Grey levels of the sampled frames of each camera.
    pub histograms: Vec<ColorHistogram>,
    /// How many episodes of the source were taken or dropped when the file ended.
    pub source_next: u64,
    /// Episodes dropped since the file before.
    pub dropped: Vec<Dropped>,
}

impl FileRecord {
    /// Returns the number of frames.
    pub fn num_frames(&self) -> u64 {
        self.episodes.iter().map(|episode| episode.length).sum()
    }
}

/// Writes the data files of a dataset.
pub struct DatasetWriter {
    storage: Storage,
    spec: DatasetSpec,
    config: WriterConfig,
    tasks: HashMap<String, u64>,
    open: Option<Open>,
    /// What the next file starts with.
    next: FileRecord,
    /// Dropped episodes with their number in the source.
    dropped: Vec<(u64, Dropped)>,
}

impl fmt::Debug for DatasetWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DatasetWriter")
            .field("destination", &self.storage.url())
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

struct Open {
    file: DataFile,
    /// Bytes of the episodes in it.
    bytes: u64,
    /// Bytes in the row group under way.
    group_bytes: u64,
}

impl DatasetWriter {
    /// Starts behind the data files that are finished already, if any.
    pub fn new(
        storage: Storage,
        spec: DatasetSpec,
        config: WriterConfig,
        finished: &[FileRecord],
    ) -> Self {
        let tasks = finished
            .iter()
            .flat_map(|file| file.new_tasks.iter().cloned());
        let tasks = (0..)
            .zip(tasks)
            .map(|(index, task)| (task, index))
            .collect();
        let mut next = empty_record(&spec);
        if let Some(last) = finished.last() {
            next.index = last.index + 1;
            next.first_episode = last.first_episode + last.episodes.len() as u64;
            next.first_frame = last.first_frame + last.num_frames();
        }
        Self {
            storage,
            spec,
            config,
            tasks,
            open: None,
            next,
            dropped: Vec::new(),
        }
    }

    /// Adds an episode, `source_index` in its source. Returns the record of the data file that
    /// ended before it, if one did.
    pub async fn add(
        &mut self,
        episode: &Episode,
        source_index: u64,
    ) -> Result<Option<FileRecord>> {
        self.check(episode)?;
        let bytes = episode.bytes();
        let full = |open: &Open| open.bytes + bytes > self.config.file_bytes.as_u64();
        let ended = if self.open.as_ref().is_some_and(full) {
            self.end_file().await?
        } else {
            None
        };
        let place = self.place(episode);
        let mut open = if let Some(open) = self.open.take() {
            open
        } else {
            self.next.path = data_path(self.next.index);
            let path = self.next.path.clone();
            Open {
                file: DataFile::create(&self.storage, path, &self.spec)?,
                bytes: 0,
                group_bytes: 0,
            }
        };
        self.write_frames(&mut open, episode, bytes, place).await?;
        open.bytes += bytes;
        self.open = Some(open);
        self.next.episodes.push(EpisodeRecord {
            name: episode.name.clone(),
            length: episode.num_frames as u64,
            task: place.task,
        });
        for (all, one) in self.next.histograms.iter_mut().zip(&episode.histograms) {
            all.merge(one);
        }
        let mut images = episode.cameras.iter().flatten();
        self.next.has_png |= images.any(|frame| frame.header.kind == PictureKind::Png);
        self.next.source_next = source_index + 1;
        Ok(ended)
    }

    /// Notes an episode of the source that is left out.
    pub fn drop_episode(&mut self, dropped: Dropped, source_index: u64) {
        self.dropped.push((source_index, dropped));
    }

    /// Ends the last data file. What was dropped behind its last episode comes with it.
    pub async fn finish(mut self) -> Result<(Option<FileRecord>, Vec<Dropped>)> {
        let ended = self.end_file().await?;
        let rest = self.dropped.into_iter().map(|(_, dropped)| dropped);
        Ok((ended, rest.collect()))
    }

    async fn end_file(&mut self) -> Result<Option<FileRecord>> {
        let Some(open) = self.open.take() else {
            return Ok(None);
        };
        let finished = open.file.finish().await?;
        let fresh = empty_record(&self.spec);
        let mut record = std::mem::replace(&mut self.next, fresh);
        record.bytes = finished.bytes;
        record.sha256 = finished.sha256;
        record.row_groups = finished.row_groups;
        let later = self
            .dropped
            .partition_point(|(i, _)| *i < record.source_next);
        let dropped = self.dropped.drain(..later).map(|(_, dropped)| dropped);
        record.dropped = dropped.collect();
        self.next.index = record.index + 1;
        self.next.first_episode = record.first_episode + record.episodes.len() as u64;
        self.next.first_frame = record.first_frame + record.num_frames();
        Ok(Some(record))
    }

    /// Cuts the episode into row groups: it joins the one under way if both fit, gets its own up to
    /// twice the target, and is split evenly above that.
    async fn write_frames(
        &self,
        open: &mut Open,
        episode: &Episode,
        bytes: u64,
        place: Place,
    ) -> Result<()> {
        let target = self.config.row_group_bytes.as_u64().max(1);
        let joined = open.group_bytes + bytes;
        if joined > 2 * target || (joined > target && open.group_bytes >= target / 2) {
            open.file.flush().await?;
            open.group_bytes = 0;
        }
        let mut groups = 1;
        if bytes > 2 * target {
            groups = bytes.div_ceil(target).min(episode.num_frames as u64);
        }
        let (mut start, mut before) = (0, 0);
        for group in 1..=groups {
            let goal = if group == groups {
                u64::MAX
            } else {
                bytes * group / groups
            };
            let mut end = start;
            while end < episode.num_frames && before < goal {
                before += episode.frame_bytes(end);
                end += 1;
            }
            open.file.write(episode, start..end, place)?;
            open.group_bytes += bytes / groups;
            start = end;
            if open.group_bytes >= target || groups > 1 {
                open.file.flush().await?;
                open.group_bytes = 0;
            }
        }
        Ok(())
    }

    fn place(&mut self, episode: &Episode) -> Place {
        let known = self.tasks.len() as u64;
        let task = *self.tasks.entry(episode.task.clone()).or_insert_with(|| {
            self.next.new_tasks.push(episode.task.clone());
            known
        });
        Place {
            episode: self.next.first_episode + self.next.episodes.len() as u64,
            first_frame: self.next.first_frame + self.next.num_frames(),
            task,
        }
    }

    fn check(&self, episode: &Episode) -> Result<()> {
        check(&self.spec, episode).map_err(|reason| Error::unusable(&episode.name, reason))
    }
}

/// Checks that an episode has the dataset's features; the error says what it has in their place.
pub(crate) fn check(spec: &DatasetSpec, episode: &Episode) -> Result<(), String> {
    let rows = episode.num_frames;
    if rows == 0 {
        return Err("it has no frames".into());
    }
    if (episode.cameras.len(), episode.numbers.len()) != (spec.cameras.len(), spec.numbers.len()) {
        return Err("it has other features than the episodes before".into());
    }
    for (feature, frames) in spec.cameras.iter().zip(&episode.cameras) {
        if frames.len() != rows {
            let found = frames.len();
            return Err(format!(
                "{} has {found} images for {rows} frames",
                feature.name
            ));
        }
        let size = |frame: &crate::Frame| (frame.header.height, frame.header.width);
        let expected = (feature.height, feature.width);
        if let Some(i) = frames.iter().position(|frame| size(frame) != expected) {
            let (height, width) = size(&frames[i]);
            return Err(format!(
                "{} is {height} x {width} at frame {i} and {} x {} in the first episode; a resize \
                 makes them equal only where the aspect is",
                feature.name, expected.0, expected.1
            ));
        }
    }
    for (feature, matrix) in spec.numbers.iter().zip(&episode.numbers) {
        if matrix.width != feature.width || matrix.values.len() != rows * matrix.width {
            return Err(format!(
                "{} has {} values for {rows} frames of {}",
                feature.name,
                matrix.values.len(),
                feature.width
            ));
        }
        if let Some(i) = matrix.values.iter().position(|value| !value.is_finite()) {
            let (frame, value) = (i / matrix.width, matrix.values[i]);
            return Err(format!("{} is {value} at frame {frame}", feature.name));
        }
    }
    Ok(())
}

fn empty_record(spec: &DatasetSpec) -> FileRecord {
    FileRecord {
        index: 0,
        path: String::new(),
        bytes: 0,
        sha256: String::new(),
        row_groups: 0,
        first_episode: 0,
        first_frame: 0,
        episodes: Vec::new(),
        new_tasks: Vec::new(),
        has_png: false,
        histograms: vec![ColorHistogram::default(); spec.cameras.len()],
        source_next: 0,
        dropped: Vec::new(),
    }
}

fn data_path(index: u64) -> String {
    let (chunk, file) = (index / CHUNK_FILES, index % CHUNK_FILES);
    format!("data/chunk-{chunk:03}/file-{file:03}.parquet")
}

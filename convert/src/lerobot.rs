//! LeRobot datasets v2.0, v2.1 and v3.0, with image features or, through `ffmpeg`, videos.
//!
//! Data files are read in the order of their paths, row group by row group, and cut where
//! `episode_index` changes; this holds for files of one episode (v2) and of many (v3).

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{Array, RecordBatch};
use async_trait::async_trait;
use pollen_storage::Storage;

use crate::columns;
use crate::episode::Recording;
use crate::error::{Error, Result};
use crate::lerobot_meta::{Info, VideoPlace, path_of, read_tasks, read_video_places};
use crate::parquet_file::ParquetFile;
use crate::picture::Frame;
use crate::reader::{Reader, blocking};
use crate::selection::Selection;
use crate::source::{Field, FieldKind, Profile, Source, Work, local_path};
use crate::video::Clip;

const EPISODE: &str = "episode_index";
const IMAGES: &str = "observation.images.";

/// What all episodes share.
#[derive(Debug)]
struct Shared {
    reader: Reader,
    info: Info,
    tasks: BTreeMap<i64, String>,
    /// Where the videos of an episode are, by feature and episode; for v3.0 only.
    videos: BTreeMap<(String, i64), VideoPlace>,
}

/// A LeRobot dataset.
#[derive(Debug)]
pub(crate) struct LeRobot {
    shared: Arc<Shared>,
    profile: Profile,
    files: Vec<String>,
    /// The next row group: file and number in it.
    file: usize,
    row_group: usize,
    open: Option<ParquetFile>,
    batches: VecDeque<RecordBatch>,
    /// Rows of the next batches that belong to episodes that were skipped.
    skip_rows: usize,
}

impl LeRobot {
    pub(crate) async fn open(storage: Storage) -> Result<Self> {
        let reader = Reader::new(storage);
        blocking(move || Self::open_blocking(reader)).await
    }

    fn open_blocking(reader: Reader) -> Result<Self> {
        let info = Info::read(&reader)?;
        let tasks = read_tasks(&reader, &info)?;
        let listing = reader.list("data")?;
        let mut files: Vec<String> = listing.iter().map(|object| object.path.clone()).collect();
        files.retain(|path| path.ends_with(".parquet"));
        let videos = if info.is_v3() && info.videos().next().is_some() {
            read_video_places(&reader, &info)?
        } else {
            BTreeMap::new()
        };
        let mut profile = profile(&info);
        profile.fingerprint = format!("lerobot {} {listing:?}", reader.name(""));
        Ok(Self {
            shared: Arc::new(Shared {
                reader,
                info,
                tasks,
                videos,
            }),
            profile,
            files,
            file: 0,
            row_group: 0,
            open: None,
            batches: VecDeque::new(),
            skip_rows: 0,
        })
    }

    /// Opens the next file when the one before is done; returns whether there is a row group.
    async fn at_row_group(&mut self) -> Result<bool> {
        loop {
            if self
                .open
                .as_ref()
                .is_some_and(|file| self.row_group < file.num_row_groups())
            {
                return Ok(true);
            }
            if self.open.take().is_some() {
                self.file += 1;
                self.row_group = 0;
            }
            let Some(path) = self.files.get(self.file).cloned() else {
                return Ok(false);
            };
            let reader = self.shared.reader.clone();
            self.open = Some(blocking(move || ParquetFile::open(&reader, &path)).await?);
        }
    }

    /// Reads the next row group.
    async fn read(
        &mut self,
        columns: Option<&'static [&'static str]>,
    ) -> Result<Option<Vec<RecordBatch>>> {
        if !self.at_row_group().await? {
            return Ok(None);
        }
        let file = self.open.clone().expect("a file with a row group is open");
        let row_group = self.row_group;
        self.row_group += 1;
        blocking(move || file.read(row_group, columns))
            .await
            .map(Some)
    }

    /// Returns the next batch of rows that are wanted.
    async fn batch(&mut self) -> Result<Option<RecordBatch>> {
        loop {
            if let Some(batch) = self.batches.pop_front() {
                let skip = self.skip_rows.min(batch.num_rows());
                self.skip_rows -= skip;
                if skip < batch.num_rows() {
                    return Ok(Some(batch.slice(skip, batch.num_rows() - skip)));
                }
                continue;
            }
            match self.read(None).await? {
                Some(batches) => self.batches.extend(batches),
                None => return Ok(None),
            }
        }
    }

    fn episodes_of(&self, batch: &RecordBatch) -> Result<Vec<i64>> {
        let column = batch.column_by_name(EPISODE);
        let column = column.and_then(|column| column.as_primitive_opt::<Int64Type>());
        match column {
            Some(column) if column.null_count() == 0 => Ok(column.values().to_vec()),
            _ => {
                let file = self
                    .files
                    .get(self.file)
                    .map(String::as_str)
                    .unwrap_or_default();
                let reason = "it has no episode_index of 64-bit integers";
                Err(Error::invalid(self.shared.reader.name(file), reason))
            }
        }
    }
}

#[async_trait]
impl Source for LeRobot {
    fn profile(&self) -> &Profile {
        &self.profile
    }

    async fn seek(&mut self, episode: u64) -> Result<()> {
        (self.file, self.row_group, self.open, self.skip_rows) = (0, 0, None, 0);
        self.batches.clear();
        let (mut before, mut last) = (0, None);
        if episode == 0 {
            return Ok(());
        }
        while let Some(batches) = self.read(Some(&[EPISODE])).await? {
            let mut row = 0;
            for batch in batches {
                for number in self.episodes_of(&batch)? {
                    if last != Some(number) {
                        if before == episode {
                            self.row_group -= 1;
                            self.skip_rows = row;
                            return Ok(());
                        }
                        before += 1;
                        last = Some(number);
                    }
                    row += 1;
                }
            }
        }
        Ok(())
    }

    async fn next(&mut self) -> Result<Option<Work>> {
        let mut parts: Vec<RecordBatch> = Vec::new();
        let mut episode = None;
        while let Some(batch) = self.batch().await? {
            let numbers = self.episodes_of(&batch)?;
            let wanted = *episode.get_or_insert(numbers[0]);
            let rows = numbers
                .iter()
                .take_while(|number| **number == wanted)
                .count();
            if rows > 0 {
                parts.push(batch.slice(0, rows));
            }
            if rows < batch.num_rows() {
                self.batches
                    .push_front(batch.slice(rows, batch.num_rows() - rows));
                break;
            }
        }
        let Some(episode) = episode else {
            return Ok(None);
        };
        let shared = Arc::clone(&self.shared);
        Ok(Some(Box::new(move |selection| {
            shared.read(episode, &parts, selection)
        })))
    }
}

impl Shared {
    fn read(
        &self,
        episode: i64,
        parts: &[RecordBatch],
        selection: &Selection,
    ) -> Result<Recording> {
        let name = format!("episode {episode}");
        let unusable = |reason: String| Error::unusable(&name, reason);
        let mut recording = Recording {
            name: name.clone(),
            num_frames: parts.iter().map(RecordBatch::num_rows).sum(),
            ..Recording::default()
        };
        for field in selection.number_fields() {
            let matrix =
                columns::numbers(parts, field).map_err(|e| unusable(format!("{field}: {e}")))?;
            recording.numbers.insert(field.into(), matrix);
        }
        for field in selection.image_fields() {
            let frames = if self.info.is_video(field) {
                self.video(field, episode, recording.num_frames, selection)?
            } else {
                let files = columns::images(parts, field);
                let files = files.map_err(|e| unusable(format!("{field}: {e}")))?;
                let frames = files.into_iter().enumerate().map(|(i, file)| {
                    let frame = selection.pictures.file(file);
                    frame.map_err(|e| unusable(format!("{field}, frame {i}: {e}")))
                });
                frames.collect::<Result<_>>()?
            };
            recording.cameras.insert(field.into(), frames);
        }
        recording.instruction = match selection.instruction.as_deref() {
            None => None,
            Some("task") => {
                let tasks = columns::numbers(parts, "task_index").map_err(unusable)?;
                let task = tasks.values.first().map(|task| *task as i64);
                task.and_then(|task| self.tasks.get(&task).cloned())
            }
            Some(field) => columns::first_text(parts, field),
        };
        Ok(recording)
    }

    fn video(
        &self,
        field: &str,
        episode: i64,
        count: usize,
        selection: &Selection,
    ) -> Result<Vec<Frame>> {
        let name = format!("episode {episode}");
        let unusable = |reason: String| Error::unusable(&name, reason);
        let size = self.info.image_size(field);
        let (height, width) = size.ok_or_else(|| unusable(format!("{field} has no size")))?;
        let (path, from) = if self.info.is_v3() {
            let place = self.videos.get(&(field.to_string(), episode));
            let place = place.ok_or_else(|| {
                unusable(format!(
                    "meta/episodes does not say where the video of {field} is"
                ))
            })?;
            let values = [("chunk_index", place.chunk), ("file_index", place.file)];
            (path_of(self.info.video_path(), field, &values), place.from)
        } else {
            let chunk = episode / self.info.chunks_size().max(1);
            let values = [("episode_chunk", chunk), ("episode_index", episode)];
            (path_of(self.info.video_path(), field, &values), 0.0)
        };
        let url = self.reader.name(&path);
        let Some(file) = local_path(&url).map(PathBuf::from) else {
            return Err(Error::arguments(format!(
                "{url}: videos are read from a local disk only; copy the dataset there first"
            )));
        };
        if !Path::new(&file).exists() {
            return Err(unusable(format!("{url} is missing")));
        }
        let mut frames = Vec::with_capacity(count);
        let clip = Clip {
            file: &file,
            // Counted in frames: sums of durations drift.
            first: (from * self.info.fps()).round() as u64,
            count,
            fps: self.info.fps(),
            height,
            width,
        };
        clip.decode(|pixels| {
            let frame = selection.pictures.video(height, width, pixels);
            frames.push(frame.map_err(|e| unusable(format!("{field}: {e}")))?);
            Ok(())
        })?;
        Ok(frames)
    }
}

fn profile(info: &Info) -> Profile {
    let mut profile = Profile {
        fps: Some(info.fps()),
        robot_type: info.robot_type(),
        num_episodes: info.num_episodes(),
        names: info.names(),
        instruction: Some("task".into()),
        fields: vec![Field::new("task", FieldKind::Text)],
        ..Profile::default()
    };
    for (name, kind) in info.fields() {
        profile.fields.push(Field::new(name, kind));
    }
    let images = profile
        .fields
        .iter()
        .filter(|field| field.kind == FieldKind::Image);
    let images = images.filter(|field| !field.name.contains("depth"));
    let cameras = images.map(|field| {
        let camera = field.name.strip_prefix(IMAGES).unwrap_or(&field.name);
        (field.name.clone(), camera.replace('.', "_"))
    });
    let cameras = cameras.collect();
    let number = |name: &str| {
        let found = profile
            .fields
            .contains(&Field::new(name, FieldKind::Numbers));
        found.then(|| name.to_string())
    };
    let (state, action) = (number("observation.state"), number("action"));
    profile.cameras = cameras;
    profile.state = state.into_iter().collect();
    profile.action = action.into_iter().collect();
    profile
}

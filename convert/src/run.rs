//! One conversion under way: episodes from the source to the writer, then the check of it all.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::sync::Arc;

use pollen_storage::Storage;
use tokio::task::JoinHandle;

use crate::convert::{ConvertArgs, Progress, Stage};
use crate::episode::Episode;
use crate::error::{Error, Result};
use crate::finalize::finalize;
use crate::progress::{self, Conversion, StoredFile};
use crate::reader::{Reader, blocking};
use crate::schema::DatasetSpec;
use crate::selection::Selection;
use crate::source::{Source, SourceKind};
use crate::writer::{self, DatasetWriter, Dropped, FileRecord, WriterConfig};

type Reading = JoinHandle<Result<Episode>>;

/// One conversion under way.
pub(crate) struct Run<P> {
    pub(crate) destination: Storage,
    pub(crate) selection: Arc<Selection>,
    pub(crate) writer_config: WriterConfig,
    pub(crate) identity: String,
    pub(crate) fps: f64,
    pub(crate) robot: String,
    /// Known from the first episode on.
    pub(crate) spec: Option<DatasetSpec>,
    pub(crate) writer: Option<DatasetWriter>,
    pub(crate) notes: Vec<String>,
    pub(crate) files: Vec<FileRecord>,
    /// Dropped and not yet in a record.
    pub(crate) dropped_since: Vec<Dropped>,
    pub(crate) progress: P,
    pub(crate) state: Progress,
}

impl<P: FnMut(&Progress) -> ControlFlow<()> + Send> Run<P> {
    /// Reads up to `jobs` episodes at once and writes them in order.
    pub(crate) async fn episodes(
        &mut self,
        mut source: Box<dyn Source>,
        jobs: NonZeroUsize,
    ) -> Result<()> {
        let mut next = self.files.last().map_or(0, |file| file.source_next);
        source.seek(next).await?;
        self.count_finished();
        let mut reading: VecDeque<(u64, Reading)> = VecDeque::new();
        // A source that fails is left only after the episodes before the fault.
        let mut ended = None;
        loop {
            while ended.is_none() && reading.len() < jobs.get() {
                let work = match source.next().await {
                    Ok(Some(work)) => work,
                    Ok(None) => {
                        ended = Some(Ok(()));
                        break;
                    }
                    Err(error) => {
                        ended = Some(Err(error));
                        break;
                    }
                };
                let selection = Arc::clone(&self.selection);
                let task = tokio::task::spawn_blocking(move || {
                    work(&selection).and_then(|recording| selection.assemble(recording))
                });
                reading.push_back((next, task));
                next += 1;
            }
            let Some((index, task)) = reading.pop_front() else {
                break;
            };
            let episode = task.await.map_err(|error| Error::Panicked {
                reason: format!("at episode {index} of the source: {error}"),
            })?;
            let added = match episode {
                Ok(episode) => self.add(&episode, index).await,
                Err(error) => Err(error),
            };
            match added {
                Ok(()) => {}
                Err(Error::Unusable { episode, reason }) => {
                    self.drop_episode(index, episode, reason);
                }
                Err(error) => return Err(error),
            }
            if (self.progress)(&self.state).is_break() {
                let files = self.files.len();
                return Err(Error::Stopped { files });
            }
        }
        ended.unwrap_or(Ok(()))?;
        if let Some(writer) = self.writer.take() {
            let (record, rest) = writer.finish().await?;
            self.dropped_since = rest;
            if let Some(record) = record {
                self.file_done(record).await?;
            }
        }
        Ok(())
    }

    fn count_finished(&mut self) {
        let state = &mut self.state;
        state.files = self.files.len() as u64;
        for file in &self.files {
            state.episodes += file.episodes.len() as u64;
            state.dropped += file.dropped.len() as u64;
            state.frames += file.num_frames();
            state.bytes += file.bytes;
        }
    }

    async fn add(&mut self, episode: &Episode, index: u64) -> Result<()> {
        let spec = if let Some(spec) = &self.spec {
            spec.clone()
        } else {
            let spec = self.selection.spec(episode, self.fps, self.robot.clone());
            writer::check(&spec, episode).map_err(|e| Error::unusable(&episode.name, e))?;
            progress::start(&self.destination, &self.identity, &spec).await?;
            self.spec = Some(spec.clone());
            spec
        };
        if self.writer.is_none() {
            let storage = self.destination.clone();
            let mut writer = DatasetWriter::new(storage, spec, self.writer_config, &self.files);
            for (i, dropped) in self.dropped_since.drain(..).enumerate() {
                // Dropped before the first usable episode.
                let before = self.files.last().map_or(0, |file| file.source_next);
                writer.drop_episode(dropped, before + i as u64);
            }
            self.writer = Some(writer);
        }
        let writer = self.writer.as_mut().expect("it was just made");
        let record = writer.add(episode, index).await?;
        self.state.episodes += 1;
        self.state.frames += episode.num_frames as u64;
        self.state.bytes += episode.bytes();
        match record {
            Some(record) => self.file_done(record).await,
            None => Ok(()),
        }
    }

    fn drop_episode(&mut self, index: u64, what: String, why: String) {
        tracing::warn!(episode = what, reason = why, "episode dropped");
        self.state.dropped += 1;
        let dropped = Dropped { what, why };
        match &mut self.writer {
            Some(writer) => writer.drop_episode(dropped, index),
            None => self.dropped_since.push(dropped),
        }
    }

    async fn file_done(&mut self, record: FileRecord) -> Result<()> {
        progress::record(&self.destination, &record).await?;
        tracing::info!(
            file = record.path,
            bytes = record.bytes,
            "data file finished"
        );
        self.files.push(record);
        self.state.files += 1;
        Ok(())
    }

    /// Reads everything back and writes the metadata.
    pub(crate) async fn verify(&mut self) -> Result<DatasetSpec> {
        let Some(spec) = self.spec.clone().filter(|_| !self.files.is_empty()) else {
            let first = self.dropped_since.first();
            let why = first.map_or("it has no episodes".into(), |d| {
                format!("{}: {}", d.what, d.why)
            });
            return Err(Error::arguments(format!("no episode can be used; {why}")));
        };
        self.state.stage = Stage::Verifying;
        if (self.progress)(&self.state).is_break() {
            let files = self.files.len();
            return Err(Error::Stopped { files });
        }
        let reader = Reader::new(self.destination.clone());
        let (files, config) = (self.files.clone(), self.writer_config);
        blocking(move || {
            finalize(&reader, &spec, config, &files)?;
            Ok(spec)
        })
        .await
    }

    pub(crate) fn conversion(
        &mut self,
        args: &ConvertArgs,
        kind: SourceKind,
        spec: &DatasetSpec,
    ) -> Conversion {
        let mut notes = std::mem::take(&mut self.notes);
        let png = self.files.iter().any(|file| file.has_png);
        if png {
            notes.push(
                "images are stored as PNG; Pollen trains on JPEG: convert with --jpeg-quality 95"
                    .into(),
            );
        }
        if spec.numbers.len() < 2 {
            notes.push("there is no observation.state; name its fields in the mapping".into());
        }
        let episodes = || self.files.iter().flat_map(|file| &file.episodes);
        let tasks: Vec<&String> = self.files.iter().flat_map(|file| &file.new_tasks).collect();
        let silent = episodes()
            .filter(|e| tasks[e.task as usize].is_empty())
            .count();
        if silent > 0 {
            notes.push(format!(
                "{silent} episodes have no instruction; give --task to add one"
            ));
        }
        let dropped = self
            .files
            .iter()
            .flat_map(|file| file.dropped.iter().cloned());
        let files = self.files.iter().map(|file| StoredFile {
            path: file.path.clone(),
            bytes: file.bytes,
            sha256: file.sha256.clone(),
        });
        Conversion {
            version: 1,
            identity: self.identity.clone(),
            kind,
            source: args.source.clone(),
            episodes: episodes().count() as u64,
            frames: self.files.iter().map(FileRecord::num_frames).sum(),
            bytes: self.files.iter().map(|file| file.bytes).sum(),
            dropped: dropped.chain(self.dropped_since.iter().cloned()).collect(),
            notes,
            files: files.collect(),
        }
    }
}

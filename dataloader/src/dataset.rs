//! One opened dataset: its tables. How its files are read: `reading`.

mod reading;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use parquet::arrow::arrow_reader::ArrowReaderMetadata;
use pollen_core::ActionSpace;
use pollen_storage::Storage;

use crate::byte_cache::{ByteCache, Owner};
use crate::dataset_config::DatasetConfig;
use crate::disk_cache::DiskCache;
use crate::error::{Error, Result};
use crate::features::feature_faults;
use crate::index::load_sidecar;
use crate::lerobot::{Metadata, read_metadata};
use crate::parquet_file::FileName;
use crate::sampler::{RowGroupFrames, Run, SampleRef};
use crate::sidecar::Sidecar;
use crate::transform::ColumnTransform;

/// A dataset that is ready to be read.
#[derive(Debug)]
pub struct Dataset {
    name: String,
    config: DatasetConfig,
    storage: Storage,
    /// Number in the mixture.
    number: u32,
    shared: Shared,
    metadata: Metadata,
    sidecar: Sidecar,
    space_index: u32,
    space: ActionSpace,
    files: Vec<FileName>,
    groups: Vec<Group>,
    /// In the order of rows.
    episodes: Vec<EpisodeRows>,
    /// Image features to read, in the order of the model's cameras.
    features: Vec<String>,
    /// Per model camera: its place in `features`.
    cameras: Vec<Option<usize>>,
}

/// What all datasets of a run share.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    pub(crate) disk_cache: Option<Arc<DiskCache>>,
    pub(crate) footers: Arc<Footers>,
    /// Owns the footers that are being read.
    pub(crate) reading: Owner,
}

/// Footers of files by (dataset, file).
pub(crate) type Footers = ByteCache<(u32, usize), ArrowReaderMetadata>;

#[derive(Clone, Copy, Debug)]
struct Group {
    file: usize,
    /// Number in its file.
    number: usize,
    first_row: u64,
}

/// The rows of one episode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EpisodeRows {
    pub(crate) episode: u64,
    pub(crate) first_row: u64,
    pub(crate) rows: u64,
}

impl Dataset {
    /// Opens dataset `number` of the mixture, making its index if there is none.
    ///
    /// `spaces` are the model's action spaces and `cameras` its camera roles, both in the model's
    /// order.
    pub(crate) async fn open(
        (number, name, config): (u32, &str, &DatasetConfig),
        storage: Storage,
        shared: Shared,
        spaces: &[ActionSpace],
        cameras: &[String],
        index_dir: &Path,
    ) -> Result<Self> {
        let metadata = read_metadata(&storage, name).await?;
        let found = spaces.iter().position(|s| s.name == config.embodiment);
        let mut faults = Vec::new();
        if found.is_none() {
            let known: Vec<&str> = spaces.iter().map(|space| &*space.name).collect();
            faults.push(format!(
                "data.datasets.{name}.embodiment = \"{}\" is not one of the model's action spaces \
                 {known:?}",
                config.embodiment
            ));
        }
        let space_index = found.unwrap_or_default();
        if let Some(space) = spaces.get(space_index) {
            feature_faults(name, config, &metadata, space, cameras, &mut faults);
        }
        if !faults.is_empty() {
            return Err(Error::Config { faults });
        }
        let transform = ColumnTransform::of(config, &spaces[space_index]);
        let sidecar = load_sidecar(&storage, name, &metadata, &transform, index_dir).await?;
        let mut dataset = Self {
            name: name.into(),
            config: config.clone(),
            storage,
            number,
            shared,
            metadata,
            space_index: space_index as u32,
            space: spaces[space_index].clone(),
            files: Vec::new(),
            groups: Vec::new(),
            episodes: Vec::new(),
            features: Vec::new(),
            cameras: Vec::new(),
            sidecar,
        };
        dataset.lay_out();
        for role in cameras {
            let feature = config.cameras.get(role);
            dataset
                .cameras
                .push(feature.map(|_| dataset.features.len()));
            dataset.features.extend(feature.cloned());
        }
        for holdout in &config.holdout_episodes {
            if !dataset.episodes.iter().any(|e| e.episode == *holdout) {
                return Err(Error::config(format!(
                    "data.datasets.{name}.holdout_episodes names episode {holdout}; the dataset \
                     has {} episodes",
                    dataset.episodes.len()
                )));
            }
        }
        Ok(dataset)
    }

    fn lay_out(&mut self) {
        let mut row = 0;
        for (f, file) in self.sidecar.files.iter().enumerate() {
            self.files.push(FileName {
                dataset: self.name.clone(),
                path: file.path.clone(),
            });
            for (number, group) in file.row_groups.iter().enumerate() {
                self.groups.push(Group {
                    file: f,
                    number,
                    first_row: row,
                });
                for &(episode, first, rows) in &group.episodes {
                    match self.episodes.last_mut().filter(|e| e.episode == episode) {
                        Some(known) if first > 0 => known.rows += rows,
                        _ => self.episodes.push(EpisodeRows {
                            episode,
                            first_row: row,
                            rows,
                        }),
                    }
                    row += rows;
                }
            }
        }
    }

    /// Returns the name in the recipe.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns its section of the recipe.
    pub fn config(&self) -> &DatasetConfig {
        &self.config
    }

    /// Returns its index: checksums, statistics, row groups.
    pub fn sidecar(&self) -> &Sidecar {
        &self.sidecar
    }

    /// Returns its `info.json` and its tasks.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Returns its action space.
    pub fn action_space(&self) -> &ActionSpace {
        &self.space
    }

    /// Returns the position of its action space among the model's.
    pub fn space_index(&self) -> u32 {
        self.space_index
    }

    /// Returns the control frequency told to the model, in hertz.
    pub fn frequency_hz(&self) -> f32 {
        if self.config.hz > 0.0 {
            self.config.hz as f32
        } else {
            self.metadata.info.fps as f32
        }
    }

    /// Returns the bytes of its data files.
    pub fn bytes(&self) -> u64 {
        self.sidecar.files.iter().map(|file| file.bytes).sum()
    }

    /// Returns the number of row groups in all files.
    pub fn num_row_groups(&self) -> usize {
        self.groups.len()
    }

    /// Returns the number of episodes, held-out ones included.
    pub fn num_episodes(&self) -> usize {
        self.episodes.len()
    }

    /// Returns the row groups with the frames of training episodes, or of the held-out ones, that
    /// samples may start at.
    pub fn frames(&self, held_out: bool) -> Vec<RowGroupFrames> {
        let groups = self.sidecar.files.iter().flat_map(|file| &file.row_groups);
        let mut row = 0;
        groups
            .map(|group| {
                let mut runs = Vec::new();
                for &(episode, _, rows) in &group.episodes {
                    if self.config.holdout_episodes.contains(&episode) == held_out {
                        self.starts(episode, row..row + rows, &mut runs);
                    }
                    row += rows;
                }
                RowGroupFrames {
                    bytes: group.bytes,
                    runs,
                }
            })
            .collect()
    }

    /// Appends the runs of an episode's rows that are steps and that no filter leaves out.
    fn starts(&self, episode: u64, rows: Range<u64>, runs: &mut Vec<Run>) {
        let of = self.episode_at(rows.start);
        let steps = &self.sidecar.transform.steps;
        let left_out = &self.sidecar.left_out;
        let mut next =
            left_out.partition_point(|&(first, rows_out)| first + rows_out <= rows.start);
        let mut open: Option<Run> = None;
        for row in rows {
            while left_out
                .get(next)
                .is_some_and(|&(first, n)| first + n <= row)
            {
                next += 1;
            }
            let filtered = left_out.get(next).is_some_and(|&(first, _)| first <= row);
            if filtered || !steps.is_step(row - of.first_row, of.rows) {
                runs.extend(open.take());
                continue;
            }
            let run = open.get_or_insert(Run {
                episode,
                first_row: row,
                rows: 0,
            });
            run.rows += 1;
        }
        runs.extend(open);
    }

    /// Returns the number of frames from a global row to the end of its episode, itself included.
    pub(crate) fn rows_left(&self, row: u64) -> u64 {
        let episode = self.episode_at(row);
        episode.first_row + episode.rows - row
    }

    /// Returns the number of steps from a global row to the end of its episode, itself included.
    pub(crate) fn steps_left(&self, row: u64) -> u64 {
        let episode = self.episode_at(row);
        let steps = &self.sidecar.transform.steps;
        steps.steps_left(row - episode.first_row, episode.rows)
    }

    fn episode_at(&self, row: u64) -> EpisodeRows {
        let at = self.episodes.partition_point(|e| e.first_row <= row);
        self.episodes[at.saturating_sub(1)]
    }

    /// Returns, per model camera, its number among the images that [`Self::open_row_group`] reads.
    pub(crate) fn cameras(&self) -> &[Option<usize>] {
        &self.cameras
    }

    /// Returns height and width that an image of the camera must have.
    pub(crate) fn image_size(&self, image: usize) -> Option<(usize, usize)> {
        let feature = self.metadata.info.features.get(&self.features[image])?;
        feature.image_size()
    }

    /// Returns the row inside its row group.
    pub(crate) fn row_in_group(&self, sample: SampleRef) -> usize {
        (sample.frame - self.groups[sample.row_group as usize].first_row) as usize
    }

    /// Names a frame in an error.
    pub(crate) fn bad_frame(&self, sample: SampleRef, reason: impl Into<String>) -> Error {
        Error::Frame {
            dataset: self.name.clone(),
            episode: sample.episode,
            frame: sample.frame,
            reason: reason.into(),
        }
    }
}

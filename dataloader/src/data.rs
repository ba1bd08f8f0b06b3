//! The datasets of a run, opened, and what turns their rows into model inputs.

use std::sync::Arc;

use pollen_core::{ActionSpace, ErrorClass, Seed};
use pollen_processing::{
    Augmentation, Image, ImageContract, ObservationContract, ResizeKind, Resizer,
};
use pollen_storage::Storage;

use crate::bad_row_groups::BadRowGroups;
use crate::batch::{BadSample, BatchDims, HostBatch, ModelShape};
use crate::byte_cache::{ByteCache, HeldBytes, Owner, Pinned};
use crate::config::{ChunkLength, DataConfig};
use crate::dataset::{Dataset, Footers, Shared};
use crate::decode::decode_jpeg_into;
use crate::disk_cache::DiskCache;
use crate::error::{Error, Result};
use crate::mixture::{Mixture, MixtureSource};
use crate::prepare::{Prepare, Texts};
use crate::row_group::OpenRowGroup;
use crate::sampler::{RowGroupFrames, SampleRef};

/// Opens the storage at a URL; the caller chooses limits and credentials.
pub type OpenStorage<'a> =
    &'a (dyn Fn(&str) -> std::result::Result<Storage, pollen_storage::Error> + Sync);

/// The datasets of a run. Shared by all loaders of a process, with one cache of open row groups.
#[derive(Debug)]
pub struct Data {
    config: DataConfig,
    shape: ModelShape,
    datasets: Vec<Dataset>,
    prepare: Vec<Prepare>,
    texts: Texts,
    resizer: Resizer,
    row_groups: Arc<RowGroups>,
    bad_row_groups: BadRowGroups<Key>,
    footers: Arc<Footers>,
}

/// (dataset, row group).
pub(crate) type Key = (u32, u32);

type RowGroups = ByteCache<Key, OpenRowGroup>;

/// Footers may take one part of so many of `data.cache_bytes`, row groups the rest.
const PARTS: u64 = 8;

impl Data {
    /// Opens the datasets that the recipe gives a weight, indexing those without a sidecar.
    ///
    /// `spaces` are the model's action spaces in its order; `open` is called for `data.root` and
    /// for datasets elsewhere.
    pub async fn open(
        config: &DataConfig,
        spaces: &[ActionSpace],
        shape: ModelShape,
        open: OpenStorage<'_>,
    ) -> Result<Self> {
        config.validate()?;
        check_shape(config, spaces, shape)?;
        let texts = Texts::load(
            &config.tokenizer,
            config.florence_tokens,
            config.text_length,
        )?;
        let opened = |url: &str| {
            open(url).map_err(|source| Error::Storage {
                dataset: "data.root".into(),
                source,
            })
        };
        let root = opened(&config.root)?;
        let disk_cache = config.disk_cache.as_ref().and_then(DiskCache::open);
        let cache_bytes = config.cache_bytes.as_u64();
        let shared = Shared {
            disk_cache: disk_cache.map(Arc::new),
            footers: Arc::new(ByteCache::new(cache_bytes / PARTS)),
            reading: Owner::default(),
        };
        let mut datasets = Vec::new();
        for (name, section) in &config.datasets {
            if section.weight != 0.0 && section.is_wordless() {
                tracing::warn!(
                    dataset = name,
                    "left out: none of its frames has an instruction"
                );
            }
        }
        for (number, (name, section)) in config.used().enumerate() {
            let mut section = section.clone();
            if config.frequency_hz > 0.0 {
                section.hz = config.frequency_hz;
            }
            let storage = match (section.url.contains("://"), section.url.is_empty()) {
                (true, _) => opened(&section.url)?,
                (false, true) => root.join(name),
                (false, false) => root.join(&section.url),
            };
            let dataset = Dataset::open(
                (number as u32, name, &section),
                storage,
                shared.clone(),
                spaces,
                &config.cameras,
                &config.index_dir,
            );
            datasets.push(dataset.await?);
        }
        let mut prepare = Vec::new();
        let mut faults = Vec::new();
        for dataset in &datasets {
            prepare.push(Prepare::new(dataset)?);
            for (role, image) in config.cameras.iter().zip(dataset.cameras()) {
                let size = image.and_then(|image| dataset.image_size(image));
                let squares = config.resize == ResizeKind::Lanczos3Square;
                if let Some((height, width)) = size.filter(|(h, w)| h != w && !squares) {
                    faults.push(format!(
                        "data.datasets.{}.cameras.{role} is {height} x {width}; data.resize keeps \
                         the aspect, set it to \"lanczos3_square\"",
                        dataset.name()
                    ));
                }
            }
        }
        if !faults.is_empty() {
            return Err(Error::Config { faults });
        }
        Ok(Self {
            resizer: Resizer::new(config.resize, config.image_size),
            row_groups: Arc::new(ByteCache::new(cache_bytes - cache_bytes / PARTS)),
            bad_row_groups: BadRowGroups::default(),
            footers: shared.footers,
            config: config.clone(),
            shape,
            datasets,
            prepare,
            texts,
        })
    }

    /// Returns the recipe's section.
    pub fn config(&self) -> &DataConfig {
        &self.config
    }

    /// Returns the sizes that batches are made for.
    pub fn shape(&self) -> ModelShape {
        self.shape
    }

    /// Returns the datasets in the order of [`SampleRef::dataset`].
    pub fn datasets(&self) -> &[Dataset] {
        &self.datasets
    }

    /// Returns (name, hash) of each dataset, for the checkpoint's manifest.
    pub fn hashes(&self) -> Vec<(String, String)> {
        let hash = |d: &Dataset| (d.name().to_owned(), d.sidecar().samples_hash());
        self.datasets.iter().map(hash).collect()
    }

    /// Returns what serving needs to prepare observations as these batches are prepared.
    pub fn contract(&self) -> ObservationContract {
        let contracts = self.datasets.iter().zip(&self.prepare);
        ObservationContract {
            version: ObservationContract::VERSION,
            cameras: self.config.cameras.clone(),
            image: ImageContract::new(self.config.image_size, self.config.resize),
            text: self.texts.contract().clone(),
            datasets: contracts
                .map(|(dataset, prepare)| (dataset.name().into(), prepare.contract().clone()))
                .collect(),
        }
    }

    /// Returns the number of token ids; the model's table needs at least as many rows.
    pub fn vocabulary_size(&self) -> usize {
        self.texts.vocabulary_size()
    }

    /// Builds the order of training samples under the run's root seed.
    pub fn mixture(&self, seed: Seed) -> Result<Mixture> {
        let sources = self.datasets.iter().map(|dataset| MixtureSource {
            name: dataset.name().to_owned(),
            weight: dataset.config().weight,
            groups: dataset.frames(false),
        });
        let mixture = Mixture::new(
            seed,
            sources.collect(),
            self.config.weight_meaning,
            self.config.window_bytes.as_u64(),
        )?;
        for (dataset, share) in self.datasets.iter().zip(mixture.shares()) {
            tracing::info!(dataset = dataset.name(), share, "mixture");
        }
        Ok(mixture)
    }

    /// Returns every `stride`-th frame of the held-out episodes, in the order of datasets and rows,
    /// numbered from 0.
    pub fn holdout(&self, stride: usize) -> Vec<(u64, SampleRef)> {
        let held_out = self.datasets.iter().enumerate().flat_map(|(d, dataset)| {
            frames_of(d as u32, &dataset.frames(true)).collect::<Vec<_>>()
        });
        (0..).zip(held_out.step_by(stride.max(1))).collect()
    }

    /// Returns how many entries of a sample count in the loss: the same on every rank, from the
    /// sample alone.
    pub fn valid_entries(&self, sample: SampleRef) -> u64 {
        let dataset = &self.datasets[sample.dataset as usize];
        (self.counted_steps(sample) * dataset.action_space().dim()) as u64
    }

    /// Returns how many steps of a sample's action chunk count in the loss.
    pub(crate) fn counted_steps(&self, sample: SampleRef) -> usize {
        let dataset = &self.datasets[sample.dataset as usize];
        let mut steps = self.shape.action_horizon;
        let own = dataset.config().chunk_length;
        if self.config.chunk_length == ChunkLength::Dataset && own > 0 {
            steps = steps.min(own);
        }
        if self.config.mask_padding {
            steps = steps.min(dataset.steps_left(sample.frame) as usize);
        }
        steps
    }

    /// Returns the bytes of row groups and of footers in memory, under the cap of
    /// `data.cache_bytes`.
    pub fn held_bytes(&self) -> (HeldBytes, HeldBytes) {
        (self.row_groups.held(), self.footers.held())
    }

    /// Returns how each dataset's rows become model values.
    pub(crate) fn prepare(&self) -> &[Prepare] {
        &self.prepare
    }

    /// Keeps row groups in memory until the pin is dropped; waits while there is no room for them.
    pub(crate) async fn pin(&self, keys: &[Key], owner: &Owner) -> Pinned<Key, OpenRowGroup> {
        let bytes = |&(dataset, group): &Key| {
            let bytes = self.datasets[dataset as usize].row_group_bytes(group);
            ((dataset, group), bytes)
        };
        let keys: Vec<(Key, u64)> = keys.iter().map(bytes).collect();
        self.row_groups.pin(&keys, owner).await
    }

    /// Returns a row group that is pinned, fetched if it is not in memory.
    pub(crate) async fn row_group(
        &self,
        key: Key,
        pinned: &Pinned<Key, OpenRowGroup>,
    ) -> Result<Arc<OpenRowGroup>> {
        let dataset = &self.datasets[key.0 as usize];
        pinned
            .get(key, || Box::pin(dataset.open_row_group(key.1)))
            .await
    }

    /// Returns the row groups that could not be read.
    pub(crate) fn bad_row_groups(&self) -> &BadRowGroups<Key> {
        &self.bad_row_groups
    }

    pub(crate) fn empty_batch(&self, samples: &[(u64, SampleRef)]) -> HostBatch {
        let dims = BatchDims {
            batch: samples.len(),
            cameras: self.config.cameras.len(),
            image_size: self.config.image_size,
            text_length: self.config.text_length,
            action_horizon: self.shape.action_horizon,
            action_width: self.shape.action_width,
            proprio_width: self.shape.proprio_width,
        };
        HostBatch::empty(dims, samples, self.texts.pad_id())
    }

    /// Fills in everything but the images of one sample.
    pub(crate) fn fill_low_dim(
        &self,
        batch: &mut HostBatch,
        slot: usize,
        sample: SampleRef,
        group: &OpenRowGroup,
    ) -> Result<()> {
        let columns = group.columns();
        let dataset = &self.datasets[sample.dataset as usize];
        let prepare = &self.prepare[sample.dataset as usize];
        let BatchDims {
            text_length,
            action_horizon,
            action_width,
            proprio_width,
            ..
        } = batch.dims;
        let row = dataset.row_in_group(sample);
        if columns.episode.get(row) != Some(&sample.episode) {
            return Err(dataset.bad_frame(sample, "the index names another episode here"));
        }
        batch.spaces[slot] = dataset.space_index();
        batch.frequency_hz[slot] = dataset.frequency_hz();
        let entries = action_horizon * action_width;
        let actions = &mut batch.actions[slot * entries..(slot + 1) * entries];
        let rows_left = dataset.rows_left(sample.frame) as usize;
        let chunk = prepare.chunk(&columns.action, row, rows_left, action_horizon);
        let chunk = chunk.map_err(|reason| dataset.bad_frame(sample, reason))?;
        let width = dataset.action_space().dim();
        let counted = self.counted_steps(sample);
        let valid = &mut batch.valid[slot * entries..(slot + 1) * entries];
        for (step, action) in chunk.chunks_exact(width).enumerate() {
            let at = step * action_width;
            actions[at..at + width].copy_from_slice(action);
            valid[at..at + width].fill(u8::from(step < counted));
        }
        if dataset.action_space().proprio_dim > 0 {
            let proprio = prepare
                .proprio(columns.state.row(row))
                .map_err(|reason| dataset.bad_frame(sample, reason))?;
            let at = slot * proprio_width;
            batch.proprio[at..at + proprio.len()].copy_from_slice(&proprio);
        }
        let task = columns.task[row];
        let text = self.texts.tokens((sample.dataset, task), || {
            prepare.prompt(&dataset.metadata().tasks[task as usize])
        })?;
        let at = slot * text_length;
        batch.input_ids[at..at + text_length].copy_from_slice(&text.ids);
        batch.text_mask[at..at + text_length].copy_from_slice(&text.mask);
        Ok(())
    }

    /// Puts a sample that cannot be used in quarantine, or returns an error that is not the
    /// sample's fault.
    pub(crate) fn quarantine(
        &self,
        batch: &mut HostBatch,
        slot: usize,
        sample: SampleRef,
        error: Error,
    ) -> Result<()> {
        if error.class() != ErrorClass::Corrupt {
            return Err(error);
        }
        let dataset = &self.datasets[sample.dataset as usize];
        batch.spaces[slot] = dataset.space_index();
        batch.frequency_hz[slot] = dataset.frequency_hz();
        batch.quarantine(BadSample {
            slot,
            dataset: dataset.name().to_owned(),
            episode: sample.episode,
            frame: sample.frame,
            entries: self.valid_entries(sample),
            reason: match error {
                Error::Frame { reason, .. } => reason,
                other => other.to_string(),
            },
        });
        Ok(())
    }

    /// Decodes, resizes and augments the images of one sample into `images`, and says which cameras
    /// its dataset has; the others' images are black.
    ///
    /// # Shapes
    /// `images` is `[N, 3, S, S]`.
    pub(crate) fn decode_images(
        &self,
        sample: SampleRef,
        group: &OpenRowGroup,
        seed: Option<Seed>,
        images: &mut [u8],
    ) -> Result<Vec<bool>> {
        let dataset = &self.datasets[sample.dataset as usize];
        let row = dataset.row_in_group(sample);
        let side = self.config.image_size;
        let roles = self.config.cameras.iter().zip(dataset.cameras());
        let planes = images.chunks_exact_mut(3 * side * side);
        let cameras = roles.zip(planes).enumerate();
        cameras
            .map(|(camera, ((role, image), planes))| {
                let Some(image) = *image else {
                    planes.fill(0);
                    return Ok(false);
                };
                let bad = |reason: String| {
                    dataset.bad_frame(sample, format!("camera `{role}`: {reason}"))
                };
                let bytes = group
                    .image(image, row)
                    .ok_or_else(|| bad("there is no image".into()))?;
                decode_jpeg_into(bytes, dataset.image_size(image), &self.resizer, planes)
                    .map_err(bad)?;
                let Some(seed) = seed else { return Ok(true) };
                let augmentation = self.config.augment.of(role);
                if augmentation != Augmentation::None {
                    let image = Image::from_planes(side, side, planes.to_vec());
                    let mut draws = seed.index(camera as u64).draws();
                    let image = image.map_err(|e| bad(e.to_string()))?;
                    planes.copy_from_slice(augmentation.apply(image, &mut draws).planes());
                }
                Ok(true)
            })
            .collect()
    }
}

/// Lists the frames of row groups in order.
pub(crate) fn frames_of(
    dataset: u32,
    groups: &[RowGroupFrames],
) -> impl Iterator<Item = SampleRef> {
    groups.iter().enumerate().flat_map(move |(g, group)| {
        group.runs.iter().flat_map(move |run| {
            (run.first_row..run.first_row + run.rows).map(move |frame| SampleRef {
                dataset,
                row_group: g as u32,
                episode: run.episode,
                frame,
            })
        })
    })
}

fn check_shape(config: &DataConfig, spaces: &[ActionSpace], shape: ModelShape) -> Result<()> {
    let mut faults = Vec::new();
    if shape.action_horizon == 0 {
        faults.push("the model's action horizon is 0".to_owned());
    }
    let used = |space: &&ActionSpace| config.used().any(|(_, d)| d.embodiment == space.name);
    for space in spaces.iter().filter(used) {
        if space.dim() > shape.action_width || space.proprio_dim > shape.proprio_width {
            faults.push(format!(
                "the action space `{}` has {} dimensions and {} of proprioception; the model takes \
                 {} and {}",
                space.name,
                space.dim(),
                space.proprio_dim,
                shape.action_width,
                shape.proprio_width
            ));
        }
    }
    if faults.is_empty() {
        Ok(())
    } else {
        Err(Error::Config { faults })
    }
}

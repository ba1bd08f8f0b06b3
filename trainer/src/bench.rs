//! Training steps and policy calls on a random batch, for measuring: a run's model, gradients and
//! update, without loader and checkpoints.

use std::collections::HashMap;
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use pollen_collectives::{Communicator, Local};
use pollen_core::{ActionSpace, Seed};
pub use pollen_dataloader::HostBatch;
use pollen_dataloader::{BatchDims, SampleRef};
use pollen_model::{Flower, FlowerConfig, Part, Precision, velocity_loss};

use crate::batch::{BatchBuilder, FlowBatch};
use crate::clip;
use crate::config::{GroupConfig, OptimizerConfig, ReduceDtype};
use crate::data_parallel::{Gradients, Reduction};
use crate::device_memory::Place;
use crate::error::Error;
use crate::layout::{Entry, Layout, Shard};
use crate::optim::{AdamW, host};
use crate::randomness::Randomness;
use crate::update::{Change, Update, learning_rates, square_sums};

/// Bytes of a bucket of gradients, as a recipe's default.
const BUCKET_BYTES: u64 = 64 << 20;
/// Largest global gradient norm.
const CLIP_NORM: f64 = 1.0;
/// Control frequency of the random samples, Hz.
const FREQUENCY_HZ: f32 = 10.0;
/// Smallest word: the ids below have a meaning of their own.
const FIRST_WORD: u64 = 3;

/// Tensors by name, with shape and values.
pub type NamedValues = Vec<(String, Vec<usize>, Vec<f32>)>;

/// A piece of work that a step has just done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lap {
    /// The batch is on the device, with its random masks.
    Copy,
    /// Forward or backward pass of a part of the model.
    Model(Part),
    /// Gradients in flat buckets, their norm, AdamW, new weights.
    Optimizer,
}

/// A model in training.
pub struct Bench {
    pub(crate) model: Flower,
    pub(crate) layout: Layout,
    pub(crate) optimizer: AdamW,
    optimizer_config: OptimizerConfig,
    pub(crate) reduction: Reduction,
    batches: BatchBuilder,
    pub(crate) device: Device,
    pub(crate) step: u64,
}

impl std::fmt::Debug for Bench {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bench")
            .field("step", &self.step)
            .finish_non_exhaustive()
    }
}

impl Bench {
    /// Builds a model with random weights and AdamW as FLOWER's pretraining has it.
    ///
    /// # Errors
    /// When the sizes do not fit together.
    pub fn new(
        config: &FlowerConfig,
        spaces: &[ActionSpace],
        precision: Precision,
        seed: u64,
        device: &Device,
    ) -> Result<Self, Error> {
        let device = device.clone().autodiff();
        let model = config.init(spaces, Seed::new(seed).child("weights"), &device)?;
        let model = model.with_precision(precision);
        let optimizer_config = OptimizerConfig {
            head: GroupConfig::default(),
            vlm: GroupConfig {
                learning_rate: 2e-5,
                betas: [0.9, 0.99],
                weight_decay: 0.01,
                exempt_norms: false,
                ..GroupConfig::default()
            },
        };
        let trained = model.parameters().into_iter().filter(|info| info.trained);
        let layout = Layout::new(
            trained.map(|info| (info.name, info.shape)),
            &optimizer_config,
            BUCKET_BYTES,
        );
        Ok(Self {
            optimizer: AdamW::new(&layout, Shard::WHOLE, &device.clone().inner()),
            reduction: Reduction {
                communicator: Arc::new(Local::default()),
                shard: Shard::WHOLE,
                dtype: ReduceDtype::F32,
                overlap: true,
                place: Place::of(&device)?,
            },
            batches: BatchBuilder {
                device: device.clone(),
                randomness: Randomness::new(seed),
                global_batch: 1,
                spaces: spaces.to_vec(),
                trim_text: config.ignores_padding(),
            },
            model,
            layout,
            optimizer_config,
            device,
            step: 0,
        })
    }

    /// Sums gradients over the ranks of a communicator, and keeps one shard of the moments, at zero.
    pub(crate) fn exchanging(
        mut self,
        communicator: Arc<dyn Communicator>,
        shard: Shard,
        dtype: ReduceDtype,
    ) -> Self {
        self.optimizer = AdamW::new(&self.layout, shard, &self.device.clone().inner());
        self.reduction = Reduction {
            communicator,
            shard,
            dtype,
            ..self.reduction
        };
        self
    }

    /// Returns the model.
    pub fn model(&self) -> &Flower {
        &self.model
    }

    /// Draws a batch of `size` samples with `words` words each; the action spaces `spaces`
    /// (indices) take turns.
    pub fn random_batch(&self, size: usize, words: usize, spaces: &[usize]) -> HostBatch {
        let config = self.model.config();
        let known = &self.batches.spaces;
        let dims = BatchDims {
            batch: size,
            cameras: config.num_cameras,
            image_size: config.vision.image_size,
            text_length: words,
            action_horizon: config.flow.action_horizon,
            action_width: self.model.action_width(),
            proprio_width: spaces
                .iter()
                .map(|&space| known[space].proprio_dim)
                .max()
                .unwrap_or(0),
        };
        let spaces: Vec<u32> = (0..size).map(|i| spaces[i % spaces.len()] as u32).collect();
        let sample = SampleRef {
            dataset: 0,
            row_group: 0,
            episode: 0,
            frame: 0,
        };
        let mut draws = Seed::new(0).child("bench").draws();
        let pixels = 0..size * dims.cameras * dims.image_bytes();
        let images: Vec<u8> = pixels.map(|_| draws.below(256) as u8).collect();
        let vocabulary = config.language.vocab_size as u64;
        let mut batch = HostBatch {
            sample_indices: (0..size as u64).collect(),
            samples: vec![sample; size],
            images: images.into(),
            camera_present: vec![true; size * dims.cameras],
            input_ids: (0..size * words)
                .map(|_| (FIRST_WORD + draws.below(vocabulary - FIRST_WORD - 1)) as i64)
                .collect(),
            text_mask: vec![1; size * words],
            actions: vec![0.0; size * dims.action_horizon * dims.action_width],
            valid: vec![0; size * dims.action_horizon * dims.action_width],
            proprio: vec![0.0; size * dims.proprio_width],
            frequency_hz: vec![FREQUENCY_HZ; size],
            bad: Vec::new(),
            spaces,
            dims,
        };
        let chunk = dims.action_horizon * dims.action_width;
        for (i, &space) in batch.spaces.iter().enumerate() {
            let dim = known[space as usize].dim();
            for at in (i * chunk..(i + 1) * chunk).step_by(dims.action_width) {
                for entry in at..at + dim {
                    batch.actions[entry] = draws.uniform_f32() * 2.0 - 1.0;
                    batch.valid[entry] = 1;
                }
            }
        }
        batch
    }

    /// Returns all parameters.
    pub fn weights(&self) -> NamedValues {
        let flat: HashMap<String, Tensor<1>> = self.model.flat_parameters().into_iter().collect();
        let named = self.model.parameters().into_iter().filter_map(|info| {
            let values = host(flat.get(&info.name)?.clone());
            Some((info.name, info.shape, values))
        });
        named.collect()
    }

    /// Returns everything that the loss of the next step on a batch is computed from.
    pub fn batch_values(&mut self, batch: &HostBatch) -> NamedValues {
        let FlowBatch {
            observation: seen,
            actions,
            noise,
            time,
            valid,
            ..
        } = self.on_device(batch);
        let size = batch.dims.batch;
        let ids = batch.input_ids.iter().map(|&id| id as f32).collect();
        let spaces = batch.spaces.iter().map(|&space| space as f32).collect();
        let mut named = vec![
            values("images", seen.images),
            ("input_ids".into(), vec![size, batch.dims.text_length], ids),
            values("text_mask", seen.text_mask),
            values("frequency_hz", seen.frequency_hz),
            ("spaces".into(), vec![size], spaces),
            values("actions", actions),
            values("noise", noise),
            values("valid", valid),
            values("t", time),
        ];
        named.extend(seen.proprio.map(|proprio| values("proprio", proprio)));
        named
    }

    /// Copies a batch to the device and adds its randomness of this step.
    pub fn on_device(&mut self, host: &HostBatch) -> FlowBatch {
        self.batches.global_batch = host.dims.batch as u64;
        let dropout = self.batches.randomness.dropout(self.step, 0, 0);
        self.batches.flow(host, self.step, dropout, &self.model)
    }

    /// Trains on a batch and returns its loss and the gradient norm. `done` is called after each
    /// piece of work, which a device may still be busy with.
    ///
    /// # Errors
    /// When the gradients do not cover the model, which would be a defect.
    pub fn step(
        &mut self,
        host: &HostBatch,
        done: &mut dyn FnMut(Lap),
    ) -> Result<(f64, f64), Error> {
        let (value, gradients) = self.gradients(host, done)?;
        let norm = self.update(gradients, host)?;
        done(Lap::Optimizer);
        self.step += 1;
        Ok((value, norm))
    }

    /// Returns a batch's loss and the gradients of each bucket.
    pub(crate) fn gradients(
        &mut self,
        host: &HostBatch,
        done: &mut dyn FnMut(Lap),
    ) -> Result<(f64, Vec<Tensor<1>>), Error> {
        let batch = self.on_device(host);
        done(Lap::Copy);
        let (z, t) = (batch.noisy(), batch.time.clone());
        let pass =
            self.model
                .segments_watched(&batch.observation, &batch.masks, z, t, &mut |part| {
                    done(Lap::Model(part));
                });
        let squares = velocity_loss(pass.velocity(), batch.noise, batch.actions, batch.valid);
        let loss: Tensor<1> = squares / host.num_valid() as f64;
        let value = f64::from(loss.clone().into_scalar::<f32>());
        let mut gradients = Gradients::new(&self.layout, &self.reduction, &self.device, false);
        let mut backward = pass.backward(&loss);
        while let Some(part) = backward.next_part() {
            let named = backward.next().unwrap_or_default();
            done(Lap::Model(part));
            gradients.add(named, true)?;
            done(Lap::Optimizer);
        }
        Ok((value, gradients.finish()?.0))
    }

    /// Updates the weights with the gradients of a batch and returns their norm.
    pub(crate) fn update(
        &mut self,
        reduced: Vec<Tensor<1>>,
        host: &HostBatch,
    ) -> Result<f64, Error> {
        let sums = square_sums(&self.layout, &self.reduction, &reduced)?;
        let norm = clip::norm(&sums);
        let spaces = &self.batches.spaces;
        let active = |entry: &Entry| {
            entry.action_space().is_none_or(|name| {
                let known = |&space: &u32| spaces[space as usize].name == name;
                host.spaces.iter().any(known)
            })
        };
        let change = Change {
            gradients: reduced,
            factor: clip::factor(norm, Some(CLIP_NORM)),
            learning_rate: learning_rates(&self.optimizer_config, self.optimizer.updates()),
            active: &active,
        };
        let update = Update {
            layout: &self.layout,
            reduction: &self.reduction,
            config: &self.optimizer_config,
            device: self.device.clone().inner(),
        };
        self.model = update.apply(&self.model, &mut self.optimizer, None, change)?;
        Ok(norm)
    }

    /// Leaves gradients and optimizer behind.
    #[must_use]
    pub fn into_policy(self) -> Policy {
        Policy {
            model: self.model.valid(),
            batches: self.batches.without_autodiff(),
        }
    }
}

fn values<const D: usize>(name: &str, x: Tensor<D>) -> (String, Vec<usize>, Vec<f32>) {
    (name.into(), x.dims().to_vec(), host(x.reshape([-1])))
}

/// A model in evaluation.
#[derive(Debug)]
pub struct Policy {
    model: Flower,
    batches: BatchBuilder,
}

impl Policy {
    /// Denoises random chunks for a batch's observations in `steps` Euler steps and waits for the
    /// actions, `[B, H, A]`.
    pub fn act(&self, host: &HostBatch, steps: usize) -> Vec<f32> {
        let batches = &self.batches;
        let noise = batches.sampling_noise(host, &batches.randomness);
        let context = self.model.encode(&batches.observation(host), None);
        crate::optim::host(self.model.sample(&context, noise, steps).reshape([-1]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollen_core::ActionSpaceFile;
    use std::path::Path;

    fn bench() -> Bench {
        bench_in(Precision::F32)
    }

    fn bench_in(precision: Precision) -> Bench {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
        let read = |name: &str| {
            let path = root.join(name);
            std::fs::read_to_string(&path).expect("part of the repository")
        };
        let table: toml::Table = read("model/flower-tiny.toml").parse().expect("TOML");
        let config = table["model"].clone().try_into().expect("a model");
        let spaces = ["eef_delta", "bimanual_eef_delta"].map(|name| {
            let text = read(&format!("embodiments/{name}.toml"));
            ActionSpaceFile::parse(&text, name).expect("an action space")
        });
        Bench::new(&config, &spaces, precision, 3, &Device::flex()).expect("fits together")
    }

    #[test]
    fn steps_on_one_batch_learn_it() {
        let mut bench = bench();
        let batch = bench.random_batch(2, 5, &[0, 1]);
        assert_eq!(batch.num_valid(), 10 * (7 + 14));
        let mut laps = Vec::new();
        let (first, norm) = bench
            .step(&batch, &mut |lap| laps.push(lap))
            .expect("a step");
        assert!(norm > 0.0 && norm.is_finite(), "{norm}");
        for lap in [
            Lap::Copy,
            Lap::Model(Part::Vision),
            Lap::Model(Part::Language),
            Lap::Model(Part::Flow),
            Lap::Optimizer,
        ] {
            assert!(laps.contains(&lap), "{lap:?} is not in {laps:?}");
        }
        let mut last = first;
        for _ in 0..20 {
            last = bench.step(&batch, &mut |_| {}).expect("a step").0;
        }
        assert!(last < first, "{last} after {first}");
    }

    #[test]
    fn bf16_follows_f32() {
        let [mut wide, mut narrow] = [Precision::F32, Precision::Bf16].map(bench_in);
        let batch = wide.random_batch(4, 5, &[0, 1]);
        for step in 0..20 {
            let (loss, norm) = wide.step(&batch, &mut |_| {}).expect("a step");
            let (coarse, coarse_norm) = narrow.step(&batch, &mut |_| {}).expect("a step");
            assert!(
                (coarse / loss - 1.0).abs() < 0.02,
                "step {step}: {coarse}, {loss}"
            );
            let apart = (coarse_norm / norm - 1.0).abs();
            assert!(apart < 0.1, "step {step}: {coarse_norm}, {norm}");
            assert!(step > 0 || coarse != loss, "it computed in f32");
        }
        // Masters are f32: the weights are no multiples of what bf16 can hold.
        let weights = narrow.model().flat_parameters().into_iter();
        let fine = weights.flat_map(|(_, values)| crate::optim::host(values));
        let fine = fine.filter(|x| x.to_bits().trailing_zeros() < 16).count();
        assert!(fine > 1_000_000, "{fine}");
    }

    #[test]
    fn a_policy_answers_with_whole_chunks() {
        let bench = bench();
        let batch = bench.random_batch(1, 5, &[0]);
        let width = bench.model().action_width();
        let actions = bench.into_policy().act(&batch, 2);
        assert_eq!(actions.len(), 10 * width);
        assert!(actions.iter().all(|x| x.abs() <= 1.0));
        assert!(actions.iter().any(|&x| x != 0.0));
    }
}

//! From a host batch to the tensors of one forward pass.
//!
//! Shapes: B samples, N cameras, S image side, T text tokens, H action horizon, A action width,
//! C context length, D context width.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use pollen_core::{ActionSpace, Seed};
use pollen_dataloader::{HostBatch, Loader};
use pollen_model::{Flower, Observation, TrainMasks, noisy_actions};
use pollen_processing::{PIXEL_MEAN, PIXEL_STD};

use crate::error::Error;
use crate::randomness::Randomness;

/// Returns the next micro-batch of the step that will be number `step`.
pub(crate) fn next_micro_batch(loader: &mut Loader, step: u64) -> Result<HostBatch, Error> {
    let mut host = loader.next_micro_batch()?;
    if crate::faults::poisons(step) {
        host.actions[0] = f32::NAN;
    }
    if let Some(sample) = crate::faults::repeats(step) {
        host.sample_indices[0] = sample;
    }
    Ok(host)
}

/// The inputs and targets of one velocity prediction.
#[derive(Debug)]
pub struct FlowBatch {
    /// What the policy sees.
    pub observation: Observation,
    /// Clean action chunks, `[B, H, A]`.
    pub actions: Tensor<3>,
    /// Standard normal noise, zero beyond each sample's action space, `[B, H, A]`.
    pub noise: Tensor<3>,
    /// Flow time, `[B]`; 1 is pure noise.
    pub time: Tensor<1>,
    /// 1 where an entry counts in the loss, `[B, H, A]`.
    pub valid: Tensor<3>,
    /// Stochastic depth and token dropout of each sample.
    pub masks: TrainMasks,
}

impl FlowBatch {
    /// Returns the point z_t between actions and noise, `[B, H, A]`.
    pub fn noisy(&self) -> Tensor<3> {
        noisy_actions(self.actions.clone(), self.noise.clone(), self.time.clone())
    }
}

/// Copies host batches to a device and adds their randomness.
#[derive(Debug)]
pub struct BatchBuilder {
    /// Where tensors go.
    pub device: Device,
    /// The run's randomness.
    pub randomness: Randomness,
    /// Samples of one step over all ranks.
    pub global_batch: u64,
    /// Action spaces by index.
    pub spaces: Vec<ActionSpace>,
    /// Leave out the padding behind the longest text of a batch: only where it changes nothing
    /// ([`FlowerConfig::ignores_padding`](pollen_model::FlowerConfig::ignores_padding)).
    pub trim_text: bool,
}

/// A trimmed text has a multiple of this many tokens, so that devices that choose kernels by shape
/// see few shapes.
const TEXT_STEP: usize = 8;

impl BatchBuilder {
    /// Returns a builder of the same inputs outside the gradient tape.
    #[must_use]
    pub fn without_autodiff(&self) -> Self {
        Self {
            device: self.device.clone().inner(),
            spaces: self.spaces.clone(),
            ..*self
        }
    }

    /// Returns the observation of a host batch.
    pub fn observation(&self, batch: &HostBatch) -> Observation {
        let d = &batch.dims;
        let (b, n, s) = (d.batch, d.cameras, d.image_size);
        let device = &self.device;
        let pixels = TensorData::new(batch.images.to_vec(), [b * n, 3, s, s]);
        let pixels = Tensor::<4, Int>::from_data(pixels, (device, DType::U8)).float();
        let constant =
            |values: [f32; 3]| Tensor::<1>::from_floats(values, device).reshape([1, 3, 1, 1]);
        let images = (pixels / 255.0 - constant(PIXEL_MEAN)) / constant(PIXEL_STD);
        let floats = |values: &[f32], shape: [usize; 2]| {
            Tensor::<2>::from_data(TensorData::new(values.to_vec(), shape), device)
        };
        let present: Vec<f32> = batch
            .camera_present
            .iter()
            .map(|&p| f32::from(u8::from(p)))
            .collect();
        let text_mask: Vec<f32> = batch.text_mask.iter().map(|&m| f32::from(m)).collect();
        let ids = TensorData::new(batch.input_ids.clone(), [b, d.text_length]);
        let ids = Tensor::<2, Int>::from_data(ids, device);
        let text = self.text_length(batch);
        Observation {
            images: images.reshape([b, n, 3, s, s]),
            camera_present: present.contains(&0.0).then(|| floats(&present, [b, n])),
            input_ids: ids.narrow(1, 0, text),
            text_mask: floats(&text_mask, [b, d.text_length]).narrow(1, 0, text),
            frequency_hz: Tensor::<1>::from_floats(batch.frequency_hz.as_slice(), device),
            proprio: (d.proprio_width > 0).then(|| floats(&batch.proprio, [b, d.proprio_width])),
            spaces: batch.spaces.iter().map(|&space| space as usize).collect(),
        }
    }

    /// Returns the text tokens of a batch that the model is given.
    fn text_length(&self, batch: &HostBatch) -> usize {
        let padded = batch.dims.text_length;
        if !self.trim_text {
            return padded;
        }
        let texts = batch.text_mask.chunks_exact(padded.max(1));
        let longest =
            texts.map(|text| text.iter().rposition(|&m| m > 0).map_or(0, |last| last + 1));
        let longest = longest.max().unwrap_or(0).max(1);
        longest.next_multiple_of(TEXT_STEP).min(padded)
    }

    /// Returns the start noise of the sampler for a host batch, `[B, H, A]`.
    pub fn sampling_noise(&self, batch: &HostBatch, randomness: &Randomness) -> Tensor<3> {
        let (h, a) = (batch.dims.action_horizon, batch.dims.action_width);
        let mut noise = vec![0.0; batch.dims.batch * h * a];
        for (i, out) in noise.chunks_exact_mut(h * a).enumerate() {
            let dim = self.spaces[batch.spaces[i] as usize].dim();
            randomness.noise(batch.sample_indices[i], a, dim, out);
        }
        self.chunks(noise, batch)
    }

    fn chunks(&self, values: Vec<f32>, batch: &HostBatch) -> Tensor<3> {
        let d = &batch.dims;
        let shape = [d.batch, d.action_horizon, d.action_width];
        Tensor::from_data(TensorData::new(values, shape), &self.device)
    }

    /// Returns everything that one training forward needs; `dropout` seeds element-wise dropout.
    pub fn flow(&self, batch: &HostBatch, step: u64, dropout: Seed, model: &Flower) -> FlowBatch {
        let time: Vec<f32> = batch
            .sample_indices
            .iter()
            .map(|&sample| {
                let j = sample % self.global_batch;
                self.randomness.flow_time(step, j, self.global_batch)
            })
            .collect();
        let valid: Vec<f32> = batch.valid.iter().map(|&v| f32::from(v)).collect();
        FlowBatch {
            observation: self.observation(batch),
            actions: self.chunks(batch.actions.clone(), batch),
            noise: self.sampling_noise(batch, &self.randomness),
            time: Tensor::<1>::from_floats(time.as_slice(), &self.device),
            valid: self.chunks(valid, batch),
            masks: self.masks(batch, dropout, model),
        }
    }

    fn masks(&self, batch: &HostBatch, dropout: Seed, model: &Flower) -> TrainMasks {
        let b = batch.dims.batch;
        let config = model.config();
        let rates = config.depth_drop_rates();
        let depth_keep = rates.iter().any(|&rate| rate > 0.0).then(|| {
            let mut keep = vec![0.0; b * rates.len()];
            for (i, out) in keep.chunks_exact_mut(rates.len()).enumerate() {
                self.randomness
                    .depth_keep(batch.sample_indices[i], &rates, out);
            }
            Tensor::from_data(TensorData::new(keep, [b, rates.len()]), &self.device)
        });
        let rate = config.token_dropout;
        let token_keep = (rate > 0.0).then(|| {
            let (c, d) = (
                config.context_len(batch.dims.text_length),
                config.language.width,
            );
            let mut keep = vec![0.0; b * c * d];
            for (i, out) in keep.chunks_exact_mut(c * d).enumerate() {
                self.randomness
                    .token_keep(batch.sample_indices[i], rate, out);
            }
            // Text comes last, so that what is left out of it is at the end here too.
            let kept = config.context_len(self.text_length(batch));
            let keep = Tensor::<3>::from_data(TensorData::new(keep, [b, c, d]), &self.device);
            keep.narrow(1, 0, kept)
        });
        TrainMasks {
            dropout,
            depth_keep,
            token_keep,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollen_dataloader::{BatchDims, SampleRef};

    /// Texts of so many words, padded to `padded`.
    fn batch(words: &[usize], padded: usize) -> HostBatch {
        let b = words.len();
        let mask = |&words: &usize| (0..padded).map(move |i| u8::from(i < words));
        let sample = SampleRef {
            dataset: 0,
            row_group: 0,
            episode: 0,
            frame: 0,
        };
        HostBatch {
            dims: BatchDims {
                batch: b,
                cameras: 1,
                image_size: 1,
                text_length: padded,
                action_horizon: 1,
                action_width: 1,
                proprio_width: 0,
            },
            sample_indices: (0..b as u64).collect(),
            samples: vec![sample; b],
            images: vec![0; b * 3].into(),
            camera_present: vec![true; b],
            input_ids: (0..(b * padded) as i64).collect(),
            text_mask: words.iter().flat_map(mask).collect(),
            actions: vec![0.0; b],
            valid: vec![1; b],
            spaces: vec![0; b],
            proprio: Vec::new(),
            frequency_hz: vec![1.0; b],
            bad: Vec::new(),
        }
    }

    fn builder(trim_text: bool) -> BatchBuilder {
        BatchBuilder {
            device: Device::flex(),
            randomness: Randomness::new(1),
            global_batch: 2,
            spaces: Vec::new(),
            trim_text,
        }
    }

    #[test]
    fn padding_behind_the_longest_text_is_left_out() {
        for (words, padded, want) in [
            (vec![3, 9], 20, 16),
            (vec![3, 8], 20, 8),
            (vec![3, 18], 20, 20),
            (vec![0, 0], 20, 8),
            (vec![2, 2], 5, 5),
        ] {
            let host = batch(&words, padded);
            let trimmed = builder(true).observation(&host);
            let whole = builder(false).observation(&host);
            assert_eq!(whole.input_ids.dims(), [2, padded]);
            assert_eq!(trimmed.input_ids.dims(), [2, want]);
            let ids = |ids: Tensor<2, Int>| ids.into_data().iter::<i64>().collect::<Vec<_>>();
            let kept = whole.input_ids.narrow(1, 0, want);
            assert_eq!(ids(trimmed.input_ids), ids(kept));
            let words: usize = words.iter().sum();
            assert_eq!(trimmed.text_mask.sum().into_scalar::<f32>(), words as f32);
        }
    }
}

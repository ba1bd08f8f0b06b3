//! What the loader hands to the trainer: host memory, ready to be copied to a device.

use serde::{Deserialize, Serialize};

use crate::pixels::Pixels;
use crate::sampler::SampleRef;

/// What the model expects of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelShape {
    /// Steps of an action chunk.
    pub action_horizon: usize,
    /// Width of the widest action space.
    pub action_width: usize,
    /// Width of the widest proprioception that a space shows the policy; 0 for none.
    pub proprio_width: usize,
}

/// Sizes of a batch's tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchDims {
    /// B, samples.
    pub batch: usize,
    /// N, cameras.
    pub cameras: usize,
    /// S, side of an image in pixels.
    pub image_size: usize,
    /// T, text tokens.
    pub text_length: usize,
    /// H, steps of an action chunk.
    pub action_horizon: usize,
    /// A, width of the widest action space.
    pub action_width: usize,
    /// P, width of the widest proprioception.
    pub proprio_width: usize,
}

impl BatchDims {
    /// Returns the bytes of one image, `[3, S, S]`.
    pub fn image_bytes(&self) -> usize {
        3 * self.image_size * self.image_size
    }
}

/// A sample that could not be loaded: its slot holds black images and counts nowhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSample {
    /// Its slot in the batch.
    pub slot: usize,
    /// Name of its dataset.
    pub dataset: String,
    /// Episode, as stored.
    pub episode: u64,
    /// Global row in the dataset.
    pub frame: u64,
    /// Entries that the sample order expected of it.
    pub entries: u64,
    /// What is wrong.
    pub reason: String,
}

/// A micro-batch in host memory.
///
/// # Shapes
/// B samples, N cameras, S image side, T text tokens, H action horizon, A action width, P
/// proprioception width; all row-major.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostBatch {
    /// The sizes.
    pub dims: BatchDims,
    /// `[B]`: the samples' numbers in the run, the key of all that is random about them.
    pub sample_indices: Vec<u64>,
    /// `[B]`: where they come from.
    pub samples: Vec<SampleRef>,
    /// `[B, N, 3, S, S]`: RGB bytes, not yet scaled; zero for a camera that is not there.
    pub images: Pixels,
    /// `[B, N]`: whether the dataset has the camera.
    pub camera_present: Vec<bool>,
    /// `[B, T]`: token ids of the prompt, padded on the right.
    pub input_ids: Vec<i64>,
    /// `[B, T]`: 1 for a token, 0 for padding.
    pub text_mask: Vec<u8>,
    /// `[B, H, A]`: normalised actions, zero beyond the sample's action space.
    pub actions: Vec<f32>,
    /// `[B, H, A]`: 1 for an entry that counts in the loss.
    pub valid: Vec<u8>,
    /// `[B]`: position of the sample's action space among the model's.
    pub spaces: Vec<u32>,
    /// `[B, P]`: normalised proprioception, zero where the action space shows none.
    pub proprio: Vec<f32>,
    /// `[B]`: control frequency in hertz.
    pub frequency_hz: Vec<f32>,
    /// Samples that could not be loaded, by slot.
    pub bad: Vec<BadSample>,
}

impl HostBatch {
    /// Makes a batch of zeros and padding for the given samples, as yet without images.
    pub(crate) fn empty(dims: BatchDims, samples: &[(u64, SampleRef)], pad_id: i64) -> Self {
        let BatchDims {
            batch: b,
            cameras: n,
            text_length: t,
            action_horizon: h,
            action_width: a,
            proprio_width: p,
            ..
        } = dims;
        Self {
            dims,
            sample_indices: samples.iter().map(|(index, _)| *index).collect(),
            samples: samples.iter().map(|(_, sample)| *sample).collect(),
            images: Pixels::default(),
            camera_present: vec![false; b * n],
            input_ids: vec![pad_id; b * t],
            text_mask: vec![0; b * t],
            actions: vec![0.0; b * h * a],
            valid: vec![0; b * h * a],
            spaces: vec![0; b],
            proprio: vec![0.0; b * p],
            frequency_hz: vec![0.0; b],
            bad: Vec::new(),
        }
    }

    /// Takes a sample out of everything that counts; its images are the caller's to blacken.
    ///
    /// Its cameras count as present: a sample that sees nothing at all would leave attention
    /// without a single key.
    pub(crate) fn quarantine(&mut self, sample: BadSample) {
        let BatchDims {
            cameras,
            action_horizon,
            action_width,
            proprio_width,
            ..
        } = self.dims;
        let of = |width: usize| sample.slot * width..(sample.slot + 1) * width;
        let entries = action_horizon * action_width;
        self.camera_present[of(cameras)].fill(true);
        self.actions[of(entries)].fill(0.0);
        self.valid[of(entries)].fill(0);
        self.proprio[of(proprio_width)].fill(0.0);
        let at = self.bad.partition_point(|other| other.slot < sample.slot);
        self.bad.insert(at, sample);
    }

    /// Returns the number of entries that count in the loss.
    pub fn num_valid(&self) -> u64 {
        self.valid.iter().map(|&v| u64::from(v)).sum()
    }
}

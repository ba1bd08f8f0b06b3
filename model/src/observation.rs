//! What the model is given.

use burn::tensor::{Int, Tensor};
use pollen_core::Seed;

/// A batch of observations, ready for the model.
#[derive(Clone, Debug)]
pub struct Observation {
    /// `[B, N, 3, S, S]`, scaled and normalised.
    pub images: Tensor<5>,
    /// `[B, N]`, 1 where the camera exists; none: all do. An absent camera is fed as a black
    /// image and hidden wherever the configured masks hide padding.
    pub camera_present: Option<Tensor<2>>,
    /// `[B, T]`, padded at the right.
    pub input_ids: Tensor<2, Int>,
    /// `[B, T]`, 1 for a word and 0 for padding.
    pub text_mask: Tensor<2>,
    /// `[B]`, control frequency in Hz.
    pub frequency_hz: Tensor<1>,
    /// `[B, P]`, normalised; each action space reads as many columns as it declares.
    pub proprio: Option<Tensor<2>>,
    /// Action space of each sample, an index into the list the model was built with.
    pub spaces: Vec<usize>,
}

/// Random masks of a training step. Given by the caller, because they belong to the samples and
/// not to the rank that happens to hold them. Handing them to
/// [`Flower::encode`](crate::Flower::encode) means training: element-wise dropout acts too.
#[derive(Clone, Debug)]
pub struct TrainMasks {
    /// Element-wise dropout draws from the backend's generator, which each layer sets to a child
    /// of this seed.
    pub dropout: Seed,
    /// `[B, num_depth_blocks]`: 0 where a residual branch of the image tower is dropped, else
    /// 1 / (probability to keep it).
    pub depth_keep: Option<Tensor<2>>,
    /// `[B, S, D]`: 0 where a context feature is dropped, else 1 / (probability to keep it).
    pub token_keep: Option<Tensor<3>>,
}

impl TrainMasks {
    /// Returns masks that keep every branch and every feature.
    pub fn new(dropout: Seed) -> Self {
        Self {
            dropout,
            depth_keep: None,
            token_keep: None,
        }
    }
}

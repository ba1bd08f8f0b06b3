//! Joins image tokens, prompt vector and text, and encodes them together.
//!
//! Legend: B batch, N cameras, L tokens of an image, T text tokens, S joined tokens, D width.

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};
use pollen_core::Seed;

use crate::attention::hide;
use crate::config::{EncoderMask, FlowerConfig, TokenOrder};
use crate::language::TextEncoder;
use crate::observation::{Observation, TrainMasks};
use crate::parameters::PROMPT;
use crate::vision::{DepthKeep, ImageProjection, VisionTower};
use crate::weights::Weights;

/// The encoder half of Florence-2 and the prompt vector.
#[derive(Module, Debug)]
pub(crate) struct JointEncoder {
    pub(crate) vision_tower: VisionTower,
    pub(crate) projection: ImageProjection,
    pub(crate) language_model: TextEncoder,
    prompt_embeds: Param<Tensor<3>>,
    #[module(skip)]
    pub(crate) order: TokenOrder,
    #[module(skip)]
    pub(crate) mask: EncoderMask,
}

impl JointEncoder {
    pub(crate) fn new(weights: &mut Weights, config: &FlowerConfig) -> Self {
        Self {
            vision_tower: VisionTower::new(weights, &config.vision),
            projection: ImageProjection::new(weights),
            language_model: TextEncoder::new(weights, &config.language),
            prompt_embeds: weights.param(PROMPT),
            order: config.token_order,
            mask: config.encoder_mask,
        }
    }

    /// Returns the tokens of all cameras, one camera after another.
    ///
    /// # Shapes
    /// `images: [B, N, 3, size, size] -> [B, N * L, D]`
    pub(crate) fn image_tokens(&self, images: Tensor<5>, masks: Option<&TrainMasks>) -> Tensor<3> {
        let cameras = images.dims()[1];
        let keep = self.depth_keep(cameras, masks);
        let map_BHWC = self
            .vision_tower
            .forward(all_cameras(images), keep.as_ref());
        self.project(map_BHWC, cameras)
    }

    /// Returns the columns of the depth mask for each image, one camera after another.
    pub(crate) fn depth_keep(
        &self,
        cameras: usize,
        masks: Option<&TrainMasks>,
    ) -> Option<DepthKeep> {
        let columns = 2 * self.vision_tower.num_blocks();
        masks
            .and_then(|masks| masks.depth_keep.clone())
            .map(|keep| {
                let batch = keep.dims()[0];
                let present = keep.narrow(1, 0, cameras * columns);
                DepthKeep(present.reshape([batch * cameras, columns]))
            })
    }

    /// Projects the feature maps of all cameras to tokens.
    ///
    /// # Shapes
    /// `[B * N, H, W, C] -> [B, N * L, D]`
    pub(crate) fn project(&self, map_BHWC: Tensor<4>, cameras: usize) -> Tensor<3> {
        let tokens = self.projection.forward(map_BHWC);
        let [images, length, width] = tokens.dims();
        tokens.reshape([images / cameras, cameras * length, width])
    }

    /// Joins image tokens, prompt vector and text in the configured order.
    ///
    /// # Shapes
    /// `images: [B, N * L, D]`, `ids: [B, T]` -> `[B, S, D]`
    pub(crate) fn join(&self, images: Tensor<3>, ids: Tensor<2, Int>) -> Tensor<3> {
        let [batch, _, width] = images.dims();
        let prompt = self.prompt_embeds.val().expand([batch, 1, width]);
        let text = self.language_model.token_embeddings(ids);
        let parts = match self.order {
            TokenOrder::FlowImagesText => vec![prompt, images, text],
            TokenOrder::ImagesFlowText => vec![images, prompt, text],
        };
        Tensor::cat(parts, 1)
    }

    /// Returns 1 where the joined sequence holds an image or a word, 0 at the prompt vector,
    /// padding and absent cameras.
    ///
    /// # Shapes
    /// `[B, S]`, for `image_tokens = N * L`
    pub(crate) fn content_mask(&self, obs: &Observation, image_tokens: usize) -> Tensor<2> {
        let [batch, cameras, ..] = obs.images.dims();
        let device = obs.images.device();
        let images = match &obs.camera_present {
            None => Tensor::ones([batch, image_tokens], &device),
            Some(present) => present
                .clone()
                .unsqueeze_dim::<3>(2)
                .expand([batch, cameras, image_tokens / cameras])
                .reshape([batch, image_tokens]),
        };
        let prompt = Tensor::zeros([batch, 1], &device);
        let parts = match self.order {
            TokenOrder::FlowImagesText => vec![prompt, images, obs.text_mask.clone()],
            TokenOrder::ImagesFlowText => vec![images, prompt, obs.text_mask.clone()],
        };
        Tensor::cat(parts, 1)
    }

    /// Encodes a joined sequence. With a seed the dropouts act.
    ///
    /// # Shapes
    /// `[B, S, D]`, `[B, S]` -> `[B, S, D]`
    pub(crate) fn encode(
        &self,
        joined_BSD: Tensor<3>,
        content_BS: Tensor<2>,
        dropout_seed: Option<Seed>,
    ) -> Tensor<3> {
        let bias = self.bias(content_BS);
        let encoder = &self.language_model.encoder;
        encoder.forward(joined_BSD, bias.as_ref(), dropout_seed)
    }

    /// Returns what is added to the encoder's logits, `[B, S] -> [B, 1, 1, S]`.
    pub(crate) fn bias(&self, content_BS: Tensor<2>) -> Option<Tensor<4>> {
        match self.mask {
            EncoderMask::TextAndFlow => Some(hide(content_BS)),
            EncoderMask::None => None,
        }
    }
}

/// `[B, N, 3, size, size] -> [B * N, 3, size, size]`
pub(crate) fn all_cameras(images: Tensor<5>) -> Tensor<4> {
    let [batch, cameras, channels, height, width] = images.dims();
    images.reshape([batch * cameras, channels, height, width])
}

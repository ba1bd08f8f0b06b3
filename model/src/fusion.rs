//! Joins image tokens, prompt vector and text, and encodes them together.
//!
//! Legend: B batch, N cameras, L tokens of an image, T text tokens, S joined tokens, D width.

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};

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
        let [batch, cameras, channels, height, width] = images.dims();
        let images = images.reshape([batch * cameras, channels, height, width]);
        let columns = 2 * self.vision_tower.num_blocks();
        let keep = masks
            .and_then(|masks| masks.depth_keep.clone())
            .map(|keep| {
                let present = keep.narrow(1, 0, cameras * columns);
                DepthKeep(present.reshape([batch * cameras, columns]))
            });
        let map_BHWC = self.vision_tower.forward(images, keep.as_ref());
        let tokens = self.projection.forward(map_BHWC);
        let [_, length, width] = tokens.dims();
        tokens.reshape([batch, cameras * length, width])
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

    /// Encodes a joined sequence.
    ///
    /// # Shapes
    /// `[B, S, D]`, `[B, S]` -> `[B, S, D]`
    pub(crate) fn encode(
        &self,
        joined_BSD: Tensor<3>,
        content_BS: Tensor<2>,
        train: bool,
    ) -> Tensor<3> {
        let mask = match self.mask {
            EncoderMask::TextAndFlow => Some(content_BS),
            EncoderMask::None => None,
        };
        self.language_model.encoder.forward(joined_BSD, mask, train)
    }
}

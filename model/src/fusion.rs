//! Joins image tokens, prompt vector and text, and encodes them together.
//!
//! Legend: B batch, N cameras, L tokens of an image, T text tokens, S joined tokens, D width.

use std::ops::Range;

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};
use pollen_core::Seed;

use crate::attention::hide;
use crate::bart_decoder::{BartDecoder, Decoded};
use crate::config::{EncoderMask, FlowerConfig, LanguageConfig, TokenOrder};
use crate::language::TextEncoder;
use crate::layers::{fork, like};
use crate::llama::{TextDecoder, causal_bias};
use crate::observation::{Observation, TrainMasks};
use crate::parameters::PROMPT;
use crate::vision::{DepthKeep, ImageTower, Projection};
use crate::weights::Weights;

/// The part of a vision-language model that the fusion leaves, and the prompt vector.
#[derive(Module, Debug)]
pub(crate) struct JointEncoder {
    pub(crate) vision_tower: ImageTower,
    pub(crate) projection: Projection,
    pub(crate) language_model: TextStack,
    prompt_embeds: Param<Tensor<3>>,
    #[module(skip)]
    pub(crate) order: TokenOrder,
    #[module(skip)]
    pub(crate) mask: EncoderMask,
}

impl JointEncoder {
    pub(crate) fn new(weights: &mut Weights, config: &FlowerConfig) -> Self {
        Self {
            vision_tower: ImageTower::new(weights, &config.vision),
            projection: Projection::new(weights, &config.vision),
            language_model: TextStack::new(weights, &config.pruned_language()),
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

    /// Joins image tokens, prompt vector and text in the configured order. Returns the words apart,
    /// too, for a decoder that reads them once more.
    ///
    /// # Shapes
    /// `images: [B, N * L, D]`, `ids: [B, T]` -> `[B, S, D]`, `[B, T, D]`
    pub(crate) fn join(
        &self,
        images: Tensor<3>,
        ids: Tensor<2, Int>,
    ) -> (Tensor<3>, Option<Tensor<3>>) {
        let [batch, _, width] = images.dims();
        let prompt = like(self.prompt_embeds.val(), &images).expand([batch, 1, width]);
        let text = like(self.language_model.token_embeddings(ids), &images);
        let (text, words) = match self.language_model.decoder() {
            Some(_) => {
                let (text, words) = fork(text);
                (text, Some(words))
            }
            None => (text, None),
        };
        let parts = match self.order {
            TokenOrder::FlowImagesText => vec![prompt, images, text],
            TokenOrder::ImagesFlowText => vec![images, prompt, text],
        };
        (Tensor::cat(parts, 1), words)
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

    /// Encodes a joined sequence; where there is a decoder, it reads `words` behind the encoder.
    /// With a seed the dropouts act.
    ///
    /// # Shapes
    /// `[B, S, D]`, `[B, T, D]`, `[B, S]` -> `[B, S, D]`, behind a decoder `[B, T, D]`
    pub(crate) fn encode(
        &self,
        joined_BSD: Tensor<3>,
        words_BTD: Option<Tensor<3>>,
        content_BS: &Tensor<2>,
        dropout_seed: Option<Seed>,
    ) -> Tensor<3> {
        let bias = self.bias(content_BS);
        let bias = bias.as_ref();
        let model = &self.language_model;
        let embedded = model.embed(joined_BSD, dropout_seed);
        let memory_BSD = model.run_layers(embedded, bias, dropout_seed, 0..model.num_layers());
        let (Some(decoder), Some(words_BTD)) = (model.decoder(), words_BTD) else {
            return memory_BSD;
        };
        let state = Decoded {
            words_BTD: decoder.embed(words_BTD, dropout_seed),
            memory_BSD,
        };
        let layers = 0..decoder.layers.len();
        decoder
            .run_layers(state, bias, dropout_seed, layers)
            .words_BTD
    }

    /// Returns what is added to the encoder's logits, `[B, S] -> [B, 1, 1, S]`; with a LLaMA-type
    /// decoder `[B, 1, S, S]`.
    pub(crate) fn bias(&self, content_BS: &Tensor<2>) -> Option<Tensor<4>> {
        let shown_BS = match self.mask {
            EncoderMask::TextAndFlow => Some(content_BS.clone()),
            EncoderMask::None => None,
        };
        match &self.language_model {
            TextStack::Bart(_) => shown_BS.map(hide),
            TextStack::Llama(_) => Some(causal_bias(
                shown_BS.unwrap_or_else(|| content_BS.ones_like()),
            )),
        }
    }

    /// Returns which tokens of the context hold something: those of the joined sequence, or of the
    /// text where a decoder has read it.
    pub(crate) fn context_mask(&self, content_BS: Tensor<2>, text_mask: Tensor<2>) -> Tensor<2> {
        match self.language_model.decoder() {
            Some(_) => text_mask,
            None => content_BS,
        }
    }
}

/// The language layers of either kind.
#[derive(Module, Debug)]
pub(crate) enum TextStack {
    Bart(TextEncoder),
    Llama(TextDecoder),
}

impl TextStack {
    fn new(weights: &mut Weights, language: &LanguageConfig) -> Self {
        match &language.decoder {
            Some(decoder) => Self::Llama(TextDecoder::new(weights, language, decoder)),
            None => Self::Bart(TextEncoder::new(weights, language)),
        }
    }

    /// Looks up text tokens, `[B, T] -> [B, T, D]`.
    pub(crate) fn token_embeddings(&self, ids_BT: Tensor<2, Int>) -> Tensor<3> {
        match self {
            Self::Bart(model) => model.token_embeddings(ids_BT),
            Self::Llama(model) => model.token_embeddings(ids_BT),
        }
    }

    /// Prepares the joined sequence for the first layer, `[B, S, D] -> [B, S, D]`.
    pub(crate) fn embed(&self, joined_BSD: Tensor<3>, dropout_seed: Option<Seed>) -> Tensor<3> {
        match self {
            Self::Bart(model) => model.encoder.embed(joined_BSD, dropout_seed),
            Self::Llama(_) => joined_BSD,
        }
    }

    pub(crate) fn num_layers(&self) -> usize {
        match self {
            Self::Bart(model) => model.encoder.layers.len(),
            Self::Llama(model) => model.layers.len(),
        }
    }

    /// Runs some of the layers over the joined sequence, with the bias of [`JointEncoder::bias`].
    ///
    /// # Shapes
    /// `[B, S, D] -> [B, S, D]`
    pub(crate) fn run_layers(
        &self,
        x_BSD: Tensor<3>,
        bias: Option<&Tensor<4>>,
        dropout_seed: Option<Seed>,
        range: Range<usize>,
    ) -> Tensor<3> {
        match (self, bias) {
            (Self::Bart(model), bias) => model.encoder.run_layers(x_BSD, bias, dropout_seed, range),
            (Self::Llama(model), Some(bias)) => model.run_layers(x_BSD, bias, range),
            (Self::Llama(_), None) => unreachable!("a causal decoder always has a bias"),
        }
    }

    /// Returns BART's decoder, if the fusion keeps it.
    pub(crate) fn decoder(&self) -> Option<&BartDecoder> {
        match self {
            Self::Bart(model) => model.decoder.as_ref(),
            Self::Llama(_) => None,
        }
    }
}

/// `[B, N, 3, size, size] -> [B * N, 3, size, size]`
pub(crate) fn all_cameras(images: Tensor<5>) -> Tensor<4> {
    let [batch, cameras, channels, height, width] = images.dims();
    images.reshape([batch * cameras, channels, height, width])
}

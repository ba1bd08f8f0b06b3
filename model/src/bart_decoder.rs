//! BART's decoder, which FLOWER drops: late fusion reads the instruction with it once more, now with
//! the encoded images and text in view.
//!
//! Legend: B batch, T text tokens, S tokens of the encoded sequence, D width.

use std::ops::Range;

use burn::module::Module;
use burn::tensor::Tensor;
use pollen_core::Seed;

use crate::attention::{Dropped, attend, causal, join_heads, split_heads};
use crate::config::{LanguageConfig, POSITION_OFFSET};
use crate::layers::{Embedding, LayerNorm, Linear, Mlp, dropout, fork, like, reseed};
use crate::weights::Weights;

/// Path of the decoder's parameters.
pub(crate) const DECODER: &str = "vlm.language_model.model.decoder";

/// What goes through the layers.
#[derive(Clone, Debug)]
pub(crate) struct Decoded {
    /// The instruction, `[B, T, D]`.
    pub(crate) words_BTD: Tensor<3>,
    /// The encoded sequence, `[B, S, D]`.
    pub(crate) memory_BSD: Tensor<3>,
}

/// Attention of the words to themselves or to the encoded sequence.
#[derive(Module, Debug)]
pub(crate) struct DecoderAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    heads: usize,
}

impl DecoderAttention {
    fn new(weights: &mut Weights, path: &str, heads: usize) -> Self {
        Self {
            q_proj: Linear::new(weights, &format!("{path}.q_proj")),
            k_proj: Linear::new(weights, &format!("{path}.k_proj")),
            v_proj: Linear::new(weights, &format!("{path}.v_proj")),
            out_proj: Linear::new(weights, &format!("{path}.out_proj")),
            heads,
        }
    }

    fn forward(
        &self,
        x_BTD: Tensor<3>,
        keys_BSD: Tensor<3>,
        bias: Option<Tensor<4>>,
        dropped: Dropped,
    ) -> Tensor<3> {
        let q = split_heads(self.q_proj.forward(x_BTD), self.heads);
        let k = split_heads(self.k_proj.forward(keys_BSD.clone()), self.heads);
        let v = split_heads(self.v_proj.forward(keys_BSD), self.heads);
        self.out_proj
            .forward(join_heads(attend(q, k, v, bias, dropped)))
    }
}

/// One layer; norms come after the sums.
#[derive(Module, Debug)]
pub(crate) struct DecoderLayer {
    self_attn: DecoderAttention,
    self_attn_layer_norm: LayerNorm,
    encoder_attn: DecoderAttention,
    encoder_attn_layer_norm: LayerNorm,
    ffn: Mlp,
    final_layer_norm: LayerNorm,
    dropout_rate: f64,
}

impl DecoderLayer {
    fn new(weights: &mut Weights, path: &str, config: &LanguageConfig) -> Self {
        let norm = |weights: &mut Weights, name: &str| {
            LayerNorm::new(weights, &format!("{path}.{name}_layer_norm"))
        };
        let attention = |weights: &mut Weights, name: &str| {
            DecoderAttention::new(weights, &format!("{path}.{name}"), config.heads)
        };
        Self {
            self_attn: attention(weights, "self_attn"),
            self_attn_layer_norm: norm(weights, "self_attn"),
            encoder_attn: attention(weights, "encoder_attn"),
            encoder_attn_layer_norm: norm(weights, "encoder_attn"),
            ffn: Mlp::new(weights, path),
            final_layer_norm: norm(weights, "final"),
            dropout_rate: config.dropout,
        }
    }

    fn forward(
        &self,
        x_BTD: Tensor<3>,
        memory_BSD: Tensor<3>,
        causal_bias: Tensor<4>,
        memory_bias: Option<Tensor<4>>,
        train: bool,
    ) -> Tensor<3> {
        let rate = self.dropout_rate;
        let dropped = Dropped { rate, train };
        let own = x_BTD.clone();
        let output = self
            .self_attn
            .forward(x_BTD.clone(), own, Some(causal_bias), dropped);
        let x_BTD = x_BTD + dropout(output, rate, train);
        let x_BTD = self.self_attn_layer_norm.forward(x_BTD);
        let output = self
            .encoder_attn
            .forward(x_BTD.clone(), memory_BSD, memory_bias, dropped);
        let x_BTD = x_BTD + dropout(output, rate, train);
        let x_BTD = self.encoder_attn_layer_norm.forward(x_BTD);
        let output = self.ffn.forward(x_BTD.clone(), rate, train);
        self.final_layer_norm
            .forward(x_BTD + dropout(output, rate, train))
    }
}

/// The layers with their positions.
#[derive(Module, Debug)]
pub(crate) struct BartDecoder {
    embed_positions: Embedding,
    layernorm_embedding: LayerNorm,
    pub(crate) layers: Vec<DecoderLayer>,
    dropout_rate: f64,
}

impl BartDecoder {
    pub(crate) fn new(weights: &mut Weights, config: &LanguageConfig) -> Self {
        let norm = format!("{DECODER}.layernorm_embedding");
        Self {
            embed_positions: Embedding::new(weights, &format!("{DECODER}.embed_positions")),
            layernorm_embedding: LayerNorm::new(weights, &norm),
            layers: (0..config.layers)
                .map(|i| DecoderLayer::new(weights, &format!("{DECODER}.layers.{i}"), config))
                .collect(),
            dropout_rate: config.dropout,
        }
    }

    /// Adds the positions 0, 1, ... and normalises. With a seed the dropouts act.
    ///
    /// # Shapes
    /// `[B, T, D] -> [B, T, D]`
    pub(crate) fn embed(&self, words_BTD: Tensor<3>, dropout_seed: Option<Seed>) -> Tensor<3> {
        let seed = dropout_seed.map(|seed| seed.child("decoder embedding"));
        reseed(&words_BTD.device(), seed);
        let positions = self
            .embed_positions
            .rows(POSITION_OFFSET, words_BTD.dims()[1]);
        let positions = like(positions, &words_BTD);
        let normed = self
            .layernorm_embedding
            .forward(words_BTD + positions.unsqueeze());
        dropout(normed, self.dropout_rate, seed.is_some())
    }

    /// Runs some of the layers. A word sees itself and those before it, and of the encoded sequence
    /// what `bias` does not hide. Each layer draws its dropout from a seed of its own.
    ///
    /// # Shapes
    /// `bias: [B, 1, 1, S]`
    pub(crate) fn run_layers(
        &self,
        state: Decoded,
        bias: Option<&Tensor<4>>,
        dropout_seed: Option<Seed>,
        range: Range<usize>,
    ) -> Decoded {
        let device = state.words_BTD.device();
        let causal_bias = causal(state.words_BTD.dims()[1], &device);
        range.fold(state, |state, layer| {
            let seed = dropout_seed.map(|seed| seed.child("decoder layer").index(layer as u64));
            reseed(&device, seed);
            let (memory, memory_BSD) = fork(state.memory_BSD);
            let words_BTD = self.layers[layer].forward(
                state.words_BTD,
                memory,
                causal_bias.clone(),
                bias.cloned(),
                seed.is_some(),
            );
            Decoded {
                words_BTD,
                memory_BSD,
            }
        })
    }
}

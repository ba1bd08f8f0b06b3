//! The text encoder (BART): post-norm transformer layers over the joined sequence.
//!
//! Legend: B batch, S tokens of the joined sequence, T text tokens, D width.

use std::ops::Range;

use burn::module::Module;
use burn::tensor::{Int, Tensor};
use pollen_core::Seed;

use crate::attention::{Dropped, attend, join_heads, split_heads};
use crate::bart_decoder::{BartDecoder, DECODER};
use crate::config::{LanguageConfig, POSITION_OFFSET};
use crate::layers::{Embedding, LayerNorm, Linear, Mlp, dropout, like, reseed};
use crate::parameters::ENCODER;
use crate::weights::Weights;

/// Id of the padding token.
const PADDING_ID: i64 = 1;

/// Attention of every token to every other.
#[derive(Module, Debug)]
pub(crate) struct EncoderAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    heads: usize,
}

impl EncoderAttention {
    fn new(weights: &mut Weights, path: &str, heads: usize) -> Self {
        Self {
            q_proj: Linear::new(weights, &format!("{path}.q_proj")),
            k_proj: Linear::new(weights, &format!("{path}.k_proj")),
            v_proj: Linear::new(weights, &format!("{path}.v_proj")),
            out_proj: Linear::new(weights, &format!("{path}.out_proj")),
            heads,
        }
    }

    fn forward(&self, x_BSD: Tensor<3>, bias: Option<Tensor<4>>, dropped: Dropped) -> Tensor<3> {
        let q = split_heads(self.q_proj.forward(x_BSD.clone()), self.heads);
        let k = split_heads(self.k_proj.forward(x_BSD.clone()), self.heads);
        let v = split_heads(self.v_proj.forward(x_BSD), self.heads);
        self.out_proj
            .forward(join_heads(attend(q, k, v, bias, dropped)))
    }
}

/// One layer; norms come after the sums.
#[derive(Module, Debug)]
pub(crate) struct EncoderLayer {
    self_attn: EncoderAttention,
    self_attn_layer_norm: LayerNorm,
    ffn: Mlp,
    final_layer_norm: LayerNorm,
    dropout_rate: f64,
}

impl EncoderLayer {
    fn new(weights: &mut Weights, path: &str, config: &LanguageConfig) -> Self {
        Self {
            self_attn: EncoderAttention::new(weights, &format!("{path}.self_attn"), config.heads),
            self_attn_layer_norm: LayerNorm::new(weights, &format!("{path}.self_attn_layer_norm")),
            ffn: Mlp::new(weights, path),
            final_layer_norm: LayerNorm::new(weights, &format!("{path}.final_layer_norm")),
            dropout_rate: config.dropout,
        }
    }

    /// # Shapes
    /// `[B, S, D] -> [B, S, D]`; `bias: [B, 1, 1, S]`
    pub(crate) fn forward(
        &self,
        x_BSD: Tensor<3>,
        bias: Option<Tensor<4>>,
        train: bool,
    ) -> Tensor<3> {
        let rate = self.dropout_rate;
        let attended = self
            .self_attn
            .forward(x_BSD.clone(), bias, Dropped { rate, train });
        let x_BSD = self
            .self_attn_layer_norm
            .forward(x_BSD + dropout(attended, rate, train));
        let output = self.ffn.forward(x_BSD.clone(), rate, train);
        self.final_layer_norm
            .forward(x_BSD + dropout(output, rate, train))
    }
}

/// The layers with their positions.
#[derive(Module, Debug)]
pub(crate) struct Encoder {
    embed_positions: Embedding,
    layernorm_embedding: LayerNorm,
    pub(crate) layers: Vec<EncoderLayer>,
    dropout_rate: f64,
}

impl Encoder {
    /// Adds the positions 0, 1, ... and normalises. With a seed the dropouts act.
    ///
    /// # Shapes
    /// `[B, S, D] -> [B, S, D]`
    pub(crate) fn embed(&self, x_BSD: Tensor<3>, dropout_seed: Option<Seed>) -> Tensor<3> {
        let seed = dropout_seed.map(|seed| seed.child("embedding"));
        reseed(&x_BSD.device(), seed);
        let tokens = x_BSD.dims()[1];
        let positions = like(self.embed_positions.rows(POSITION_OFFSET, tokens), &x_BSD);
        let normed = self
            .layernorm_embedding
            .forward(x_BSD + positions.unsqueeze());
        dropout(normed, self.dropout_rate, dropout_seed.is_some())
    }

    /// Runs some of the layers. Each draws its dropout from a seed of its own.
    ///
    /// # Shapes
    /// `x_BSD: [B, S, D]`, `bias: [B, 1, 1, S]` -> `[B, S, D]`
    pub(crate) fn run_layers(
        &self,
        x_BSD: Tensor<3>,
        bias: Option<&Tensor<4>>,
        dropout_seed: Option<Seed>,
        range: Range<usize>,
    ) -> Tensor<3> {
        range.fold(x_BSD, |x_BSD, layer| {
            let seed = dropout_seed.map(|seed| seed.child("layer").index(layer as u64));
            reseed(&x_BSD.device(), seed);
            self.layers[layer].forward(x_BSD, bias.cloned(), seed.is_some())
        })
    }

    /// Encodes the joined sequence. What `bias` hides is not attended, but encoded all the same.
    /// With a seed the dropouts act.
    ///
    /// # Shapes
    /// `x_BSD: [B, S, D]`, `bias: [B, 1, 1, S]` (none: all attended) -> `[B, S, D]`
    pub(crate) fn forward(
        &self,
        x_BSD: Tensor<3>,
        bias: Option<&Tensor<4>>,
        dropout_seed: Option<Seed>,
    ) -> Tensor<3> {
        let x_BSD = self.embed(x_BSD, dropout_seed);
        self.run_layers(x_BSD, bias, dropout_seed, 0..self.layers.len())
    }
}

/// Token table and encoder, with the decoder if the parameter table has it.
#[derive(Module, Debug)]
pub(crate) struct TextEncoder {
    shared: Embedding,
    pub(crate) encoder: Encoder,
    pub(crate) decoder: Option<BartDecoder>,
}

impl TextEncoder {
    pub(crate) fn new(weights: &mut Weights, config: &LanguageConfig) -> Self {
        let layers = (0..config.layers)
            .map(|layer| EncoderLayer::new(weights, &format!("{ENCODER}.layers.{layer}"), config))
            .collect();
        let norm = format!("{ENCODER}.layernorm_embedding");
        Self {
            shared: Embedding::new(weights, "vlm.language_model.model.shared"),
            encoder: Encoder {
                embed_positions: Embedding::new(weights, &format!("{ENCODER}.embed_positions")),
                layernorm_embedding: LayerNorm::new(weights, &norm),
                layers,
                dropout_rate: config.dropout,
            },
            decoder: weights
                .has(&format!("{DECODER}.embed_positions.weight"))
                .then(|| BartDecoder::new(weights, config)),
        }
    }

    /// Looks up text tokens, `[B, T] -> [B, T, D]`. The row of the padding token gets no gradient.
    pub(crate) fn token_embeddings(&self, ids_BT: Tensor<2, Int>) -> Tensor<3> {
        let padding = ids_BT.clone().equal_elem(PADDING_ID).unsqueeze_dim::<3>(2);
        let rows_BTD = self.shared.forward(ids_BT);
        let padding = padding.expand(rows_BTD.dims());
        rows_BTD.clone().mask_where(padding, rows_BTD.detach())
    }
}

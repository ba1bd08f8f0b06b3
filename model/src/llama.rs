//! A LLaMA-type text decoder over the joined sequence, for decoder-only vision-language models.
//!
//! Legend: B batch, S tokens of the joined sequence, T text tokens, D width, G heads of keys and values,
//! E width of a head.

use std::ops::Range;

use burn::module::Module;
use burn::tensor::activation::silu;
use burn::tensor::{Int, Tensor};

use crate::attention::{Dropped, HIDDEN, attend, join_heads, split_heads};
use crate::config::{DecoderConfig, LanguageConfig};
use crate::layers::{Embedding, Linear, RmsNorm};
use crate::rope::Rope;
use crate::weights::Weights;

/// Path of the decoder's parameters.
pub(crate) const LLAMA: &str = "vlm.text_model";

/// Causal attention in which several heads of queries share one of keys and values.
#[derive(Module, Debug)]
pub(crate) struct GroupedAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    heads: usize,
    kv_heads: usize,
}

impl GroupedAttention {
    fn forward(&self, x_BSD: Tensor<3>, bias: Tensor<4>, rope: &Rope) -> Tensor<3> {
        let q = split_heads(self.q_proj.forward(x_BSD.clone()), self.heads);
        let k = split_heads(self.k_proj.forward(x_BSD.clone()), self.kv_heads);
        let v = split_heads(self.v_proj.forward(x_BSD), self.kv_heads);
        let (q, k) = (rope.rotate(q), rope.rotate(k));
        let (k, v) = (self.repeat(k), self.repeat(v));
        let mixed = attend(q, k, v, Some(bias), Dropped::NEVER);
        self.o_proj.forward(join_heads(mixed))
    }

    /// Gives each head of queries its keys or values, `[B, G, S, E] -> [B, H, S, E]`.
    fn repeat(&self, x_BGSE: Tensor<4>) -> Tensor<4> {
        let [batch, groups, tokens, width] = x_BGSE.dims();
        let each = self.heads / self.kv_heads;
        x_BGSE
            .unsqueeze_dim::<5>(2)
            .expand([batch, groups, each, tokens, width])
            .reshape([batch, self.heads, tokens, width])
    }
}

/// Feed-forward layer with a SiLU gate.
#[derive(Module, Debug)]
#[allow(
    clippy::struct_field_names,
    reason = "fields are named as in the files"
)]
pub(crate) struct GatedLayer {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

/// One layer; norms come before attention and feed-forward layer.
#[derive(Module, Debug)]
pub(crate) struct LlamaLayer {
    input_layernorm: RmsNorm,
    self_attn: GroupedAttention,
    post_attention_layernorm: RmsNorm,
    mlp: GatedLayer,
}

impl LlamaLayer {
    fn new(weights: &mut Weights, path: &str, heads: usize, config: &DecoderConfig) -> Self {
        let attention = format!("{path}.self_attn");
        let after = format!("{path}.post_attention_layernorm");
        let eps = config.norm_eps;
        Self {
            input_layernorm: RmsNorm::with_eps(weights, &format!("{path}.input_layernorm"), eps),
            self_attn: GroupedAttention {
                q_proj: Linear::new(weights, &format!("{attention}.q_proj")),
                k_proj: Linear::new(weights, &format!("{attention}.k_proj")),
                v_proj: Linear::new(weights, &format!("{attention}.v_proj")),
                o_proj: Linear::new(weights, &format!("{attention}.o_proj")),
                heads,
                kv_heads: config.kv_heads,
            },
            post_attention_layernorm: RmsNorm::with_eps(weights, &after, eps),
            mlp: GatedLayer {
                gate_proj: Linear::new(weights, &format!("{path}.mlp.gate_proj")),
                up_proj: Linear::new(weights, &format!("{path}.mlp.up_proj")),
                down_proj: Linear::new(weights, &format!("{path}.mlp.down_proj")),
            },
        }
    }

    /// # Shapes
    /// `[B, S, D] -> [B, S, D]`; `bias: [B, 1, S, S]`
    fn forward(&self, x_BSD: Tensor<3>, bias: Tensor<4>, rope: &Rope) -> Tensor<3> {
        let normed = self.input_layernorm.forward(x_BSD.clone());
        let x_BSD = x_BSD + self.self_attn.forward(normed, bias, rope);
        let normed = self.post_attention_layernorm.forward(x_BSD.clone());
        let gate = silu(self.mlp.gate_proj.forward(normed.clone()));
        let hidden = gate * self.mlp.up_proj.forward(normed);
        x_BSD + self.mlp.down_proj.forward(hidden)
    }
}

/// Token table and layers.
#[derive(Module, Debug)]
pub(crate) struct TextDecoder {
    embed_tokens: Embedding,
    pub(crate) layers: Vec<LlamaLayer>,
    /// Only behind the last layer of the whole decoder.
    norm: Option<RmsNorm>,
    rope: Rope,
}

impl TextDecoder {
    /// Builds as many layers as `language` says; the norm behind them if the table has it.
    pub(crate) fn new(
        weights: &mut Weights,
        language: &LanguageConfig,
        config: &DecoderConfig,
    ) -> Self {
        let device = weights.device().clone();
        let norm = format!("{LLAMA}.norm");
        Self {
            embed_tokens: Embedding::new(weights, &format!("{LLAMA}.embed_tokens")),
            layers: (0..language.layers)
                .map(|layer| {
                    let path = format!("{LLAMA}.layers.{layer}");
                    LlamaLayer::new(weights, &path, language.heads, config)
                })
                .collect(),
            norm: weights
                .has(&format!("{norm}.weight"))
                .then(|| RmsNorm::with_eps(weights, &norm, config.norm_eps)),
            rope: Rope::new(
                config.rope_theta,
                language.max_positions,
                config.head_dim,
                &device,
            ),
        }
    }

    /// Looks up text tokens, `[B, T] -> [B, T, D]`.
    pub(crate) fn token_embeddings(&self, ids_BT: Tensor<2, Int>) -> Tensor<3> {
        self.embed_tokens.forward(ids_BT)
    }

    /// Runs some of the layers; the norm belongs to the last.
    ///
    /// # Shapes
    /// `x_BSD: [B, S, D]`, `bias: [B, 1, S, S]` -> `[B, S, D]`
    pub(crate) fn run_layers(
        &self,
        x_BSD: Tensor<3>,
        bias: &Tensor<4>,
        range: Range<usize>,
    ) -> Tensor<3> {
        let last = range.end == self.layers.len();
        let x_BSD = self.layers[range].iter().fold(x_BSD, |x_BSD, layer| {
            layer.forward(x_BSD, bias.clone(), &self.rope)
        });
        match &self.norm {
            Some(norm) if last => norm.forward(x_BSD),
            _ => x_BSD,
        }
    }
}

/// Returns the bias that shows each token itself and those before it, without the ones where
/// `mask` is 0: `[B, S] -> [B, 1, S, S]`. Every row has a visible key.
pub(crate) fn causal_bias(mask_BS: Tensor<2>) -> Tensor<4> {
    let [batch, tokens] = mask_BS.dims();
    let device = mask_BS.device();
    let earlier = Tensor::<2>::ones([tokens, tokens], &device)
        .tril(-1)
        .reshape([1, 1, tokens, tokens]);
    let itself = Tensor::<2>::eye(tokens, &device).reshape([1, 1, tokens, tokens]);
    let seen = mask_BS.reshape([batch, 1, 1, tokens]) * earlier + itself;
    (seen - 1.0) * -HIDDEN
}

//! One block of the flow transformer.
//!
//! Legend: B batch, T action tokens, S context tokens, D width, H heads, E width of a head.

use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::activation::silu;

use crate::attention::{Dropped, attend, join_heads, split_heads};
use crate::config::FlowConfig;
use crate::layers::{Linear, RmsNorm, dropout};
use crate::rope::Rope;
use crate::weights::Weights;

/// What all blocks of one forward pass share.
#[derive(Debug)]
pub(crate) struct Shared<'a> {
    /// SiLU of the conditioning vector, `[B, D]`.
    pub(crate) cond_BD: Tensor<2>,
    /// The action space's modulation, `[B, 6 D]`, if it is applied.
    pub(crate) global: Option<Tensor<2>>,
    /// Context after its projection, `[B, S, D]`.
    pub(crate) context_BSD: Tensor<3>,
    /// Bias of the cross-attention logits, `[B, 1, 1, S]`.
    pub(crate) cross_bias: Option<Tensor<4>>,
    /// Hides later action tokens, `[1, 1, T, T]`.
    pub(crate) causal_bias: Tensor<4>,
    /// Rotary tables.
    pub(crate) rope: &'a Rope,
    /// Whether dropout acts.
    pub(crate) train: bool,
}

/// Self-attention over the action tokens.
#[derive(Module, Debug)]
pub(crate) struct SelfAttention {
    qkv: Linear,
    proj: Linear,
    q_norm: RmsNorm,
    k_norm: RmsNorm,
    heads: usize,
    dropout_attention: f64,
    dropout_residual: f64,
}

impl SelfAttention {
    fn new(weights: &mut Weights, path: &str, config: &FlowConfig) -> Self {
        Self {
            qkv: Linear::new(weights, &format!("{path}.qkv")),
            proj: Linear::new(weights, &format!("{path}.proj")),
            q_norm: RmsNorm::new(weights, &format!("{path}.q_norm"), config.norm),
            k_norm: RmsNorm::new(weights, &format!("{path}.k_norm"), config.norm),
            heads: config.heads,
            dropout_attention: config.dropout_attention,
            dropout_residual: config.dropout_residual,
        }
    }

    pub(crate) fn forward(&self, x_BTD: Tensor<3>, shared: &Shared) -> Tensor<3> {
        let mut parts = self.qkv.forward(x_BTD).chunk(3, 2).into_iter();
        let mut next = || split_heads(parts.next().expect("three parts"), self.heads);
        let (q, k, v) = (next(), next(), next());
        let q = shared.rope.rotate(self.q_norm.forward(q));
        let k = shared.rope.rotate(self.k_norm.forward(k));
        let dropped = Dropped {
            rate: self.dropout_attention,
            train: shared.train,
        };
        let mixed = attend(q, k, v, Some(shared.causal_bias.clone()), dropped);
        let output = self.proj.forward(join_heads(mixed));
        dropout(output, self.dropout_residual, shared.train)
    }
}

/// Attention of the action tokens to the context.
#[derive(Module, Debug)]
pub(crate) struct CrossAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    proj: Linear,
    q_norm: RmsNorm,
    k_norm: RmsNorm,
    heads: usize,
    dropout_attention: f64,
    dropout_residual: f64,
}

impl CrossAttention {
    fn new(weights: &mut Weights, path: &str, config: &FlowConfig) -> Self {
        Self {
            q_proj: Linear::new(weights, &format!("{path}.q_proj")),
            k_proj: Linear::new(weights, &format!("{path}.k_proj")),
            v_proj: Linear::new(weights, &format!("{path}.v_proj")),
            proj: Linear::new(weights, &format!("{path}.proj")),
            q_norm: RmsNorm::new(weights, &format!("{path}.q_norm"), config.norm),
            k_norm: RmsNorm::new(weights, &format!("{path}.k_norm"), config.norm),
            heads: config.heads,
            dropout_attention: config.dropout_attention,
            dropout_residual: config.dropout_residual,
        }
    }

    pub(crate) fn forward(&self, x_BTD: Tensor<3>, shared: &Shared) -> Tensor<3> {
        let context = shared.context_BSD.clone();
        let q = split_heads(self.q_proj.forward(x_BTD), self.heads);
        let k = split_heads(self.k_proj.forward(context.clone()), self.heads);
        let v = split_heads(self.v_proj.forward(context), self.heads);
        let dropped = Dropped {
            rate: self.dropout_attention,
            train: shared.train,
        };
        let (q, k) = (self.q_norm.forward(q), self.k_norm.forward(k));
        let mixed = attend(q, k, v, shared.cross_bias.clone(), dropped);
        let output = self.proj.forward(join_heads(mixed));
        dropout(output, self.dropout_residual, shared.train)
    }
}

/// Feed-forward layer with a SiLU gate.
#[derive(Module, Debug)]
pub(crate) struct GatedMlp {
    fc1: Linear,
    fc2: Linear,
    proj: Linear,
    dropout_rate: f64,
}

impl GatedMlp {
    fn new(weights: &mut Weights, path: &str, config: &FlowConfig) -> Self {
        Self {
            fc1: Linear::new(weights, &format!("{path}.fc1")),
            fc2: Linear::new(weights, &format!("{path}.fc2")),
            proj: Linear::new(weights, &format!("{path}.proj")),
            dropout_rate: config.dropout_mlp,
        }
    }

    pub(crate) fn forward(&self, x_BTD: Tensor<3>, train: bool) -> Tensor<3> {
        let hidden = silu(self.fc1.forward(x_BTD.clone())) * self.fc2.forward(x_BTD);
        self.proj.forward(dropout(hidden, self.dropout_rate, train))
    }
}

/// The block's own modulation: of low rank beside a global one, else of full rank.
#[derive(Module, Debug)]
pub(crate) struct BlockModulation {
    down: Linear,
    up: Option<Linear>,
}

/// Shift, scale and gate of self-attention and feed-forward layer, `[B, 1, D]` each.
#[derive(Debug)]
pub(crate) struct Modulation {
    pub(crate) shift_attention: Tensor<3>,
    pub(crate) scale_attention: Tensor<3>,
    pub(crate) gate_attention: Tensor<3>,
    pub(crate) shift_mlp: Tensor<3>,
    pub(crate) scale_mlp: Tensor<3>,
    pub(crate) gate_mlp: Tensor<3>,
}

impl BlockModulation {
    fn new(weights: &mut Weights, path: &str) -> Self {
        let up = format!("{path}.2");
        Self {
            down: Linear::new(weights, &format!("{path}.1")),
            up: weights
                .has(&format!("{up}.weight"))
                .then(|| Linear::new(weights, &up)),
        }
    }

    /// # Shapes
    /// `[B, D] -> [B, 6 D]`
    pub(crate) fn local(&self, cond_BD: Tensor<2>) -> Tensor<2> {
        let modulation = self.down.forward(cond_BD);
        match &self.up {
            Some(up) => up.forward(modulation),
            None => modulation,
        }
    }

    /// Adds the action space's modulation and names the six parts.
    pub(crate) fn forward(&self, shared: &Shared) -> Modulation {
        let mut all = self.local(shared.cond_BD.clone());
        if let Some(global) = &shared.global {
            all = all + global.clone();
        }
        let mut parts = all.unsqueeze_dim::<3>(1).chunk(6, 2).into_iter();
        let mut next = || parts.next().expect("six parts");
        Modulation {
            shift_attention: next(),
            scale_attention: next(),
            gate_attention: next(),
            shift_mlp: next(),
            scale_mlp: next(),
            gate_mlp: next(),
        }
    }
}

/// A block: causal self-attention, cross-attention to the context, gated feed-forward layer.
#[derive(Module, Debug)]
pub(crate) struct FlowBlock {
    pub(crate) norm1: RmsNorm,
    pub(crate) norm2: RmsNorm,
    pub(crate) norm3: RmsNorm,
    pub(crate) self_attn: SelfAttention,
    pub(crate) cross_attn: CrossAttention,
    pub(crate) mlp: GatedMlp,
    pub(crate) modulation: BlockModulation,
}

impl FlowBlock {
    /// Builds the block whose names start with `path` (with its trailing dot, if any).
    pub(crate) fn new(weights: &mut Weights, path: &str, config: &FlowConfig) -> Self {
        Self {
            norm1: RmsNorm::new(weights, &format!("{path}norm1"), config.norm),
            norm2: RmsNorm::new(weights, &format!("{path}norm2"), config.norm),
            norm3: RmsNorm::new(weights, &format!("{path}norm3"), config.norm),
            self_attn: SelfAttention::new(weights, &format!("{path}self_attn"), config),
            cross_attn: CrossAttention::new(weights, &format!("{path}cross_attn"), config),
            mlp: GatedMlp::new(weights, &format!("{path}mlp"), config),
            modulation: BlockModulation::new(weights, &format!("{path}adaLN_modulation")),
        }
    }

    /// # Shapes
    /// `[B, T, D] -> [B, T, D]`
    pub(crate) fn forward(&self, x_BTD: Tensor<3>, shared: &Shared) -> Tensor<3> {
        let m = self.modulation.forward(shared);
        let normed = modulate(
            self.norm1.forward(x_BTD.clone()),
            m.shift_attention,
            m.scale_attention,
        );
        let x_BTD = x_BTD + self.self_attn.forward(normed, shared) * m.gate_attention;
        let normed = self.norm2.forward(x_BTD.clone());
        let x_BTD = x_BTD + self.cross_attn.forward(normed, shared);
        let normed = modulate(self.norm3.forward(x_BTD.clone()), m.shift_mlp, m.scale_mlp);
        x_BTD + self.mlp.forward(normed, shared.train) * m.gate_mlp
    }
}

/// Returns `x * (1 + scale) + shift`.
pub(crate) fn modulate(x: Tensor<3>, shift: Tensor<3>, scale: Tensor<3>) -> Tensor<3> {
    x * (scale + 1.0) + shift
}

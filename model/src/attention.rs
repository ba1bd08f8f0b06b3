//! Scaled dot-product attention, shared by the text encoder and the flow transformer.
//!
//! Legend: B batch, H heads, Q queries, K keys, E width of a head, D = H * E.

use burn::tensor::activation::softmax;
use burn::tensor::{DType, Device, Tensor};

use crate::layers::{dropout, like, to};

/// Added to the logit of a key that must not be attended. Finite, so that a row in which every
/// key is hidden stays free of NaN.
pub(crate) const HIDDEN: f64 = -1e30;

/// Settings of one attention.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dropped {
    /// Dropout of the probabilities.
    pub(crate) rate: f64,
    /// Whether it acts.
    pub(crate) train: bool,
}

impl Dropped {
    /// No dropout, in training either.
    pub(crate) const NEVER: Self = Self {
        rate: 0.0,
        train: false,
    };
}

/// Returns `softmax(q k^T / sqrt(E) + bias) v`; bias and softmax in f32.
///
/// # Shapes
/// - `q_BHQE`, `k_BHKE`, `v_BHKE`
/// - `bias`: broadcast to `[B, H, Q, K]`
/// - result: `[B, H, Q, E]`
pub(crate) fn attend(
    q_BHQE: Tensor<4>,
    k_BHKE: Tensor<4>,
    v_BHKE: Tensor<4>,
    bias: Option<Tensor<4>>,
    dropped: Dropped,
) -> Tensor<4> {
    let scale = 1.0 / (q_BHQE.dims()[3] as f64).sqrt();
    let mut logits_BHQK = to((q_BHQE * scale).matmul(k_BHKE.transpose()), DType::F32);
    if let Some(bias) = bias {
        logits_BHQK = logits_BHQK + bias;
    }
    let probabilities = like(softmax(logits_BHQK, 3), &v_BHKE);
    dropout(probabilities, dropped.rate, dropped.train).matmul(v_BHKE)
}

/// Splits the width in heads: `[B, T, D] -> [B, H, T, E]`.
pub(crate) fn split_heads(x_BTD: Tensor<3>, heads: usize) -> Tensor<4> {
    let [batch, tokens, width] = x_BTD.dims();
    x_BTD
        .reshape([batch, tokens, heads, width / heads])
        .swap_dims(1, 2)
}

/// Joins the heads: `[B, H, T, E] -> [B, T, D]`.
pub(crate) fn join_heads(x_BHTE: Tensor<4>) -> Tensor<3> {
    let [batch, heads, tokens, width] = x_BHTE.dims();
    x_BHTE
        .swap_dims(1, 2)
        .reshape([batch, tokens, heads * width])
}

/// Returns the bias that hides the keys where `mask` is 0, `[B, K] -> [B, 1, 1, K]`.
pub(crate) fn hide(mask_BK: Tensor<2>) -> Tensor<4> {
    let [batch, keys] = mask_BK.dims();
    ((mask_BK - 1.0) * -HIDDEN).reshape([batch, 1, 1, keys])
}

/// Returns the bias that hides later keys, `[1, 1, tokens, tokens]`.
pub(crate) fn causal(tokens: usize, device: &Device) -> Tensor<4> {
    Tensor::<2>::full([tokens, tokens], HIDDEN, device)
        .triu(1)
        .unsqueeze()
}

//! Attention inside windows, and attention between channels.
//!
//! Legend: B images, H x W cells, C channels, G heads or groups, E channels of one, N cells.

use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::activation::softmax;

use crate::attention::{Dropped, attend};
use crate::layers::{LayerNorm, Linear};
use crate::weights::Weights;

/// Attention among the cells of a window.
#[derive(Module, Debug)]
pub(crate) struct WindowAttention {
    norm: LayerNorm,
    qkv: Linear,
    proj: Linear,
    heads: usize,
    window: usize,
}

impl WindowAttention {
    pub(crate) fn new(weights: &mut Weights, path: &str, heads: usize, window: usize) -> Self {
        Self {
            norm: LayerNorm::new(weights, &format!("{path}.norm")),
            qkv: Linear::new(weights, &format!("{path}.fn.qkv")),
            proj: Linear::new(weights, &format!("{path}.fn.proj")),
            heads,
            window,
        }
    }

    /// The map is padded with zeros after the norm; padding takes part in the attention, as in
    /// the reference.
    ///
    /// # Shapes
    /// `[B, H, W, C] -> [B, H, W, C]`
    pub(crate) fn forward(&self, x_BHWC: Tensor<4>) -> Tensor<4> {
        let [batch, height, width, channels] = x_BHWC.dims();
        let side = self.window;
        let (rows, columns) = (height.div_ceil(side), width.div_ceil(side));
        let (padded_height, padded_width) = (rows * side, columns * side);
        let normed = self.norm.forward(x_BHWC);
        let normed = extend(normed, 1, padded_height - height);
        let normed = extend(normed, 2, padded_width - width);
        let windows = normed
            .reshape([batch, rows, side, columns, side, channels])
            .swap_dims(2, 3)
            .reshape([batch * rows * columns, side * side, channels]);
        let [q, k, v] = split_three(&self.qkv.forward(windows), self.heads);
        let dropped = Dropped {
            rate: 0.0,
            train: false,
        };
        let mixed = attend(q, k, v, None, dropped).swap_dims(1, 2).reshape([
            batch * rows * columns,
            side * side,
            channels,
        ]);
        self.proj
            .forward(mixed)
            .reshape([batch, rows, columns, side, side, channels])
            .swap_dims(2, 3)
            .reshape([batch, padded_height, padded_width, channels])
            .narrow(1, 0, height)
            .narrow(2, 0, width)
    }
}

/// Attention among the channels of a group.
#[derive(Module, Debug)]
pub(crate) struct ChannelAttention {
    norm: LayerNorm,
    qkv: Linear,
    proj: Linear,
    groups: usize,
}

impl ChannelAttention {
    pub(crate) fn new(weights: &mut Weights, path: &str, groups: usize) -> Self {
        Self {
            norm: LayerNorm::new(weights, &format!("{path}.norm")),
            qkv: Linear::new(weights, &format!("{path}.fn.qkv")),
            proj: Linear::new(weights, &format!("{path}.fn.proj")),
            groups,
        }
    }

    /// # Shapes
    /// `[B, H, W, C] -> [B, H, W, C]`
    pub(crate) fn forward(&self, x_BHWC: Tensor<4>) -> Tensor<4> {
        let [batch, height, width, channels] = x_BHWC.dims();
        let cells = height * width;
        let normed = self.norm.forward(x_BHWC);
        let qkv = self.qkv.forward(normed.reshape([batch, cells, channels]));
        let [q_BGNE, k_BGNE, v_BGNE] = split_three(&qkv, self.groups);
        let scale = 1.0 / (cells as f64).sqrt();
        let weights_BGEE = softmax((q_BGNE * scale).transpose().matmul(k_BGNE), 3);
        let mixed_BNC = v_BGNE
            .matmul(weights_BGEE.transpose())
            .swap_dims(1, 2)
            .reshape([batch, cells, channels]);
        self.proj
            .forward(mixed_BNC)
            .reshape([batch, height, width, channels])
    }
}

/// Splits a fused projection: `[B, N, 3 * G * E]` to three of `[B, G, N, E]`.
fn split_three(qkv: &Tensor<3>, parts: usize) -> [Tensor<4>; 3] {
    let [batch, cells, width] = qkv.dims();
    let channels = width / 3;
    [0, 1, 2].map(|i| {
        qkv.clone()
            .narrow(2, i * channels, channels)
            .reshape([batch, cells, parts, channels / parts])
            .swap_dims(1, 2)
    })
}

/// Appends `count` zeros along `axis`.
fn extend(x: Tensor<4>, axis: usize, count: usize) -> Tensor<4> {
    if count == 0 {
        return x;
    }
    let mut dims = x.dims();
    dims[axis] = count;
    let zeros = Tensor::zeros(dims, &x.device());
    Tensor::cat(vec![x, zeros], axis)
}

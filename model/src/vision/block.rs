//! Spatial and channel block: convolution, attention, convolution, feed-forward layer, each added
//! to its input.

use burn::module::Module;
use burn::tensor::Tensor;

use super::BranchKeep;
use super::attention::{ChannelAttention, WindowAttention};
use crate::config::VisionConfig;
use crate::layers::{Conv2d, LayerNorm, Mlp};
use crate::weights::Weights;

/// Feed-forward layer behind its norm.
#[derive(Module, Debug)]
pub(crate) struct FeedForward {
    norm: LayerNorm,
    net: Mlp,
}

impl FeedForward {
    fn new(weights: &mut Weights, path: &str) -> Self {
        Self {
            norm: LayerNorm::new(weights, &format!("{path}.norm")),
            net: Mlp::new(weights, &format!("{path}.fn.net")),
        }
    }

    fn forward(&self, x_BHWC: Tensor<4>) -> Tensor<4> {
        self.net.forward(self.norm.forward(x_BHWC), 0.0, false)
    }
}

/// A block whose attention looks at windows of cells.
#[derive(Module, Debug)]
pub(crate) struct SpatialBlock {
    conv1: Conv2d,
    window_attn: WindowAttention,
    conv2: Conv2d,
    ffn: FeedForward,
}

impl SpatialBlock {
    pub(crate) fn new(
        weights: &mut Weights,
        path: &str,
        config: &VisionConfig,
        stage: usize,
    ) -> Self {
        let path = format!("{path}.spatial_block");
        Self {
            conv1: Conv2d::new(weights, &format!("{path}.conv1.fn.dw"), 1, 1),
            window_attn: WindowAttention::new(
                weights,
                &format!("{path}.window_attn"),
                config.heads[stage],
                config.window,
            ),
            conv2: Conv2d::new(weights, &format!("{path}.conv2.fn.dw"), 1, 1),
            ffn: FeedForward::new(weights, &format!("{path}.ffn")),
        }
    }

    /// # Shapes
    /// `[B, H, W, C] -> [B, H, W, C]`
    pub(crate) fn forward(&self, x: Tensor<4>, keep: &BranchKeep) -> Tensor<4> {
        let x = x.clone() + self.conv1.forward(x);
        let x = x.clone() + keep.apply(0, self.window_attn.forward(x));
        let x = x.clone() + self.conv2.forward(x);
        x.clone() + keep.apply(1, self.ffn.forward(x))
    }
}

/// A block whose attention mixes channels.
#[derive(Module, Debug)]
pub(crate) struct ChannelBlock {
    conv1: Conv2d,
    channel_attn: ChannelAttention,
    conv2: Conv2d,
    ffn: FeedForward,
}

impl ChannelBlock {
    pub(crate) fn new(
        weights: &mut Weights,
        path: &str,
        config: &VisionConfig,
        stage: usize,
    ) -> Self {
        let path = format!("{path}.channel_block");
        Self {
            conv1: Conv2d::new(weights, &format!("{path}.conv1.fn.dw"), 1, 1),
            channel_attn: ChannelAttention::new(
                weights,
                &format!("{path}.channel_attn"),
                config.groups[stage],
            ),
            conv2: Conv2d::new(weights, &format!("{path}.conv2.fn.dw"), 1, 1),
            ffn: FeedForward::new(weights, &format!("{path}.ffn")),
        }
    }

    /// # Shapes
    /// `[B, H, W, C] -> [B, H, W, C]`
    pub(crate) fn forward(&self, x: Tensor<4>, keep: &BranchKeep) -> Tensor<4> {
        let x = x.clone() + self.conv1.forward(x);
        let x = x.clone() + keep.apply(0, self.channel_attn.forward(x));
        let x = x.clone() + self.conv2.forward(x);
        x.clone() + keep.apply(1, self.ffn.forward(x))
    }
}

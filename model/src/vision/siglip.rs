//! SigLIP: the plain vision transformer of decoder-only models, and the connector to their tokens.
//!
//! Legend: B images, H x W patches, N = H * W, C channels, D width of the text decoder, S side of the
//! squares that become one token.

use std::ops::Range;

use burn::module::Module;
use burn::tensor::Tensor;

use crate::attention::{Dropped, attend, join_heads, split_heads};
use crate::config::{SiglipConfig, VisionConfig};
use crate::layers::{Conv2d, Embedding, LayerNorm, Linear, gelu_tanh, like};
use crate::weights::Weights;

/// Path of the tower's parameters.
pub(crate) const SIGLIP: &str = "vlm.vision_model";
/// Path of the connector's matrix.
pub(crate) const CONNECTOR: &str = "vlm.connector.modality_projection.proj";

/// Patches and their learned positions.
#[derive(Module, Debug)]
pub(crate) struct PatchPositions {
    patch_embedding: Conv2d,
    position_embedding: Embedding,
}

/// Attention of every patch to every other.
#[derive(Module, Debug)]
pub(crate) struct PatchAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    heads: usize,
}

/// Feed-forward layer.
#[derive(Module, Debug)]
pub(crate) struct PatchMlp {
    fc1: Linear,
    fc2: Linear,
}

/// One layer; norms come before attention and feed-forward layer.
#[derive(Module, Debug)]
pub(crate) struct SiglipLayer {
    layer_norm1: LayerNorm,
    self_attn: PatchAttention,
    layer_norm2: LayerNorm,
    mlp: PatchMlp,
}

/// The image tower.
#[derive(Module, Debug)]
pub(crate) struct SiglipTower {
    embeddings: PatchPositions,
    pub(crate) layers: Vec<SiglipLayer>,
    post_layernorm: LayerNorm,
}

impl SiglipLayer {
    fn new(weights: &mut Weights, path: &str, heads: usize, eps: f64) -> Self {
        let attention = format!("{path}.self_attn");
        Self {
            layer_norm1: LayerNorm::with_eps(weights, &format!("{path}.layer_norm1"), eps),
            self_attn: PatchAttention {
                q_proj: Linear::new(weights, &format!("{attention}.q_proj")),
                k_proj: Linear::new(weights, &format!("{attention}.k_proj")),
                v_proj: Linear::new(weights, &format!("{attention}.v_proj")),
                out_proj: Linear::new(weights, &format!("{attention}.out_proj")),
                heads,
            },
            layer_norm2: LayerNorm::with_eps(weights, &format!("{path}.layer_norm2"), eps),
            mlp: PatchMlp {
                fc1: Linear::new(weights, &format!("{path}.mlp.fc1")),
                fc2: Linear::new(weights, &format!("{path}.mlp.fc2")),
            },
        }
    }

    /// # Shapes
    /// `[B, N, C] -> [B, N, C]`
    fn forward(&self, x_BNC: Tensor<3>) -> Tensor<3> {
        let attention = &self.self_attn;
        let normed = self.layer_norm1.forward(x_BNC.clone());
        let q = split_heads(attention.q_proj.forward(normed.clone()), attention.heads);
        let k = split_heads(attention.k_proj.forward(normed.clone()), attention.heads);
        let v = split_heads(attention.v_proj.forward(normed), attention.heads);
        let mixed = join_heads(attend(q, k, v, None, Dropped::NEVER));
        let x_BNC = x_BNC + attention.out_proj.forward(mixed);
        let normed = self.layer_norm2.forward(x_BNC.clone());
        x_BNC
            + self
                .mlp
                .fc2
                .forward(gelu_tanh(self.mlp.fc1.forward(normed)))
    }
}

impl SiglipTower {
    /// Builds the tower: `config` has one stage.
    pub(crate) fn new(weights: &mut Weights, config: &VisionConfig, siglip: &SiglipConfig) -> Self {
        let eps = siglip.norm_eps;
        let patches = format!("{SIGLIP}.embeddings.patch_embedding");
        let positions = format!("{SIGLIP}.embeddings.position_embedding");
        let layer = |weights: &mut Weights, layer| {
            let path = format!("{SIGLIP}.encoder.layers.{layer}");
            SiglipLayer::new(weights, &path, config.heads[0], eps)
        };
        Self {
            embeddings: PatchPositions {
                patch_embedding: Conv2d::new(weights, &patches, siglip.patch, 0),
                position_embedding: Embedding::new(weights, &positions),
            },
            layers: (0..config.depths[0]).map(|i| layer(weights, i)).collect(),
            post_layernorm: LayerNorm::with_eps(weights, &format!("{SIGLIP}.post_layernorm"), eps),
        }
    }

    /// Runs some of the layers; the patches belong to the first, the last norm to the last.
    ///
    /// # Shapes
    /// `[B, H, W, C] -> [B, H', W', C']`
    pub(crate) fn run_layers(&self, mut x_BHWC: Tensor<4>, range: Range<usize>) -> Tensor<4> {
        if range.start == 0 {
            x_BHWC = self.embeddings.patch_embedding.forward(x_BHWC);
            let [_, height, width, channels] = x_BHWC.dims();
            let positions = self.embeddings.position_embedding.rows(0, height * width);
            let positions = like(positions, &x_BHWC);
            x_BHWC = x_BHWC + positions.reshape([1, height, width, channels]);
        }
        let [batch, height, width, channels] = x_BHWC.dims();
        let last = range.end == self.layers.len();
        let mut x_BNC = x_BHWC.reshape([batch, height * width, channels]);
        for layer in &self.layers[range] {
            x_BNC = layer.forward(x_BNC);
        }
        if last {
            x_BNC = self.post_layernorm.forward(x_BNC);
        }
        x_BNC.reshape([batch, height, width, channels])
    }
}

/// Joins squares of patches to one token each (pixel shuffle) and projects them.
#[derive(Module, Debug)]
pub(crate) struct Connector {
    proj: Linear,
    side: usize,
}

impl Connector {
    pub(crate) fn new(weights: &mut Weights, side: usize) -> Self {
        Self {
            proj: Linear::new(weights, CONNECTOR),
            side,
        }
    }

    /// # Shapes
    /// `[B, H, W, C] -> [B, H * W / S^2, D]`
    pub(crate) fn forward(&self, x_BHWC: Tensor<4>) -> Tensor<3> {
        let [batch, height, width, channels] = x_BHWC.dims();
        let side = self.side;
        let (rows, columns) = (height / side, width / side);
        let squares = x_BHWC
            .reshape([batch, rows, side, columns, side, channels])
            .swap_dims(2, 3)
            .reshape([batch, rows * columns, side * side * channels]);
        self.proj.forward(squares)
    }
}

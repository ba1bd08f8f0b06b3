//! The image tower (DaViT) and its projection to tokens.
//!
//! Legend: B images, H x W cells, C channels, N = H * W, D width of the text encoder.

mod attention;
mod block;
mod siglip;

use std::ops::Range;

use burn::module::{Module, Param};
use burn::tensor::module::linear;
use burn::tensor::{Device, Tensor, TensorData};

use crate::config::{VisionConfig, patch_geometry};
use crate::layers::{Conv2d, Embedding, LayerNorm, like};
use crate::weights::Weights;
pub(crate) use attention::attend_channels;
use block::{ChannelBlock, SpatialBlock};
pub(crate) use siglip::{CONNECTOR, SIGLIP};
use siglip::{Connector, SiglipTower};

/// Patch convolution of a stage with its norm: before it, but after it in the first stage.
#[derive(Module, Debug)]
pub(crate) struct PatchEmbedding {
    proj: Conv2d,
    norm: LayerNorm,
    norm_first: bool,
}

impl PatchEmbedding {
    fn new(weights: &mut Weights, path: &str, stage: usize) -> Self {
        let (_, stride, padding) = patch_geometry(stage);
        Self {
            proj: Conv2d::new(weights, &format!("{path}.proj"), stride, padding),
            norm: LayerNorm::new(weights, &format!("{path}.norm")),
            norm_first: stage > 0,
        }
    }

    /// # Shapes
    /// `[B, H, W, C] -> [B, H', W', C']`
    pub(crate) fn forward(&self, x_BHWC: Tensor<4>) -> Tensor<4> {
        if self.norm_first {
            self.proj.forward(self.norm.forward(x_BHWC))
        } else {
            self.norm.forward(self.proj.forward(x_BHWC))
        }
    }
}

/// A spatial block followed by a channel block.
#[derive(Module, Debug)]
pub(crate) struct BlockPair {
    pub(crate) spatial_block: SpatialBlock,
    pub(crate) channel_block: ChannelBlock,
}

/// The four stages of the tower.
#[derive(Module, Debug)]
pub(crate) struct VisionTower {
    pub(crate) convs: Vec<PatchEmbedding>,
    pub(crate) blocks: Vec<Vec<BlockPair>>,
}

/// Which residual branches of a sample survive stochastic depth, already divided by the
/// probability to survive; `[B, 2 * blocks]`.
#[derive(Clone, Debug)]
pub(crate) struct DepthKeep(pub(crate) Tensor<2>);

/// The two columns of one block.
#[derive(Clone, Debug)]
pub(crate) struct BranchKeep {
    keep: Option<(Tensor<2>, usize)>,
}

impl BranchKeep {
    /// Every branch stays.
    pub(crate) const ALL: Self = Self { keep: None };

    /// Scales the attention branch (0) or the feed-forward branch (1).
    fn apply(&self, branch: usize, x_BHWC: Tensor<4>) -> Tensor<4> {
        match &self.keep {
            None => x_BHWC,
            Some((keep, block)) => {
                let column = keep.clone().narrow(1, 2 * block + branch, 1);
                let column = like(column, &x_BHWC);
                x_BHWC * column.unsqueeze_dims::<4>(&[2, 3])
            }
        }
    }
}

impl VisionTower {
    pub(crate) fn new(weights: &mut Weights, config: &VisionConfig) -> Self {
        let tower = "vlm.vision_tower";
        let stages = 0..config.dims.len();
        Self {
            convs: stages
                .clone()
                .map(|s| PatchEmbedding::new(weights, &format!("{tower}.convs.{s}"), s))
                .collect(),
            blocks: stages
                .map(|s| {
                    (0..config.depths[s])
                        .map(|pair| {
                            let path = format!("{tower}.blocks.{s}.{pair}");
                            BlockPair {
                                spatial_block: SpatialBlock::new(weights, &path, config, s),
                                channel_block: ChannelBlock::new(weights, &path, config, s),
                            }
                        })
                        .collect()
                })
                .collect(),
        }
    }

    /// Returns the number of the first block of a stage.
    pub(crate) fn first_block(&self, stage: usize) -> usize {
        2 * self.blocks[..stage].iter().map(Vec::len).sum::<usize>()
    }

    /// Runs some of the blocks, counted through all stages; the patch convolution of a stage
    /// belongs to its first block.
    ///
    /// # Shapes
    /// `[B, H, W, C] -> [B, H', W', C']`
    pub(crate) fn run_blocks(
        &self,
        mut x_BHWC: Tensor<4>,
        keep: Option<&DepthKeep>,
        range: Range<usize>,
    ) -> Tensor<4> {
        let mut block = 0;
        for (conv, pairs) in self.convs.iter().zip(&self.blocks) {
            if range.contains(&block) {
                x_BHWC = conv.forward(x_BHWC);
            }
            for pair in pairs {
                let keep = |block| BranchKeep {
                    keep: keep.map(|keep| (keep.0.clone(), block)),
                };
                if range.contains(&block) {
                    x_BHWC = pair.spatial_block.forward(x_BHWC, &keep(block));
                }
                if range.contains(&(block + 1)) {
                    x_BHWC = pair.channel_block.forward(x_BHWC, &keep(block + 1));
                }
                block += 2;
            }
        }
        x_BHWC
    }
}

/// The image tower of either kind.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "a model has one of them")]
pub(crate) enum ImageTower {
    Davit(VisionTower),
    Siglip(SiglipTower),
}

impl ImageTower {
    pub(crate) fn new(weights: &mut Weights, config: &VisionConfig) -> Self {
        match &config.siglip {
            Some(siglip) => Self::Siglip(SiglipTower::new(weights, config, siglip)),
            None => Self::Davit(VisionTower::new(weights, config)),
        }
    }

    pub(crate) fn num_stages(&self) -> usize {
        match self {
            Self::Davit(tower) => tower.blocks.len(),
            Self::Siglip(_) => 1,
        }
    }

    /// Returns the number of the first block of a stage, or of all blocks for the stage behind
    /// the last.
    pub(crate) fn first_block(&self, stage: usize) -> usize {
        match self {
            Self::Davit(tower) => tower.first_block(stage),
            Self::Siglip(tower) => stage * tower.layers.len(),
        }
    }

    pub(crate) fn num_blocks(&self) -> usize {
        self.first_block(self.num_stages())
    }

    /// Runs some of the blocks; SigLIP has no stochastic depth.
    ///
    /// # Shapes
    /// `[B, H, W, C] -> [B, H', W', C']`
    pub(crate) fn run_blocks(
        &self,
        x_BHWC: Tensor<4>,
        keep: Option<&DepthKeep>,
        range: Range<usize>,
    ) -> Tensor<4> {
        match self {
            Self::Davit(tower) => tower.run_blocks(x_BHWC, keep, range),
            Self::Siglip(tower) => tower.run_layers(x_BHWC, range),
        }
    }

    /// # Shapes
    /// `[B, 3, S, S] -> [B, H, W, C]`
    pub(crate) fn forward(&self, images: Tensor<4>, keep: Option<&DepthKeep>) -> Tensor<4> {
        self.run_blocks(channels_last(images), keep, 0..self.num_blocks())
    }
}

/// From a feature map to tokens, for either kind of tower.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "a model has one of them")]
pub(crate) enum Projection {
    Florence(ImageProjection),
    Connector(Connector),
}

impl Projection {
    pub(crate) fn new(weights: &mut Weights, config: &VisionConfig) -> Self {
        match &config.siglip {
            Some(siglip) => Self::Connector(Connector::new(weights, siglip.pixel_shuffle)),
            None => Self::Florence(ImageProjection::new(weights)),
        }
    }

    /// # Shapes
    /// `[B, H, W, C] -> [B, tokens, D]`
    pub(crate) fn forward(&self, x_BHWC: Tensor<4>) -> Tensor<3> {
        match self {
            Self::Florence(projection) => projection.forward(x_BHWC),
            Self::Connector(connector) => connector.forward(x_BHWC),
        }
    }
}

/// `[B, C, H, W] -> [B, H, W, C]`
pub(crate) fn channels_last(images: Tensor<4>) -> Tensor<4> {
    images.permute([0, 2, 3, 1])
}

/// Learned positions of rows and columns.
#[derive(Module, Debug)]
pub(crate) struct ImagePositions {
    rows: Embedding,
    columns: Embedding,
}

/// Projects a feature map to tokens: positions, the mean and all cells, a linear map, a norm.
#[derive(Module, Debug)]
pub(crate) struct ImageProjection {
    /// `[C, D]`, unlike other linear layers.
    linear: Param<Tensor<2>>,
    norm: LayerNorm,
    positions: ImagePositions,
}

impl ImageProjection {
    pub(crate) fn new(weights: &mut Weights) -> Self {
        let positions = "vlm.image_pos_embed";
        Self {
            linear: weights.param("vlm.image_projection"),
            norm: LayerNorm::new(weights, "vlm.image_proj_norm"),
            positions: ImagePositions {
                rows: Embedding::new(weights, &format!("{positions}.row_embeddings")),
                columns: Embedding::new(weights, &format!("{positions}.column_embeddings")),
            },
        }
    }

    /// # Shapes
    /// `[B, H, W, C] -> [B, 1 + H * W, D]`
    pub(crate) fn forward(&self, x_BHWC: Tensor<4>) -> Tensor<3> {
        let [batch, height, width, channels] = x_BHWC.dims();
        let half = channels / 2;
        let columns = self.positions.columns.rows(0, width);
        let rows = self.positions.rows.rows(0, height);
        let positions_HWC = Tensor::cat(
            vec![
                columns.unsqueeze_dim::<3>(0).expand([height, width, half]),
                rows.unsqueeze_dim::<3>(1).expand([height, width, half]),
            ],
            2,
        );
        let positions_HWC = like(positions_HWC, &x_BHWC);
        let frame = like(frame_position(channels, &self.device()), &x_BHWC);
        let x_BHWC = x_BHWC + positions_HWC.unsqueeze() + frame;
        let cells_BNC = x_BHWC.reshape([batch, height * width, channels]);
        let tokens = Tensor::cat(vec![cells_BNC.clone().mean_dim(1), cells_BNC], 1);
        let weight = like(self.linear.val(), &tokens);
        let projected = linear(tokens, weight, None);
        self.norm.forward(projected)
    }

    fn device(&self) -> Device {
        self.linear.val().device()
    }
}

/// Row 0 of the table of frame positions: sines (0) and cosines (1) in turn, `[1, 1, 1, C]`.
pub(crate) fn frame_position(channels: usize, device: &Device) -> Tensor<4> {
    let row: Vec<f32> = (0..channels).map(|c| (c % 2) as f32).collect();
    Tensor::from_data(TensorData::new(row, [1, 1, 1, channels]), device)
}

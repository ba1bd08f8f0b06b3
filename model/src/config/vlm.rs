//! Sizes of the vision-language model: `[model.vision]` and `[model.language]`.

use serde::{Deserialize, Serialize};

use super::probability;

/// Rows of each of the two image position tables.
pub(crate) const IMAGE_POSITIONS: usize = 50;
/// The first text position is row 2 of the position table.
pub(crate) const POSITION_OFFSET: usize = 2;
/// SigLIP in place of DaViT, with the connector that joins squares of patches to one token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiglipConfig {
    /// Side of a patch, in pixels.
    pub patch: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Side of the square of patches that becomes one token.
    pub pixel_shuffle: usize,
    /// Added to the variance in norms.
    pub norm_eps: f64,
}

/// A LLaMA-type decoder in place of BART's encoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecoderConfig {
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Base of the rotary positions.
    pub rope_theta: f64,
    /// Added to the mean square in norms.
    pub norm_eps: f64,
    /// Share of the layers, the last ones, that intermediate fusion drops.
    pub dropped_share: f64,
}

/// The image tower: DaViT, whose first stage has a 7x7 patch convolution of stride 4 and the others
/// one of 3x3 and stride 2; or SigLIP as one stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VisionConfig {
    /// Side of the square input, in pixels.
    pub image_size: usize,
    /// Channels of each stage.
    pub dims: Vec<usize>,
    /// Heads of the window attention of each stage.
    pub heads: Vec<usize>,
    /// Groups of the channel attention of each stage; none with SigLIP.
    #[serde(default)]
    pub groups: Vec<usize>,
    /// Pairs of a spatial and a channel block in each stage; layers of SigLIP.
    pub depths: Vec<usize>,
    /// Side of an attention window, in cells; 0 with SigLIP.
    #[serde(default)]
    pub window: usize,
    /// Highest probability to drop a residual branch; it grows linearly from 0 with the depth.
    pub stochastic_depth: f64,
    /// SigLIP in place of DaViT.
    #[serde(default)]
    pub siglip: Option<SiglipConfig>,
}

/// The text encoder (BART, or a LLaMA-type decoder).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LanguageConfig {
    /// Width of the tokens.
    pub width: usize,
    /// Encoder layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Rows of the token table, the one of the prompt token (the last) included.
    pub vocab_size: usize,
    /// Longest joined sequence.
    pub max_positions: usize,
    /// Dropout of embeddings, attention and feed-forward layers; 0 with a LLaMA-type decoder.
    pub dropout: f64,
    /// A LLaMA-type decoder in place of BART.
    #[serde(default)]
    pub decoder: Option<DecoderConfig>,
}

impl VisionConfig {
    /// Returns the side of the last feature map, in cells.
    pub fn grid(&self) -> usize {
        if let Some(siglip) = &self.siglip {
            return self.image_size / siglip.patch;
        }
        (0..self.dims.len()).fold(self.image_size, |side, stage| {
            let (kernel, stride, padding) = patch_geometry(stage);
            (side + 2 * padding).saturating_sub(kernel) / stride + 1
        })
    }

    /// Returns the tokens of one image: the mean and every cell, or the squares of the connector.
    pub fn num_tokens(&self) -> usize {
        match &self.siglip {
            Some(siglip) => (self.grid() / siglip.pixel_shuffle).pow(2),
            None => 1 + self.grid() * self.grid(),
        }
    }

    /// Returns the number of blocks, spatial and channel ones.
    pub fn num_blocks(&self) -> usize {
        2 * self.depths.iter().sum::<usize>()
    }

    fn siglip_faults(&self, siglip: &SiglipConfig, faults: &mut Vec<String>) {
        let one = self.dims.len() == 1 && self.heads.len() == 1 && self.depths.len() == 1;
        if !one || !self.groups.is_empty() || self.window != 0 || self.stochastic_depth != 0.0 {
            faults.push(
                "vision.siglip: give vision.dims, heads and depths one entry each, and neither \
                 groups, window nor stochastic_depth"
                    .into(),
            );
            return;
        }
        let (dim, heads) = (self.dims[0], self.heads[0]);
        if heads == 0 || dim == 0 || dim % heads != 0 || self.depths[0] == 0 || siglip.ffn == 0 {
            faults.push(format!(
                "vision.dims[0] = {dim} must be a multiple of vision.heads[0] = {heads}, and \
                 vision.depths[0] and vision.siglip.ffn positive"
            ));
        }
        let square = siglip.patch * siglip.pixel_shuffle;
        if square == 0 || self.image_size == 0 || !self.image_size.is_multiple_of(square) {
            faults.push(format!(
                "vision.image_size = {} must be a multiple of {square} pixels, vision.siglip.patch x \
                 pixel_shuffle",
                self.image_size
            ));
        }
    }

    pub(super) fn faults(&self, faults: &mut Vec<String>) {
        if let Some(siglip) = &self.siglip {
            return self.siglip_faults(siglip, faults);
        }
        let stages = self.dims.len();
        if stages == 0
            || [&self.heads, &self.groups, &self.depths]
                .iter()
                .any(|v| v.len() != stages)
        {
            faults.push(
                "vision.dims, heads, groups and depths need one entry per stage, at least one"
                    .into(),
            );
            return;
        }
        for (stage, &dim) in self.dims.iter().enumerate() {
            for (key, parts) in [("heads", self.heads[stage]), ("groups", self.groups[stage])] {
                if parts == 0 || dim % parts != 0 {
                    faults.push(format!(
                        "vision.dims[{stage}] = {dim} is not a multiple of vision.{key}[{stage}] = {parts}"
                    ));
                }
            }
            if dim == 0 || self.depths[stage] == 0 {
                faults.push(format!(
                    "vision.dims[{stage}] and depths[{stage}] must be positive"
                ));
            }
        }
        if !self.dims[stages - 1].is_multiple_of(2) {
            faults.push(
                "the last of vision.dims must be even: half for rows, half for columns".into(),
            );
        }
        if self.window == 0 || self.image_size == 0 {
            faults.push("vision.window and vision.image_size must be positive".into());
        } else if self.grid() > IMAGE_POSITIONS {
            faults.push(format!(
                "vision.image_size = {} gives {} cells a side, above {IMAGE_POSITIONS}",
                self.image_size,
                self.grid()
            ));
        }
        probability("vision.stochastic_depth", self.stochastic_depth, faults);
    }
}

impl LanguageConfig {
    pub(super) fn faults(&self, faults: &mut Vec<String>) {
        if self.heads == 0 || self.width == 0 {
            faults.push("language.width and language.heads must be positive".into());
        } else if self.decoder.is_none() && !self.width.is_multiple_of(self.heads) {
            faults.push(format!(
                "language.width = {} must be a multiple of language.heads = {}",
                self.width, self.heads
            ));
        }
        if self.layers == 0 || self.ffn == 0 {
            faults.push("language.layers and language.ffn must be positive".into());
        }
        if self.vocab_size < 2 {
            faults.push("language.vocab_size must hold the prompt token and one more".into());
        }
        probability("language.dropout", self.dropout, faults);
        let Some(decoder) = &self.decoder else {
            return;
        };
        if decoder.kv_heads == 0 || !self.heads.is_multiple_of(decoder.kv_heads) {
            faults.push(format!(
                "language.heads = {} must be a multiple of language.decoder.kv_heads = {}",
                self.heads, decoder.kv_heads
            ));
        }
        if decoder.head_dim == 0 || !decoder.head_dim.is_multiple_of(2) {
            faults.push("language.decoder.head_dim must be even".into());
        }
        if self.dropout != 0.0 {
            faults.push("language.dropout: a LLaMA-type decoder has none, set it to 0".into());
        }
        let share = decoder.dropped_share;
        probability("language.decoder.dropped_share", share, faults);
    }
}

/// Returns kernel, stride and padding of a stage's patch convolution.
pub(crate) fn patch_geometry(stage: usize) -> (usize, usize, usize) {
    if stage == 0 { (7, 4, 3) } else { (3, 2, 1) }
}

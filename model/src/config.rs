//! Sizes and switches of FLOWER: the `[model]` table of a recipe.

use std::collections::BTreeSet;

use burn::tensor::Device;
use pollen_core::{ActionSpace, Seed};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::flower::Flower;
use crate::init;
use crate::parameters::ParameterTable;
use crate::weights::Weights;

/// Width of the sinusoids of time and frequency.
pub(crate) const SINUSOID_WIDTH: usize = 256;
/// Rows of each of the two image position tables.
pub(crate) const IMAGE_POSITIONS: usize = 50;
/// The first text position is row 2 of the position table.
pub(crate) const POSITION_OFFSET: usize = 2;

/// Order of the joined sequence that the text encoder reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenOrder {
    /// Prompt vector, image tokens, text: the order of pretraining.
    FlowImagesText,
    /// Image tokens, prompt vector, text: the order of finetuning.
    ImagesFlowText,
}

/// Which positions the text encoder may attend to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EncoderMask {
    /// The prompt vector, padding and absent cameras are hidden: pretraining.
    TextAndFlow,
    /// Everything is attended, padding too: finetuning.
    None,
}

/// What the context mask does in the cross-attention of the flow transformer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CrossAttentionMask {
    /// Its 0 and 1 are added to the logits, as the pretrained weights expect.
    Additive,
    /// Where it is 0 a position is not attended.
    Boolean,
    /// It is ignored.
    None,
}

/// A part of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// The image tower.
    Vision,
    /// The text encoder.
    Language,
    /// The flow transformer.
    Flow,
}

/// The normalisation without mean subtraction that the flow transformer uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormVariant {
    /// Divided by the root of the mean square.
    Rms,
    /// Divided by the root of the unbiased variance, as early releases of timm did.
    Variance,
}

/// How the conditioning vector reaches the blocks of the flow transformer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModulationKind {
    /// Global-AdaLN: one large matrix per action space that all blocks share, and a matrix of low
    /// rank in each block.
    #[default]
    GlobalAdaln,
    /// AdaLN-Zero: each block has a large matrix of its own, zero at first, for all action spaces.
    AdalnZero,
}

/// The image tower (DaViT). The first stage has a 7x7 patch convolution of stride 4, the others
/// 3x3 of stride 2.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VisionConfig {
    /// Side of the square input, in pixels.
    pub image_size: usize,
    /// Channels of each stage.
    pub dims: Vec<usize>,
    /// Heads of the window attention of each stage.
    pub heads: Vec<usize>,
    /// Groups of the channel attention of each stage.
    pub groups: Vec<usize>,
    /// Pairs of a spatial and a channel block in each stage.
    pub depths: Vec<usize>,
    /// Side of an attention window, in cells.
    pub window: usize,
    /// Highest probability to drop a residual branch; it grows linearly from 0 with the depth.
    pub stochastic_depth: f64,
}

/// The text encoder (BART).
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
    /// Dropout of embeddings, attention and feed-forward layers.
    pub dropout: f64,
}

/// The flow transformer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlowConfig {
    /// Width of the action tokens.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Blocks.
    pub layers: usize,
    /// How the conditioning vector reaches the blocks.
    #[serde(default)]
    pub modulation: ModulationKind,
    /// Rank of each block's own modulation in Global-AdaLN.
    pub modulation_rank: usize,
    /// Base of the rotary positions.
    pub rope_theta: f64,
    /// Rows of the rotary tables: the longest action chunk.
    pub rope_table_len: usize,
    /// Steps of an action chunk.
    pub action_horizon: usize,
    /// Dropout of attention probabilities.
    pub dropout_attention: f64,
    /// Dropout after each attention.
    pub dropout_residual: f64,
    /// Dropout inside the gated feed-forward layer.
    pub dropout_mlp: f64,
    /// Dropout inside the proprioception encoders.
    pub dropout_proprio: f64,
    /// Normalisation of tokens, queries, keys and context.
    pub norm: NormVariant,
}

/// All sizes and switches of the model; the action spaces come with the data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlowerConfig {
    /// Cameras of an observation.
    pub num_cameras: usize,
    /// Order of the joined sequence.
    pub token_order: TokenOrder,
    /// Mask of the text encoder.
    pub encoder_mask: EncoderMask,
    /// Mask of the cross-attention.
    pub cross_attention_mask: CrossAttentionMask,
    /// Dropout of the context tokens.
    pub token_dropout: f64,
    /// Whether the policy sees the proprioception of the action spaces that declare some.
    #[serde(default = "yes")]
    pub proprioception: bool,
    /// Parameters whose canonical names start with one of these keep their values: they get no
    /// gradient and no optimizer state. With `vlm.` the whole vision-language model is frozen and
    /// runs without its own dropout.
    #[serde(default)]
    pub frozen: Vec<String>,
    /// Parts of which training keeps no activations but the inputs of each block, and computes
    /// the others once more in the backward pass: the same bits in less memory and more time.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub recompute: BTreeSet<Part>,
    /// The image tower.
    pub vision: VisionConfig,
    /// The text encoder.
    pub language: LanguageConfig,
    /// The flow transformer.
    pub flow: FlowConfig,
}

fn yes() -> bool {
    true
}

impl VisionConfig {
    /// Returns the side of the last feature map, in cells.
    pub fn grid(&self) -> usize {
        (0..self.dims.len()).fold(self.image_size, |side, stage| {
            let (kernel, stride, padding) = patch_geometry(stage);
            (side + 2 * padding).saturating_sub(kernel) / stride + 1
        })
    }

    /// Returns the tokens of one image: the mean and every cell.
    pub fn num_tokens(&self) -> usize {
        1 + self.grid() * self.grid()
    }

    /// Returns the number of blocks, spatial and channel ones.
    pub fn num_blocks(&self) -> usize {
        2 * self.depths.iter().sum::<usize>()
    }

    fn faults(&self, faults: &mut Vec<String>) {
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

impl FlowConfig {
    /// Returns the width of a head.
    pub(crate) fn head_dim(&self) -> usize {
        self.width / self.heads
    }

    /// Returns the hidden width of the gated feed-forward layer.
    pub(crate) fn hidden(&self) -> usize {
        (2 * 4 * self.width / 3).next_multiple_of(256)
    }

    fn faults(&self, faults: &mut Vec<String>) {
        if self.heads == 0 || !self.width.is_multiple_of(2 * self.heads.max(1)) || self.width == 0 {
            faults.push(format!(
                "flow.width = {} must be an even multiple of flow.heads = {}",
                self.width, self.heads
            ));
        }
        if self.layers == 0 || self.modulation_rank == 0 {
            faults.push("flow.layers and flow.modulation_rank must be positive".into());
        }
        if self.action_horizon == 0 || self.action_horizon > self.rope_table_len {
            faults.push(format!(
                "flow.action_horizon = {} must be between 1 and flow.rope_table_len = {}",
                self.action_horizon, self.rope_table_len
            ));
        }
        if !self.rope_theta.is_finite() || self.rope_theta <= 1.0 {
            faults.push(format!(
                "flow.rope_theta = {} must be above 1",
                self.rope_theta
            ));
        }
        for (key, p) in [
            ("flow.dropout_attention", self.dropout_attention),
            ("flow.dropout_residual", self.dropout_residual),
            ("flow.dropout_mlp", self.dropout_mlp),
            ("flow.dropout_proprio", self.dropout_proprio),
        ] {
            probability(key, p, faults);
        }
    }
}

fn probability(key: &str, value: f64, faults: &mut Vec<String>) {
    if !(0.0..1.0).contains(&value) {
        faults.push(format!("{key} = {value} must be at least 0 and below 1"));
    }
}

/// Returns kernel, stride and padding of a stage's patch convolution.
pub(crate) fn patch_geometry(stage: usize) -> (usize, usize, usize) {
    if stage == 0 { (7, 4, 3) } else { (3, 2, 1) }
}

impl FlowerConfig {
    /// Returns every fault of the configuration; empty when it can be built.
    pub fn validate(&self) -> Vec<String> {
        let mut faults = Vec::new();
        self.vision.faults(&mut faults);
        let language = &self.language;
        if language.heads == 0
            || language.width == 0
            || !language.width.is_multiple_of(language.heads.max(1))
        {
            faults.push(format!(
                "language.width = {} must be a multiple of language.heads = {}",
                language.width, language.heads
            ));
        }
        if language.layers == 0 || language.ffn == 0 {
            faults.push("language.layers and language.ffn must be positive".into());
        }
        if language.vocab_size < 2 {
            faults.push("language.vocab_size must hold the prompt token and one more".into());
        }
        probability("language.dropout", language.dropout, &mut faults);
        self.flow.faults(&mut faults);
        if self.num_cameras == 0 {
            faults.push("num_cameras must be positive".into());
        }
        probability("token_dropout", self.token_dropout, &mut faults);
        if faults.is_empty() && self.context_len(1) > language.max_positions {
            faults.push(format!(
                "language.max_positions = {} is below the {} positions of {} camera(s), the prompt vector and one word",
                language.max_positions,
                self.context_len(1),
                self.num_cameras
            ));
        }
        faults
    }

    /// Returns whether no parameter of the vision-language model is trained.
    pub(crate) fn vlm_frozen(&self) -> bool {
        let whole = |prefix: &String| "vlm.".starts_with(prefix.as_str());
        self.frozen.iter().any(whole)
    }

    /// Returns the length of the joined sequence for `text_len` text tokens.
    pub fn context_len(&self, text_len: usize) -> usize {
        self.num_cameras * self.vision.num_tokens() + 1 + text_len
    }

    /// Returns whether padding behind the text changes nothing, so that it can be left out: the
    /// encoder must not attend to it, and neither may the cross-attention. An additive mask leaves
    /// padding its share of the attention, and as every padded token has a position and an output
    /// of its own, no single key could stand for them.
    pub fn ignores_padding(&self) -> bool {
        self.encoder_mask == EncoderMask::TextAndFlow
            && self.cross_attention_mask == CrossAttentionMask::Boolean
    }

    /// Returns the number of columns of [`TrainMasks::depth_keep`](crate::TrainMasks): one per
    /// camera, block and residual branch, the last running fastest.
    pub fn num_depth_blocks(&self) -> usize {
        2 * self.num_cameras * self.vision.num_blocks()
    }

    /// Returns the probability that each column of the depth mask drops its branch.
    pub fn depth_drop_rates(&self) -> Vec<f64> {
        let blocks = self.vision.num_blocks();
        let step = self.vision.stochastic_depth / blocks.saturating_sub(1).max(1) as f64;
        (0..self.num_depth_blocks())
            .map(|column| (column / 2 % blocks) as f64 * step)
            .collect()
    }

    /// Returns the names, shapes and sizes of all parameters, without allocating any of them.
    pub fn parameter_table(&self, spaces: &[ActionSpace]) -> Result<ParameterTable, Error> {
        self.check(spaces)?;
        let table = ParameterTable::new(self, spaces);
        let unknown = |prefix: &&String| !table.iter().any(|spec| spec.name.starts_with(*prefix));
        let mut faults: Vec<String> = self
            .frozen
            .iter()
            .filter(unknown)
            .map(|prefix| {
                format!(
                    "frozen = \"{prefix}\" is the beginning of no parameter's name; `pollen model \
                     describe` lists them"
                )
            })
            .collect();
        if !table.iter().any(|spec| spec.trained) {
            faults.push("frozen leaves no parameter to train".into());
        }
        if faults.is_empty() {
            Ok(table)
        } else {
            Err(Error::InvalidConfig { faults })
        }
    }

    /// Builds the model with random weights that depend on `seed` alone: every rank and backend
    /// gets the same ones.
    pub fn init(
        &self,
        spaces: &[ActionSpace],
        seed: Seed,
        device: &Device,
    ) -> Result<Flower, Error> {
        let table = self.parameter_table(spaces)?;
        let mut draw = |spec: &crate::ParameterSpec| init::draw(spec, &table, seed);
        let mut weights = Weights::new(&table, &mut draw, device);
        Ok(Flower::new(self, spaces, &mut weights))
    }

    fn check(&self, spaces: &[ActionSpace]) -> Result<(), Error> {
        let mut faults = self.validate();
        if spaces.is_empty() {
            faults.push("no action space is given; name at least one dataset".into());
        }
        for (i, space) in spaces.iter().enumerate() {
            faults.extend(space.faults());
            if spaces[..i].iter().any(|other| other.name == space.name) {
                faults.push(format!("action space `{}` is listed twice", space.name));
            }
        }
        if faults.is_empty() {
            Ok(())
        } else {
            Err(Error::InvalidConfig { faults })
        }
    }
}

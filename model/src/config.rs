//! Sizes and switches of FLOWER: the `[model]` table of a recipe.

mod vlm;

use std::collections::BTreeSet;

use burn::tensor::{DType, Device};
use pollen_core::{ActionSpace, Seed};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::flower::Flower;
use crate::init;
use crate::parameters::ParameterTable;
use crate::weights::Weights;
pub use vlm::{DecoderConfig, LanguageConfig, SiglipConfig, VisionConfig};
pub(crate) use vlm::{IMAGE_POSITIONS, POSITION_OFFSET, patch_geometry};

/// Width of the sinusoids of time and frequency.
pub(crate) const SINUSOID_WIDTH: usize = 256;

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

/// Element type that the model computes in; its parameters are f32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32-bit float.
    #[default]
    F32,
    /// 16-bit brain float, with norms, softmax, embeddings of time and loss in f32.
    Bf16,
}

impl Precision {
    /// Returns the element type of activations.
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }

    /// Returns the bytes of an activation.
    pub fn value_bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
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

/// Where the flow transformer takes its context from the vision-language model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fusion {
    /// From the middle: BART's encoder without its decoder, or the first layers of a decoder.
    #[default]
    Intermediate,
    /// Before the language layers: image tokens and words as they would enter the first one.
    Early,
    /// Behind all language layers: BART's encoder and decoder, or the whole decoder.
    Late,
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
    /// Where the flow transformer takes its context from the vision-language model.
    #[serde(default)]
    pub fusion: Fusion,
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

impl FlowerConfig {
    /// Returns every fault of the configuration; empty when it can be built.
    pub fn validate(&self) -> Vec<String> {
        let mut faults = Vec::new();
        self.vision.faults(&mut faults);
        self.language.faults(&mut faults);
        if self.language.decoder.is_some() != self.vision.siglip.is_some() {
            faults.push(
                "vision.siglip and language.decoder belong together: give both or neither".into(),
            );
        }
        self.flow.faults(&mut faults);
        if self.num_cameras == 0 {
            faults.push("num_cameras must be positive".into());
        }
        probability("token_dropout", self.token_dropout, &mut faults);
        let (language, length) = (&self.language, self.joined_len(1));
        if faults.is_empty() && length > language.max_positions {
            faults.push(format!(
                "language.max_positions = {} is below the {} positions of {} camera(s), the prompt vector and one word",
                language.max_positions,
                length,
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
    pub(crate) fn joined_len(&self, text_len: usize) -> usize {
        self.num_cameras * self.vision.num_tokens() + 1 + text_len
    }

    /// Returns the tokens of the context for `text_len` text tokens: the joined sequence, or the
    /// text alone where BART's decoder has read it.
    pub fn context_len(&self, text_len: usize) -> usize {
        if self.rereads_text() {
            text_len
        } else {
            self.joined_len(text_len)
        }
    }

    /// Returns whether BART's decoder reads the text behind the encoder.
    pub(crate) fn rereads_text(&self) -> bool {
        self.fusion == Fusion::Late && self.language.decoder.is_none()
    }

    /// Returns the text encoder with the layers that the fusion leaves.
    pub(crate) fn pruned_language(&self) -> LanguageConfig {
        let mut language = self.language.clone();
        let dropped = match (self.fusion, &language.decoder) {
            (Fusion::Early, _) => language.layers,
            (Fusion::Intermediate, Some(decoder)) => {
                (decoder.dropped_share * language.layers as f64) as usize
            }
            (Fusion::Intermediate, None) | (Fusion::Late, _) => 0,
        };
        language.layers -= dropped;
        language
    }

    /// Returns the same graph with every dropout rate at 0.
    #[must_use]
    pub fn without_dropout(&self) -> Self {
        let mut config = self.clone();
        config.token_dropout = 0.0;
        config.vision.stochastic_depth = 0.0;
        config.language.dropout = 0.0;
        config.flow.dropout_attention = 0.0;
        config.flow.dropout_residual = 0.0;
        config.flow.dropout_mlp = 0.0;
        config.flow.dropout_proprio = 0.0;
        config
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

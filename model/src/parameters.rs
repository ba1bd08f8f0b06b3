//! Names, shapes and initial distributions of all parameters, from the configuration alone.
//!
//! The modules take their shapes from this table, so what it counts is what is allocated.

use std::collections::BTreeMap;
use std::fmt;

use pollen_core::ActionSpace;

use crate::bart_decoder::DECODER;
use crate::config::{
    DecoderConfig, FlowConfig, FlowerConfig, Fusion, IMAGE_POSITIONS, LanguageConfig,
    ModulationKind, POSITION_OFFSET, SINUSOID_WIDTH, SiglipConfig, VisionConfig, patch_geometry,
};
use crate::llama::LLAMA;
use crate::vision::{CONNECTOR, SIGLIP};

/// Name of the token table.
pub const TOKEN_TABLE: &str = "vlm.language_model.model.shared.weight";
/// Name of the token table of a LLaMA-type decoder.
pub(crate) const LLAMA_TOKENS: &str = "vlm.text_model.embed_tokens.weight";
/// Name of the prompt vector, saved with the weights but not trained.
pub const PROMPT: &str = "prompt_embeds";
/// Name of the text encoder.
pub(crate) const ENCODER: &str = "vlm.language_model.model.encoder";
/// Standard deviation of the initial embeddings and of the encoders' linear layers.
const STD: f32 = 0.02;

/// How the first values of a parameter are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Init {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// Uniform in (-bound, bound).
    Uniform(f32),
    /// Normal with this standard deviation.
    Normal(f32),
    /// The mean row of the token table.
    MeanToken,
}

/// One parameter: its name, shape and first values.
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterSpec {
    /// Canonical name, as in published checkpoints.
    pub name: String,
    /// Shape, as in published checkpoints (`[out, in]` for linear layers).
    pub shape: Vec<usize>,
    /// Whether training changes it.
    pub trained: bool,
    /// How it starts.
    pub(crate) init: Init,
}

impl ParameterSpec {
    /// Returns the number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns whether it holds no value at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// All parameters of a model, sorted by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ParameterTable {
    specs: BTreeMap<String, ParameterSpec>,
}

impl ParameterTable {
    pub(crate) fn new(config: &FlowerConfig, spaces: &[ActionSpace]) -> Self {
        let mut table = Self::default();
        let language = config.pruned_language();
        match &config.vision.siglip {
            Some(siglip) => table.siglip(&config.vision, siglip, language.width),
            None => table.vision(&config.vision, language.width),
        }
        match &language.decoder {
            Some(decoder) => table.llama(&language, decoder, config.fusion == Fusion::Late),
            None => table.language(&language),
        }
        if config.rereads_text() {
            table.bart_decoder(&language);
        }
        table.add(PROMPT, &[1, 1, config.language.width], Init::MeanToken);
        table.freeze(PROMPT);
        table.flow(&config.flow, config.language.width, spaces);
        if !config.proprioception {
            table
                .specs
                .retain(|name, _| !name.starts_with("proprio_encoders."));
        }
        for prefix in &config.frozen {
            table.freeze(prefix);
        }
        table
    }

    /// Returns the parameters in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = &ParameterSpec> {
        self.specs.values()
    }

    /// Returns the parameter of that name.
    pub fn get(&self, name: &str) -> Option<&ParameterSpec> {
        self.specs.get(name)
    }

    /// Returns the token table, whose mean row is the first prompt vector; none in a table of parts.
    pub fn token_table(&self) -> Option<&ParameterSpec> {
        self.get(TOKEN_TABLE).or_else(|| self.get(LLAMA_TOKENS))
    }

    /// Returns the number of parameter values; the prompt vector is a constant and not counted.
    pub fn count(&self) -> usize {
        self.summary().iter().map(|(_, count)| count).sum()
    }

    /// Returns the number of parameter values of each module, in the order of their names.
    pub fn summary(&self) -> Vec<(String, usize)> {
        let mut modules: BTreeMap<String, usize> = BTreeMap::new();
        for spec in self.iter().filter(|spec| spec.name != PROMPT) {
            *modules.entry(module_of(&spec.name)).or_default() += spec.len();
        }
        modules.into_iter().collect()
    }

    fn add(&mut self, name: &str, shape: &[usize], init: Init) {
        let spec = ParameterSpec {
            name: name.into(),
            shape: shape.into(),
            trained: true,
            init,
        };
        let before = self.specs.insert(name.into(), spec);
        debug_assert!(before.is_none(), "{name} is listed twice");
    }

    fn freeze(&mut self, prefix: &str) {
        for spec in self.specs.values_mut() {
            if spec.name.starts_with(prefix) {
                spec.trained = false;
            }
        }
    }

    /// A linear layer of the encoders: normal weight, zero bias.
    fn normal(&mut self, path: &str, shape: &[usize]) {
        self.add(&format!("{path}.weight"), shape, Init::Normal(STD));
        self.add(&format!("{path}.bias"), &shape[..1], Init::Zeros);
    }

    /// A linear layer of the head: PyTorch's default.
    fn linear(&mut self, path: &str, outputs: usize, inputs: usize, bias: bool) {
        let init = Init::Uniform(1.0 / (inputs as f32).sqrt());
        self.add(&format!("{path}.weight"), &[outputs, inputs], init);
        if bias {
            self.add(&format!("{path}.bias"), &[outputs], init);
        }
    }

    fn layer_norm(&mut self, path: &str, width: usize) {
        self.add(&format!("{path}.weight"), &[width], Init::Ones);
        self.add(&format!("{path}.bias"), &[width], Init::Zeros);
    }

    fn rms_norm(&mut self, path: &str, width: usize) {
        self.add(&format!("{path}.weight"), &[width], Init::Ones);
    }

    /// Adds the image tower and the projection to `width`.
    pub(crate) fn vision(&mut self, config: &VisionConfig, width: usize) {
        let tower = "vlm.vision_tower";
        for (stage, &dim) in config.dims.iter().enumerate() {
            let (kernel, _, _) = patch_geometry(stage);
            let inputs = if stage == 0 {
                3
            } else {
                config.dims[stage - 1]
            };
            let conv = format!("{tower}.convs.{stage}");
            self.normal(&format!("{conv}.proj"), &[dim, inputs, kernel, kernel]);
            self.layer_norm(
                &format!("{conv}.norm"),
                if stage == 0 { dim } else { inputs },
            );
            for pair in 0..config.depths[stage] {
                for (block, attention) in [
                    ("spatial_block", "window_attn"),
                    ("channel_block", "channel_attn"),
                ] {
                    let path = format!("{tower}.blocks.{stage}.{pair}.{block}");
                    self.normal(&format!("{path}.conv1.fn.dw"), &[dim, 1, 3, 3]);
                    self.layer_norm(&format!("{path}.{attention}.norm"), dim);
                    self.normal(&format!("{path}.{attention}.fn.qkv"), &[3 * dim, dim]);
                    self.normal(&format!("{path}.{attention}.fn.proj"), &[dim, dim]);
                    self.normal(&format!("{path}.conv2.fn.dw"), &[dim, 1, 3, 3]);
                    self.layer_norm(&format!("{path}.ffn.norm"), dim);
                    self.normal(&format!("{path}.ffn.fn.net.fc1"), &[4 * dim, dim]);
                    self.normal(&format!("{path}.ffn.fn.net.fc2"), &[dim, 4 * dim]);
                }
            }
        }
        let last = config.dims[config.dims.len() - 1];
        self.add("vlm.image_projection", &[last, width], Init::Normal(STD));
        self.layer_norm("vlm.image_proj_norm", width);
        for table in ["row", "column"] {
            let name = format!("vlm.image_pos_embed.{table}_embeddings.weight");
            self.add(&name, &[IMAGE_POSITIONS, last / 2], Init::Normal(STD));
        }
    }

    /// Adds the token table and the text encoder.
    pub(crate) fn language(&mut self, config: &LanguageConfig) {
        let width = config.width;
        self.add(TOKEN_TABLE, &[config.vocab_size, width], Init::Normal(STD));
        let positions = [config.max_positions + POSITION_OFFSET, width];
        let name = format!("{ENCODER}.embed_positions.weight");
        self.add(&name, &positions, Init::Normal(STD));
        self.layer_norm(&format!("{ENCODER}.layernorm_embedding"), width);
        for layer in 0..config.layers {
            let path = format!("{ENCODER}.layers.{layer}");
            for part in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                self.normal(&format!("{path}.self_attn.{part}"), &[width, width]);
            }
            self.layer_norm(&format!("{path}.self_attn_layer_norm"), width);
            self.normal(&format!("{path}.fc1"), &[config.ffn, width]);
            self.normal(&format!("{path}.fc2"), &[width, config.ffn]);
            self.layer_norm(&format!("{path}.final_layer_norm"), width);
        }
    }

    /// Adds BART's decoder.
    pub(crate) fn bart_decoder(&mut self, config: &LanguageConfig) {
        let width = config.width;
        let positions = [config.max_positions + POSITION_OFFSET, width];
        let name = format!("{DECODER}.embed_positions.weight");
        self.add(&name, &positions, Init::Normal(STD));
        self.layer_norm(&format!("{DECODER}.layernorm_embedding"), width);
        for layer in 0..config.layers {
            let path = format!("{DECODER}.layers.{layer}");
            for attention in ["self_attn", "encoder_attn"] {
                for part in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                    self.normal(&format!("{path}.{attention}.{part}"), &[width, width]);
                }
                self.layer_norm(&format!("{path}.{attention}_layer_norm"), width);
            }
            self.normal(&format!("{path}.fc1"), &[config.ffn, width]);
            self.normal(&format!("{path}.fc2"), &[width, config.ffn]);
            self.layer_norm(&format!("{path}.final_layer_norm"), width);
        }
    }

    /// Adds SigLIP and the connector to `width`.
    pub(crate) fn siglip(&mut self, config: &VisionConfig, siglip: &SiglipConfig, width: usize) {
        let (dim, patch) = (config.dims[0], siglip.patch);
        let embeddings = format!("{SIGLIP}.embeddings");
        self.normal(
            &format!("{embeddings}.patch_embedding"),
            &[dim, 3, patch, patch],
        );
        let positions = [config.grid() * config.grid(), dim];
        let name = format!("{embeddings}.position_embedding.weight");
        self.add(&name, &positions, Init::Normal(STD));
        for layer in 0..config.depths[0] {
            let path = format!("{SIGLIP}.encoder.layers.{layer}");
            for part in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                self.normal(&format!("{path}.self_attn.{part}"), &[dim, dim]);
            }
            self.normal(&format!("{path}.mlp.fc1"), &[siglip.ffn, dim]);
            self.normal(&format!("{path}.mlp.fc2"), &[dim, siglip.ffn]);
            self.layer_norm(&format!("{path}.layer_norm1"), dim);
            self.layer_norm(&format!("{path}.layer_norm2"), dim);
        }
        self.layer_norm(&format!("{SIGLIP}.post_layernorm"), dim);
        let inputs = dim * siglip.pixel_shuffle * siglip.pixel_shuffle;
        self.add(
            &format!("{CONNECTOR}.weight"),
            &[width, inputs],
            Init::Normal(STD),
        );
    }

    /// Adds a LLaMA-type decoder; `whole`: with the norm behind its last layer.
    pub(crate) fn llama(&mut self, config: &LanguageConfig, decoder: &DecoderConfig, whole: bool) {
        let width = config.width;
        self.add(LLAMA_TOKENS, &[config.vocab_size, width], Init::Normal(STD));
        let queries = config.heads * decoder.head_dim;
        let keys = decoder.kv_heads * decoder.head_dim;
        for layer in 0..config.layers {
            let path = format!("{LLAMA}.layers.{layer}");
            for (part, shape) in [
                ("self_attn.q_proj", [queries, width]),
                ("self_attn.k_proj", [keys, width]),
                ("self_attn.v_proj", [keys, width]),
                ("self_attn.o_proj", [width, queries]),
                ("mlp.gate_proj", [config.ffn, width]),
                ("mlp.up_proj", [config.ffn, width]),
                ("mlp.down_proj", [width, config.ffn]),
            ] {
                self.add(&format!("{path}.{part}.weight"), &shape, Init::Normal(STD));
            }
            self.rms_norm(&format!("{path}.input_layernorm"), width);
            self.rms_norm(&format!("{path}.post_attention_layernorm"), width);
        }
        if whole {
            self.rms_norm(&format!("{LLAMA}.norm"), width);
        }
    }

    /// Adds one block of the flow transformer under `path` (with its trailing dot, if any).
    pub(crate) fn flow_block(&mut self, config: &FlowConfig, path: &str) {
        let (width, head_dim, hidden) = (config.width, config.head_dim(), config.hidden());
        for norm in ["norm1", "norm2", "norm3"] {
            self.rms_norm(&format!("{path}{norm}"), width);
        }
        self.linear(&format!("{path}self_attn.qkv"), 3 * width, width, false);
        for part in ["q_proj", "k_proj", "v_proj"] {
            self.linear(&format!("{path}cross_attn.{part}"), width, width, false);
        }
        for attention in ["self_attn", "cross_attn"] {
            self.linear(&format!("{path}{attention}.proj"), width, width, false);
            self.rms_norm(&format!("{path}{attention}.q_norm"), head_dim);
            self.rms_norm(&format!("{path}{attention}.k_norm"), head_dim);
        }
        self.linear(&format!("{path}mlp.fc1"), hidden, width, false);
        self.linear(&format!("{path}mlp.fc2"), hidden, width, false);
        self.linear(&format!("{path}mlp.proj"), width, hidden, false);
        let modulation = format!("{path}adaLN_modulation");
        match config.modulation {
            ModulationKind::GlobalAdaln => {
                let rank = config.modulation_rank;
                self.linear(&format!("{modulation}.1"), rank, width, true);
                self.linear(&format!("{modulation}.2"), 6 * width, rank, true);
            }
            ModulationKind::AdalnZero => {
                let (weight, bias) = (
                    format!("{modulation}.1.weight"),
                    format!("{modulation}.1.bias"),
                );
                self.add(&weight, &[6 * width, width], Init::Zeros);
                self.add(&bias, &[6 * width], Init::Zeros);
            }
        }
    }

    /// Adds the flow transformer over a context of `context_width`.
    pub(crate) fn flow(
        &mut self,
        config: &FlowConfig,
        context_width: usize,
        spaces: &[ActionSpace],
    ) {
        let width = config.width;
        for layer in 0..config.layers {
            self.flow_block(config, &format!("dit.{layer}."));
        }
        for embedder in ["t_embedder", "frequency_embedder", "action_space_embedder"] {
            self.linear(&format!("{embedder}.mlp.0"), width, SINUSOID_WIDTH, true);
            self.linear(&format!("{embedder}.mlp.2"), width, width, true);
        }
        let embeddings = "action_space_embedder.action_embeddings";
        self.add(
            embeddings,
            &[spaces.len(), SINUSOID_WIDTH],
            Init::Normal(STD),
        );
        self.freeze("action_space_embedder");
        self.rms_norm("cond_norm", context_width);
        self.linear("cond_linear", width, context_width, false);
        for space in spaces {
            let name = &space.name;
            if config.modulation == ModulationKind::GlobalAdaln {
                self.add(
                    &format!("adaln.{name}.modCX.1.weight"),
                    &[9 * width, width],
                    Init::Zeros,
                );
            }
            self.linear(
                &format!("action_encoders.{name}.fc1"),
                width,
                space.dim(),
                true,
            );
            self.linear(&format!("action_encoders.{name}.fc2"), width, width, true);
            self.linear(&format!("action_decoders.{name}"), space.dim(), width, true);
            if space.proprio_dim > 0 {
                let path = format!("proprio_encoders.{name}");
                self.linear(&format!("{path}.fc1"), width, space.proprio_dim, true);
                self.linear(&format!("{path}.fc2"), width, width, true);
            }
        }
    }
}

/// Returns the module under which a parameter is counted.
fn module_of(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').collect();
    let depth = match parts[..] {
        ["vlm", "vision_tower", ..] => {
            return format!("vlm.vision_tower (stage {})", parts[3]);
        }
        ["vlm", "language_model", "model", "encoder" | "decoder", ..] => 5,
        ["vlm", "language_model", ..] => 4,
        ["vlm", "vision_model" | "text_model", ..] => 3,
        [
            "vlm" | "adaln" | "action_encoders" | "action_decoders" | "proprio_encoders",
            ..,
        ] => 2,
        _ => 1,
    };
    parts[..depth.min(parts.len())].join(".")
}

impl fmt::Display for ParameterTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (module, count) in self.summary() {
            writeln!(f, "{module:<50} {:>15}", grouped(count))?;
        }
        write!(f, "{:<50} {:>15}", "total", grouped(self.count()))
    }
}

/// Returns a number with a comma between thousands.
pub(crate) fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{flower_config, space};

    #[test]
    fn the_full_model_has_947_million_parameters() {
        let spaces = [
            space("joint_single", 8, 0),
            space("eef_delta", 7, 0),
            space("bimanual_nav", 16, 0),
        ];
        let table = flower_config("flower.toml")
            .parameter_table(&spaces)
            .expect("a valid configuration");
        assert_eq!(table.count(), 947_137_311);
        let count = |prefix: &str| -> usize {
            let parts = table.summary();
            parts
                .iter()
                .filter(|(m, _)| m.starts_with(prefix))
                .map(|(_, n)| n)
                .sum()
        };
        assert_eq!(count("vlm.vision_tower"), 360_632_320);
        assert_eq!(count("vlm."), 570_707_968);
        assert_eq!(count("dit"), 339_913_728);
        assert_eq!(count("adaln."), 28_311_552);
        assert!(table.to_string().ends_with("947,137,311"));
    }

    #[test]
    fn proprioception_adds_its_encoder() {
        let plain = [space("bimanual_nav", 16, 0)];
        let with = [space("bimanual_nav", 16, 16)];
        let config = flower_config("flower.toml");
        let count = |spaces: &[ActionSpace]| config.parameter_table(spaces).expect("valid").count();
        assert_eq!(count(&with) - count(&plain), 1_067_008);
    }

    #[test]
    fn the_decoder_only_model_has_the_sizes_of_smolvlm2() {
        let spaces = [space("eef_delta", 7, 0)];
        let mut config = flower_config("flower-smolvlm2.toml");
        let vlm = |config: &FlowerConfig| -> usize {
            let table = config.parameter_table(&spaces).expect("valid");
            let part = table.iter().filter(|spec| spec.name.starts_with("vlm."));
            part.map(ParameterSpec::len).sum()
        };
        let kept = vlm(&config);
        config.fusion = Fusion::Late;
        // Published with an output layer of the size of its token table.
        assert_eq!(vlm(&config) + 49_280 * 960, 507_482_304);
        // 9 of 32 layers and the last norm are dropped.
        assert_eq!(vlm(&config) - kept, 9 * 9_832_320 + 960);
    }

    #[test]
    fn the_tiny_model_is_tiny() {
        let spaces = [space("eef_delta", 7, 0)];
        let table = flower_config("flower-tiny.toml")
            .parameter_table(&spaces)
            .expect("a valid configuration");
        assert!((500_000..1_500_000).contains(&table.count()), "{table}");
    }
}

//! Writes a model's weights under the names that others know.

use std::collections::BTreeMap;

use pollen_model::{FlowerConfig, PROMPT, ParameterTable, TOKEN_TABLE};
use pollen_storage::Storage;
use safetensors::Dtype;

use crate::choices::Choices;
use crate::error::Result;
use crate::import::transpose;
use crate::initial::Initial;
use crate::names::to_transformers;
use crate::shards::{self, Planned, Values, Written};

/// Rows of the table of frame positions.
const FRAMES: usize = 100;

/// What is exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The whole model under the names of the FLOWER authors' code.
    Flower,
    /// The vision-language encoder as `transformers` has it, with its `config.json`.
    Vlm,
}

/// How it is exported.
#[derive(Clone, Copy, Debug)]
pub struct ExportOptions {
    /// Which part, in which names.
    pub what: What,
    /// Rounds parameters to bf16; tables stay f32.
    pub bf16: bool,
    /// Bytes of a shard, unless one tensor has more.
    pub shard_bytes: u64,
}

/// Where a tensor of an export comes from.
enum Part {
    Copy(String),
    /// The transpose of a tensor with this many rows.
    Transpose(String, usize),
    Computed(Vec<f32>),
}

/// Writes the weights of a model of `config` into a folder that holds none, one tensor in memory
/// at a time.
pub async fn export(
    weights: &Initial,
    config: &FlowerConfig,
    table: &ParameterTable,
    options: &ExportOptions,
    destination: &Storage,
) -> Result<Written> {
    shards::check_free(destination).await?;
    let mut sources = Sources {
        weights,
        planned: Vec::new(),
        parts: BTreeMap::new(),
        parameter: if options.bf16 {
            Dtype::BF16
        } else {
            Dtype::F32
        },
    };
    match options.what {
        What::Flower => sources.flower(config, table),
        What::Vlm => sources.vlm(config, table),
    }
    let planned = std::mem::take(&mut sources.planned);
    let choices = (options.what == What::Flower).then(|| Choices::of(config));
    let notes = serde_json::json!({ "choices": choices });
    if options.what == What::Flower {
        return shards::write(destination, planned, options.shard_bytes, &notes, &sources).await;
    }
    let json = format!("{:#}\n", transformers_config(config));
    destination.put("config.json", json.into()).await?;
    let written = shards::write(destination, planned, options.shard_bytes, &notes, &sources).await;
    if written.is_err() {
        // That it cannot be deleted is not the error to report.
        let _ = destination.delete("config.json").await;
    }
    written
}

struct Sources<'a> {
    weights: &'a Initial,
    planned: Vec<Planned>,
    parts: BTreeMap<String, Part>,
    parameter: Dtype,
}

impl Sources<'_> {
    fn flower(&mut self, config: &FlowerConfig, table: &ParameterTable) {
        for spec in table.iter() {
            self.copy(&spec.name, &spec.name, &spec.shape);
        }
        let tokens = [config.language.vocab_size, config.language.width];
        let tied = "vlm.language_model.model.encoder.embed_tokens.weight";
        self.copy(tied, TOKEN_TABLE, &tokens);
        let bias = "vlm.language_model.final_logits_bias";
        self.compute(bias, &[1, tokens[0]], vec![0.0; tokens[0]]);
        self.frames("vlm.visual_temporal_embed.pos_idx_to_embed", config);
        let flow = &config.flow;
        let (rows, columns) = (flow.rope_table_len, flow.width / flow.heads / 2);
        let (cos, sin) = pollen_model::rope_tables(flow.rope_theta, rows, 2 * columns);
        for layer in 0..flow.layers {
            for (kind, values) in [("cos", &cos), ("sin", &sin)] {
                let name = format!("dit.{layer}.self_attn.{kind}");
                self.compute(&name, &[rows, columns], values.clone());
            }
        }
    }

    fn vlm(&mut self, config: &FlowerConfig, table: &ParameterTable) {
        for spec in table.iter() {
            if let Some((name, transposed)) = to_transformers(&spec.name) {
                if transposed {
                    let shape: Vec<usize> = spec.shape.iter().rev().copied().collect();
                    let part = Part::Transpose(spec.name.clone(), spec.shape[0]);
                    self.add(&name, &shape, self.parameter, part);
                } else {
                    self.copy(&name, &spec.name, &spec.shape);
                }
            }
        }
        // No name of theirs; it says that the last row of the token table is the prompt token's.
        self.copy(PROMPT, PROMPT, &[1, 1, config.language.width]);
        let name = "model.multi_modal_projector.visual_temporal_embed.pos_idx_to_embed";
        self.frames(name, config);
    }

    fn copy(&mut self, name: &str, from: &str, shape: &[usize]) {
        self.add(name, shape, self.parameter, Part::Copy(from.into()));
    }

    fn compute(&mut self, name: &str, shape: &[usize], values: Vec<f32>) {
        self.add(name, shape, Dtype::F32, Part::Computed(values));
    }

    /// Sines of every frame position in even columns, cosines in odd ones.
    fn frames(&mut self, name: &str, config: &FlowerConfig) {
        let width = config.vision.dims[config.vision.dims.len() - 1];
        let values = (0..FRAMES * width)
            .map(|i| {
                let (frame, column) = (i / width, i % width);
                let rate = 10000_f64.powf(-2.0 * (column / 2) as f64 / width as f64);
                let angle = frame as f64 * rate;
                (if column % 2 == 0 {
                    angle.sin()
                } else {
                    angle.cos()
                }) as f32
            })
            .collect();
        self.compute(name, &[FRAMES, width], values);
    }

    fn add(&mut self, name: &str, shape: &[usize], dtype: Dtype, part: Part) {
        self.planned.push(Planned {
            name: name.into(),
            shape: shape.into(),
            dtype,
        });
        self.parts.insert(name.into(), part);
    }
}

impl Values for Sources<'_> {
    async fn values(&self, name: &str) -> Result<Vec<f32>> {
        match &self.parts[name] {
            Part::Copy(from) => self.weights.require(from).await,
            Part::Transpose(from, rows) => Ok(transpose(&self.weights.require(from).await?, *rows)),
            Part::Computed(values) => Ok(values.clone()),
        }
    }
}

/// Returns the configuration with which `transformers` opens the encoder. The decoder has no layers:
/// FLOWER does not have one.
fn transformers_config(config: &FlowerConfig) -> serde_json::Value {
    let (vision, language) = (&config.vision, &config.language);
    let stages = vision.dims.len();
    let per_stage = |first: usize, others: usize| -> Vec<usize> {
        (0..stages)
            .map(|stage| if stage == 0 { first } else { others })
            .collect()
    };
    let prenorm: Vec<bool> = (0..stages).map(|stage| stage > 0).collect();
    serde_json::json!({
        "architectures": ["Florence2ForConditionalGeneration"],
        "model_type": "florence2",
        "image_token_id": language.vocab_size - 1,
        "is_encoder_decoder": true,
        "tie_word_embeddings": true,
        "text_config": {
            "model_type": "bart",
            "activation_function": "gelu",
            "attention_dropout": language.dropout,
            "d_model": language.width,
            "decoder_attention_heads": language.heads,
            "decoder_ffn_dim": language.ffn,
            "decoder_layers": 0,
            "dropout": language.dropout,
            "activation_dropout": language.dropout,
            "encoder_attention_heads": language.heads,
            "encoder_ffn_dim": language.ffn,
            "encoder_layers": language.layers,
            "max_position_embeddings": language.max_positions,
            "scale_embedding": false,
            "vocab_size": language.vocab_size,
            "bos_token_id": 0,
            "pad_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
        "vision_config": {
            "model_type": "florence_vision",
            "activation_function": "gelu",
            "depths": vision.depths,
            "drop_path_rate": vision.stochastic_depth,
            "embed_dim": vision.dims,
            "in_channels": 3,
            "max_position_embeddings": 50,
            "max_temporal_embeddings": FRAMES,
            "mlp_ratio": 4.0,
            "num_groups": vision.groups,
            "num_heads": vision.heads,
            "patch_padding": per_stage(3, 1),
            "patch_prenorm": prenorm,
            "patch_size": per_stage(7, 3),
            "patch_stride": per_stage(4, 2),
            "projection_dim": language.width,
            "qkv_bias": true,
            "window_size": vision.window,
        },
    })
}

//! Whole imports of small models from files made here.

mod bad_input;
mod export_round_trip;
mod fusion;
mod sources;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use pollen_core::action_space::{ActionDim, Normalize};
use pollen_core::{ActionSpace, Seed, tensor_header};
use pollen_model::{CrossAttentionMask, FlowerConfig, NormVariant, PROMPT, TOKEN_TABLE};
use pollen_storage::{Silent, Storage, StorageConfig};
use safetensors::Dtype;
use tempfile::TempDir;

use crate::{Fit, FitOptions, Result, WeightFiles, Written, fit, import};

/// Tensors of a file by name: type, shape and values.
pub(super) type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<f32>)>;

/// Reads `configs/model/<name>`.
pub(super) fn published(name: &str) -> FlowerConfig {
    #[derive(serde::Deserialize)]
    struct File {
        model: FlowerConfig,
    }
    let path = format!("{}/../configs/model/{name}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).expect("part of the repository");
    toml::from_str::<File>(&text).expect("valid").model
}

/// A model that is small enough to be made for every test.
pub(super) fn config() -> FlowerConfig {
    let mut config = published("flower-tiny.toml");
    config.vision.dims = vec![4, 8];
    config.vision.heads = vec![1, 2];
    config.vision.groups = vec![2, 2];
    config.vision.depths = vec![1, 2];
    config.language.width = 16;
    config.language.heads = 2;
    config.language.layers = 1;
    config.language.ffn = 24;
    config.language.vocab_size = 20;
    config.language.max_positions = 64;
    config.flow.width = 24;
    config.flow.heads = 2;
    config.flow.modulation_rank = 4;
    config.vision.image_size = 32;
    config.num_cameras = 1;
    config
}

pub(super) fn spaces() -> Vec<ActionSpace> {
    let space = |name: &str, dim: usize, proprio_dim| ActionSpace {
        name: name.into(),
        prompt: name.into(),
        num_arms: 1,
        proprio_dim,
        dims: (0..dim)
            .map(|i| ActionDim {
                name: format!("d{i}"),
                unit: "none".into(),
                normalize: Normalize::Keep,
            })
            .collect(),
    };
    vec![space("eef_delta", 7, 0), space("bimanual_nav", 16, 16)]
}

/// Random values for every parameter, without the prompt vector.
pub(super) fn canonical(config: &FlowerConfig) -> Tensors {
    let table = config.parameter_table(&spaces()).expect("valid");
    let specs = table.iter().filter(|spec| spec.name != PROMPT);
    specs
        .map(|spec| {
            let mut values = vec![0.0; spec.len()];
            Seed::new(1)
                .child(&spec.name)
                .draws()
                .fill_normal(&mut values);
            (spec.name.clone(), (Dtype::F32, spec.shape.clone(), values))
        })
        .collect()
}

/// Adds what the authors' checkpoints hold beside parameters.
pub(super) fn with_buffers(mut tensors: Tensors, config: &FlowerConfig, theta: f64) -> Tensors {
    let pairs = config.flow.width / config.flow.heads / 2;
    let (cos, sin) = pollen_model::rope_tables(theta, 100, 2 * pairs);
    for layer in 0..config.flow.layers {
        for (name, values) in [("cos", &cos), ("sin", &sin)] {
            let key = format!("dit.{layer}.self_attn.{name}");
            tensors.insert(key, (Dtype::F32, vec![100, pairs], values.clone()));
        }
    }
    let tokens = tensors[TOKEN_TABLE].clone();
    let name = "vlm.language_model.model.encoder.embed_tokens.weight";
    tensors.insert(name.into(), tokens);
    let bias = vec![0.0; config.language.vocab_size];
    tensors.insert(
        "vlm.language_model.final_logits_bias".into(),
        (Dtype::F32, vec![1, bias.len()], bias),
    );
    let row: Vec<f32> = (0..8).map(|i| (i % 2) as f32).collect();
    tensors.insert(
        "vlm.visual_temporal_embed.pos_idx_to_embed".into(),
        (Dtype::F32, vec![1, 8], row),
    );
    tensors
}

/// Returns a safetensors file.
pub(super) fn file(tensors: &Tensors) -> Vec<u8> {
    let entries = tensors
        .iter()
        .map(|(name, (dtype, shape, _))| (name.as_str(), *dtype, shape.as_slice()));
    let (mut bytes, _) = tensor_header::head(entries, &BTreeMap::new());
    for (dtype, _, values) in tensors.values() {
        for &value in values {
            match *dtype {
                Dtype::F32 => bytes.extend(value.to_le_bytes()),
                Dtype::BF16 => bytes.extend(half::bf16::from_f32(value).to_le_bytes()),
                Dtype::F16 => bytes.extend(half::f16::from_f32(value).to_le_bytes()),
                Dtype::F64 => bytes.extend(f64::from(value).to_le_bytes()),
                other => panic!("{other} is not made here"),
            }
        }
    }
    bytes
}

/// What the tests' flow transformers were trained with.
pub(super) fn trained() -> FitOptions {
    FitOptions {
        cross_attention_mask: Some(CrossAttentionMask::Boolean),
        norm: Some(NormVariant::Rms),
        prompt: Some(crate::PromptSource::Mean),
        ..FitOptions::default()
    }
}

pub(super) fn options(missing: &[&str]) -> FitOptions {
    FitOptions {
        allow_missing: missing.iter().map(|&prefix| prefix.into()).collect(),
        ..FitOptions::default()
    }
}

/// A folder with a source, and one to import to.
pub(super) struct Lab {
    pub(super) dir: TempDir,
    runtime: tokio::runtime::Runtime,
}

impl Lab {
    pub(super) fn new() -> Self {
        Self {
            dir: TempDir::new().expect("a folder"),
            runtime: tokio::runtime::Runtime::new().expect("threads"),
        }
    }

    /// Returns a lab whose source is this file.
    pub(super) fn with(bytes: &[u8]) -> Self {
        let lab = Self::new();
        lab.write("source/model.safetensors", bytes);
        lab
    }

    pub(super) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    pub(super) fn write(&self, name: &str, bytes: &[u8]) {
        let path = self.dir.path().join(name);
        std::fs::create_dir_all(path.parent().expect("inside")).expect("a folder");
        std::fs::write(path, bytes).expect("written");
    }

    pub(super) fn storage(&self, name: &str) -> Storage {
        let config = StorageConfig::default();
        Storage::open(&self.path(name), &config, Arc::new(Silent)).expect("a folder")
    }

    pub(super) fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(Box::pin(work))
    }

    pub(super) fn open(&self, name: &str) -> Result<WeightFiles> {
        let config = StorageConfig::default();
        self.wait(WeightFiles::open(
            &self.path(name),
            &config,
            Arc::new(Silent),
        ))
    }

    pub(super) fn fit(&self, config: &FlowerConfig, options: &FitOptions) -> Fit {
        let files = self.open("source").expect("opens");
        self.wait(fit(&files, config, &spaces(), options))
            .expect("is read")
    }

    /// Imports `source` into `destination`.
    pub(super) fn import(&self, config: &FlowerConfig, options: &FitOptions) -> Result<Written> {
        let files = self.open("source")?;
        let fitted =
            self.wait(fit(&files, config, &spaces(), options))
                .map_err(|error| match error {
                    crate::FitError::Weights(error) => error,
                    crate::FitError::Model(error) => panic!("{error}"),
                })?;
        let destination = self.storage("destination");
        self.wait(import(&files, &fitted, options, &destination))
    }

    /// Reads everything that was imported.
    pub(super) fn imported(&self, name: &str) -> BTreeMap<String, Vec<u32>> {
        let files = self.open(name).expect("opens");
        let names: Vec<String> = files.tensors().keys().cloned().collect();
        names
            .into_iter()
            .map(|name| {
                let values = self.wait(files.read(&name)).expect("is read");
                (name, values.into_iter().map(f32::to_bits).collect())
            })
            .collect()
    }

    pub(super) fn exists(&self, name: &str) -> bool {
        Path::new(&self.path(name)).exists()
    }
}

/// Returns the bits of all values.
pub(super) fn bits(tensors: &Tensors) -> BTreeMap<String, Vec<u32>> {
    let each = tensors.iter();
    each.map(|(name, (_, _, values))| {
        let values = values.iter().map(|value| value.to_bits());
        (name.clone(), values.collect())
    })
    .collect()
}

/// Returns the mean of all rows but the last.
pub(super) fn mean_row(tensors: &Tensors) -> Vec<u32> {
    let (_, shape, values) = &tensors[TOKEN_TABLE];
    let words = shape[0] - 1;
    (0..shape[1])
        .map(|column| {
            let sum: f64 = (0..words)
                .map(|row| f64::from(values[row * shape[1] + column]))
                .sum();
            ((sum / words as f64) as f32).to_bits()
        })
        .collect()
}

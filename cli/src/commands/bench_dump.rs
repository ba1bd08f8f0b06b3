//! Weights and a batch for another implementation to compute the same loss from.

use std::path::Path;

use anyhow::{Context, Result};
use pollen_trainer::bench::{Bench, HostBatch, NamedValues};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

/// Writes `weights.safetensors`, `batch.safetensors` and, from one step on them, `result.json`.
pub(crate) fn write(bench: &mut Bench, host: &HostBatch, dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    save(&dir.join("weights.safetensors"), bench.weights())?;
    let batch = bench.batch_values(host);
    save(&dir.join("batch.safetensors"), batch)?;
    let (loss, grad_norm) = bench.step(host, &mut |_| {})?;
    let path = dir.join("result.json");
    let text = json!({"loss": loss, "grad_norm": grad_norm}).to_string();
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn save(path: &Path, tensors: NamedValues) -> Result<()> {
    let little_endian = |values: Vec<f32>| values.into_iter().flat_map(f32::to_le_bytes);
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, shape, values)| (name, shape, little_endian(values).collect()))
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        TensorView::new(Dtype::F32, shape.clone(), bytes).map(|view| (name, view))
    });
    let views: Vec<_> = views.collect::<Result<_, _>>()?;
    safetensors::serialize_to_file(views, None, path)
        .with_context(|| format!("cannot write {}", path.display()))
}

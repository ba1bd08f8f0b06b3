//! A checkpoint moves between devices without changing a bit.

use std::collections::HashMap;
use std::sync::Arc;

use burn::tensor::Device;
use pollen_checkpoints::{Checkpoints, FlatSlice, ManifestHead, Restored, TensorSlice, Values};
use pollen_model::Precision;
use pollen_storage::{Silent, Storage, StorageConfig};

use super::{Findings, Site, trained_a_little};
use crate::bench::Bench;
use crate::data_parallel::to_device;
use crate::error::Error;
use crate::layout::Shard;
use crate::optim::{AdamW, host};

/// Weights by name with their shapes, and moments by name with their first flat index.
#[derive(PartialEq)]
struct State {
    weights: Vec<(String, Vec<usize>, Vec<f32>)>,
    moments: Vec<(&'static str, usize, Vec<f32>)>,
    updates: u64,
}

impl State {
    fn of(bench: &Bench) -> Self {
        let infos = bench.model.parameters().into_iter();
        let values = bench.model.flat_parameters().into_iter();
        Self {
            weights: infos
                .zip(values)
                .map(|(info, (name, values))| (name, info.shape, host(values)))
                .collect(),
            moments: bench
                .optimizer
                .moments(&bench.layout, &(0..bench.layout.len()))
                .into_iter()
                .map(|(name, offset, values)| (name, offset, host(values)))
                .collect(),
            updates: bench.optimizer.updates(),
        }
    }

    /// Returns the number of values whose bits differ; all of them if the shapes do.
    fn differences(&self, other: &Self) -> usize {
        let values = |state: &Self| -> Vec<u32> {
            let weights = state.weights.iter().flat_map(|(_, _, values)| values);
            let moments = state.moments.iter().flat_map(|(_, _, values)| values);
            weights
                .chain(moments)
                .map(|value| value.to_bits())
                .collect()
        };
        let (a, b) = (values(self), values(other));
        if a.len() != b.len() || self.updates != other.updates {
            return a.len().max(b.len());
        }
        a.iter().zip(b).filter(|(a, b)| **a != *b).count()
    }
}

pub(super) fn run(site: &Site, findings: &mut Findings) -> Result<(), Error> {
    let file_fault = |source: std::io::Error| Error::File {
        path: site.scratch.display().to_string(),
        source,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(file_fault)?;
    let folder = site.scratch.join("checkpoint");
    std::fs::create_dir_all(&folder).map_err(file_fault)?;
    let folder = folder.canonicalize().map_err(file_fault)?;
    let url = format!("file://{}", folder.display());
    let storage = Storage::open(&url, &StorageConfig::default(), Arc::new(Silent))?;
    let store = Checkpoints::new(storage, runtime.handle().clone());

    let mut here = trained_a_little(&site.small, Precision::F32, &site.device)?;
    let spaces: Vec<usize> = (0..site.small.spaces.len()).collect();
    let batch = here.random_batch(1, 8, &spaces);
    for _ in 0..2 {
        here.step(&batch, &mut |_| {})?;
    }
    let saved = State::of(&here);
    let mut on_cpu = fresh(site, &Device::flex())?;
    restore(&mut on_cpu, &store, &save(&store, &here, &saved, 1)?)?;
    let carried = State::of(&on_cpu);
    findings.at_most(
        "values that changed on the way to the CPU",
        saved.differences(&carried) as f64,
        0.0,
    );
    let mut back = fresh(site, &site.device)?;
    restore(&mut back, &store, &save(&store, &on_cpu, &carried, 2)?)?;
    let returned = State::of(&back);
    findings.at_most(
        "values that changed on the way back",
        saved.differences(&returned) as f64,
        0.0,
    );
    // The draws of a step belong to its number.
    back.step = here.step;
    let (before, _) = here.gradients(&batch, &mut |_| {})?;
    let (after, _) = back.gradients(&batch, &mut |_| {})?;
    let apart = (before - after).abs() / before.abs();
    findings.at_most("loss after it", apart, site.allowance());
    findings.measured(
        "values",
        saved.weights.iter().map(|(_, _, v)| v.len()).sum::<usize>(),
    );
    std::fs::remove_dir_all(&folder).map_err(file_fault)
}

/// Returns a model with other weights.
fn fresh(site: &Site, device: &Device) -> Result<Bench, Error> {
    let small = &site.small;
    Bench::new(&small.model, &small.spaces, Precision::F32, 1, device)
}

fn save(store: &Checkpoints, bench: &Bench, state: &State, step: u64) -> Result<Restored, Error> {
    let claim = store.claim(store.next_generation()?)?;
    let writer = store.writer(&claim, step, 0, 1);
    let tensors: Vec<TensorSlice<'_>> = state
        .weights
        .iter()
        .map(|(name, shape, values)| TensorSlice {
            name: name.clone(),
            shape: shape.clone(),
            values: Values::F32(values),
        })
        .collect();
    let moments: Vec<FlatSlice<'_>> = state
        .moments
        .iter()
        .map(|(name, offset, values)| FlatSlice {
            name: (*name).to_owned(),
            global_len: bench.layout.len() as u64,
            offset: *offset as u64,
            values: Values::F32(values),
        })
        .collect();
    let mut files = writer.write_state(&tensors, &moments, None, || ())?;
    files.push(writer.write_file("contract.json", "{}".into())?);
    let head = ManifestHead {
        step,
        updates: state.updates,
        samples: step,
        world_size: 1,
        config_hash: "device check".into(),
        recipe_hash: "device check".into(),
        layout_hash: bench.layout.hash(),
        order_version: 1,
        dataset_hashes: std::collections::BTreeMap::new(),
        gpu_hours_spent: 0.0,
        eval_error: None,
        extra: serde_json::Value::Null,
    };
    store.publish(&claim, head, files)?;
    let newest = store.newest()?;
    newest.ok_or_else(|| Error::internal("what was just published is not there"))
}

fn restore(bench: &mut Bench, store: &Checkpoints, from: &Restored) -> Result<(), Error> {
    let plain = bench.device.clone().inner();
    let mut weights: HashMap<String, Vec<f32>> = store
        .read_model(from)?
        .into_iter()
        .filter_map(|(name, data)| Some((name, data.to_f32()?)))
        .collect();
    bench.model = bench
        .model
        .clone()
        .with_flat_parameters(&mut |name| Some(to_device(weights.remove(name)?, &plain)));
    bench.optimizer = AdamW::restore(
        &bench.layout,
        Shard::WHOLE,
        &plain,
        from.manifest.head.updates,
        |name, range| store.read_flat(from, name, range),
    )?;
    Ok(())
}

//! The exponential moving average of the trained weights, in the flat layout of the optimizer.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor};
use pollen_checkpoints::TensorData;
use pollen_model::Flower;

use crate::data_parallel::to_device;
use crate::layout::{Bucket, Layout};
use crate::schedule::EmaConfig;

/// Averaged weights in f32, by bucket.
#[derive(Debug)]
pub(crate) struct Ema {
    pub(crate) config: EmaConfig,
    pub(crate) buckets: Vec<Tensor<1>>,
}

impl Ema {
    /// Starts from the weights of `model`.
    pub(crate) fn new(config: EmaConfig, model: &Flower, layout: &Layout) -> Self {
        let weights: BTreeMap<_, _> = model.flat_parameters().into_iter().collect();
        let bucket = |bucket: &Bucket| {
            let entries = layout.entries()[bucket.entries.clone()].iter();
            Tensor::cat(
                entries.map(|entry| weights[&entry.name].clone()).collect(),
                0,
            )
        };
        Self {
            config,
            buckets: layout.buckets().iter().map(bucket).collect(),
        }
    }

    /// Takes the averages from a checkpoint's tensors.
    ///
    /// # Errors
    /// Names the first tensor that is missing, of another size or not f32.
    pub(crate) fn restore(
        config: EmaConfig,
        layout: &Layout,
        mut tensors: BTreeMap<String, TensorData>,
        device: &Device,
    ) -> Result<Self, String> {
        let mut buckets = Vec::with_capacity(layout.buckets().len());
        for bucket in layout.buckets() {
            let mut values = Vec::with_capacity(bucket.range.len());
            for entry in &layout.entries()[bucket.entries.clone()] {
                let stored = tensors.remove(&entry.name);
                match stored.and_then(|tensor| tensor.to_f32()) {
                    Some(stored) if stored.len() == entry.len() => values.extend(stored),
                    _ => return Err(entry.name.clone()),
                }
            }
            buckets.push(to_device(values, device));
        }
        Ok(Self { config, buckets })
    }

    /// Moves the averages of bucket `index` towards `weights`, after update number `update`,
    /// counted from 1.
    pub(crate) fn update(&mut self, index: usize, weights: Tensor<1>, update: u64) {
        let average = &mut self.buckets[index];
        let share = 1.0 - self.config.decay(update);
        *average = average.clone() - (average.clone() - weights) * share;
    }

    /// Returns all parameters of `model` with the averages in place of the trained ones, flat and
    /// in the order of their names.
    pub(crate) fn flat_parameters(
        &self,
        model: &Flower,
        layout: &Layout,
    ) -> Vec<(String, Tensor<1>)> {
        let mut averages: BTreeMap<&str, Tensor<1>> = BTreeMap::new();
        for (bucket, average) in layout.buckets().iter().zip(&self.buckets) {
            for entry in &layout.entries()[bucket.entries.clone()] {
                let start = entry.offset - bucket.range.start;
                let values = average.clone().slice([start..start + entry.len()]);
                averages.insert(&entry.name, values);
            }
        }
        let all = model.flat_parameters().into_iter();
        all.map(|(name, weights)| {
            let values = averages.remove(name.as_str()).unwrap_or(weights);
            (name, values)
        })
        .collect()
    }

    /// Returns `model` with the averages in place of the trained weights.
    pub(crate) fn model(&self, model: &Flower, layout: &Layout) -> Flower {
        let mut averages: BTreeMap<_, _> =
            self.flat_parameters(model, layout).into_iter().collect();
        model
            .clone()
            .with_flat_parameters(&mut |name| averages.remove(name))
    }
}

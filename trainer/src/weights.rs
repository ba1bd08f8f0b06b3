//! The model's weights seen through the flat layout, one bucket at a time.

use std::collections::HashMap;

use burn::tensor::Tensor;
use pollen_model::Flower;

use crate::layout::Layout;

/// Flat weights by canonical name.
#[derive(Debug)]
pub(crate) struct FlatWeights {
    by_name: HashMap<String, Tensor<1>>,
}

impl FlatWeights {
    /// Takes the trained weights of a model.
    pub(crate) fn of(model: &Flower, layout: &Layout) -> Self {
        let mut by_name: HashMap<_, _> = model.flat_parameters().into_iter().collect();
        let trained: std::collections::HashSet<&str> = layout
            .entries()
            .iter()
            .map(|entry| entry.name.as_str())
            .collect();
        by_name.retain(|name, _| trained.contains(name.as_str()));
        Self { by_name }
    }

    /// Takes bucket `index` out.
    pub(crate) fn take(&mut self, layout: &Layout, index: usize) -> Tensor<1> {
        let entries = &layout.entries()[layout.buckets()[index].entries.clone()];
        let parts = entries.iter().map(|entry| {
            let values = self.by_name.remove(&entry.name);
            values.expect("every entry is a parameter, and a bucket is taken once")
        });
        Tensor::cat(parts.collect(), 0)
    }

    /// Puts new values of bucket `index` in.
    pub(crate) fn put(&mut self, layout: &Layout, index: usize, values: &Tensor<1>) {
        let bucket = &layout.buckets()[index];
        for entry in &layout.entries()[bucket.entries.clone()] {
            let start = entry.offset - bucket.range.start;
            let values = values.clone().slice([start..start + entry.len()]);
            self.by_name.insert(entry.name.clone(), values);
        }
    }

    /// Puts the weights into the model.
    pub(crate) fn into_model(mut self, model: Flower) -> Flower {
        model.with_flat_parameters(&mut |name| self.by_name.remove(name))
    }
}

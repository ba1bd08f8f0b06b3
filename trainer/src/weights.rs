//! The model's weights seen through the flat layout, one bucket at a time.

use std::collections::HashMap;

use burn::tensor::Tensor;
use pollen_model::Flower;

use crate::layout::Layout;

/// Flat weights by canonical name. Only the bucket in work is held twice.
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

    /// Replaces bucket `index` by what `change` makes of it.
    pub(crate) fn update(
        &mut self,
        layout: &Layout,
        index: usize,
        change: impl FnOnce(Tensor<1>) -> Tensor<1>,
    ) {
        let bucket = &layout.buckets()[index];
        let entries = &layout.entries()[bucket.entries.clone()];
        let parts = entries
            .iter()
            .map(|entry| {
                self.by_name
                    .remove(&entry.name)
                    .expect("every entry is a parameter")
            })
            .collect();
        let flat = change(Tensor::cat(parts, 0));
        for entry in entries {
            let start = entry.offset - bucket.range.start;
            let values = flat.clone().slice([start..start + entry.len()]);
            self.by_name.insert(entry.name.clone(), values);
        }
    }

    /// Puts the weights into the model.
    pub(crate) fn into_model(mut self, model: Flower) -> Flower {
        model.with_flat_parameters(&mut |name| self.by_name.remove(name))
    }
}

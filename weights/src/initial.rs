//! The weights that a run starts from: an imported folder, or a checkpoint of another run.

use std::collections::BTreeSet;

use pollen_model::{FlowerConfig, ParameterTable};

use crate::choices::Choices;
use crate::error::{Error, Result};
use crate::files::{WeightFiles, converter, wrong_dtype};
use crate::fit::is_named;

/// Weights under canonical names that fit a model.
#[derive(Debug)]
pub struct Initial {
    files: WeightFiles,
    names: BTreeSet<String>,
}

impl Initial {
    /// Compares all names, shapes and types, and what the weights were trained with, before any
    /// weight is read. Parameters that `allow_missing` names (see [`is_named`]) may be missing.
    pub fn new(
        files: WeightFiles,
        table: &ParameterTable,
        config: &FlowerConfig,
        allow_missing: &[String],
    ) -> Result<Self> {
        let mut faults = Vec::new();
        let mut names = BTreeSet::new();
        let mut missing: Vec<&str> = Vec::new();
        for spec in table.iter() {
            let Some(stored) = files.tensors().get(&spec.name) else {
                if !is_named(&spec.name, allow_missing) {
                    missing.push(&spec.name);
                }
                continue;
            };
            if stored.shape != spec.shape {
                faults.push(format!(
                    "tensor `{}` in {} has shape {:?}, the recipe's model wants {:?}",
                    spec.name,
                    files.file_of(stored),
                    stored.shape,
                    spec.shape
                ));
            } else if converter(stored.dtype).is_none() {
                let reason = wrong_dtype(&spec.name, stored.dtype);
                faults.push(format!("{}: {reason}", files.file_of(stored)));
            }
            names.insert(spec.name.clone());
        }
        if let Some(first) = missing.first() {
            faults.push(format!(
                "{} tensors are missing, the first is `{first}`; let them keep their random \
                 values by prefixes in init.allow_missing, for example [\"head\"]",
                missing.len()
            ));
        }
        let extra: Vec<&String> = files
            .tensors()
            .keys()
            .filter(|name| table.get(name).is_none())
            .collect();
        if let Some(first) = extra.first() {
            faults.push(format!(
                "{} tensors are no parameters of the recipe's model, the first is `{first}`; \
                 published names go through `pollen weights import` first",
                extra.len()
            ));
        }
        let choices = files.notes()["pollen"]["choices"].clone();
        if let Ok(Some(choices)) = serde_json::from_value::<Option<Choices>>(choices) {
            faults.extend(choices.faults(&Choices::of(config)));
        }
        if faults.is_empty() {
            Ok(Self { files, names })
        } else {
            let url = files.url().into();
            Err(Error::Unfit { url, faults })
        }
    }

    /// Returns the number of parameters that are there.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Returns whether no parameter is there.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Reads a parameter that must be there.
    pub(crate) async fn require(&self, name: &str) -> Result<Vec<f32>> {
        self.files.read(name).await
    }

    /// Reads a parameter, if it is there.
    pub async fn read(&self, name: &str) -> Result<Option<Vec<f32>>> {
        if self.names.contains(name) {
            self.files.read(name).await.map(Some)
        } else {
            Ok(None)
        }
    }
}

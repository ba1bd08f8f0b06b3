//! Recipe section `[init]`: the weights that a new run starts from.

use std::sync::Arc;

use burn::tensor::Device;
use pollen_model::Flower;
use pollen_storage::Observer;
use pollen_weights::{Initial, WeightFiles};
use serde::{Deserialize, Serialize};

use crate::config::RunConfig;
use crate::data_parallel::to_device;
use crate::error::Error;

/// The weights that a new run starts from; a run that continues has its own.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InitConfig {
    /// Folder or URL of weights under canonical names: what `pollen weights import` wrote, or a
    /// checkpoint of another run. Empty: random weights.
    #[serde(default)]
    pub from: String,
    /// Parameters that may be missing there and keep their random values: prefixes of their
    /// names, or `head` or `vlm` for a whole part.
    #[serde(default)]
    pub allow_missing: Vec<String>,
}

/// Puts the weights of `[init]` into a model with random ones, one tensor at a time.
pub(crate) fn load(
    model: Flower,
    config: &RunConfig,
    device: &Device,
    runtime: &tokio::runtime::Handle,
    observer: Arc<dyn Observer>,
) -> Result<Flower, Error> {
    let init = &config.init;
    if init.from.is_empty() {
        return Ok(model);
    }
    let files = runtime.block_on(WeightFiles::open(&init.from, &config.storage, observer))?;
    let table = config.model.parameter_table(&config.action_spaces)?;
    let initial = Initial::new(files, &table, &config.model, &init.allow_missing)?;
    let plain = device.clone().inner();
    let mut fault = None;
    let model = model.with_flat_parameters(&mut |name| {
        if fault.is_some() {
            return None;
        }
        match runtime.block_on(initial.read(name)) {
            Ok(values) => values.map(|values| to_device(values, &plain)),
            Err(error) => {
                fault = Some(error);
                None
            }
        }
    });
    if let Some(fault) = fault {
        return Err(fault.into());
    }
    tracing::info!(from = init.from, tensors = initial.len(), "initial weights");
    Ok(model)
}

//! Where the modules get their values from while they are built: random draws, or a file.

use burn::module::{Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};

use crate::parameters::{ParameterSpec, ParameterTable};

/// Gives each module its parameters by canonical name.
pub(crate) struct Weights<'a> {
    table: &'a ParameterTable,
    source: &'a mut dyn FnMut(&ParameterSpec) -> Vec<f32>,
    device: &'a Device,
}

impl<'a> Weights<'a> {
    /// Takes names and shapes from `table` and values from `source`.
    pub(crate) fn new(
        table: &'a ParameterTable,
        source: &'a mut dyn FnMut(&ParameterSpec) -> Vec<f32>,
        device: &'a Device,
    ) -> Self {
        Self {
            table,
            source,
            device,
        }
    }

    /// Returns the device the model is built on.
    pub(crate) fn device(&self) -> &Device {
        self.device
    }

    /// Returns whether the table has a parameter of that name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.table.get(name).is_some()
    }

    /// Returns the parameter `name`, on the device.
    pub(crate) fn param<const D: usize>(&mut self, name: &str) -> Param<Tensor<D>> {
        let spec = self
            .table
            .get(name)
            .expect("the table lists every parameter that a module asks for");
        let values = (self.source)(spec);
        let data = TensorData::new(values, spec.shape.clone());
        if spec.trained {
            return Param::from_data(data, self.device);
        }
        Param::initialized(ParamId::new(), Tensor::from_data(data, self.device))
    }
}

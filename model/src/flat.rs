//! The parameters as flat, named tensors: what collectives, optimizer and checkpoints work on.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Gradients, Tensor};

use crate::flower::Flower;
use crate::names::canonical;

/// Name, shape and role of a parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterInfo {
    /// Canonical name, as in published checkpoints.
    pub name: String,
    /// Shape, as in published checkpoints.
    pub shape: Vec<usize>,
    /// Whether training changes it; constants that are saved with the weights are not trained.
    pub trained: bool,
}

/// A parameter of any rank, while the modules are walked.
struct Visited<'a, F> {
    path: Vec<String>,
    spaces: &'a [&'a str],
    each: F,
}

/// What is done with each parameter.
trait EachParameter {
    fn each<const D: usize>(&mut self, name: String, param: &Param<Tensor<D>>);
}

impl<F: EachParameter> ModuleVisitor for Visited<'_, F> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let name = canonical(&self.path.join("."), self.spaces);
        self.each.each(name, param);
    }
}

#[derive(Default)]
struct Infos(BTreeMap<String, ParameterInfo>);

impl EachParameter for Infos {
    fn each<const D: usize>(&mut self, name: String, param: &Param<Tensor<D>>) {
        let info = ParameterInfo {
            name: name.clone(),
            shape: param.base().dims().to_vec(),
            trained: true,
        };
        self.0.insert(name, info);
    }
}

#[derive(Default)]
struct Values(BTreeMap<String, Tensor<1>>);

impl EachParameter for Values {
    fn each<const D: usize>(&mut self, name: String, param: &Param<Tensor<D>>) {
        self.0
            .insert(name, flatten(param.base().without_autodiff()));
    }
}

type TakeGradient = dyn FnOnce(&mut Gradients) -> Option<Tensor<1>>;

/// A parameter whose gradient is still to come.
pub(crate) struct Pending {
    pub(crate) name: String,
    /// Whether it gets one at all.
    pub(crate) trained: bool,
    take: Box<TakeGradient>,
}

impl Pending {
    /// Takes the gradient out of `grads`, flat and outside autodiff.
    pub(crate) fn take(self, grads: &mut Gradients) -> (String, Option<Tensor<1>>) {
        (self.name, (self.take)(grads))
    }
}

#[derive(Default)]
struct AllPending(Vec<Pending>);

impl EachParameter for AllPending {
    fn each<const D: usize>(&mut self, name: String, param: &Param<Tensor<D>>) {
        let base = param.base();
        self.0.push(Pending {
            name,
            trained: base.is_require_grad(),
            take: Box::new(move |grads| base.grad_remove(grads).map(flatten)),
        });
    }
}

fn flatten<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let count = tensor.shape().num_elements();
    tensor.reshape([count])
}

struct Replaced<'a> {
    path: Vec<String>,
    spaces: Vec<String>,
    values: &'a mut dyn FnMut(&str) -> Option<Tensor<1>>,
}

impl ModuleMapper for Replaced<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let spaces: Vec<&str> = self.spaces.iter().map(String::as_str).collect();
        let name = canonical(&self.path.join("."), &spaces);
        let Some(value) = (self.values)(&name) else {
            return param;
        };
        param.map(|old| {
            let value = value.without_autodiff().reshape(old.dims());
            match old.gradient_checkpointing_strategy() {
                None => value,
                Some(strategy) => value
                    .autodiff()
                    .with_gradient_checkpointing_strategy(strategy)
                    .set_require_grad(old.is_require_grad()),
            }
        })
    }
}

impl Flower {
    /// Lists all parameters in the order of their names, with the constants that are saved along.
    pub fn parameters(&self) -> Vec<ParameterInfo> {
        let mut infos = self.walk(Infos::default()).0;
        for info in infos.values_mut() {
            info.trained = !self.frozen.contains(&info.name);
        }
        infos.into_values().collect()
    }

    /// Returns all values, flat and outside autodiff, in the order of [`Flower::parameters`].
    pub fn flat_parameters(&self) -> Vec<(String, Tensor<1>)> {
        self.walk(Values::default()).0.into_iter().collect()
    }

    /// Replaces the parameters for which `values` has something. What was trained stays so.
    ///
    /// # Panics
    /// When a value has another number of entries than its parameter.
    #[must_use]
    pub fn with_flat_parameters(self, values: &mut dyn FnMut(&str) -> Option<Tensor<1>>) -> Self {
        let spaces = self.head.spaces.iter().map(|s| s.name.clone()).collect();
        self.map(&mut Replaced {
            path: Vec::new(),
            spaces,
            values,
        })
    }

    /// Returns all parameters with a way to their gradients, in the order of their names.
    pub(crate) fn pending(&self) -> Vec<Pending> {
        pending(self, &self.head.space_names())
    }

    /// Takes the gradients of all parameters out of `grads`, in the order of their names.
    pub(crate) fn take_gradients(&self, grads: &mut Gradients) -> Vec<(String, Option<Tensor<1>>)> {
        let all = self.pending().into_iter();
        all.map(|parameter| parameter.take(grads)).collect()
    }

    fn walk<F: EachParameter>(&self, each: F) -> F {
        walk(self, &self.head.space_names(), each)
    }
}

/// Returns the parameters of any part of the model with a way to their gradients, in the order of
/// their names.
pub(crate) fn pending<M: Module>(module: &M, spaces: &[&str]) -> Vec<Pending> {
    let mut all = walk(module, spaces, AllPending::default()).0;
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

fn walk<M: Module, F: EachParameter>(module: &M, spaces: &[&str], each: F) -> F {
    let mut visitor = Visited {
        path: Vec::new(),
        spaces,
        each,
    };
    module.visit(&mut visitor);
    visitor.each
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{bits, mini, mini_observation, space};
    use burn::tensor::Device;
    use pollen_core::Seed;

    fn model(device: &Device) -> Flower {
        let spaces = [space("eef_delta", 7, 0), space("bimanual_nav", 9, 4)];
        mini().init(&spaces, Seed::new(5), device).expect("valid")
    }

    #[test]
    fn names_and_shapes_are_those_of_the_table() {
        let spaces = [space("eef_delta", 7, 0), space("bimanual_nav", 9, 4)];
        let table = mini().parameter_table(&spaces).expect("valid");
        let listed = model(&Device::flex()).parameters();
        let expected: Vec<ParameterInfo> = table
            .iter()
            .map(|spec| ParameterInfo {
                name: spec.name.clone(),
                shape: spec.shape.clone(),
                trained: spec.trained,
            })
            .collect();
        assert_eq!(listed, expected);
    }

    #[test]
    fn values_round_trip_and_stay_trained() {
        let device = Device::flex().autodiff();
        let start = model(&device);
        let before: BTreeMap<_, _> = start.flat_parameters().into_iter().collect();
        let changed = start.with_flat_parameters(&mut |name| Some(before[name].clone() + 1.0));
        for (name, value) in changed.flat_parameters() {
            assert_eq!(bits(value), bits(before[&name].clone() + 1.0), "{name}");
        }
        let back = changed.with_flat_parameters(&mut |name| before.get(name).cloned());
        for (name, value) in back.flat_parameters() {
            assert!(!value.is_autodiff());
            assert_eq!(bits(value), bits(before[&name].clone()), "{name}");
        }
        let (loss, _) = mini_loss(&back, &device);
        let mut grads = loss.backward();
        let taken = back.take_gradients(&mut grads);
        let names: Vec<&String> = taken.iter().map(|(name, _)| name).collect();
        let infos = back.parameters();
        assert_eq!(
            names,
            infos.iter().map(|info| &info.name).collect::<Vec<_>>()
        );
        for (info, (name, grad)) in infos.iter().zip(&taken) {
            assert_eq!(grad.is_some(), info.trained, "{name}");
            if let Some(grad) = grad {
                assert_eq!(grad.dims()[0], info.shape.iter().product::<usize>());
                assert!(!grad.is_autodiff());
            }
        }
    }

    fn mini_loss(model: &Flower, device: &Device) -> (Tensor<1>, usize) {
        let obs = mini_observation(&[0, 1, 0], device);
        let context = model.encode(&obs, None);
        let valid = model.valid_mask(&obs.spaces, device);
        let z = Tensor::ones(valid.dims(), device) * valid.clone();
        let t = Tensor::from_floats([0.2, 0.5, 0.9], device);
        let velocity = model.velocity(&context, z.clone(), t, None);
        let loss = crate::velocity_loss(velocity, z.clone(), z * 0.5, valid);
        (loss, obs.spaces.len())
    }
}

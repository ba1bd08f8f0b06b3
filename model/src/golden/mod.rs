//! Small runs of the published code that this crate must reproduce: one file each in
//! `tests/golden`, of which sizes, weights, inputs, results and bounds are read.
//!
//! The tests of this crate compare them on the CPU; `pollen gpu-check` on any device.

mod encoder;
mod flow;
mod joined;
mod transformers;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::tensor::{Device, Int, Tensor, TensorData};
use pollen_core::ActionSpace;
use pollen_core::action_space::{ActionDim, Normalize};
use safetensors::{Dtype, SafeTensors};
use serde::Serialize;
use serde_json::Value;

use crate::config::{FlowConfig, ModulationKind, NormVariant};
use crate::error::Error;
use crate::parameters::ParameterSpec;
use crate::rope;

/// One result beside the published one.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Name of the tensor in the file.
    pub name: String,
    /// Euclidean norm of the difference over that of the published result; where the latter is
    /// zero, the norm of the difference.
    pub relative: f64,
    /// The file's bound of it, for f32 arithmetic.
    pub limit: f64,
    /// The first value outside the file's bound for single values, if there is one.
    pub outside: Option<String>,
}

impl Comparison {
    /// Says whether the result is inside the file's bounds, or as near as `allowance`, for
    /// arithmetic that is coarser than the bounds were made for.
    pub fn holds(&self, allowance: f64) -> bool {
        let inside = self.relative <= self.limit && self.outside.is_none();
        inside || self.relative <= allowance
    }
}

type Check = fn(&Golden, &Device);

const CHECKS: [(&str, Check); 11] = [
    ("bart_decoder", transformers::bart_decoder),
    ("bart_encoder", encoder::bart_encoder),
    ("davit", encoder::tower),
    ("davit_small_image", encoder::tower),
    ("dit", flow::dit),
    ("flow_block", flow::flow_block),
    ("flow_loss", flow::flow_loss),
    ("joined", joined::joined),
    ("sampler", flow::sampler),
    ("sinusoids", flow::sinusoids),
    ("smolvlm", transformers::smolvlm),
];

/// Returns the names of the files that can be compared.
pub fn names() -> impl Iterator<Item = &'static str> {
    CHECKS.iter().map(|(name, _)| *name)
}

/// Computes everything in `<name>.safetensors` of a folder on a device and compares it.
///
/// # Errors
/// When the file is not there or is no golden file of this crate.
///
/// # Panics
/// When the file lacks a tensor that is to be compared, holds one that is not, or the device
/// fails.
pub fn compare(dir: &Path, name: &str, device: &Device) -> Result<Vec<Comparison>, Error> {
    let path = dir.join(format!("{name}.safetensors"));
    let fault = |reason: String| Error::Golden {
        path: path.display().to_string(),
        reason,
    };
    let check = CHECKS.iter().find(|(known, _)| *known == name);
    let (_, check) = check.ok_or_else(|| fault("nothing of this name is known".into()))?;
    let bytes = std::fs::read(&path).map_err(|error| fault(error.to_string()))?;
    let golden = Golden::parse(&bytes).map_err(fault)?;
    check(&golden, device);
    Ok(golden.finish())
}

/// One file of golden tensors, which of them have been used, and what came of it.
struct Golden {
    tensors: BTreeMap<String, (Vec<usize>, Vec<f64>)>,
    config: Value,
    tolerance: Value,
    used: RefCell<BTreeSet<String>>,
    comparisons: RefCell<Vec<Comparison>>,
}

impl Golden {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let words = |error: safetensors::SafeTensorError| error.to_string();
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(words)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let json = |key: &str| {
            let text = metadata.get(key).ok_or_else(|| format!("no {key} in it"))?;
            serde_json::from_str(text).map_err(|error| format!("{key}: {error}"))
        };
        let tensors = SafeTensors::deserialize(bytes)
            .map_err(words)?
            .iter()
            .map(|(name, view)| {
                let (shape, data) = (view.shape().to_vec(), view.data());
                (name.to_owned(), (shape, numbers(view.dtype(), data)))
            })
            .collect();
        Ok(Self {
            tensors,
            config: json("config")?,
            tolerance: json("tolerance")?,
            used: RefCell::default(),
            comparisons: RefCell::default(),
        })
    }

    fn size(&self, key: &str) -> usize {
        self.config[key]
            .as_u64()
            .unwrap_or_else(|| panic!("no size {key}")) as usize
    }

    fn sizes(&self, key: &str) -> Vec<usize> {
        let list = self.config[key].as_array().expect("a list");
        list.iter()
            .map(|v| v.as_u64().expect("a size") as usize)
            .collect()
    }

    fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn shape(&self, name: &str) -> &[usize] {
        &self
            .tensors
            .get(name)
            .unwrap_or_else(|| panic!("no tensor {name}"))
            .0
    }

    fn numbers(&self, name: &str) -> &[f64] {
        self.used.borrow_mut().insert(name.into());
        &self
            .tensors
            .get(name)
            .unwrap_or_else(|| panic!("no tensor {name}"))
            .1
    }

    /// Returns a tensor in its own shape.
    fn tensor<const D: usize>(&self, name: &str, device: &Device) -> Tensor<D> {
        let numbers: Vec<f32> = self.numbers(name).iter().map(|&x| x as f32).collect();
        Tensor::from_data(TensorData::new(numbers, self.shape(name).to_vec()), device)
    }

    /// Returns `input.<name>` with its axes of length 1 behind the first removed.
    fn rows<const D: usize>(&self, name: &str, device: &Device) -> Tensor<D> {
        let name = format!("input.{name}");
        let shape = self.shape(&name);
        let mut kept: Vec<usize> = shape[..1].to_vec();
        kept.extend(&shape[shape.len() + 1 - D..]);
        let numbers: Vec<f32> = self.numbers(&name).iter().map(|&x| x as f32).collect();
        Tensor::from_data(TensorData::new(numbers, kept), device)
    }

    fn ids(&self, name: &str, device: &Device) -> Tensor<2, Int> {
        let ids: Vec<i64> = self.numbers(name).iter().map(|&x| x as i64).collect();
        Tensor::from_data(TensorData::new(ids, self.shape(name).to_vec()), device)
    }

    /// Returns the values of a parameter.
    fn weight(&self, spec: &ParameterSpec) -> Vec<f32> {
        let name = format!("weight.{}", spec.name);
        assert_eq!(self.shape(&name), spec.shape, "shape of {name}");
        self.numbers(&name).iter().map(|&x| x as f32).collect()
    }

    /// Compares with `output.<name>`.
    fn output<const D: usize>(&self, name: &str, actual: Tensor<D>) {
        self.compare(&format!("output.{name}"), actual, "");
    }

    /// Compares a gradient by its full name.
    fn grad<const D: usize>(&self, name: &str, actual: Tensor<D>) {
        self.compare(name, actual, "grad_");
    }

    fn compare<const D: usize>(&self, name: &str, actual: Tensor<D>, kind: &str) {
        let actual = values(actual);
        let expected = self.numbers(name);
        assert_eq!(actual.len(), expected.len(), "number of values of {name}");
        let bound = |key: &str| self.tolerance[format!("{kind}{key}")].as_f64();
        let single = bound("atol").zip(bound("rtol"));
        let (mut error, mut norm, mut outside) = (0.0_f64, 0.0_f64, None);
        for (i, (&a, &b)) in actual.iter().zip(expected).enumerate() {
            let a = f64::from(a);
            error += (a - b).powi(2);
            norm += b * b;
            if let Some((atol, rtol)) = single
                && (a - b).abs() > atol + rtol * b.abs()
            {
                outside.get_or_insert_with(|| format!("{name}[{i}]: {a} is not {b}"));
            }
        }
        let (relative, limit) = if norm == 0.0 {
            (error.sqrt(), 0.0)
        } else {
            let limit = bound("rel_l2").expect("every golden file has this bound");
            ((error / norm).sqrt(), limit)
        };
        self.comparisons.borrow_mut().push(Comparison {
            name: name.into(),
            relative,
            limit,
            outside,
        });
    }

    /// Compares the tables that the model computes and the reference stores.
    fn check_tables(&self, config: &FlowConfig) {
        for name in self.tensors.keys() {
            let Some(kind) = ["cos", "sin"].into_iter().find(|kind| {
                name.starts_with("weight.") && name.ends_with(&format!("self_attn.{kind}"))
            }) else {
                continue;
            };
            let (cos, sin) =
                rope::tables(config.rope_theta, config.rope_table_len, config.head_dim());
            let table = if kind == "cos" { cos } else { sin };
            let stored = self.numbers(name);
            assert_eq!(table.len(), stored.len(), "size of {name}");
            for (&a, &b) in table.iter().zip(stored) {
                assert!((f64::from(a) - b).abs() < 2e-6, "{name}: {a} is not {b}");
            }
        }
    }

    /// Returns what was compared.
    ///
    /// # Panics
    /// When a weight was not used or a result was not compared.
    fn finish(self) -> Vec<Comparison> {
        let used = self.used.borrow();
        let left: Vec<&String> = self
            .tensors
            .keys()
            .filter(|name| !name.starts_with("input.") && !used.contains(*name))
            .collect();
        assert!(left.is_empty(), "not compared: {left:?}");
        drop(used);
        self.comparisons.into_inner()
    }

    /// Returns the action spaces whose weights the file has, in upstream's order, and the index
    /// of each upstream number in that list.
    fn spaces(&self) -> (Vec<ActionSpace>, BTreeMap<usize, usize>) {
        let mut spaces = Vec::new();
        let mut index = BTreeMap::new();
        for (number, default) in ["joint_single", "eef_delta", "bimanual_nav"]
            .iter()
            .enumerate()
        {
            let name = self.config["action_names"][number.to_string()]
                .as_str()
                .unwrap_or(default);
            let decoder = format!("weight.action_decoders.{name}.bias");
            if self.has(&decoder) {
                let proprio = format!("weight.proprio_encoders.{name}.fc1.weight");
                let proprio_dim = if self.has(&proprio) {
                    self.shape(&proprio)[1]
                } else {
                    0
                };
                index.insert(number, spaces.len());
                spaces.push(space(name, self.shape(&decoder)[0], proprio_dim));
            }
        }
        (spaces, index)
    }

    /// Returns the action space of each sample.
    fn space_of_rows(&self) -> Vec<usize> {
        let (_, index) = self.spaces();
        self.numbers("input.action_type")
            .iter()
            .map(|&n| index[&(n as usize)])
            .collect()
    }

    /// Returns the sizes of the flow transformer; `block` is the name of its first block.
    fn flow_config(&self, block: &str) -> FlowConfig {
        let rank = self.shape(&format!("weight.{block}adaLN_modulation.1.weight"))[0];
        FlowConfig {
            width: self.size("D"),
            heads: self.size("H"),
            layers: self.size("layers"),
            modulation: ModulationKind::GlobalAdaln,
            modulation_rank: rank,
            rope_theta: self.config["theta"].as_f64().expect("a number"),
            rope_table_len: self.size("qlen"),
            action_horizon: self.size("L"),
            dropout_attention: 0.0,
            dropout_residual: 0.0,
            dropout_mlp: 0.0,
            dropout_proprio: 0.0,
            norm: NormVariant::Rms,
        }
    }
}

fn numbers(dtype: Dtype, data: &[u8]) -> Vec<f64> {
    match dtype {
        Dtype::F32 => data
            .chunks_exact(4)
            .map(|b| f64::from(f32::from_le_bytes(b.try_into().expect("four bytes"))))
            .collect(),
        Dtype::F64 => data
            .chunks_exact(8)
            .map(|b| f64::from_le_bytes(b.try_into().expect("eight bytes")))
            .collect(),
        Dtype::I64 => data
            .chunks_exact(8)
            .map(|b| i64::from_le_bytes(b.try_into().expect("eight bytes")) as f64)
            .collect(),
        other => panic!("unexpected dtype {other:?}"),
    }
}

/// Appends zero columns up to `width` to a chunk.
fn pad(x: Tensor<3>, width: usize) -> Tensor<3> {
    let [batch, horizon, dim] = x.dims();
    let zeros = Tensor::zeros([batch, horizon, width - dim], &x.device());
    Tensor::cat(vec![x, zeros], 2)
}

/// Returns an action space of `dim` dimensions.
pub(crate) fn space(name: &str, dim: usize, proprio_dim: usize) -> ActionSpace {
    ActionSpace {
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
    }
}

/// Returns all values.
pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("an f32 tensor")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str) {
        let dir = std::env::var_os("POLLEN_GOLDEN_DIR").map_or_else(
            || concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden").into(),
            std::path::PathBuf::from,
        );
        let comparisons = compare(&dir, name, &Device::flex()).expect("a golden file");
        assert!(!comparisons.is_empty());
        for comparison in comparisons {
            assert!(comparison.holds(0.0), "{comparison:?}");
        }
    }

    #[test]
    fn golden_bart_decoder() {
        check("bart_decoder");
    }

    #[test]
    fn golden_bart_encoder() {
        check("bart_encoder");
    }

    #[test]
    fn golden_davit() {
        check("davit");
    }

    #[test]
    fn golden_davit_small_image() {
        check("davit_small_image");
    }

    #[test]
    fn golden_dit() {
        check("dit");
    }

    #[test]
    fn golden_flow_block() {
        check("flow_block");
    }

    #[test]
    fn golden_flow_loss() {
        check("flow_loss");
    }

    #[test]
    fn golden_joined() {
        check("joined");
    }

    #[test]
    fn golden_sampler() {
        check("sampler");
    }

    #[test]
    fn golden_sinusoids() {
        check("sinusoids");
    }

    #[test]
    fn golden_smolvlm() {
        check("smolvlm");
    }

    #[test]
    fn a_result_outside_its_bounds_is_reported() {
        let comparison = |relative, outside: Option<&str>| Comparison {
            name: "output.x".into(),
            relative,
            limit: 1e-4,
            outside: outside.map(str::to_owned),
        };
        assert!(comparison(1e-5, None).holds(0.0));
        assert!(!comparison(1e-3, None).holds(0.0));
        assert!(!comparison(1e-5, Some("x[3]: 1 is not 2")).holds(0.0));
        assert!(comparison(1e-3, None).holds(2e-3));
        assert!(!comparison(f64::NAN, None).holds(1.0));
        let error = compare(Path::new("nowhere"), "dit", &Device::flex()).expect_err("no file");
        assert!(error.to_string().contains("nowhere"), "{error}");
    }
}

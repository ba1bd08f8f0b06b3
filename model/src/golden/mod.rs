//! Small runs of the published code that this crate must reproduce, from `tests/golden` or the
//! folder that `POLLEN_GOLDEN_DIR` names. All sizes and bounds come from the files.

mod encoder;
mod flow;
mod joined;
mod transformers;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::{Device, Int, Tensor, TensorData};
use pollen_core::ActionSpace;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::config::{FlowConfig, ModulationKind, NormVariant};
use crate::parameters::ParameterSpec;
use crate::rope;
use crate::testing::{space, values};

/// One file of golden tensors, and which of them have been used.
struct Golden {
    tensors: BTreeMap<String, (Vec<usize>, Vec<f64>)>,
    config: Value,
    tolerance: Value,
    used: RefCell<BTreeSet<String>>,
}

impl Golden {
    fn open(name: &str) -> Self {
        let dir = std::env::var("POLLEN_GOLDEN_DIR")
            .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden").into());
        let bytes = std::fs::read(format!("{dir}/{name}.safetensors")).expect("a golden file");
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("a safetensors header");
        let metadata = header.metadata().clone().expect("metadata");
        let json = |key: &str| serde_json::from_str(&metadata[key]).expect("JSON");
        let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let tensors = file
            .iter()
            .map(|(name, view)| {
                let (shape, data) = (view.shape().to_vec(), view.data());
                (name.to_owned(), (shape, numbers(view.dtype(), data)))
            })
            .collect();
        Self {
            tensors,
            config: json("config"),
            tolerance: json("tolerance"),
            used: RefCell::default(),
        }
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
        let (mut error, mut norm) = (0.0_f64, 0.0_f64);
        for (i, (&a, &b)) in actual.iter().zip(expected).enumerate() {
            let a = f64::from(a);
            error += (a - b).powi(2);
            norm += b * b;
            if let (Some(atol), Some(rtol)) = (bound("atol"), bound("rtol")) {
                assert!(
                    (a - b).abs() <= atol + rtol * b.abs(),
                    "{name}[{i}]: {a} is not {b}"
                );
            }
        }
        if norm == 0.0 {
            assert_eq!(error, 0.0, "{name} must be exactly zero");
            return;
        }
        let relative = (error / norm).sqrt();
        let limit = bound("rel_l2").expect("a tolerance");
        if std::env::var_os("POLLEN_GOLDEN_VERBOSE").is_some() {
            use std::io::Write as _;
            writeln!(std::io::stdout(), "{relative:.2e} of {limit:.0e} {name}").expect("a stdout");
        }
        assert!(
            relative <= limit,
            "{name}: relative error {relative:.2e} above {limit:.1e}"
        );
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

    /// Fails when a weight was not used or a result was not compared.
    fn finish(&self) {
        let used = self.used.borrow();
        let left: Vec<&String> = self
            .tensors
            .keys()
            .filter(|name| !name.starts_with("input.") && !used.contains(*name))
            .collect();
        assert!(left.is_empty(), "not compared: {left:?}");
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

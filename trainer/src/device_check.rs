//! Whether a device computes what it should: stages that each take minutes, measure something against
//! a bound and say so. `pollen gpu-check` runs them.
//!
//! | module | stage |
//! |---|---|
//! | `golden` | the published code's results, in f32 |
//! | `bf16` | the operations that the model spends its time in, in bf16 |
//! | `gradients` | one training step against the CPU |
//! | `exchange` | training steps through NCCL |
//! | `soak` | memory over many steps |
//! | `checkpoint` | state saved on one device and restored on another |

mod bf16;
mod checkpoint;
mod exchange;
mod golden;
mod gradients;
mod soak;

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use pollen_core::{ActionSpace, Seed};
use pollen_model::{FlowerConfig, Precision};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::bench::Bench;
use crate::data_parallel::to_device;
use crate::device::DeviceKind;
use crate::error::Error;
use crate::optim::host;

/// Relative error that f32 results may have on a GPU, where matrix products may run as TF32, with 10
/// bits of mantissa. A wrong kernel is off by far more.
const TF32_ALLOWANCE: f64 = 5e-3;

/// A model and the action spaces that it is built for.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Sizes and switches.
    pub model: FlowerConfig,
    /// Action spaces.
    pub spaces: Vec<ActionSpace>,
}

/// What the stages work with.
#[derive(Clone, Debug)]
pub struct Site {
    /// The device that is checked.
    pub device: Device,
    /// Its kind.
    pub kind: DeviceKind,
    /// A model of about a million parameters.
    pub small: Subject,
    /// The model at its full width.
    pub full: Subject,
    /// Folder of the golden tensors.
    pub golden: PathBuf,
    /// Folder for what stages write.
    pub scratch: PathBuf,
    /// Training steps of the soak.
    pub soak_steps: u64,
}

impl Site {
    /// Returns the relative error that f32 results may have beyond the bounds made for f32.
    fn allowance(&self) -> f64 {
        match self.kind {
            DeviceKind::Cpu => 0.0,
            DeviceKind::Cuda => TF32_ALLOWANCE,
        }
    }
}

/// One thing that was measured, and its bound.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Finding {
    /// What was measured.
    pub what: String,
    /// The value; JSON has no infinities and writes them as null.
    pub value: Option<f64>,
    /// The largest value that is right.
    pub bound: f64,
    /// Whether it is.
    pub holds: bool,
}

/// What a stage found.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Findings {
    /// What was held against a bound.
    pub findings: Vec<Finding>,
    /// What was measured beside that.
    pub measured: serde_json::Map<String, Value>,
    /// Why the stage was not run.
    pub skipped: Option<String>,
}

impl Findings {
    /// Notes a value that must not be above a bound; NaN is above all.
    pub fn at_most(&mut self, what: impl Into<String>, value: f64, bound: f64) {
        self.findings.push(Finding {
            what: what.into(),
            value: value.is_finite().then_some(value),
            bound,
            holds: value <= bound,
        });
    }

    /// Notes something that is wrong whatever its value.
    pub fn wrong(&mut self, what: impl Into<String>) {
        self.findings.push(Finding {
            what: what.into(),
            value: None,
            bound: 0.0,
            holds: false,
        });
    }

    /// Notes a measurement without a bound.
    pub fn measured(&mut self, what: &str, value: impl Into<Value>) {
        self.measured.insert(what.into(), value.into());
    }

    /// Returns whether something was measured and all of it holds.
    pub fn pass(&self) -> bool {
        !self.findings.is_empty() && self.findings.iter().all(|finding| finding.holds)
    }

    /// Returns the finding that is farthest beyond its bound, or nearest to it.
    pub fn worst(&self) -> Option<&Finding> {
        let excess = |finding: &Finding| match finding.value {
            None => f64::INFINITY,
            Some(0.0) => 0.0,
            Some(value) => value / finding.bound,
        };
        let all = self.findings.iter();
        all.max_by(|a, b| {
            (!a.holds, excess(a))
                .partial_cmp(&(!b.holds, excess(b)))
                .unwrap_or(std::cmp::Ordering::Equal)
        })
    }
}

/// A stage.
#[derive(Clone, Copy, Debug)]
pub struct Stage {
    /// Name, for the command line and its file.
    pub name: &'static str,
    /// What it does, in one line.
    pub about: &'static str,
    /// Whether kernels are fused.
    pub fused: bool,
    work: fn(&Site, &mut Findings) -> Result<(), Error>,
}

/// All stages that this crate runs.
pub const STAGES: [Stage; 8] = [
    Stage {
        name: "golden",
        about: "the published code's results, in f32",
        fused: true,
        work: golden::run,
    },
    Stage {
        name: "golden-unfused",
        about: "the same without kernel fusion",
        fused: false,
        work: golden::run,
    },
    Stage {
        name: "bf16",
        about: "the model's matrix products and attention, and a training step, in bf16 against f32",
        fused: true,
        work: bf16::run,
    },
    Stage {
        name: "gradients",
        about: "a training step of a small model: loss, every gradient and the update, as on the CPU",
        fused: true,
        work: gradients::small,
    },
    Stage {
        name: "exchange",
        about: "training steps whose gradients go through NCCL from device memory, as without it",
        fused: true,
        work: exchange::run,
    },
    Stage {
        name: "checkpoint",
        about: "weights and moments saved here, restored on the CPU and back, to the bit",
        fused: true,
        work: checkpoint::run,
    },
    Stage {
        name: "soak",
        about: "memory over thousands of small training steps",
        fused: true,
        work: soak::run,
    },
    Stage {
        name: "gradients-full",
        about: "a training step of the whole model: loss and norms of the gradients, as on the CPU",
        fused: true,
        work: gradients::full,
    },
];

impl Stage {
    /// Runs the stage.
    ///
    /// # Errors
    /// What kept it from running to its end; a wrong result is no error but a finding.
    pub fn run(&self, site: &Site) -> Result<Findings, Error> {
        let mut findings = Findings::default();
        (self.work)(site, &mut findings)?;
        Ok(findings)
    }
}

/// Returns a subject's model in training, its zeros replaced by small values: as after some training,
/// so that gradients reach every parameter.
fn trained_a_little(
    subject: &Subject,
    precision: Precision,
    device: &Device,
) -> Result<Bench, Error> {
    const STD: f32 = 0.02;
    let mut bench = Bench::new(&subject.model, &subject.spaces, precision, 1, device)?;
    let plain = bench.device.clone().inner();
    let mut zeros: std::collections::HashMap<String, Tensor<1>> = bench
        .model
        .flat_parameters()
        .into_iter()
        .filter_map(|(name, values)| {
            let mut values = host(values);
            if values.iter().any(|&value| value != 0.0) {
                return None;
            }
            Seed::new(2).child(&name).draws().fill_normal(&mut values);
            for value in &mut values {
                *value *= STD;
            }
            Some((name, to_device(values, &plain)))
        })
        .collect();
    bench.model = bench
        .model
        .clone()
        .with_flat_parameters(&mut |name| zeros.remove(name));
    Ok(bench)
}

/// Returns the resident memory of this process, in bytes.
fn resident_bytes() -> Option<u64> {
    kibibytes(Path::new("/proc/self/status"), "VmRSS:")
}

/// Returns the memory that new processes may use without swapping, in bytes.
fn available_bytes() -> Option<u64> {
    kibibytes(Path::new("/proc/meminfo"), "MemAvailable:")
}

fn kibibytes(file: &Path, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let count: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(count * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_finding_is_one_that_fails() {
        let mut findings = Findings::default();
        assert!(!findings.pass(), "nothing was measured");
        findings.at_most("near", 0.9, 1.0);
        assert!(findings.pass());
        findings.at_most("none", f64::NAN, 1.0);
        findings.at_most("bits", 0.0, 0.0);
        assert!(!findings.pass());
        assert_eq!(findings.worst().expect("three").what, "none");
        findings.findings.remove(1);
        assert_eq!(findings.worst().expect("two").what, "near");
    }

    #[test]
    fn this_process_has_memory() {
        assert!(resident_bytes().expect("linux") > 1 << 20);
        assert!(available_bytes().expect("linux") > 0);
    }
}

//! The command line of `pollen bench`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use pollen_model::Precision;
use pollen_trainer::device::DeviceChoice;

/// Measures the training step and the policy on random batches, one JSON line for each.
///
/// It is a run's own step, without loader, checkpoints and other ranks: copies, forward and
/// backward pass, clipping, AdamW. `make bench` and `make gpu-bench` hold it against the same graph
/// in PyTorch.
///
/// Examples:
///   pollen bench --micro-batch 2,8
///   pollen bench --model configs/model/flower.toml --cameras 1 --micro-batch 64,128 --device cuda
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct BenchArgs {
    /// TOML file with the model's sizes
    #[arg(
        long,
        value_name = "FILE",
        default_value = "configs/model/flower-tiny.toml"
    )]
    pub(crate) model: PathBuf,
    /// Action spaces of the model, files in configs/embodiments; those of --batch-spaces among them
    #[arg(
        long,
        value_name = "NAME,NAME,...",
        value_delimiter = ',',
        default_value = "joint_single,eef_delta,bimanual_nav"
    )]
    pub(crate) spaces: Vec<String>,
    /// Action spaces of the samples, which take turns
    #[arg(
        long,
        value_name = "NAME,...",
        value_delimiter = ',',
        default_value = "eef_delta"
    )]
    pub(crate) batch_spaces: Vec<String>,
    /// Cameras of an observation, instead of the model file's
    #[arg(long)]
    pub(crate) cameras: Option<usize>,
    /// Steps of an action chunk, instead of the model file's
    #[arg(long)]
    pub(crate) chunk: Option<usize>,
    /// Words of every sample
    #[arg(long, default_value_t = 50)]
    pub(crate) text_len: usize,
    /// Samples of a step
    #[arg(
        long,
        value_name = "N,N,...",
        value_delimiter = ',',
        default_value = "8"
    )]
    pub(crate) micro_batch: Vec<usize>,
    /// What is measured
    #[arg(
        long,
        value_name = "WHAT,...",
        value_delimiter = ',',
        default_value = "train,latency"
    )]
    pub(crate) measure: Vec<Measure>,
    /// Euler steps of a policy call
    #[arg(long, default_value_t = 4)]
    pub(crate) denoising_steps: usize,
    /// Whether the model file's dropout rates act
    #[arg(long, value_name = "on|off", default_value = "on")]
    pub(crate) dropout: Switch,
    /// Element type that the model computes in: f32 or bf16
    #[arg(long, default_value = "f32", value_parser = super::named::<Precision>)]
    pub(crate) precision: Precision,
    /// Device to compute on: auto, cpu or cuda
    #[arg(long, default_value = "auto", value_parser = super::named::<DeviceChoice>)]
    pub(crate) device: DeviceChoice,
    /// Time to measure each setting for
    #[arg(long, default_value_t = 3.0)]
    pub(crate) seconds: f64,
    /// Steps and calls before that
    #[arg(long, default_value_t = 2)]
    pub(crate) warmup: usize,
    /// Of weights, batches and dropout
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Writes weights, the first batch, and their loss and gradient norm into this folder, for
    /// benches/pytorch/loss.py; needs --dropout off
    #[arg(long, value_name = "DIR")]
    pub(crate) dump: Option<PathBuf>,
    /// Measures single operations instead, at the shapes in these JSON lines of
    /// benches/pytorch/micro.py: milliseconds of the forward pass, and of both passes
    #[arg(long, value_name = "FILE")]
    pub(crate) operations: Option<PathBuf>,
}

/// A measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Measure {
    /// Training steps, and the share of each part
    Train,
    /// Policy calls at batch 1
    Latency,
    /// Nothing, for --dump alone
    None,
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

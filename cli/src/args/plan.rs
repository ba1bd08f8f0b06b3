//! The command line of `pollen plan`.

use std::path::PathBuf;

use clap::{ArgGroup, Args};
use pollen_launcher::Link;

use super::RecipeArgs;

/// Prints what a recipe would do and cost, without starting it.
///
/// Given what one device takes, it predicts more of them: --step-seconds S (forward and backward
/// pass of one micro-batch), --from RUN (measured in a run of this recipe), or --mfu M (an
/// assumption). It says what breaks the recipe's budget of GPU-hours and which change mends it.
///
/// Examples:
///   pollen plan oxe --step-seconds 0.206 --micro-batch 128 --gpus 8,16,32,64
///   pollen plan demo --from demo --gpus 1,2,4 --link loopback
///   pollen plan oxe --mfu 0.4 --price 2.5 --json
///   pollen plan oxe --mfu 0.4 --gpus 8,64,1024 --simulate
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
#[command(group = ArgGroup::new("measure").args(["step_seconds", "from", "mfu"]))]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) recipe: RecipeArgs,
    /// Numbers of GPUs to predict, such as 8,16,32; by default powers of two up to 1,024
    #[arg(
        long,
        value_name = "N,N,...",
        value_delimiter = ',',
        requires = "measure"
    )]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) gpus: Vec<u32>,
    /// Measured seconds of one micro-batch's forward and backward pass on one GPU
    #[arg(long, value_name = "S", value_parser = positive)]
    pub(crate) step_seconds: Option<f64>,
    /// Samples of the micro-batch of --step-seconds; by default the recipe's
    #[arg(long, value_name = "B", requires = "step_seconds")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) micro_batch: Option<u64>,
    /// A run that was measured: its id or the beginning of it, its folder, or a recipe, of which
    /// the newest run is meant
    #[arg(long, value_name = "RUN")]
    pub(crate) from: Option<String>,
    /// Folder of all runs, for --from
    #[arg(long, default_value = "runs", value_name = "DIR")]
    pub(crate) runs: PathBuf,
    /// Assumed share of the peak rate that the model's operations reach, such as 0.4
    #[arg(long, value_name = "SHARE", value_parser = positive)]
    pub(crate) mfu: Option<f64>,
    /// Peak rate of one GPU for --mfu, in TFLOP/s; 989 is an H100's in bf16
    #[arg(long, value_name = "TFLOPS", default_value_t = 989.0, value_parser = positive)]
    pub(crate) peak: f64,
    /// Seconds of one update of all parameters on one GPU; with --from it is measured
    #[arg(long, value_name = "S", value_parser = positive, requires = "measure")]
    pub(crate) optimizer_seconds: Option<f64>,
    /// Deviation of a step's compute time as a share of it; 0.01, or with --from measured
    #[arg(long, value_name = "SHARE", value_parser = positive, requires = "measure")]
    pub(crate) jitter: Option<f64>,
    #[arg(long, value_name = "LINK", help = link_help(), value_parser = link)]
    pub(crate) link: Option<Link>,
    /// Price of one GPU's hour in US dollars; by default launch.usd_per_gpu_hour
    #[arg(long, value_name = "USD", value_parser = positive)]
    pub(crate) price: Option<f64>,
    #[command(flatten)]
    pub(crate) simulation: SimulationArgs,
    /// Prints one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// What is simulated. The defaults are assumptions: measure your own cluster.
#[derive(Debug, Args)]
#[command(next_help_heading = "Simulation")]
pub(crate) struct SimulationArgs {
    /// Simulates whole runs with jitter, stragglers, failures and checkpoints, and picks the steps
    /// between checkpoints; Young's and Daly's intervals stand beside
    #[arg(long, requires = "measure")]
    pub(crate) simulate: bool,
    /// Root of the simulation's randomness: the same seed gives the same runs
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Simulated runs for each interval
    #[arg(long, value_name = "N", default_value_t = 4)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) repeats: u32,
    /// Mean hours between failures of one GPU; 8,000 is one in 7.9 hours at 1,024 GPUs
    #[arg(long, value_name = "HOURS", default_value_t = 8000.0, value_parser = positive)]
    pub(crate) mtbf_hours: f64,
    /// Seconds from a failure to the next step: notice, replace, start, restore
    #[arg(long, value_name = "S", default_value_t = 120.0, value_parser = positive)]
    pub(crate) restart_seconds: f64,
    /// Mean hours between slow phases of one GPU
    #[arg(long, value_name = "HOURS", default_value_t = 2000.0, value_parser = positive)]
    pub(crate) straggler_hours: f64,
    /// How many times longer its steps take then
    #[arg(long, value_name = "FACTOR", default_value_t = 1.3, value_parser = positive)]
    pub(crate) straggler_slowdown: f64,
    /// Mean minutes that a slow phase lasts
    #[arg(long, value_name = "MINUTES", default_value_t = 30.0, value_parser = positive)]
    pub(crate) straggler_minutes: f64,
    /// GB/s at which one worker copies its part of a checkpoint, while training stands still
    #[arg(long, value_name = "GB/S", default_value_t = 10.0, value_parser = positive)]
    pub(crate) copy_rate: f64,
    /// GB/s at which one worker writes its part, beside training
    #[arg(long, value_name = "GB/S", default_value_t = 0.5, value_parser = positive)]
    pub(crate) write_rate: f64,
    /// Seconds from the last byte until a checkpoint is published
    #[arg(long, value_name = "S", default_value_t = 1.0, value_parser = positive)]
    pub(crate) publish_seconds: f64,
}

fn link_help() -> String {
    let known: Vec<String> = Link::known()
        .map(|(name, meaning)| format!("{name} ({meaning})"))
        .collect();
    format!(
        "How the GPUs are joined: {}; or rates of an all-reduce in GB/s, such as \
         gpus=8,inside=476,between=331. By default h100-ndr, or loopback for a run on CPUs",
        known.join("; ")
    )
}

fn link(text: &str) -> Result<Link, String> {
    Link::parse(text).map_err(|error| error.to_string())
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number.is_finite() => Ok(number),
        _ => Err("write a number above 0".into()),
    }
}

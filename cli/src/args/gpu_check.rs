//! The command line of `pollen gpu-check`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

/// Checks that a GPU computes what it should, in stages of minutes; --list says which.
///
/// Each stage writes OUT/STAGE.json as soon as it ends. Run the same command again after it was
/// cut: stages that passed with this very binary are kept. A stage that fails, hangs or crashes does
/// not stop the others; the table at the end says why, and the exit code is 75 if any failed.
/// Stages run in a process of their own, which is ended when one takes longer than --limit.
///
/// It needs recipes/, configs/, demo/ and tests/golden/ below the current folder, as in the
/// repository and in the archive of make dist.
///
/// Examples:
///   pollen gpu-check
///   pollen gpu-check --stage golden --stage bf16 --out /data/check
///   pollen gpu-check --device cpu --quick        tries the stages themselves, without a GPU
#[derive(Clone, Debug, Args)]
#[command(verbatim_doc_comment)]
#[allow(clippy::struct_excessive_bools, reason = "switches of a command line")]
pub(crate) struct GpuCheckArgs {
    /// Only this stage; may be repeated
    #[arg(long = "stage", value_name = "NAME")]
    pub(crate) stages: Vec<String>,
    /// Lists the stages and what is known of them in OUT, and stops
    #[arg(long)]
    pub(crate) list: bool,
    /// Folder of the results
    #[arg(long, default_value = "gpu-check", value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// What is checked
    #[arg(long, default_value = "cuda")]
    pub(crate) device: CheckedDevice,
    /// Folder of the golden tensors
    #[arg(long, default_value = "tests/golden", value_name = "DIR")]
    pub(crate) golden: PathBuf,
    /// A tenth of the training steps
    #[arg(long)]
    pub(crate) quick: bool,
    /// Runs stages again that passed
    #[arg(long)]
    pub(crate) again: bool,
    /// Longest time of a stage
    #[arg(long, default_value = "8m", value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) limit: Duration,
    /// Runs the stages in this process: what the command starts itself with
    #[arg(long, hide = true)]
    pub(crate) here: bool,
    /// Is one rank of the stage nccl: what that stage starts
    #[arg(long, hide = true, value_name = "RANK,WORLD,GPU,STORE", value_parser = nccl_rank)]
    pub(crate) nccl_rank: Option<NcclRank>,
}

/// One rank of the stage `nccl`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NcclRank {
    pub(crate) rank: u32,
    pub(crate) world: u32,
    pub(crate) gpu: usize,
    /// Address of the store.
    pub(crate) store: String,
}

fn nccl_rank(text: &str) -> Result<NcclRank, String> {
    let parts: Vec<&str> = text.splitn(4, ',').collect();
    let [rank, world, gpu, store] = parts[..] else {
        return Err("write RANK,WORLD,GPU,STORE".into());
    };
    let number = |text: &str| text.parse::<u32>().map_err(|error| error.to_string());
    Ok(NcclRank {
        rank: number(rank)?,
        world: number(world)?,
        gpu: number(gpu)? as usize,
        store: store.into(),
    })
}

/// A device to check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CheckedDevice {
    /// The first NVIDIA GPU
    Cuda,
    /// The CPU, to try the stages themselves
    Cpu,
}

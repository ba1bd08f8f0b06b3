//! The command line.

mod bench;
mod gpu_check;
mod plan;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub(crate) use bench::{BenchArgs, Measure, Switch};
pub(crate) use gpu_check::{CheckedDevice, GpuCheckArgs, NcclRank};
pub(crate) use plan::{PlanArgs, SimulationArgs};

/// Trains FLOWER, a vision-language-action flow policy, on robot episodes in object storage.
///
/// A run is a recipe: `pollen launch demo` starts recipes/demo.toml, or continues its newest
/// unfinished run. Exit codes: 0 done, 1 restarts exhausted, 2 bad recipe or command line,
/// 70 internal error, 75 infrastructure fault, 85 preempted and saved, 93 do not requeue,
/// 130 interrupted and saved.
#[derive(Debug, Parser)]
#[command(name = "pollen", version, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Starts a recipe's workers and supervises them, or continues its newest unfinished run
    Launch(LaunchArgs),
    Plan(PlanArgs),
    /// Lists running runs: step, rate, workers and their last signs of life
    Ps(PsArgs),
    /// Prints the workers' logs of a run's latest start
    Logs(LogsArgs),
    /// Asks a running run to save and end, waits for it and says what was saved
    Stop(StopArgs),
    /// Runs one worker; `launch`, srun, mpirun or torchrun start it with RANK, WORLD_SIZE,
    /// MASTER_ADDR and MASTER_PORT in the environment
    Worker(WorkerArgs),
    /// Shows the resolved configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Lists, verifies, compares and deletes checkpoints
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Works on datasets
    #[command(subcommand)]
    Data(DataCommand),
    /// Describes a recipe's model
    #[command(subcommand)]
    Model(ModelCommand),
    Bench(BenchArgs),
    GpuCheck(GpuCheckArgs),
    /// Writes a checkpoint's weights under the names that others know, in Hugging Face's layout
    Export(ExportArgs),
    /// Brings published weights in
    #[command(subcommand)]
    Weights(WeightsCommand),
}

/// A recipe and what is changed in it.
#[derive(Debug, Args)]
pub(crate) struct RecipeArgs {
    /// Name of a file in recipes/, or a path
    pub(crate) recipe: String,
    /// Overrides one key, for example --set train.steps=900; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) overrides: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct LaunchArgs {
    #[command(flatten)]
    pub(crate) recipe: RecipeArgs,
    /// Folder of all runs
    #[arg(long, default_value = "runs", value_name = "DIR")]
    pub(crate) runs: PathBuf,
    /// Prints the plan and stops
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Continues although the data changed since the checkpoint, with another sample order
    #[arg(long)]
    pub(crate) accept_new_data: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Folder of all runs
    #[arg(long, default_value = "runs", value_name = "DIR")]
    pub(crate) runs: PathBuf,
    /// Lists runs that nobody works on, too
    #[arg(long)]
    pub(crate) all: bool,
    /// Prints one JSON object a line
    #[arg(long)]
    pub(crate) json: bool,
}

/// One run among those of a folder.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// A run's id or the beginning of it, its folder, or a recipe, of which the newest run is meant
    pub(crate) run: String,
    /// Folder of all runs
    #[arg(long, default_value = "runs", value_name = "DIR")]
    pub(crate) runs: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Only this worker's log
    #[arg(long)]
    pub(crate) rank: Option<u32>,
    /// Follows the logs, over restarts, until the run ends
    #[arg(short, long)]
    pub(crate) follow: bool,
}

#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// How long to wait for the run's end
    #[arg(long, default_value = "10m", value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) timeout: std::time::Duration,
}

#[derive(Debug, Args)]
pub(crate) struct WorkerArgs {
    /// Resolved recipe, as the launcher wrote it into the run's folder
    #[arg(long, value_name = "FILE")]
    pub(crate) config: PathBuf,
    /// The run's folder, where events are appended
    #[arg(long, value_name = "DIR")]
    pub(crate) run_dir: PathBuf,
    /// Object-store folder of the run, where checkpoints go
    #[arg(long, value_name = "URL")]
    pub(crate) run_url: String,
    /// Continues although the data changed since the checkpoint
    #[arg(long)]
    pub(crate) accept_new_data: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Prints every value of a recipe with the file, variable or flag it came from
    Explain(RecipeArgs),
}

/// PLACE is a run's folder (runs/demo/20261124-050351-6809fa90), its object-store URL, or one
/// checkpoint below it (s3://bucket/runs/demo/ID/checkpoints/step-00000600/g1).
#[derive(Debug, Subcommand)]
pub(crate) enum CheckpointCommand {
    /// Lists a run's checkpoints: step, generation, size, age, state
    Ls {
        /// Run folder or URL
        place: String,
        /// Prints one JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Reads every byte and compares it with the checksums; exit code 93 if anything is damaged
    Verify {
        /// Run folder or URL: all published checkpoints; or the URL of one
        place: String,
    },
    /// Compares the newest checkpoints of two places, or two checkpoints, tensor by tensor
    Diff {
        /// Run folder or URL
        first: String,
        /// Run folder or URL
        second: String,
        /// Prints one JSON object a tensor
        #[arg(long)]
        json: bool,
    },
    /// Deletes one checkpoint, first in the log, then its files; never the newest that verifies
    Rm {
        /// URL of the checkpoint, or run folder with /step-00000600/g1 at its end
        place: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum DataCommand {
    /// Computes a dataset's index and statistics (meta/pollen.json) where they are missing
    Index(RecipeArgs),
    /// Converts a dataset to LeRobotDataset v3.0 with images; the same command goes on after a kill
    Convert(ConvertArgs),
    /// Prints mean, deviation, range and quantiles of each dimension after the action transform.
    ///
    /// Reads actions and states only, never images. The result is kept beside the dataset under the
    /// hash of data and transform; the loader uses the same one.
    Stats(StatsArgs),
    /// Writes a file of configs/datasets/ from what a dataset says of itself, and checks it.
    ///
    /// Cameras, fields, rate and chunk length come from meta/info.json. The columns tell gripper
    /// polarity (correlation with the gripper's state), delta or absolute actions (comparison with
    /// the states after them), tiny ranges, copies of episodes, the share with an instruction and
    /// the share of idle frames. Each is printed with its figures and what to set, and stands as a
    /// comment in the file.
    Add(AddArgs),
    /// Writes a page and a contact sheet of some episodes: frames with times, the instruction,
    /// action curves by dimension, raw and normalised
    Inspect(InspectArgs),
}

/// Which datasets a command is about.
#[derive(Debug, Args)]
pub(crate) struct DataTargetArgs {
    /// URL or folder of a dataset, name of a recipe (all its datasets), or name of a dataset in
    /// configs/datasets/
    #[arg(value_name = "URL|DATASET|RECIPE")]
    pub(crate) target: String,
    /// With a URL: the dataset of configs/datasets/ that says what its columns are; without it they
    /// are taken as stored. With a recipe: only this one of its datasets
    #[arg(long, value_name = "NAME")]
    pub(crate) dataset: Option<String>,
    /// URL of the folder that holds the datasets, in place of data.root and POLLEN_DATA__ROOT. Without
    /// either, a recipe with an object server of its own (demo) is read from run.stage_from, which
    /// fills that server
    #[arg(long, value_name = "URL")]
    pub(crate) root: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct StatsArgs {
    #[command(flatten)]
    pub(crate) target: DataTargetArgs,
    /// Checks for constant dimensions, tiny ranges, outliers, NaN and grippers outside their range
    #[arg(long)]
    pub(crate) warn: bool,
    /// Prints one JSON object a dataset
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct AddArgs {
    /// URL or folder of a LeRobotDataset v3.0 with images
    pub(crate) url: String,
    /// What the dataset is to be called: letters, digits, _ and -
    pub(crate) name: String,
    /// Its action space, a file of configs/embodiments/; found by width and motion when not given
    #[arg(long, value_name = "NAME")]
    pub(crate) embodiment: Option<String>,
    /// The robot's name in prompts, in place of robot_type in meta/info.json
    #[arg(long, value_name = "TEXT")]
    pub(crate) robot: Option<String>,
    /// The file to write, in place of configs/datasets/NAME.toml
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Writes over a file that exists
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    pub(crate) target: DataTargetArgs,
    /// Episodes by number, for example 0,3,10-12; by default the first, the middle and the last one
    #[arg(long, value_delimiter = ',', value_name = "NUMBERS", value_parser = episode_range)]
    pub(crate) episodes: Vec<std::ops::RangeInclusive<u64>>,
    /// Frames of each episode that are shown
    #[arg(long, default_value = "8", value_name = "COUNT")]
    pub(crate) frames: std::num::NonZeroUsize,
    /// Folder that DATASET/index.html and DATASET/sheet.png are written to
    #[arg(long, default_value = "inspect", value_name = "DIR")]
    pub(crate) out: PathBuf,
}

/// Most episodes that one range may name.
const MAX_EPISODES: u64 = 100;

fn episode_range(text: &str) -> Result<std::ops::RangeInclusive<u64>, String> {
    let number = |text: &str| {
        text.trim()
            .parse::<u64>()
            .map_err(|e| format!("{text:?}: {e}"))
    };
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (number(first)?, number(last)?),
        None => (number(text)?, number(text)?),
    };
    if first > last || last - first >= MAX_EPISODES {
        return Err(format!("write FIRST-LAST, at most {MAX_EPISODES} episodes"));
    }
    Ok(first..=last)
}

#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// Folder, file or URL of the source: RLDS/TFDS, LeRobot v2 or v3, CALVIN, HDF5 of LIBERO,
    /// robomimic or robosuite
    pub(crate) source: String,
    /// Folder or URL of the dataset to make
    pub(crate) destination: String,
    /// Format of the source (rlds, lerobot, calvin, hdf5); found out when not given
    #[arg(long)]
    pub(crate) kind: Option<pollen_convert::SourceKind>,
    /// Split of an RLDS dataset, or folder of CALVIN
    #[arg(long)]
    pub(crate) split: Option<String>,
    /// Image field and the camera it becomes; may be repeated. Found by name when not given
    #[arg(long = "camera", value_name = "FIELD=CAMERA", value_parser = camera)]
    pub(crate) cameras: Vec<(String, String)>,
    /// Field that becomes (a part of) the action; may be repeated
    #[arg(long = "action", value_name = "FIELD")]
    pub(crate) actions: Vec<String>,
    /// Field that becomes (a part of) the state; may be repeated
    #[arg(long = "state", value_name = "FIELD")]
    pub(crate) states: Vec<String>,
    /// Field that holds the instruction
    #[arg(long, value_name = "FIELD")]
    pub(crate) instruction: Option<String>,
    /// Instruction of episodes that have none
    #[arg(long)]
    pub(crate) task: Option<String>,
    /// Frames a second, where the source does not say
    #[arg(long)]
    pub(crate) fps: Option<f64>,
    /// Short side of the images in pixels; by default JPEG bytes stay as they are
    #[arg(long)]
    pub(crate) resize: Option<u32>,
    /// Quality of the JPEG that PNG files and arrays are encoded as
    #[arg(long, default_value_t = 95)]
    pub(crate) jpeg_quality: u8,
    /// Turns images by 180 degrees (true) or not (false); by default where the format stores them
    /// upside down
    #[arg(long)]
    pub(crate) rotate: Option<bool>,
    /// Episodes that are read at once; by default one per core
    #[arg(long)]
    pub(crate) jobs: Option<std::num::NonZeroUsize>,
}

fn camera(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((field, camera)) if !field.is_empty() && !camera.is_empty() => {
            Ok((field.into(), camera.into()))
        }
        _ => Err("write FIELD=CAMERA, for example observation/image_0=primary".into()),
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum ModelCommand {
    /// Prints the parameters of a recipe's model by module, its operations a sample, its memory
    Describe(DescribeArgs),
}

#[derive(Debug, Args)]
pub(crate) struct DescribeArgs {
    #[command(flatten)]
    pub(crate) recipe: RecipeArgs,
    /// Prints JSON, in counts and bytes
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum WeightsCommand {
    /// Checks published weights of Florence-2 or FLOWER against a recipe's model and writes them
    /// under canonical names, to start a run from with --set init.from=DST
    Import(ImportArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// The weights: a .safetensors file or a folder of one or of shards, as a path or URL, or
    /// `hf://owner/name[@revision]` on the Hugging Face Hub
    pub(crate) source: String,
    /// Folder or URL to write to
    pub(crate) destination: String,
    /// Name of a file in recipes/, or a path: the model that the weights must fit
    #[arg(long)]
    pub(crate) recipe: String,
    /// Overrides one key of the recipe; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) overrides: Vec<String>,
    /// Prints what would become of every key, and stops
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Parameters that the source may lack: a prefix of their names, or head or vlm; may be
    /// repeated
    #[arg(long, value_name = "PREFIX")]
    pub(crate) allow_missing: Vec<String>,
    /// Keys of the source that may be left over, by prefix; may be repeated
    #[arg(long, value_name = "PREFIX")]
    pub(crate) allow_unexpected: Vec<String>,
    /// Cross-attention mask that the flow transformer was trained with: additive, boolean or none
    #[arg(long, value_name = "MASK", value_parser = named::<pollen_model::CrossAttentionMask>)]
    pub(crate) cross_attention_mask: Option<pollen_model::CrossAttentionMask>,
    /// Norm that the flow transformer was trained with: rms, or variance (early releases of timm)
    #[arg(long, value_name = "NORM", value_parser = named::<pollen_model::NormVariant>)]
    pub(crate) norm: Option<pollen_model::NormVariant>,
    /// Base of the rotary positions, where the source has no tables of them
    #[arg(long, value_name = "THETA")]
    pub(crate) rope_theta: Option<f64>,
    /// Where the prompt vector comes from, if a FLOWER checkpoint lacks it: the weights of
    /// Florence-2, or `mean` for the mean row of the checkpoint's own token table
    #[arg(long, value_name = "URL|mean")]
    pub(crate) prompt_from: Option<String>,
    /// Which weights are taken from a file that holds both
    #[arg(long, value_name = "KIND")]
    pub(crate) weights: Option<WhichWeights>,
}

/// One of two sets of weights in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum WhichWeights {
    /// The exponential moving average
    Ema,
    /// What the optimizer left
    Raw,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// Folder of a run's checkpoints (the newest that verifies is taken), of one checkpoint, or of
    /// imported weights
    pub(crate) checkpoint: String,
    /// Folder or URL to write to
    pub(crate) destination: String,
    /// The recipe that wrote it; the surest is the run's own config.toml
    #[arg(long)]
    pub(crate) recipe: String,
    /// Overrides one key of the recipe; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) overrides: Vec<String>,
    /// What is written
    #[arg(long, default_value = "flower")]
    pub(crate) what: WhatToExport,
    /// Type of the written parameters
    #[arg(long, default_value = "f32")]
    pub(crate) dtype: ExportType,
    /// Which weights of a checkpoint are written
    #[arg(long, value_name = "KIND", default_value = "raw")]
    pub(crate) weights: WhichWeights,
    /// Size of a file, unless one tensor is larger
    #[arg(long, default_value = "4 GB", value_name = "SIZE")]
    pub(crate) shard_size: pollen_core::ByteSize,
    /// Exports although the checkpoint was written with another configuration
    #[arg(long)]
    pub(crate) accept_other_recipe: bool,
}

/// What is exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum WhatToExport {
    /// The whole model under the names of the FLOWER authors' code
    Flower,
    /// The vision-language encoder, for Hugging Face transformers
    Vlm,
}

/// Type of exported parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ExportType {
    /// As they are
    F32,
    /// Rounded; tables of positions stay f32
    Bf16,
}

/// Reads a name as a recipe has it.
fn named<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(text.into()).map_err(|error: serde_json::Error| error.to_string())
}

//! The recipe as the trainer sees it: one strict struct, checked as a whole before anything runs.

use pollen_core::ActionSpace;
use pollen_model::FlowerConfig;
use serde::{Deserialize, Serialize};

use crate::schedule::{EmaConfig, Schedule};

/// A complete run.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Version of the recipe's schema; 1.
    pub version: u32,
    /// The recipe's name.
    pub name: String,
    /// Root of all randomness.
    pub seed: u64,
    /// The action spaces, in the order of their index.
    pub action_spaces: Vec<ActionSpace>,
    /// The model.
    pub model: FlowerConfig,
    /// The weights that a new run starts from.
    #[serde(default)]
    pub init: crate::initial::InitConfig,
    /// The data.
    pub data: pollen_dataloader::DataConfig,
    /// The training step.
    pub train: TrainConfig,
    /// What is measured on held-out episodes.
    pub eval: EvalConfig,
    /// When checkpoints are written and which are kept.
    pub checkpoint: pollen_checkpoints::Config,
    /// How ranks talk to each other.
    #[serde(default)]
    pub communicator: pollen_collectives::Config,
    /// When a rank counts as hanging.
    #[serde(default)]
    pub watchdog: pollen_collectives::WatchdogConfig,
    /// Requests to object storage.
    #[serde(default)]
    pub storage: pollen_storage::StorageConfig,
    /// Where events go.
    pub observe: pollen_observe::Config,
    /// The limit of the run's cost.
    pub budget: BudgetConfig,
}

/// The training step.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// What workers compute on.
    #[serde(default)]
    pub device: crate::device::DeviceChoice,
    /// Element type that the model computes in. Weights, gradients and optimizer state are f32.
    #[serde(default)]
    pub precision: pollen_model::Precision,
    /// Samples of one step over all ranks.
    pub global_batch: u32,
    /// Samples of one forward pass on one rank.
    pub micro_batch: u32,
    /// Global gradient norm above which gradients are scaled down; none leaves them alone.
    #[serde(default)]
    pub clip_norm: Option<f64>,
    /// Bytes of gradients that are reduced at a time.
    #[serde(default = "default_bucket")]
    pub bucket: pollen_core::ByteSize,
    /// Element type in which gradients travel; they are kept in f32.
    #[serde(default)]
    pub reduce_dtype: ReduceDtype,
    /// Sends a bucket of gradients while the backward pass goes on. Changes no bit.
    #[serde(default = "default_overlap")]
    pub overlap: bool,
    /// Keeps the optimizer's state and does its work in shards, one a rank (ZeRO-1), instead of
    /// the whole on every rank. Changes no bit.
    #[serde(default)]
    pub shard_optimizer: bool,
    /// Steps with a non-finite loss or gradient that are skipped before the run stops.
    #[serde(default = "default_non_finite")]
    pub max_non_finite_steps: u64,
    /// Steps after each start in which the sample ids of all ranks are gathered and checked: every
    /// sample of the global batch exactly once.
    #[serde(default = "default_audit")]
    pub audit_steps: u64,
    /// Averages of the weights, which are evaluated and saved beside the weights themselves.
    /// Without it there are none.
    #[serde(default)]
    pub ema: Option<EmaConfig>,
    /// AdamW for the two groups.
    pub optimizer: OptimizerConfig,
}

fn default_audit() -> u64 {
    100
}

fn default_overlap() -> bool {
    true
}

/// Element type of gradients on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReduceDtype {
    /// 32-bit float.
    #[default]
    F32,
    /// 16-bit brain float: half the bytes, rounded once before and once after the sum.
    Bf16,
}

fn default_bucket() -> pollen_core::ByteSize {
    pollen_core::ByteSize::mib(64)
}

fn default_non_finite() -> u64 {
    10
}

/// A group of parameters with its own learning rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// The flow transformer with its encoders and decoders.
    Head,
    /// The vision-language encoder.
    Vlm,
}

impl Group {
    /// Returns the group of a canonical parameter name.
    pub fn of(name: &str) -> Self {
        if name.starts_with("vlm.") {
            Self::Vlm
        } else {
            Self::Head
        }
    }

    /// Returns the group's name in recipes and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Head => "head",
            Self::Vlm => "vlm",
        }
    }
}

/// AdamW for the two groups.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Everything outside the vision-language encoder.
    pub head: GroupConfig,
    /// The vision-language encoder.
    pub vlm: GroupConfig,
}

impl OptimizerConfig {
    /// Returns the settings of a group.
    pub fn group(&self, group: Group) -> &GroupConfig {
        match group {
            Group::Head => &self.head,
            Group::Vlm => &self.vlm,
        }
    }
}

/// AdamW for one group.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Decay of the moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    #[serde(default = "default_eps")]
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Whether parameters named bias, layernorm, ln or norm are not decayed.
    pub exempt_norms: bool,
    /// Learning rate over the updates.
    pub schedule: Schedule,
}

fn default_eps() -> f64 {
    1e-8
}

impl Default for GroupConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-4,
            betas: [0.9, 0.95],
            eps: default_eps(),
            weight_decay: 0.1,
            exempt_norms: true,
            schedule: Schedule::Constant,
        }
    }
}

/// What is measured on held-out episodes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalConfig {
    /// Euler steps of the sampler.
    pub denoising_steps: usize,
    /// Chunks sampled for each observation. The error of their mean is what is compared with the
    /// mean predictor; the error of single samples is reported beside it.
    #[serde(default = "default_samples")]
    pub samples: usize,
    /// Frames between the chunks that are sampled in a held-out episode.
    pub frame_stride: usize,
    /// Samples of one forward pass.
    pub batch: usize,
    /// Steps from one measurement to the next; without it only the end of a run is measured. A
    /// checkpoint of a measured step carries its error, the mean over action spaces.
    #[serde(default)]
    pub every_steps: Option<u64>,
}

fn default_samples() -> usize {
    8
}

/// The limit of the run's cost.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BudgetConfig {
    /// Device-hours after which the run saves and stops.
    pub max_gpu_hours: f64,
}

impl RunConfig {
    /// Returns every fault of the recipe at once.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = self.model.validate();
        faults.extend(self.checkpoint.faults());
        faults.extend(self.observe.validate());
        faults.extend(self.watchdog.faults());
        for fault in [
            self.data.validate().err().map(|error| error.to_string()),
            self.communicator
                .validate()
                .err()
                .map(|error| error.to_string()),
        ] {
            faults.extend(fault);
        }
        if self.version != 1 {
            faults.push(format!(
                "version = {} is not known; this build reads 1",
                self.version
            ));
        }
        if self.action_spaces.is_empty() {
            faults.push("embodiments names no action space".into());
        }
        for (i, space) in self.action_spaces.iter().enumerate() {
            faults.extend(space.faults());
            if self.action_spaces[..i]
                .iter()
                .any(|other| other.name == space.name)
            {
                faults.push(format!(
                    "embodiments names action space `{}` twice",
                    space.name
                ));
            }
        }
        let train = &self.train;
        if train.steps == 0 || train.global_batch == 0 || train.micro_batch == 0 {
            faults.push(
                "train.steps, train.global_batch and train.micro_batch must be at least 1".into(),
            );
        }
        faults.extend(train.ema.iter().flat_map(EmaConfig::faults));
        for group in [Group::Head, Group::Vlm] {
            let settings = train.optimizer.group(group);
            let key = format!("train.optimizer.{}", group.name());
            faults.extend(settings.schedule.faults(&format!("{key}.schedule")));
            if settings.betas.iter().any(|beta| !(0.0..1.0).contains(beta)) {
                faults.push(format!("{key}.betas must lie in [0, 1)"));
            }
            if settings.learning_rate < 0.0 || settings.weight_decay < 0.0 || settings.eps <= 0.0 {
                faults.push(format!(
                    "{key}: learning_rate and weight_decay must not be negative, eps must be positive"
                ));
            }
        }
        let eval = &self.eval;
        if [
            eval.denoising_steps,
            eval.samples,
            eval.frame_stride,
            eval.batch,
        ]
        .contains(&0)
        {
            faults.push("eval.* must be at least 1".into());
        }
        if eval.every_steps == Some(0) {
            faults.push("eval.every_steps must be at least 1".into());
        }
        let (measured, saved) = (eval.every_steps.unwrap_or(0), self.checkpoint.every_steps);
        if self.checkpoint.keep_best > 0
            && (measured == 0 || !measured.is_multiple_of(saved.max(1)))
        {
            faults.push(format!(
                "checkpoint.keep_best needs measured checkpoints: set eval.every_steps to a \
                 multiple of checkpoint.every_steps = {saved}"
            ));
        }
        if self.budget.max_gpu_hours <= 0.0 {
            faults.push("budget.max_gpu_hours must be positive".into());
        }
        faults
    }

    /// Returns the micro-batches of one step on one rank.
    ///
    /// # Errors
    /// When `world_size` cannot make the global batch exactly; the message lists those that can.
    pub fn accumulation(&self, world_size: u32) -> Result<u32, String> {
        let (global, micro) = (self.train.global_batch, self.train.micro_batch);
        if global.is_multiple_of(micro) && (global / micro).is_multiple_of(world_size) {
            return Ok(global / micro / world_size);
        }
        let fitting: Vec<String> = (1..=global / micro)
            .filter(|world| global.is_multiple_of(micro) && (global / micro).is_multiple_of(*world))
            .map(|world| world.to_string())
            .collect();
        let fix = if fitting.is_empty() {
            "set train.micro_batch to a divisor of train.global_batch".to_owned()
        } else {
            format!("world sizes that can: {}", fitting.join(", "))
        };
        Err(format!(
            "{world_size} workers cannot make train.global_batch = {global} exactly from \
             train.micro_batch = {micro}; {fix}"
        ))
    }
}

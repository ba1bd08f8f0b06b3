//! From a recipe to a training run: the step, the optimizer, saving and resuming.
//!
//! ```text
//! Loader --HostBatch--> BatchBuilder --FlowBatch--> Flower --loss--> Gradients --all-reduce-->
//!   clip --> AdamW --> Flower      and every N steps: Recovery --> checkpoints
//! ```
//!
//! | module | job |
//! |---|---|
//! | [`run`] | a worker from its arguments to its exit code |
//! | [`training_loop`] | the loop: log, save, stop |
//! | [`step`] | one optimizer step, the whole of it |
//! | `update` | its end: norm, AdamW on this rank's shard, new weights |
//! | [`verdict`] | what all ranks decide together |
//! | [`batch`] | host batch to tensors, with noise and flow time |
//! | [`randomness`] | randomness that belongs to the sample |
//! | [`data_parallel`] | flat gradients, summed over ranks while the backward pass goes on |
//! | [`layout`] | where each parameter lies in the flat state |
//! | [`memory`] | what a rank keeps, by world size |
//! | [`optim`], [`clip`], [`schedule`] | AdamW, the global norm, learning rates and EMA decay |
//! | `ema` | averaged weights |
//! | [`recovery`] | what is saved and restored with all ranks |
//! | `initial` | the weights a new run starts from |
//! | `saving` | writing it beside the training |
//! | `contact_sheet` | the pictures of a step that was not finite |
//! | [`eval`] | error of sampled actions on held-out episodes |
//! | [`config`] | the recipe, checked as a whole |
//! | [`signals`], [`phases`] | stop flags; the phases of a step |
//! | [`pulse`], `watchdog` | where a rank is and how long it may stay there; what ends a hang |
//!
//! ```
//! use pollen_trainer::schedule::Schedule;
//! let schedule = Schedule::InverseSqrt { warmup: 1000, timescale: 400_000 };
//! assert_eq!(schedule.learning_rate(1e-4, 500), 0.5e-4);
//! ```

#![forbid(unsafe_code)]

pub mod batch;
pub mod clip;
pub mod config;
mod contact_sheet;
pub mod data_parallel;
mod ema;
pub mod error;
pub mod eval;
mod faults;
#[cfg(test)]
mod golden;
mod initial;
pub mod layout;
pub mod memory;
pub mod optim;
pub mod phases;
pub mod pulse;
pub mod randomness;
pub mod recovery;
pub mod run;
mod saving;
pub mod schedule;
pub mod signals;
pub mod step;
pub mod training_loop;
mod update;
pub mod verdict;
mod watchdog;
mod weights;

pub use config::RunConfig;
pub use error::Error;
pub use run::{WorkerArgs, run_worker};
pub use signals::StopFlags;
pub use training_loop::Outcome;

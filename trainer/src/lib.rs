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
//! | [`device_memory`] | tensors lent to the communicator where they lie |
//! | [`kernel_cache`] | where compiled and tuned GPU kernels are kept |
//! | [`layout`] | where each parameter lies in the flat state |
//! | [`memory`] | what a rank keeps, by world size |
//! | [`optim`], [`clip`], [`schedule`] | AdamW, the global norm, learning rates and EMA decay |
//! | `ema` | averaged weights |
//! | [`recovery`] | what is saved and restored with all ranks |
//! | `initial` | the weights a new run starts from |
//! | `store_events` | storage retries as events |
//! | `saving` | writing it beside the training |
//! | [`audit`] | whether the loaders delivered what the sample order says |
//! | `contact_sheet` | the pictures of a step that was not finite |
//! | [`eval`] | error of sampled actions on held-out episodes |
//! | [`config`] | the recipe, checked as a whole |
//! | [`mod@bench`] | the same step on a random batch, for measuring |
//! | [`device`] | CPU or GPU |
//! | [`device_check`] | whether a device computes what the CPU and the published code do |
//! | [`signals`], [`phases`] | stop flags; the phases of a step |
//! | [`pulse`], `watchdog` | where a rank is and how long it may stay there; what ends a hang |
//!
//! ```
//! use pollen_trainer::schedule::Schedule;
//! let schedule = Schedule::InverseSqrt { warmup: 1000, timescale: 400_000 };
//! assert_eq!(schedule.learning_rate(1e-4, 500), 0.5e-4);
//! ```

#![deny(unsafe_code)]

pub mod audit;
pub mod batch;
pub mod bench;
pub mod clip;
pub mod config;
mod contact_sheet;
pub mod data_parallel;
pub mod device;
pub mod device_check;
#[allow(
    unsafe_code,
    reason = "the one file that names raw memory, to lend it to the communicator"
)]
pub mod device_memory;
mod ema;
pub mod error;
pub mod eval;
mod faults;
#[cfg(test)]
mod golden;
mod initial;
pub mod kernel_cache;
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
mod store_events;
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

//! Plans a run, starts one worker per device, watches them, and starts them again when one fails.
//! Never links the model: workers are other processes.
//!
//! ```text
//! recipe --Plan--> text, `plan` event
//! RunDir::find_or_create --lock--> next generation
//!        |
//! Supervisor --WorkerGroup--> rank 0..n (own process group, own log, environment contract)
//!        |                        | exit codes            | events.jsonl
//!        +-- decide(exits) <------+                       v
//!        +-- restart | done | stop               Tail --> Observer (progress line)
//! ObjectServer: the demo's S3 server beside them
//! ```
//!
//! | module | job |
//! |---|---|
//! | [`config`] | recipe section `[launch]` |
//! | [`contract`] | the environment of a worker, both ways |
//! | [`decision`] | from exit codes to done, restart or stop |
//! | [`error`] | what can go wrong, and the fix |
//! | [`local`] | the workers of one generation as processes |
//! | [`lock`] | one launcher per run |
//! | `hang` | workers that make no progress: found, reported, ended |
//! | [`log_tail`] | the last lines of a worker's log |
//! | [`object_server`] | SeaweedFS for the demo |
//! | [`parent_death`] | a worker ends with its launcher |
//! | [`plan`] | size, time and cost before the start |
//! | [`process`] | how processes end and whether they live |
//! | [`run_dir`] | `runs/<recipe>/<id>/`, found again by the same command |
//! | [`scaling`] | a step on more devices, predicted from one |
//! | [`simulation`] | a run with failures in fast motion, and the checkpoint interval |
//! | [`supervisor`] | brings a run to its end |
//!
//! ```
//! use pollen_launcher::{WorkerEnv, WorkerFlags};
//! // Without a rank in flags or environment, a worker is alone.
//! let worker = WorkerEnv::detect(|_| None, &WorkerFlags::default())?;
//! assert_eq!((worker.rank, worker.world_size), (0, 1));
//! # Ok::<(), pollen_launcher::Error>(())
//! ```

#![forbid(unsafe_code)]

mod atomic_file;
mod backoff;
pub mod config;
pub mod contract;
mod credentials;
pub mod decision;
pub mod error;
mod hang;
mod hostlist;
mod http;
pub mod local;
pub mod lock;
pub mod log_tail;
pub mod object_server;
pub mod parent_death;
pub mod plan;
mod ports;
pub mod process;
pub mod run_dir;
pub mod scaling;
mod signals;
pub mod simulation;
pub mod supervisor;

pub use config::{Config, Engine, ObjectServerKind};
pub use contract::{WorkerEnv, WorkerFlags};
pub use decision::{Decision, RankExit, StopSignal, Verdict, decide};
pub use error::Error;
pub use local::{Placement, WorkerCommand, WorkerGroup};
pub use lock::{Holder, RunLock};
pub use log_tail::LogTail;
pub use object_server::{ObjectServer, find_weed};
pub use parent_death::{die_with, die_with_launcher};
pub use plan::{Plan, PlanInput, StepTime};
pub use process::{Exit, ProcessId};
pub use run_dir::{Meeting, RunDir, RunRecord, RunRequest};
pub use scaling::{Advice, Link, Measured, Prediction, Remedy, ScalingModel, Workload};
pub use simulation::{Candidate, Choice, Saving, Scenario, Trouble};
pub use supervisor::{Job, Observer, Outcome, StopHandle, Supervisor};

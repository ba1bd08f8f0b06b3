//! Sharded safetensors checkpoints with an append-only commit log, for any world size.
//!
//! Every rank writes its part, rank 0 commits: a checkpoint counts from the moment its entry stands
//! in the log, and never before. A newer attempt claims the run in the same log, so that an older
//! one that is still alive can write but not commit.
//!
//! ```text
//! claim --> log/00000001.json
//! rank 0..N: Writer --> step-00012000/g1/{model,optim}-*.safetensors --FileRecord--> rank 0
//! rank 0:    publish --> MANIFEST.json --> log/00000002.json --> LATEST (a hint)
//! restart:   claim --> newest (verifies) --> read_model, read_flat(any range), read_file
//! ```
//!
//! | module | job |
//! |---|---|
//! | `checkpoints` | the handle: claims and what all methods share |
//! | `config` | how often, how many, how hard to check |
//! | `diff` | two checkpoints tensor by tensor |
//! | `digest` | crc32c inline, sha256 on its own thread |
//! | `error` | what went wrong and what to do |
//! | `hook` | named stages, for tests that kill |
//! | `inspect` | what there is, whether it is whole, deleting by hand |
//! | `log` | the commit log and its fence |
//! | `manifest` | what a checkpoint consists of |
//! | `publish` | the commit |
//! | `restore` | the newest that verifies; ranges for any world size |
//! | `retain` | what is kept, what is deleted |
//! | `tensors` | the safetensors container |
//! | `writer` | one rank's files |
//!
//! ```
//! use std::sync::Arc;
//! use pollen_checkpoints::{Checkpoints, FlatSlice, ManifestHead, Values};
//! use pollen_storage::{Silent, Storage, StorageConfig};
//!
//! let runtime = tokio::runtime::Runtime::new()?;
//! let storage = Storage::open("memory:///doc", &StorageConfig::default(), Arc::new(Silent))?;
//! let checkpoints = Checkpoints::new(storage.join("checkpoints"), runtime.handle().clone());
//! let claim = checkpoints.claim(checkpoints.next_generation()?)?;
//! let momentum = FlatSlice { name: "m".into(), global_len: 3, offset: 0, values: Values::F32(&[1.0, 2.0, 3.0]) };
//! let file = checkpoints.writer(&claim, 10, 0, 1).write_flat(&[momentum])?;
//! let head = ManifestHead {
//!     step: 10, updates: 10, samples: 640, world_size: 1, config_hash: "c".into(),
//!     recipe_hash: "r".into(), layout_hash: "l".into(), order_version: 1,
//!     dataset_hashes: [].into(), gpu_hours_spent: 0.1, eval_error: None, extra: serde_json::Value::Null,
//! };
//! checkpoints.publish(&claim, head, vec![file])?;
//! let restored = checkpoints.newest()?.expect("one was published");
//! assert_eq!(checkpoints.read_flat(&restored, "m", 1..3)?, [2.0, 3.0]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod checkpoints;
mod config;
mod diff;
mod digest;
mod error;
mod hook;
mod inspect;
mod log;
mod manifest;
mod publish;
mod restore;
mod retain;
mod tensors;
mod writer;

pub use checkpoints::{Checkpoints, Published};
pub use config::{Config, Verify};
pub use diff::{Change, TensorDiff, diff};
pub use error::{Error, Result, Skipped};
pub use hook::StageFn;
pub use inspect::{Listed, State};
pub use log::Claim;
pub use manifest::{
    CheckpointId, FileKind, FileRecord, FlatRecord, Manifest, ManifestHead, TensorRecord,
};
pub use restore::Restored;
pub use tensors::{Dtype, Source, TensorData, TensorSlice, Values};
pub use writer::{FlatSlice, Writer};

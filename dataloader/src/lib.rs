//! Streams multi-embodiment robot episodes from Parquet row groups in object storage.
//!
//! ```text
//! Data::open     info.json, tasks, meta/pollen.json of each dataset (made once if it is not there)
//! Mixture        index -> (dataset, row group, episode, frame): a pure function of the seed
//! Loader         rank's slice of each global batch -> one GET per row group -> JPEG decode threads
//!                -> resize, augment, normalise, tokenise -> HostBatch, in order, prefetched
//! ```
//!
//! The order of samples does not depend on the number of ranks, threads or restarts: the state of a
//! loader is the number of samples consumed.
//!
//! | module | job |
//! |---|---|
//! | `bad_row_groups` | row groups that are not fetched for each of their samples |
//! | [`batch`] | tensors in host memory |
//! | `byte_cache` | row groups and footers in memory, under a cap |
//! | [`config`] | the `[data]` section of a recipe |
//! | `correlation` | how two numbers go together |
//! | [`data`] | the opened datasets of a run |
//! | [`dataset`] | one opened dataset |
//! | [`dataset_check`] | what columns say of grippers, motion, copies, words and rest |
//! | [`dataset_config`] | one dataset's section of a recipe |
//! | [`decode`] | JPEG to pixels, on a pool of threads |
//! | `disk_cache` | row groups on the node's disk, shared by its processes |
//! | [`dimension_check`] | what is suspicious about values, dimension by dimension |
//! | [`error`] | what can go wrong |
//! | `features` | checks a recipe against the stored features |
//! | [`filter`] | frames that no sample starts at |
//! | [`index`] | checksums, episode spans and statistics of a dataset |
//! | [`lerobot`] | LeRobotDataset v3.0 metadata |
//! | [`loader`] | one rank's micro-batches; held-out episodes |
//! | `mean_chunk` | the prediction of a policy that sees nothing |
//! | [`mixture`] | which dataset a sample comes from; the slice of a rank |
//! | [`pixels`] | memory of images, used again batch after batch |
//! | [`recording`] | single episodes with pictures |
//! | [`sampler`] | the order inside a dataset |
//! | [`sidecar`] | `meta/pollen.json` |
//! | [`statistics`] | statistics by a pass over low-dimensional columns |
//! | [`summary`] | figures of a mixture |
//! | [`survey`] | a dataset by its columns alone, without images or index |
//! | [`transform`] | which columns become actions, and how |
//!
//! ```
//! use pollen_core::Seed;
//! use pollen_dataloader::{DatasetOrder, RowGroupFrames, Run};
//! let groups = (0..4)
//!     .map(|g| RowGroupFrames {
//!         bytes: 8 << 20,
//!         runs: vec![Run { episode: g, first_row: 100 * g, rows: 100 }],
//!     })
//!     .collect();
//! let order = DatasetOrder::new(0, Seed::new(7), 16 << 20, groups);
//! // Any sample, without those before it; the second epoch starts at 400.
//! let sample = order.at(1_234_567);
//! assert_eq!(sample.episode, sample.frame / 100);
//! ```

#![forbid(unsafe_code)]

mod bad_row_groups;
pub mod batch;
mod byte_cache;
mod columns;
pub mod config;
mod correlation;
pub mod data;
pub mod dataset;
pub mod dataset_check;
pub mod dataset_config;
pub mod decode;
pub mod dimension_check;
mod disk_cache;
pub mod error;
mod features;
pub mod filter;
pub mod index;
pub mod lerobot;
pub mod loader;
mod mean_chunk;
pub mod mixture;
mod parquet_file;
mod pipeline;
pub mod pixels;
mod prepare;
mod recent;
pub mod recording;
mod row_group;
pub mod sampler;
pub mod sidecar;
pub mod statistics;
pub mod summary;
pub mod survey;
pub mod transform;

pub use batch::{BadSample, BatchDims, HostBatch, ModelShape};
pub use byte_cache::HeldBytes;
pub use columns::{Columns, Rows};
pub use config::{Augment, ChunkLength, DataConfig, DiskCacheConfig, WeightMeaning};
pub use data::{Data, OpenStorage};
pub use dataset::Dataset;
pub use dataset_check::{DatasetCheck, GripperVerdict, Verdict};
pub use dataset_config::{DatasetConfig, Filters, Frame, Gripper, Instruction, Motion, Source};
pub use dimension_check::{Dimension, DimensionCheck, Finding};
pub use error::{Error, Result};
pub use filter::{FrameFilter, Idle};
pub use index::index_dataset;
pub use loader::{HoldoutLoader, Loader, LoaderArgs, check_sizes};
pub use mixture::{Mixture, MixtureSource};
pub use recording::{Picture, Recording};
pub use sampler::{DatasetOrder, ORDER_VERSION, RowGroupFrames, Run, SampleRef};
pub use sidecar::{SIDECAR_PATH, SIDECAR_VERSION, Sidecar};
pub use statistics::Statistics;
pub use summary::{DatasetSummary, Summary};
pub use survey::Survey;
pub use transform::ColumnTransform;

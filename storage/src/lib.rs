//! Object storage behind one handle: URLs, retries that are counted and reported, request limits.
//!
//! The same calls reach S3 and what speaks like it (`s3://bucket/prefix`), Azure
//! (`az://container/prefix`), Google Cloud Storage (`gs://bucket/prefix`), folders (`file:///...` or a
//! plain path), web servers (`http://` and `https://`, to read only) and process memory
//! (`memory:///name`, for tests).
//!
//! ```text
//! url --Location--> Backend --+
//!                             v
//! caller --get/put--> Storage --attempt under a time limit--> object_store
//!                        |                   |
//!                        |<-- Verdict -------+   again, final, or unknown
//!                        +-- Observer: every retry and recovery; Counters
//! ```
//!
//! | module | job |
//! |---|---|
//! | `backend` | opens the store a URL names; S3 credentials from `AWS_*` variables |
//! | `clouds` | Azure, Google Cloud Storage and web servers |
//! | `config` | time limits and the number of requests at once |
//! | `error` | what went wrong, where, and what to change |
//! | `location` | parses URLs |
//! | `observer` | who is told about retries |
//! | `retry` | attempts, back-off, counters |
//! | `storage` | the handle |
//! | `upload` | large objects in parts |
//! | `verdict` | what a failure means: try again, or not |
//!
//! ```
//! # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
//! use std::sync::Arc;
//! use pollen_storage::{Silent, Storage, StorageConfig};
//! let storage = Storage::open("memory:///docs", &StorageConfig::default(), Arc::new(Silent))?;
//! storage.put("run/a.json", "{}".into()).await?;
//! assert_eq!(storage.join("run").list("").await?[0].path, "a.json");
//! # Ok::<(), pollen_storage::Error>(())
//! # })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod backend;
mod clouds;
mod config;
mod error;
mod location;
mod observer;
mod retry;
mod storage;
mod upload;
mod verdict;

pub use config::StorageConfig;
pub use error::{Cause, Error, Result};
pub use observer::{Observer, Recovered, Retry, Silent};
pub use retry::Counters;
pub use storage::{ObjectInfo, PutIfAbsent, Storage};

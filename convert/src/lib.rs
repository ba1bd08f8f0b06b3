//! Converts robot datasets of other formats to LeRobotDataset v3.0 with images: images byte for
//! byte, statistics exact, and a conversion that was killed goes on where it stopped.
//!
//! ```text
//! storage or disk -> Source (rlds | lerobot | calvin | hdf5) -> Recording of the mapped fields
//!   -> Episode -> DatasetWriter -> data files, one record each -> read back, checked, statistics
//! ```
//!
//! | module | job |
//! |---|---|
//! | `calvin`, `npy` | CALVIN folders: a `.npz` file a step |
//! | `columns` | numbers, images and text out of Arrow columns |
//! | `convert`, `run` | the whole way: arguments, report, order of episodes |
//! | `data_file`, `writer` | streaming writer: row groups, files, records |
//! | `episode`, `selection` | what lies between source and writer; the mapping of fields |
//! | `error` | what went wrong, in which file, and what to change |
//! | `example`, `tfrecord`, `tfds`, `rlds`, `rlds_layout` | RLDS: framing, protobuf, features |
//! | `finalize`, `metadata`, `stats` | the check at the end, `meta/`, statistics |
//! | `hdf5` | LIBERO, robomimic and robosuite files |
//! | `lerobot`, `lerobot_meta`, `video` | LeRobot v2.0 to v3.0; videos through `ffmpeg` |
//! | `parquet_file`, `reader` | row groups with one request each; storage for blocking threads |
//! | `picture` | headers, pixels, resize, encodings |
//! | `progress` | what makes a conversion go on after a kill |
//! | `schema` | features as JSON, Arrow and Hugging Face metadata |
//! | `source` | what every format gives; finding out the format |
//!
//! ```
//! # tokio::runtime::Runtime::new()?.block_on(async {
//! use std::ops::ControlFlow;
//! use pollen_convert::{ConvertArgs, convert};
//! let mut args = ConvertArgs::new("/data/bridge_dataset/1.0.0", "memory:///bridge");
//! args.mapping.cameras = vec![("observation/image_0".into(), "primary".into())];
//! let outcome = convert(&args, |progress| {
//!     let _ = (progress.episodes, progress.total_episodes);
//!     ControlFlow::Continue(())
//! });
//! // There is no such folder here.
//! assert!(outcome.await.unwrap_err().to_string().contains("/data/bridge_dataset"));
//! # Ok::<(), std::io::Error>(())
//! # })?;
//! # Ok::<(), std::io::Error>(())
//! ```

mod calvin;
mod columns;
mod convert;
mod data_file;
mod episode;
mod error;
mod example;
mod finalize;
mod hdf5;
mod lerobot;
mod lerobot_meta;
mod metadata;
mod npy;
mod parquet_file;
mod picture;
mod progress;
mod reader;
mod rlds;
mod rlds_layout;
mod run;
mod schema;
mod selection;
mod source;
mod stats;
mod tfds;
mod tfrecord;
mod video;
mod writer;

#[cfg(test)]
#[path = "../../tests/damage/mod.rs"]
mod damage;
#[cfg(test)]
mod tests;

pub use convert::{ConvertArgs, Progress, Report, Stage, convert};
pub use episode::{Episode, Matrix};
pub use error::{Error, Result};
pub use picture::{ColorHistogram, Frame, Header, PictureKind};
pub use schema::{CameraFeature, DatasetSpec, NumberFeature};
pub use selection::Mapping;
pub use source::SourceKind;
pub use writer::{DatasetWriter, Dropped, EpisodeRecord, FileRecord, WriterConfig};

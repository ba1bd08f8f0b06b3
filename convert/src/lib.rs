//! Converts robot datasets of other formats to LeRobotDataset v3.0 with images.

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
mod tests;

pub use convert::{ConvertArgs, Progress, Report, Stage, convert};
pub use episode::{Episode, Matrix};
pub use error::{Error, Result};
pub use picture::{ColorHistogram, Frame, Header, PictureKind};
pub use schema::{CameraFeature, DatasetSpec, NumberFeature};
pub use selection::Mapping;
pub use source::SourceKind;
pub use writer::{DatasetWriter, Dropped, EpisodeRecord, FileRecord, WriterConfig};

//! What can go wrong between storage and a batch.

use pollen_core::ErrorClass;

/// This crate's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why data could not be opened or loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The recipe's `[data]` section cannot be used.
    #[error("data configuration: {}", faults.join("; "))]
    Config {
        /// All faults at once, each with what to change.
        faults: Vec<String>,
    },
    /// The batch sizes do not fit the world size.
    #[error(
        "global batch {global_batch} cannot be cut into micro-batches of {micro_batch} over \
         {world_size} ranks; {advice}"
    )]
    WorldSize {
        /// Samples of a step.
        global_batch: usize,
        /// Samples of a micro-batch.
        micro_batch: usize,
        /// Ranks.
        world_size: usize,
        /// What would fit.
        advice: String,
    },
    /// Reading or writing an object failed.
    #[error("dataset `{dataset}`: {source}")]
    Storage {
        /// Dataset.
        dataset: String,
        /// The failure, with the object's path.
        source: pollen_storage::Error,
    },
    /// A file of a dataset is not what it should be.
    #[error("dataset `{dataset}`: {path}: {reason}")]
    File {
        /// Dataset.
        dataset: String,
        /// Object.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// The stored data no longer match their index.
    #[error(
        "dataset `{dataset}` changed since it was indexed: {reason}; restore it, or \
         delete its meta/pollen.json and start a new run with the new order of samples"
    )]
    Changed {
        /// Dataset.
        dataset: String,
        /// What differs.
        reason: String,
    },
    /// Kept statistics are not those of this data and this transform.
    #[error(
        "dataset `{dataset}`: the statistics in {path} are not for this run: {reason}; delete the \
         file and they are taken again"
    )]
    Statistics {
        /// Dataset.
        dataset: String,
        /// The file.
        path: String,
        /// What differs.
        reason: String,
    },
    /// A frame cannot be used.
    #[error("dataset `{dataset}`, episode {episode}, frame {frame}: {reason}")]
    Frame {
        /// Dataset.
        dataset: String,
        /// Episode, as stored.
        episode: u64,
        /// Global row in the dataset.
        frame: u64,
        /// What is wrong.
        reason: String,
    },
    /// The tokenizer cannot be used.
    #[error("`data.tokenizer`: {source}")]
    Tokenizer {
        /// What is wrong with it.
        source: pollen_processing::Error,
    },
    /// A dataset's statistics do not fit its action space.
    #[error("dataset `{dataset}`: {source}")]
    Processing {
        /// Dataset.
        dataset: String,
        /// What does not fit.
        source: pollen_processing::Error,
    },
    /// A part of the loader is gone: a bug, or the runtime was shut down under it.
    #[error("the loader's {part} ended early; the runtime it was started on must outlive it")]
    Ended {
        /// Which part.
        part: &'static str,
    },
}

impl Error {
    /// Returns what the caller can do.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Config { .. } | Self::WorldSize { .. } | Self::Statistics { .. } => {
                ErrorClass::User
            }
            Self::Tokenizer { source } | Self::Processing { source, .. } => source.class(),
            Self::Storage { source, .. } => source.class(),
            Self::File { .. } | Self::Changed { .. } | Self::Frame { .. } => ErrorClass::Corrupt,
            Self::Ended { .. } => ErrorClass::Fatal,
        }
    }

    pub(crate) fn config(fault: impl Into<String>) -> Self {
        Self::Config {
            faults: vec![fault.into()],
        }
    }
}

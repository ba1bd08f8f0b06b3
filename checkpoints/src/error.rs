//! What went wrong with a checkpoint, and what to do.

use std::fmt;

use pollen_core::ErrorClass;
use serde::{Deserialize, Serialize};

/// What this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A published checkpoint that was passed over, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Its step.
    pub step: u64,
    /// The generation that published it.
    pub generation: u64,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            step,
            generation,
            reason,
        } = self;
        write!(f, "step {step} of generation {generation}: {reason}")
    }
}

/// Why a checkpoint could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Storage failed.
    #[error(transparent)]
    Storage(#[from] pollen_storage::Error),
    /// A newer attempt owns the run: this process must end and publish nothing.
    #[error(
        "generation {generation} was replaced by generation {by_generation}: this process must end"
    )]
    Fenced {
        /// Ours.
        generation: u64,
        /// The one that claimed the run since.
        by_generation: u64,
    },
    /// The generation is not higher than those before it.
    #[error("generation {generation} is taken: start as generation {next}")]
    GenerationTaken {
        /// What was asked for.
        generation: u64,
        /// The first free number.
        next: u64,
    },
    /// The same generation has published the same step before.
    #[error("step {step} was published by generation {generation} already: it cannot be changed")]
    AlreadyPublished {
        /// The step.
        step: u64,
        /// The generation.
        generation: u64,
    },
    /// The files do not make up a checkpoint.
    #[error("the checkpoint of step {step} is not complete: {}", faults.join("; "))]
    Incomplete {
        /// The step.
        step: u64,
        /// All faults at once.
        faults: Vec<String>,
    },
    /// Stored bytes are not what was written.
    #[error("{url} is damaged: {reason}")]
    Corrupt {
        /// The object.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// There are published checkpoints, but none can be used.
    #[error(
        "no checkpoint below {url} can be restored: {}; restore the files, or start a new run",
        reasons.join("; ")
    )]
    NothingVerifies {
        /// The folder of the checkpoints.
        url: String,
        /// Each with what is wrong with it.
        reasons: Vec<String>,
    },
    /// The checkpoint has no such file, array or range.
    #[error("{url} holds no {what}: it was made by another recipe or version")]
    Absent {
        /// The checkpoint's folder.
        url: String,
        /// What was asked for.
        what: String,
    },
    /// The checkpoint is the one a restart needs.
    #[error(
        "step {step} of generation {generation} is the newest checkpoint that verifies: a restart \
         needs it, so it is kept"
    )]
    Protected {
        /// The step.
        step: u64,
        /// The generation.
        generation: u64,
    },
    /// The operating system gave no thread or no random bytes.
    #[error("the operating system failed: {source}")]
    System {
        /// The operating system's reason.
        source: std::io::Error,
    },
}

impl Error {
    /// Returns what a caller can do. A fenced process must end without being started again.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Storage(error) => error.class(),
            Self::Absent { .. } | Self::Protected { .. } => ErrorClass::User,
            Self::GenerationTaken { .. } | Self::System { .. } => ErrorClass::Retryable,
            Self::Corrupt { .. } | Self::NothingVerifies { .. } => ErrorClass::Corrupt,
            Self::Fenced { .. } | Self::AlreadyPublished { .. } | Self::Incomplete { .. } => {
                ErrorClass::Fatal
            }
        }
    }
}

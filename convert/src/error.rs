//! What went wrong, in which file, and what to change.

use std::fmt;

use pollen_core::ErrorClass;

/// What this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a dataset could not be converted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Storage failed; the message names the object.
    #[error(transparent)]
    Storage(#[from] pollen_storage::Error),
    /// A local file could not be read or written.
    #[error("{file}: {source}")]
    Io {
        /// The file.
        file: String,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A file holds what its format does not allow.
    #[error("{file} is broken at byte {offset}: {reason}; copy it again from its origin")]
    Corrupt {
        /// The file.
        file: String,
        /// Where in the file.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// A file cannot be used as it is.
    #[error("{file}: {reason}")]
    Invalid {
        /// The file.
        file: String,
        /// What is wrong and, where it helps, what to do.
        reason: String,
    },
    /// The arguments do not fit the source or each other.
    #[error("{reason}")]
    Arguments {
        /// What is wrong and what to write instead.
        reason: String,
    },
    /// One episode cannot be used; a conversion goes on without it and reports it.
    #[error("{episode}: {reason}")]
    Unusable {
        /// The episode, as its source names it.
        episode: String,
        /// Why.
        reason: String,
    },
    /// A Parquet file could not be written.
    #[error("{file} cannot be written: {source}")]
    Write {
        /// The file.
        file: String,
        /// The reason.
        source: parquet::errors::ParquetError,
    },
    /// What was written is not what was read back.
    #[error("{file} was not stored as written: {reason}; delete the destination and convert again")]
    Verification {
        /// The file.
        file: String,
        /// The difference.
        reason: String,
    },
    /// The caller asked to stop; the same command goes on where this one stopped.
    #[error("stopped by request; the same command goes on after {files} finished data files")]
    Stopped {
        /// Data files finished so far.
        files: usize,
    },
    /// A worker of this crate panicked.
    #[error("a conversion worker panicked: {reason}")]
    Panicked {
        /// What is known.
        reason: String,
    },
}

impl Error {
    /// Returns what a caller can do.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Storage(source) => source.class(),
            Self::Io { .. } | Self::Stopped { .. } => ErrorClass::Retryable,
            Self::Corrupt { .. } | Self::Unusable { .. } | Self::Verification { .. } => {
                ErrorClass::Corrupt
            }
            Self::Invalid { .. } | Self::Arguments { .. } => ErrorClass::User,
            Self::Write { .. } | Self::Panicked { .. } => ErrorClass::Fatal,
        }
    }

    pub(crate) fn invalid(file: impl Into<String>, reason: impl fmt::Display) -> Self {
        Self::Invalid {
            file: file.into(),
            reason: reason.to_string(),
        }
    }

    pub(crate) fn corrupt(file: impl Into<String>, offset: u64, reason: impl fmt::Display) -> Self {
        Self::Corrupt {
            file: file.into(),
            offset,
            reason: reason.to_string(),
        }
    }

    pub(crate) fn arguments(reason: impl Into<String>) -> Self {
        Self::Arguments {
            reason: reason.into(),
        }
    }

    pub(crate) fn unusable(episode: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unusable {
            episode: episode.into(),
            reason: reason.into(),
        }
    }
}

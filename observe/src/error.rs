//! What can go wrong with an event file.

use std::io;
use std::path::PathBuf;

use pollen_core::ErrorClass;

/// Why an event could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The event file could not be opened.
    #[error("cannot open the event file {}: {source}; check that its folder exists and is writable", path.display())]
    Open {
        /// The event file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// A record could not be appended.
    #[error("cannot append to the event file {}: {source}; free disk space or mend the disk", path.display())]
    Write {
        /// The event file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The operating system took only a part of a record.
    #[error("only {written} of {expected} bytes of an event fitted into {}; free disk space", path.display())]
    Short {
        /// The event file.
        path: PathBuf,
        /// Bytes taken.
        written: usize,
        /// Bytes of the record.
        expected: usize,
    },
    /// The event file could not be read.
    #[error("cannot read the event file {}: {source}", path.display())]
    Read {
        /// The event file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// A line is whole but is not a record.
    #[error("{} line {line} is not an event: {source}; remove that line to go on", path.display())]
    Line {
        /// The event file.
        path: PathBuf,
        /// Line number, from 1.
        line: u64,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// A record could not be turned into JSON.
    #[error("cannot encode a `{kind}` event: {source}")]
    Encode {
        /// The event's kind.
        kind: &'static str,
        /// What the encoder said.
        source: serde_json::Error,
    },
}

impl Error {
    /// Returns what a caller can do about it.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Open { .. } | Self::Read { .. } => ErrorClass::User,
            Self::Write { .. } | Self::Short { .. } => ErrorClass::Retryable,
            Self::Line { .. } => ErrorClass::Corrupt,
            Self::Encode { .. } => ErrorClass::Fatal,
        }
    }
}

//! What went wrong, where, and what to change.

use std::time::Duration;

use pollen_core::ErrorClass;

/// What this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The error below one of ours.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why an object could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URL or the path cannot name an object.
    #[error("`{url}` cannot be used: {reason}")]
    InvalidUrl {
        /// As given.
        url: String,
        /// What is wrong and what to write instead.
        reason: String,
    },
    /// There is no such object.
    #[error("{url} does not exist")]
    NotFound {
        /// URL of the object.
        url: String,
    },
    /// There is no such bucket.
    #[error(
        "bucket `{bucket}` does not exist at {endpoint}: create it, or correct the URL or AWS_ENDPOINT_URL"
    )]
    NoBucket {
        /// Name of the bucket.
        bucket: String,
        /// Address of the server.
        endpoint: String,
    },
    /// The server or the operating system refused access.
    #[error("{operation} of {url} was refused: {hint} ({source})")]
    PermissionDenied {
        /// The operation.
        operation: &'static str,
        /// URL of the object.
        url: String,
        /// What to check.
        hint: &'static str,
        /// The answer.
        source: Cause,
    },
    /// A conditional write was sent and its answer is unknown: it may or may not have happened.
    #[error("it is not known whether {url} was written: read it back ({source})")]
    Ambiguous {
        /// URL of the object.
        url: String,
        /// How the answer was lost.
        source: Cause,
    },
    /// Every attempt failed for reasons that may pass.
    #[error(
        "{operation} of {url} failed {attempts} times in {after:.1?}: check the server or raise `storage.retry_for` (last: {source})"
    )]
    Exhausted {
        /// The operation.
        operation: &'static str,
        /// URL of the object.
        url: String,
        /// Attempts made.
        attempts: u32,
        /// Time since the first.
        after: Duration,
        /// The last attempt's error.
        source: Cause,
    },
    /// The disk or the quota is full.
    #[error("no space left for {url}: free some or choose another folder ({source})")]
    DiskFull {
        /// URL of the object.
        url: String,
        /// The operating system's reason.
        source: Cause,
    },
    /// The object ends before the range that was asked for.
    #[error("{url} ends before byte {end}: the file is truncated or was replaced")]
    Short {
        /// URL of the object.
        url: String,
        /// End of the range.
        end: u64,
    },
    /// The request will never succeed as it is.
    #[error("{operation} of {url} failed: {source}")]
    Rejected {
        /// The operation.
        operation: &'static str,
        /// URL of the object.
        url: String,
        /// The answer.
        source: Cause,
    },
}

impl Error {
    /// Returns what a caller can do.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::InvalidUrl { .. }
            | Self::NotFound { .. }
            | Self::NoBucket { .. }
            | Self::PermissionDenied { .. } => ErrorClass::User,
            Self::Ambiguous { .. } | Self::Exhausted { .. } | Self::DiskFull { .. } => {
                ErrorClass::Retryable
            }
            Self::Short { .. } => ErrorClass::Corrupt,
            Self::Rejected { .. } => ErrorClass::Fatal,
        }
    }

    /// Returns whether the object is known not to exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }
}

/// One attempt got no answer in time.
#[derive(Debug, thiserror::Error)]
#[error("no answer within {limit:.1?}")]
pub(crate) struct NoAnswer {
    pub(crate) limit: Duration,
}

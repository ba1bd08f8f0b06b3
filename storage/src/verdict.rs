//! What a failed attempt means: try again, or not.
//!
//! `object_store` keeps the HTTP status of most answers only in its text, so the text is read
//! where no type carries it. The unit tests and the tests against a real socket pin the wording.

use std::error::Error as _;
use std::io;
use std::time::Duration;

use object_store::Error as StoreError;
use object_store::client::{HttpError, HttpErrorKind};

use crate::error::{Cause, NoAnswer};

/// How an attempt failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The store answered, or could not be reached.
    Store(StoreError),
    /// Nothing came within the limit.
    NoAnswer(NoAnswer),
    /// The object is shorter than the range.
    Short,
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// Runs a request under a time limit.
pub(crate) async fn within<T>(
    limit: Duration,
    request: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(limit, request).await {
        Ok(outcome) => Ok(outcome?),
        Err(_) => Err(Failure::no_answer(limit)),
    }
}

impl Failure {
    pub(crate) fn no_answer(limit: Duration) -> Self {
        Self::NoAnswer(NoAnswer { limit })
    }

    /// Turns the failure into the source of one of our errors.
    pub(crate) fn into_cause(self) -> Cause {
        match self {
            Self::Store(error) => error.into(),
            Self::NoAnswer(error) => error.into(),
            Self::Short => "the object is shorter than the range".into(),
        }
    }

    /// Returns what the failure means.
    pub(crate) fn verdict(&self) -> Verdict {
        match self {
            Self::Store(error) => judge(error),
            Self::NoAnswer(_) => Verdict::Transient { sent: true },
            Self::Short => Verdict::Range,
        }
    }
}

/// What a failure means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// There is no such object.
    NotFound,
    /// There is no such bucket.
    NoBucket,
    /// Access was refused.
    Denied,
    /// No credentials could be found.
    NoCredentials,
    /// The object exists already.
    Exists,
    /// The disk is full.
    DiskFull,
    /// The range lies outside the object.
    Range,
    /// It may pass; `sent`: the request may have been carried out all the same.
    Transient { sent: bool },
    /// It will not pass.
    Permanent,
}

fn judge(error: &StoreError) -> Verdict {
    let text = error.to_string();
    let no_bucket = [
        "<Code>NoSuchBucket</Code>",
        "<Code>ContainerNotFound</Code>",
    ];
    if no_bucket.iter().any(|code| text.contains(code)) {
        return Verdict::NoBucket;
    }
    // The address at which cloud machines ask for credentials: nobody else has it.
    if text.contains("http://169.254.169.254/") {
        return Verdict::NoCredentials;
    }
    if let Some(verdict) = status(&text).and_then(|status| judge_status(status, &text)) {
        return verdict;
    }
    match error {
        StoreError::NotFound { .. } => return Verdict::NotFound,
        StoreError::AlreadyExists { .. }
        | StoreError::Precondition { .. }
        | StoreError::NotModified { .. } => return Verdict::Exists,
        StoreError::PermissionDenied { .. } | StoreError::Unauthenticated { .. } => {
            return Verdict::Denied;
        }
        _ => {}
    }
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(http) = error.downcast_ref::<HttpError>() {
            let sent = http.kind() != HttpErrorKind::Connect;
            return Verdict::Transient { sent };
        }
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return judge_io(io.kind());
        }
        cause = error.source();
    }
    let outside = [
        "Out of range of file",
        "Requested range was invalid",
        "Wanted range starting at",
    ];
    if outside.iter().any(|phrase| text.contains(phrase)) {
        return Verdict::Range;
    }
    if text.contains("Server returned error response") {
        return Verdict::Transient { sent: true };
    }
    Verdict::Permanent
}

/// Finds the HTTP status in the client's text.
fn status(text: &str) -> Option<u16> {
    let (_, after) = text.split_once("non-2xx status code: ")?;
    after.get(..3)?.parse().ok()
}

fn judge_status(status: u16, text: &str) -> Option<Verdict> {
    let verdict = match status {
        400 if text.contains("<Code>RequestTimeout</Code>") => Verdict::Transient { sent: true },
        400 if text.contains("<Code>ExpiredToken</Code>") => Verdict::Denied,
        401 | 403 => Verdict::Denied,
        404 => Verdict::NotFound,
        // What Azure answers to a write of a name that is taken.
        409 if text.contains("<Code>BlobAlreadyExists</Code>") => Verdict::Exists,
        // S3 answers 409 while another conditional write of the same key is under way.
        409 | 429 => Verdict::Transient { sent: false },
        416 => Verdict::Range,
        304 | 412 => Verdict::Exists,
        501 => Verdict::Permanent,
        408 | 500..=599 => Verdict::Transient { sent: true },
        _ => return None,
    };
    Some(verdict)
}

fn judge_io(kind: io::ErrorKind) -> Verdict {
    use io::ErrorKind as K;
    match kind {
        K::NotFound => Verdict::NotFound,
        K::AlreadyExists => Verdict::Exists,
        K::StorageFull | K::QuotaExceeded | K::FileTooLarge => Verdict::DiskFull,
        K::PermissionDenied | K::ReadOnlyFilesystem => Verdict::Denied,
        K::ConnectionRefused => Verdict::Transient { sent: false },
        K::ConnectionReset
        | K::ConnectionAborted
        | K::BrokenPipe
        | K::Interrupted
        | K::NetworkDown
        | K::NetworkUnreachable
        | K::HostUnreachable
        | K::ResourceBusy
        | K::StaleNetworkFileHandle
        | K::TimedOut
        | K::UnexpectedEof
        | K::WouldBlock => Verdict::Transient { sent: true },
        _ => Verdict::Permanent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(source: impl Into<Cause>) -> StoreError {
        StoreError::Generic {
            store: "S3",
            source: source.into(),
        }
    }

    #[test]
    fn statuses_are_told_apart() {
        let told = |status: &str| {
            judge(&generic(format!(
                "Server returned non-2xx status code: {status}: <Error/>"
            )))
        };
        assert_eq!(told("503 Slow Down"), Verdict::Transient { sent: true });
        assert_eq!(
            told("429 Too Many Requests"),
            Verdict::Transient { sent: false }
        );
        assert_eq!(told("403 Forbidden"), Verdict::Denied);
        assert_eq!(told("400 Bad Request"), Verdict::Permanent);
        assert_eq!(told("416 Range Not Satisfiable"), Verdict::Range);
    }

    #[test]
    fn io_errors_are_told_apart() {
        let told = |kind: io::ErrorKind| judge(&generic(io::Error::from(kind)));
        assert_eq!(told(io::ErrorKind::StorageFull), Verdict::DiskFull);
        assert_eq!(told(io::ErrorKind::FileTooLarge), Verdict::DiskFull);
        assert_eq!(told(io::ErrorKind::ReadOnlyFilesystem), Verdict::Denied);
        assert_eq!(
            told(io::ErrorKind::ConnectionRefused),
            Verdict::Transient { sent: false }
        );
    }
}

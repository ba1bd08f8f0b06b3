//! Who is told about retries, so that they reach the run's events and the screen.

use std::fmt::Debug;
use std::time::Duration;

/// An attempt that failed and will be made again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retry {
    /// The operation: `get`, `put`, `list` ...
    pub operation: &'static str,
    /// URL of the object or folder.
    pub path: String,
    /// The number of the failed attempt, from 1.
    pub attempt: u32,
    /// Time since the operation began.
    pub waited: Duration,
    /// Why the attempt failed.
    pub error: String,
}

/// An operation that succeeded after at least one failed attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// The operation.
    pub operation: &'static str,
    /// URL of the object or folder.
    pub path: String,
    /// Attempts made, the successful one included.
    pub attempts: u32,
    /// Time since the operation began.
    pub waited: Duration,
}

/// Receives retries and recoveries. Called from I/O tasks: must not block.
pub trait Observer: Send + Sync + Debug {
    /// Takes note of a failed attempt that will be made again.
    fn retry(&self, retry: &Retry);
    /// Takes note of an operation that succeeded after failed attempts.
    fn recovered(&self, recovered: &Recovered);
}

/// An observer that ignores everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn retry(&self, _: &Retry) {}
    fn recovered(&self, _: &Recovered) {}
}

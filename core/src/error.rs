//! Error classes decide what happens next; exit codes tell schedulers the same thing.

use std::fmt;

/// What a caller can do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// The user must change something: configuration, credentials, command line. Exit code 2.
    User,
    /// Trying again, here or on another node, may succeed. Exit code 75.
    Retryable,
    /// Stored bytes are wrong: skip and count, or stop above the cap. Exit code 93.
    Corrupt,
    /// A bug or an impossible state. Exit code 70.
    Fatal,
}

/// Exit codes of `pollen`: schedulers and the launcher decide by them.
///
/// ```
/// use pollen_core::ExitCode;
/// assert_eq!(ExitCode::Preempted.code(), 85);
/// assert_eq!(ExitCode::from_code(93), Some(ExitCode::DoNotRequeue));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitCode {
    /// The run is complete.
    Done,
    /// The restart budget is used up.
    RestartsExhausted,
    /// Bad configuration, command line, credentials, bucket or world size.
    Usage,
    /// A bug.
    Internal,
    /// Disk full, device or network fault: this node is suspect.
    Infrastructure,
    /// Preempted; a checkpoint was saved; requeue.
    Preempted,
    /// Requeueing cannot help: bad data above the cap, changed dataset, too many non-finite steps,
    /// budget spent.
    DoNotRequeue,
    /// Interrupted by the user; a checkpoint was saved.
    Interrupted,
}

impl ExitCode {
    const ALL: [Self; 8] = [
        Self::Done,
        Self::RestartsExhausted,
        Self::Usage,
        Self::Internal,
        Self::Infrastructure,
        Self::Preempted,
        Self::DoNotRequeue,
        Self::Interrupted,
    ];

    /// Returns the number handed to the operating system.
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::RestartsExhausted => 1,
            Self::Usage => 2,
            Self::Internal => 70,
            Self::Infrastructure => 75,
            Self::Preempted => 85,
            Self::DoNotRequeue => 93,
            Self::Interrupted => 130,
        }
    }

    /// Returns the meaning of a number, if it is one of ours.
    pub fn from_code(code: i32) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|exit| i32::from(exit.code()) == code)
    }
}

impl From<ErrorClass> for ExitCode {
    fn from(class: ErrorClass) -> Self {
        match class {
            ErrorClass::User => Self::Usage,
            ErrorClass::Retryable => Self::Infrastructure,
            ErrorClass::Corrupt => Self::DoNotRequeue,
            ErrorClass::Fatal => Self::Internal,
        }
    }
}

impl fmt::Display for ExitCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let meaning = match self {
            Self::Done => "done",
            Self::RestartsExhausted => "restart budget exhausted",
            Self::Usage => "bad configuration or command line",
            Self::Internal => "internal error",
            Self::Infrastructure => "infrastructure fault",
            Self::Preempted => "preempted, checkpoint saved",
            Self::DoNotRequeue => "stopped for good",
            Self::Interrupted => "interrupted, checkpoint saved",
        };
        write!(f, "{meaning} (exit {})", self.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_round_trip() {
        for exit in ExitCode::ALL {
            assert_eq!(ExitCode::from_code(i32::from(exit.code())), Some(exit));
        }
        assert_eq!(ExitCode::from_code(137), None);
    }
}

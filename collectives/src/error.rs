//! What can go wrong between ranks, said so that the reader knows which rank to look at.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pollen_core::ErrorClass;

use crate::buffer::DType;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// How a rank is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absence {
    /// Its connection to the store broke: the process or its node is dead.
    Died,
    /// It closed its communicator in good order.
    Left,
    /// It is connected, as far as the store knows, but was not heard from in time.
    Silent,
    /// It was never there.
    NeverCame,
}

impl fmt::Display for Absence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Died => "died",
            Self::Left => "left",
            Self::Silent => "silent",
            Self::NeverCame => "never came",
        })
    }
}

/// A rank that others waited for in vain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Absent {
    /// The rank.
    pub rank: u32,
    /// Its host name, if it registered one.
    pub host: Option<String>,
    /// How it is missing.
    pub how: Absence,
}

impl fmt::Display for Absent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = self.host.as_deref().unwrap_or("host unknown");
        write!(f, "rank {} ({host}, {})", self.rank, self.how)
    }
}

/// Why a store or communicator could not do what was asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The store could not be reached.
    #[error(
        "cannot reach the store at {address} within {}: {source}; check that the launcher (or rank \
         0) runs there and that the port is open",
        humantime::format_duration(*.waited)
    )]
    StoreUnreachable {
        /// `host:port`.
        address: String,
        /// How long it was tried.
        waited: Duration,
        /// The last attempt's error.
        source: Arc<std::io::Error>,
    },
    /// The store was reached once, and is gone or does not answer.
    #[error("lost the store at {address}: {source}; its process has ended or hangs")]
    StoreLost {
        /// `host:port`.
        address: String,
        /// The operating system's reason.
        source: Arc<std::io::Error>,
    },
    /// The server's address is not usable.
    #[error("cannot serve the store at {address}: {source}; choose another address or port 0")]
    Bind {
        /// The address asked for.
        address: String,
        /// The operating system's reason.
        source: Arc<std::io::Error>,
    },
    /// A key did not appear in time.
    #[error(
        "key `{key}` did not appear in the store at {address} within {}",
        humantime::format_duration(*.waited)
    )]
    KeyTimeout {
        /// The full key.
        key: String,
        /// `host:port`.
        address: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The store refused a request.
    #[error("the store at {address} refused: {reason}")]
    StoreRefused {
        /// `host:port`.
        address: String,
        /// The server's words.
        reason: String,
    },
    /// The peer does not speak our protocol.
    #[error("{address} does not speak the store's protocol: {reason}; is it another service?")]
    Protocol {
        /// `host:port`.
        address: String,
        /// What was wrong with its answer.
        reason: String,
    },
    /// A gather, barrier or join did not complete in time.
    #[error(
        "{what}: {} of {world} ranks missing after {}: {}; look at their logs, or raise the limit",
        .missing.len(),
        humantime::format_duration(*.waited),
        list(.missing)
    )]
    Missing {
        /// What was waited for.
        what: String,
        /// How many ranks there should be.
        world: u32,
        /// How long it was waited for.
        waited: Duration,
        /// Who did not come.
        missing: Vec<Absent>,
    },
    /// A gather or barrier of this name was already done by this rank.
    #[error("rank {rank} used the name `{name}` twice: put the step or a count into it")]
    NameReused {
        /// The full name.
        name: String,
        /// This rank.
        rank: u32,
    },
    /// A collective failed; the communicator is of no further use.
    #[error(
        "rank {rank} of {world}: {operation} failed: {reason}{}{}; restart all ranks from the last \
         checkpoint",
        section("; missing: ", &list(.missing)),
        section("; others report: ", &.reports.join(", "))
    )]
    Collective {
        /// This rank.
        rank: u32,
        /// The number of ranks.
        world: u32,
        /// What was being done.
        operation: String,
        /// The engine's words.
        reason: String,
        /// Which ranks are known to be missing.
        missing: Vec<Absent>,
        /// What other ranks said about their own failure.
        reports: Vec<String>,
    },
    /// `abort` was called on this rank.
    #[error("the communicator of rank {rank} was aborted on request")]
    Aborted {
        /// This rank.
        rank: u32,
    },
    /// The communication thread is gone.
    #[error("the communication thread of rank {rank} ended unexpectedly; this is a bug")]
    ThreadEnded {
        /// This rank.
        rank: u32,
    },
    /// An argument does not fit.
    #[error("rank {rank}: {operation}: {reason}")]
    Argument {
        /// This rank.
        rank: u32,
        /// What was asked for.
        operation: &'static str,
        /// Why it cannot be done.
        reason: String,
    },
    /// The back end cannot handle device memory.
    #[error("the {backend} back end takes host buffers only: copy to the host first")]
    DeviceBuffer {
        /// The back end.
        backend: &'static str,
    },
    /// A buffer has another element type than was asked for.
    #[error("expected a host buffer of {expected}, found {found}")]
    WrongType {
        /// The type asked for.
        expected: DType,
        /// What the buffer is.
        found: String,
    },
    /// The shim was not found or could not be opened.
    #[error("cannot open libpollen_gloo.so: run `make setup`; tried {}", tried.join(", "))]
    LibraryMissing {
        /// Each place with its reason.
        tried: Vec<String>,
    },
    /// The shim is of another version.
    #[error("{} is of another version ({reason}): run `make setup`", path.display())]
    LibraryOutdated {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// NCCL was not found or could not be opened.
    #[error(
        "cannot open NCCL: install it (package libnccl2, or pip install nvidia-nccl-cu12), name it in \
         communicator.nccl_library or POLLEN_NCCL_LIBRARY, or set communicator.backend=gloo; tried {}",
        tried.join(", ")
    )]
    NcclMissing {
        /// Each place with its reason.
        tried: Vec<String>,
    },
    /// NCCL or the driver is there and cannot be used.
    #[error("NCCL cannot be used: {reason}; install another, or set communicator.backend=gloo")]
    NcclUnusable {
        /// What does not fit.
        reason: String,
    },
    /// The section `[communicator]` is not usable as it is.
    #[error("communicator: {}", faults.join("; "))]
    Config {
        /// All faults at once.
        faults: Vec<String>,
    },
}

impl Error {
    /// Returns what a caller can do about it.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::StoreUnreachable { .. }
            | Self::StoreLost { .. }
            | Self::KeyTimeout { .. }
            | Self::Missing { .. }
            | Self::Collective { .. }
            | Self::Aborted { .. } => ErrorClass::Retryable,
            Self::Bind { .. }
            | Self::Protocol { .. }
            | Self::LibraryMissing { .. }
            | Self::LibraryOutdated { .. }
            | Self::NcclMissing { .. }
            | Self::NcclUnusable { .. }
            | Self::Config { .. } => ErrorClass::User,
            Self::StoreRefused { .. }
            | Self::NameReused { .. }
            | Self::ThreadEnded { .. }
            | Self::Argument { .. }
            | Self::DeviceBuffer { .. }
            | Self::WrongType { .. } => ErrorClass::Fatal,
        }
    }

    /// Returns the ranks known to be missing, if that is what went wrong.
    pub fn missing(&self) -> &[Absent] {
        match self {
            Self::Missing { missing, .. } | Self::Collective { missing, .. } => missing,
            _ => &[],
        }
    }
}

fn list(absent: &[Absent]) -> String {
    let words: Vec<String> = absent.iter().map(ToString::to_string).collect();
    words.join(", ")
}

fn section(title: &str, text: &str) -> String {
    if text.is_empty() {
        String::new()
    } else {
        format!("{title}{text}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_names_the_missing_ranks_and_their_hosts() {
        let error = Error::Missing {
            what: "generation 3: joining".into(),
            world: 4,
            waited: Duration::from_mins(2),
            missing: vec![
                Absent {
                    rank: 1,
                    host: Some("node-b".into()),
                    how: Absence::Died,
                },
                Absent {
                    rank: 3,
                    host: None,
                    how: Absence::NeverCame,
                },
            ],
        };
        assert_eq!(
            error.to_string(),
            "generation 3: joining: 2 of 4 ranks missing after 2m: rank 1 (node-b, died), rank 3 \
             (host unknown, never came); look at their logs, or raise the limit"
        );
        assert_eq!(error.class(), ErrorClass::Retryable);
        assert_eq!(error.missing().len(), 2);
    }
}

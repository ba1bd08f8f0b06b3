//! What can go wrong before, around and after the workers.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pollen_core::ErrorClass;

/// Why a run could not be planned, started or supervised.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The recipe's section `[launch]` cannot be used.
    #[error("{}", faults.join("; "))]
    Config {
        /// All faults at once.
        faults: Vec<String>,
    },
    /// The engine is known but cannot be used yet.
    #[error("`launch.engine = \"{engine}\"` is not in this build yet: use \"local\"")]
    Engine {
        /// The engine.
        engine: &'static str,
    },
    /// A file or folder of the run could not be used.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// A file that the launcher wrote earlier cannot be understood.
    #[error("{} is damaged: {source}; move {} away to start afresh", path.display(), folder(path))]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// Another launcher runs the same run.
    #[error(
        "run {run} is being run by process {pid} (`{command}`): wait for it, or stop it with \
         `kill {pid}`"
    )]
    Locked {
        /// The run's id.
        run: String,
        /// Process id of the holder.
        pid: String,
        /// Its command line.
        command: String,
    },
    /// There is no such run.
    #[error("no run `{name}` in {}{}", root.display(), newest(known))]
    NoRun {
        /// What was asked for.
        name: String,
        /// Where.
        root: PathBuf,
        /// The newest runs there.
        known: Vec<String>,
    },
    /// More than one run could be meant.
    #[error("`{name}` could be any of the runs {}: write more of its id", fitting.join(", "))]
    ManyRuns {
        /// What was asked for.
        name: String,
        /// The ids that begin with it.
        fitting: Vec<String>,
    },
    /// The environment does not say which worker this is.
    #[error("{reason}")]
    Contract {
        /// What is missing or contradicts, and the flag or variable to set.
        reason: String,
    },
    /// A worker could not be started.
    #[error("cannot start rank {rank} ({}): {source}", program.display())]
    Spawn {
        /// The worker.
        rank: u32,
        /// Its program.
        program: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The launcher was gone before its worker was ready.
    #[error(
        "the launcher (process {launcher}) is not the parent of this worker: it has ended, or a \
         wrapper started the worker without `exec`"
    )]
    Orphan {
        /// Process id the launcher gave.
        launcher: u32,
    },
    /// An operating-system call failed that has no file.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The store through which the workers meet could not be opened.
    #[error("cannot open the workers' store on {address}: {source}")]
    Store {
        /// The address.
        address: String,
        /// The store's reason.
        source: Box<pollen_collectives::Error>,
    },
    /// The event file could not be used.
    #[error(transparent)]
    Events(#[from] pollen_observe::Error),
    /// There is no SeaweedFS binary.
    #[error(
        "no SeaweedFS binary at {}: run scripts/install-seaweedfs.sh, or set POLLEN_WEED",
        looked_at.display()
    )]
    NoServerBinary {
        /// Where it was looked for last.
        looked_at: PathBuf,
    },
    /// The object server ended or did not answer.
    #[error("the object server {problem} (log: {}){}", log.display(), last_lines(tail))]
    Server {
        /// What it did.
        problem: String,
        /// Its log.
        log: PathBuf,
        /// The log's last lines.
        tail: String,
    },
    /// The object server cannot be replaced because somebody else uses it.
    #[error(
        "the object server of {} {problem} and another run is using it: wait for that run",
        root.display()
    )]
    ServerBusy {
        /// Its folder.
        root: PathBuf,
        /// Why it would have to be replaced.
        problem: String,
    },
    /// The global batch cannot be made of whole micro-batches.
    #[error("{reason}")]
    WorldSize {
        /// The arithmetic, and the sizes that fit.
        reason: String,
    },
    /// A run has too few steps to plan from.
    #[error(
        "run {run} has {steps} steps after its first ones where a plan needs {needed}: let it go \
         on, or give --step-seconds"
    )]
    NotMeasured {
        /// The run.
        run: String,
        /// Steps that count.
        steps: usize,
        /// Steps needed.
        needed: usize,
    },
    /// The devices' links are not described, or not enough.
    #[error(
        "link `{text}`: {reason}; give one of {}, or rates in GB/s such as \
         gpus=8,inside=476,between=331",
        crate::scaling::Link::names()
    )]
    Link {
        /// What was asked for.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl Error {
    /// Returns what a caller can do about it.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Config { .. }
            | Self::Engine { .. }
            | Self::Locked { .. }
            | Self::NoRun { .. }
            | Self::ManyRuns { .. }
            | Self::Contract { .. }
            | Self::Spawn { .. }
            | Self::NoServerBinary { .. }
            | Self::ServerBusy { .. }
            | Self::WorldSize { .. }
            | Self::Link { .. }
            | Self::NotMeasured { .. }
            | Self::Damaged { .. } => ErrorClass::User,
            Self::File { source, .. } | Self::System { source, .. } => match source.kind() {
                io::ErrorKind::NotFound
                | io::ErrorKind::PermissionDenied
                | io::ErrorKind::NotADirectory
                | io::ErrorKind::ReadOnlyFilesystem => ErrorClass::User,
                _ => ErrorClass::Retryable,
            },
            Self::Orphan { .. } | Self::Server { .. } => ErrorClass::Retryable,
            Self::Store { source, .. } => source.class(),
            Self::Events(error) => error.class(),
        }
    }

    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }

    pub(crate) fn system(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { action, source }
    }
}

fn folder(path: &Path) -> String {
    path.parent().unwrap_or(path).display().to_string()
}

fn newest(known: &[String]) -> String {
    if known.is_empty() {
        ", which holds none".to_owned()
    } else {
        format!("; the newest are {}", known.join(", "))
    }
}

fn last_lines(tail: &str) -> String {
    if tail.is_empty() {
        String::new()
    } else {
        format!(": {}", tail.trim().replace('\n', " | "))
    }
}

/// Formats a wait for messages.
pub(crate) fn waited(wait: Duration) -> String {
    humantime::format_duration(Duration::from_millis(wait.as_millis() as u64)).to_string()
}

//! Why a run stopped.

use pollen_core::{ErrorClass, ExitCode};

/// An error of the training process.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The recipe does not fit together.
    #[error("the recipe cannot be run: {}", .0.join("; "))]
    Recipe(Vec<String>),
    /// Object storage failed.
    #[error(transparent)]
    Storage(#[from] pollen_storage::Error),
    /// The data could not be read.
    #[error(transparent)]
    Data(#[from] pollen_dataloader::Error),
    /// A checkpoint could not be written or read.
    #[error(transparent)]
    Checkpoint(#[from] pollen_checkpoints::Error),
    /// Ranks could not reach each other.
    #[error(transparent)]
    Collective(#[from] pollen_collectives::Error),
    /// An event could not be written.
    #[error(transparent)]
    Observe(#[from] pollen_observe::Error),
    /// The model could not be built.
    #[error(transparent)]
    Model(#[from] pollen_model::Error),
    /// The weights to start from could not be read or do not fit.
    #[error("init.from: {0}")]
    Weights(#[from] pollen_weights::Error),
    /// A file of the run could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: String,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A checkpoint belongs to another model, order or data.
    #[error("checkpoint of step {step} does not fit this run: {reason}")]
    Mismatch {
        /// The checkpoint's step.
        step: u64,
        /// What differs, and what to do.
        reason: String,
    },
    /// Rank 0 could not publish a checkpoint that this rank took part in.
    #[error("rank 0 could not publish the checkpoint of step {step}: {reason}")]
    Unpublished {
        /// The checkpoint's step.
        step: u64,
        /// Rank 0's reason.
        reason: String,
    },
    /// Too many steps had a non-finite loss or gradient.
    #[error(
        "{count} steps had a non-finite loss or gradient, above train.max_non_finite_steps = {cap}; \
         lower the learning rate or look at the samples named in events.jsonl"
    )]
    NonFinite {
        /// Steps skipped.
        count: u64,
        /// The cap.
        cap: u64,
    },
    /// The loaders delivered other samples than the sample order says.
    #[error(
        "step {step}: the samples that the ranks delivered are not those of the sample order: \
         {fault}; the weights are those of the step before. Starting again would repeat it: report \
         it with config.toml and the number of workers"
    )]
    Audit {
        /// The step that was under way.
        step: u64,
        /// What differs.
        fault: Box<crate::audit::AuditFault>,
    },
    /// Too many samples could not be loaded.
    #[error(
        "{count} samples could not be loaded, above data.max_bad_samples = {cap}; repair or exclude \
         what events.jsonl names (grep bad_sample), or raise the cap"
    )]
    BadSamples {
        /// Samples left out.
        count: u64,
        /// The cap.
        cap: u64,
    },
    /// A rank hangs: all of them end, to start again from the last checkpoint.
    #[error("{hang}; what its and this rank's threads were doing is in {}", stacks.display())]
    Hang {
        /// Which, where and since when.
        hang: Box<pollen_collectives::Hang>,
        /// The report.
        stacks: std::path::PathBuf,
    },
    /// A state that cannot be.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Error {
    /// Returns an internal error.
    pub fn internal(reason: impl Into<String>) -> Self {
        Self::Internal(reason.into())
    }

    /// Returns what a caller can do.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Recipe(_) => ErrorClass::User,
            Self::Storage(error) => error.class(),
            Self::Data(error) => error.class(),
            Self::Checkpoint(error) => error.class(),
            Self::Collective(error) => error.class(),
            Self::Observe(error) => error.class(),
            Self::Model(error) => error.class(),
            Self::Weights(error) => error.class(),
            Self::File { .. } | Self::Unpublished { .. } | Self::Hang { .. } => {
                ErrorClass::Retryable
            }
            Self::Mismatch { .. }
            | Self::NonFinite { .. }
            | Self::BadSamples { .. }
            | Self::Audit { .. } => ErrorClass::Corrupt,
            Self::Internal(_) => ErrorClass::Fatal,
        }
    }

    /// Returns the exit code of a process that ends with this error.
    pub fn exit_code(&self) -> ExitCode {
        if let Self::Checkpoint(pollen_checkpoints::Error::Fenced { .. }) = self {
            // Another start of the run goes on with it; this one must not come back.
            return ExitCode::DoNotRequeue;
        }
        self.class().into()
    }
}

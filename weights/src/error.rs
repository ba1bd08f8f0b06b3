//! What can be wrong with weights, which file and tensor, and what to change.

use pollen_core::ErrorClass;

/// What this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why weights could not be read, fitted or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Object storage failed.
    #[error(transparent)]
    Storage(#[from] pollen_storage::Error),
    /// The Hugging Face Hub does not give what was asked for.
    #[error(
        "{url} cannot be fetched: {source}; check the name, the network and HF_ENDPOINT, and HF_TOKEN \
         for a repository that asks for one"
    )]
    Hub {
        /// As given.
        url: String,
        /// The client's reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A file is not what it should be.
    #[error("{file}: {reason}")]
    Corrupt {
        /// URL of the file.
        file: String,
        /// The tensor, if one is to blame, and what is wrong.
        reason: String,
    },
    /// There are no weights at a URL, or in no form that is read.
    #[error("no weights at {url}: {reason}")]
    NoWeights {
        /// As given.
        url: String,
        /// What was looked for, and what to do.
        reason: String,
    },
    /// The weights do not fit the model of the recipe.
    #[error("{url} does not fit the recipe's model: {}", faults.join("; "))]
    Unfit {
        /// The source.
        url: String,
        /// Every fault, each naming a tensor or a setting.
        faults: Vec<String>,
    },
    /// The destination holds weights already.
    #[error("{url} holds weights already; choose another folder or delete it")]
    Exists {
        /// The destination.
        url: String,
    },
}

impl Error {
    /// Returns what a caller can do.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Storage(error) => error.class(),
            Self::Corrupt { .. } => ErrorClass::Corrupt,
            Self::Hub { .. }
            | Self::NoWeights { .. }
            | Self::Unfit { .. }
            | Self::Exists { .. } => ErrorClass::User,
        }
    }
}

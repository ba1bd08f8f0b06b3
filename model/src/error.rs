//! What can go wrong while a model is described or built.

use pollen_core::ErrorClass;

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration contradicts itself; every fault is listed.
    #[error("the model configuration has {} fault(s): {}", faults.len(), faults.join("; "))]
    InvalidConfig {
        /// One sentence per fault, each naming the key to change.
        faults: Vec<String>,
    },
    /// A file of golden tensors cannot be read.
    #[error("golden file {path}: {reason}; tests/golden of the repository has them all")]
    Golden {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl Error {
    /// Returns what a caller can do about this error.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::InvalidConfig { .. } | Self::Golden { .. } => ErrorClass::User,
        }
    }
}

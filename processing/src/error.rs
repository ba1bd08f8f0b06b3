//! What can go wrong between a stored observation and a model input.

use pollen_core::ErrorClass;

/// Why an observation, its statistics or its contract cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An image's bytes do not match its size.
    #[error("an image of {height} x {width} has {expected} bytes, not {bytes}")]
    ImageBytes {
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
        /// Bytes that such an image has.
        expected: usize,
        /// Bytes given.
        bytes: usize,
    },
    /// A square image was needed, and the resize rule keeps the aspect.
    #[error(
        "a {height} x {width} image is not square after a short-side resize: \
         set the resize to `lanczos3_square` or crop the camera"
    )]
    NotSquare {
        /// Rows before the resize.
        height: usize,
        /// Columns before the resize.
        width: usize,
    },
    /// A value that statistics are made of is not a number.
    #[error("frame {row}, dimension {dim} is {value}: exclude the frame or repair the dataset")]
    NotFinite {
        /// Number of the frame among those pushed.
        row: u64,
        /// Dimension.
        dim: usize,
        /// The value.
        value: f32,
    },
    /// Statistics were asked of no frames.
    #[error("statistics need at least one frame: the dataset or its filter leaves none")]
    NoFrames,
    /// Statistics do not fit the space they are to normalise.
    #[error("statistics of `{space}` have {found} dimensions, not {expected}: compute them again")]
    Dimensions {
        /// The action space, or `proprioception`.
        space: String,
        /// Dimensions needed.
        expected: usize,
        /// Dimensions found.
        found: usize,
    },
    /// A tokenizer file is unusable.
    #[error("tokenizer {origin}: {reason}")]
    Tokenizer {
        /// The file, or what stands for it.
        origin: String,
        /// What is wrong, and the fix.
        reason: String,
        /// The library's reason, if it gave one.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// A contract is not one that this build reads.
    #[error("{origin} is not an observation contract: {source}")]
    ContractSyntax {
        /// The file.
        origin: String,
        /// Line, column and reason.
        source: serde_json::Error,
    },
    /// A contract contradicts itself.
    #[error("{origin}: {}", faults.join("; "))]
    ContractFaults {
        /// The file.
        origin: String,
        /// All faults at once.
        faults: Vec<String>,
    },
    /// The dataset whose statistics to use is not clear.
    #[error("{asked}: name one of {}", known.join(", "))]
    UnknownDataset {
        /// What was asked for.
        asked: String,
        /// The names the contract has.
        known: Vec<String>,
    },
}

impl Error {
    /// Returns what a caller can do about it.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::ImageBytes { .. } | Self::NotFinite { .. } | Self::ContractSyntax { .. } => {
                ErrorClass::Corrupt
            }
            Self::NotSquare { .. }
            | Self::NoFrames
            | Self::Dimensions { .. }
            | Self::Tokenizer { .. }
            | Self::ContractFaults { .. }
            | Self::UnknownDataset { .. } => ErrorClass::User,
        }
    }
}

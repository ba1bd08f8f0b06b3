//! What training and serving do to an observation, in one place, so that both do the same.
//!
//! ```text
//! decoded image --Resizer--> u8 [3,S,S] --Augmentation (training)--> batch --device--> normalised
//! stored columns --Transform--> action, proprioception
//! instruction --Prompt--> text --Tokenizer--> ids + mask
//! action, proprioception --Normalizer(ActionStats, ActionSpace)--> [-1,1], and back in serving
//! all of it, as data: ObservationContract = a checkpoint's contract.json
//! ```
//!
//! | module | job |
//! |---|---|
//! | [`augment`] | crop and colour changes as functions of their draws |
//! | [`contract`] | what a checkpoint expects of an observation |
//! | [`conventions`] | gripper and pose conventions of raw actions |
//! | [`error`] | what can go wrong |
//! | [`normalize`] | scaling of actions and proprioception |
//! | [`op`] | the operations of a transform |
//! | [`pixels`] | images as bytes, shifts, scaling to model values |
//! | [`prompt`] | the text that the model reads |
//! | [`resize`] | antialiased bilinear and lanczos3, as the references do it |
//! | [`rotation`] | representations of rotations |
//! | [`stats`] | exact statistics of actions |
//! | [`tokenize`] | text to ids |
//! | [`transform`] | a dataset's stored columns to its action space |
//!
//! ```
//! use pollen_core::Seed;
//! use pollen_processing::{Augmentation, Image, ResizeKind, Resizer};
//! # fn main() -> Result<(), pollen_processing::Error> {
//! let decoded = vec![128; 96 * 96 * 3];
//! let image = Image::from_interleaved(96, 96, &decoded)?;
//! let image = Resizer::new(ResizeKind::BilinearShortSide, 64).resize_square(image)?;
//! let image = Augmentation::RandomShift { pad: 3 }.apply(image, &mut Seed::new(1).draws());
//! assert_eq!(image.planes().len(), 3 * 64 * 64);
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

pub mod augment;
pub mod contract;
pub mod conventions;
pub mod error;
mod filter;
#[cfg(test)]
mod golden;
pub mod normalize;
pub mod op;
mod photometric;
pub mod pixels;
pub mod prompt;
pub mod resize;
pub mod rotation;
pub mod stats;
pub mod tokenize;
pub mod transform;

pub use augment::{Augmentation, CropAndColor};
pub use contract::{
    DatasetContract, ImageContract, Normalization, ObservationContract, TextContract,
};
pub use error::Error;
pub use normalize::{Fallback, FallbackKind, Normalizer};
pub use op::Op;
pub use pixels::{Image, PIXEL_MEAN, PIXEL_STD, normalize_pixels};
pub use prompt::Prompt;
pub use resize::{ResizeKind, Resizer};
pub use rotation::Rotation;
pub use stats::{ActionStats, StatsBuilder};
pub use tokenize::{Padding, TextLength, TokenBatch, Tokenizer, florence_tokens};
pub use transform::{Part, Stored, Transform, Transformed};

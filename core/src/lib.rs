//! What every other crate speaks: seeds, action spaces, error classes, exit codes, injected time
//! and layered configuration files.
//!
//! ```text
//! recipe.toml --Layered--> merged table --parse--> each crate's own Config
//! Seed --child/index--> Seed --draws--> counter-based random numbers
//! ```
//!
//! | module | job |
//! |---|---|
//! | [`action_space`] | names, units and padding of an embodiment's actions |
//! | [`clock`] | time that tests can drive by hand |
//! | [`error`] | what a caller can do about an error; exit codes with a meaning |
//! | [`foreign`] | other people's parsers, whose panics become errors |
//! | [`layered`] | `extends`, environment and `--set`, with the origin of every value |
//! | [`seed`] | seeds as a tree, random numbers as a function of their position |
//! | [`tensor_header`] | the head of a safetensors file |
//!
//! ```
//! use pollen_core::seed::Seed;
//! let noise = Seed::new(7).child("noise").index(42);
//! assert_eq!(noise.draws().next_u64(), noise.draws().next_u64());
//! ```

pub mod action_space;
pub mod clock;
pub mod error;
pub mod foreign;
pub mod layered;
pub mod seed;
pub mod tensor_header;

pub use action_space::{ActionSpace, ActionSpaceFile};
pub use bytesize::ByteSize;
pub use clock::{Clock, ManualClock, SystemClock};
pub use error::{ErrorClass, ExitCode};
pub use foreign::no_panic;
pub use layered::{ConfigError, Layered};
pub use seed::{Draws, Seed};

//! Published weights in and out: safetensors by ranges, upstream names, strict reports.
//!
//! ```text
//! url, hf:// --WeightFiles (headers only)--> keys --names--> parameters --fit--> Fit (report, faults)
//! Fit --import, one tensor at a time--> shards + index under canonical names
//! shards + index, or a checkpoint --Initial--> a run's first weights
//!                                       +-----export--> shards + index under others' names
//! ```
//!
//! | module | job |
//! |---|---|
//! | `choices` | what weights were trained with and do not show |
//! | `error` | what is wrong, in which file and tensor |
//! | `export` | writes a model under others' names |
//! | `files` | safetensors files behind a URL, read by ranges |
//! | `fit`, `fitting` | which tensor becomes which parameter, and why not |
//! | `hub` | files of the Hugging Face Hub |
//! | `import` | writes a fitted source |
//! | `initial` | the weights a run starts from |
//! | `names` | what a key of a published file means |
//! | `report` | what became of every key |
//! | `shards` | writes shards and their index |
//! | `trained` | finds or demands those choices |

#![forbid(unsafe_code)]

mod choices;
mod error;
mod export;
mod files;
mod fit;
mod fitting;
mod hub;
mod import;
mod initial;
mod names;
mod report;
mod shards;
mod trained;

#[cfg(test)]
mod tests;

pub use choices::Choices;
pub use error::{Error, Result};
pub use export::{ExportOptions, What, export};
pub use files::{Stored, WeightFiles};
pub use fit::{Fit, FitError, FitOptions, PromptSource, fit, is_named};
pub use import::import;
pub use initial::Initial;
pub use report::{Line, Outcome, Report};
pub use shards::Written;

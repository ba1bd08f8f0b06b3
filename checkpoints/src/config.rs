//! How often to save, what to keep, how hard to check.

use serde::{Deserialize, Serialize};

/// The recipe's section `[checkpoint]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Steps from one checkpoint to the next.
    pub every_steps: u64,
    /// Newest checkpoints to keep.
    pub keep_last: usize,
    /// Keeps those whose step is a multiple of this, for ever.
    pub keep_every: Option<u64>,
    /// Keeps as many with the lowest held-out error, of those that were measured.
    pub keep_best: usize,
    /// What is compared before a checkpoint is restored, and before an older one is deleted.
    pub verify: Verify,
}

/// What is compared with the MANIFEST.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verify {
    /// Sizes only: one look-up a file.
    Sizes,
    /// Sizes, crc32c and sha256: reads every byte.
    #[default]
    Full,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            every_steps: 1000,
            keep_last: 3,
            keep_every: None,
            keep_best: 0,
            verify: Verify::Full,
        }
    }
}

impl Config {
    /// Returns every fault of the section.
    pub fn faults(&self) -> Vec<String> {
        let zero = [
            ("every_steps", self.every_steps == 0),
            ("keep_last", self.keep_last == 0),
            ("keep_every", self.keep_every == Some(0)),
        ];
        let zero = zero.into_iter().filter(|(_, zero)| *zero);
        zero.map(|(key, _)| format!("checkpoint.{key} is 0: use at least 1"))
            .collect()
    }
}

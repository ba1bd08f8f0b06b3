//! What a dataset's actions, states and instructions become: the same code as in serving.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use pollen_core::ActionSpace;
use pollen_processing::{
    DatasetContract, Normalizer, Padding, Prompt, TextContract, TextLength, Tokenizer,
    florence_tokens,
};
use sha2::{Digest, Sha256};

use crate::columns::Rows;
use crate::dataset::Dataset;
use crate::dataset_config::{DatasetConfig, Instruction};
use crate::error::{Error, Result};
use crate::sidecar::hex;

/// Turns one dataset's values into model values.
#[derive(Debug)]
pub(crate) struct Prepare {
    contract: DatasetContract,
    instruction: Instruction,
    action: Normalizer,
    proprio: Option<Normalizer>,
    /// Rows between the steps of a chunk.
    every: usize,
}

impl Prepare {
    pub(crate) fn new(dataset: &Dataset) -> Result<Self> {
        let space = dataset.action_space();
        let instruction = dataset.config().instruction;
        let proprio_stats = (space.proprio_dim > 0).then(|| dataset.sidecar().proprio.clone());
        let contract = DatasetContract {
            action_space: space.clone(),
            normalization: dataset.config().normalization,
            action_stats: dataset.sidecar().action.clone(),
            proprio_stats: proprio_stats.flatten(),
            prompt: match instruction {
                Instruction::Raw | Instruction::None => Prompt::Instruction,
                Instruction::Task | Instruction::Empty => prompt(space, dataset.config()),
            },
            frequency_hz: f64::from(dataset.frequency_hz()),
        };
        let of_dataset = |source| Error::Processing {
            dataset: dataset.name().into(),
            source,
        };
        let action = contract.action_normalizer().map_err(of_dataset)?;
        let proprio = contract.proprio_normalizer().map_err(of_dataset)?;
        for fallback in action.fallbacks() {
            tracing::warn!(dataset = dataset.name(), %fallback, "action normalisation");
        }
        Ok(Self {
            contract,
            instruction,
            action,
            proprio,
            every: dataset.config().transform.every,
        })
    }

    pub(crate) fn contract(&self) -> &DatasetContract {
        &self.contract
    }

    /// Returns the normalised action chunk that starts at `row`; past the end of the episode,
    /// `rows_left` rows away, the last action repeats.
    ///
    /// # Shapes
    /// [horizon, dim].
    pub(crate) fn chunk(
        &self,
        actions: &Rows,
        row: usize,
        rows_left: usize,
        horizon: usize,
    ) -> Result<Vec<f32>, String> {
        let last = row + rows_left.saturating_sub(1);
        let mut chunk = Vec::with_capacity(horizon * actions.width);
        for step in 0..horizon {
            chunk.extend_from_slice(actions.row((row + step * self.every).min(last)));
        }
        if let Some(at) = chunk.iter().position(|value| !value.is_finite()) {
            let (step, dim) = (at / actions.width, at % actions.width);
            return Err(format!(
                "the action {step} frames later has {} in dimension {dim}; exclude the episode or \
                 repair the dataset",
                chunk[at]
            ));
        }
        self.action.normalize(&mut chunk);
        Ok(chunk)
    }

    /// Returns the normalised proprioception; empty where the action space shows none.
    pub(crate) fn proprio(&self, state: &[f32]) -> Result<Vec<f32>, String> {
        let Some(normalizer) = &self.proprio else {
            return Ok(Vec::new());
        };
        if let Some(dim) = state.iter().position(|value| !value.is_finite()) {
            return Err(format!(
                "the proprioception has {} in dimension {dim}; exclude the episode or repair the \
                 dataset",
                state[dim]
            ));
        }
        let mut state = state.to_vec();
        normalizer.normalize(&mut state);
        Ok(state)
    }

    /// Returns the text the model reads for an instruction.
    pub(crate) fn prompt(&self, instruction: &str) -> String {
        match self.instruction {
            Instruction::Empty | Instruction::None => self.contract.prompt.text(""),
            Instruction::Task | Instruction::Raw => self.contract.prompt.text(instruction),
        }
    }
}

/// Describes the robot of a dataset in its own wording.
fn prompt(space: &ActionSpace, config: &DatasetConfig) -> Prompt {
    let mut space = space.clone();
    if !config.prompt_space.is_empty() {
        space.prompt.clone_from(&config.prompt_space);
    }
    Prompt::minimal(&space, &config.robot)
}

/// The token ids of one prompt.
///
/// # Shapes
/// `[T]` each.
#[derive(Debug)]
pub(crate) struct Tokens {
    pub(crate) ids: Vec<i64>,
    pub(crate) mask: Vec<u8>,
}

/// Prompts as token ids; each prompt is encoded once.
#[derive(Debug)]
pub(crate) struct Texts {
    tokenizer: Tokenizer,
    contract: TextContract,
    /// By (dataset, task).
    known: Mutex<HashMap<(u32, u64), Arc<Tokens>>>,
}

impl Texts {
    pub(crate) fn load(path: &Path, florence: bool, length: usize) -> Result<Self> {
        let failed = |source| Error::Tokenizer { source };
        let bytes = std::fs::read(path).map_err(|source| {
            failed(pollen_processing::Error::Tokenizer {
                origin: path.display().to_string(),
                reason: "cannot be read; correct `data.tokenizer`".into(),
                source: Some(Box::new(source)),
            })
        })?;
        let origin = path.display().to_string();
        let mut tokenizer = Tokenizer::from_bytes(&bytes, &origin).map_err(failed)?;
        if florence {
            tokenizer = tokenizer
                .with_special_tokens(florence_tokens())
                .map_err(failed)?;
        }
        Ok(Self {
            tokenizer,
            contract: TextContract {
                tokenizer_sha256: hex(&Sha256::digest(&bytes)),
                florence_tokens: florence,
                length: TextLength {
                    max: length,
                    padding: Padding::MaxLength,
                },
            },
            known: Mutex::default(),
        })
    }

    pub(crate) fn contract(&self) -> &TextContract {
        &self.contract
    }

    pub(crate) fn vocabulary_size(&self) -> usize {
        self.tokenizer.vocabulary_size()
    }

    pub(crate) fn pad_id(&self) -> i64 {
        i64::from(self.tokenizer.pad())
    }

    /// Returns the ids of the prompt with this key; `prompt` makes its text.
    pub(crate) fn tokens(
        &self,
        key: (u32, u64),
        prompt: impl FnOnce() -> String,
    ) -> Result<Arc<Tokens>> {
        // Entries are only ever added, so a panic elsewhere leaves the map whole.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tokens) = known.get(&key) {
            return Ok(Arc::clone(tokens));
        }
        let batch = self
            .tokenizer
            .encode_batch(&[prompt()], self.contract.length)
            .map_err(|source| Error::Tokenizer { source })?;
        let tokens = Arc::new(Tokens {
            ids: batch.ids.into_iter().map(i64::from).collect(),
            mask: batch.mask.into_iter().map(u8::from).collect(),
        });
        known.insert(key, Arc::clone(&tokens));
        Ok(tokens)
    }
}

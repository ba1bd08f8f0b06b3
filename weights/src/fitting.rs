//! Fits the keys of a source to the parameters of a model: what is taken from where, and a reason
//! for everything that is not. Reads headers and small tables, no weights.

use std::collections::BTreeMap;

use pollen_model::{FlowerConfig, PROMPT, ParameterSpec, TOKEN_TABLE};
use safetensors::Dtype;

use crate::error::Result;
use crate::files::{WeightFiles, converter, wrong_dtype};
use crate::fit::{Fit, FitOptions, Part, PromptSource, is_named};
use crate::names::{self, Meaning};
use crate::report::Outcome;

/// Missing parameters that an error names; the report has all.
const MOST_NAMES: usize = 3;
/// Name of the embeddings of action spaces, which no output depends on.
const SPACE_EMBEDDINGS: &str = "action_space_embedder.action_embeddings";

/// A source while its keys are fitted.
pub(crate) struct Fitting<'a> {
    pub(crate) files: &'a WeightFiles,
    pub(crate) config: &'a FlowerConfig,
    pub(crate) options: &'a FitOptions,
    /// Keys by the parameter they hold.
    pub(crate) sources: BTreeMap<String, Vec<(String, names::Key)>>,
    /// Keys of the tables of cosines and of sines.
    pub(crate) tables: (Vec<String>, Vec<String>),
    pub(crate) native: bool,
    pub(crate) fit: Fit,
}

impl Fitting<'_> {
    /// Sorts all keys by what they mean.
    pub(crate) async fn read_keys(&mut self) -> Result<()> {
        let keys: Vec<(String, names::Key)> = self
            .files
            .tensors()
            .keys()
            .map(|key| (key.clone(), names::read(key)))
            .collect();
        let both = keys.iter().any(|(_, key)| key.averaged)
            && keys
                .iter()
                .any(|(_, key)| !key.averaged && matches!(key.meaning, Meaning::Parameter { .. }));
        if both && self.options.averaged.is_none() {
            self.fit.faults.push(
                "it holds averaged weights and others; say --weights ema or --weights raw".into(),
            );
        }
        for (key, read) in keys {
            if both
                && self
                    .options
                    .averaged
                    .is_some_and(|wanted| wanted != read.averaged)
            {
                let reason = if read.averaged {
                    "averaged weights, which were not asked for"
                } else {
                    "not averaged, and averaged weights were asked for"
                };
                self.fit.report.add(Outcome::Unused, &key, "", reason);
                continue;
            }
            self.native |= read.native;
            match &read.meaning {
                Meaning::Parameter { name, .. } => {
                    let name = name.clone();
                    self.sources.entry(name).or_default().push((key, read));
                }
                Meaning::RopeTable { cosines: true } => self.tables.0.push(key),
                Meaning::RopeTable { cosines: false } => self.tables.1.push(key),
                Meaning::TemporalTable => self.temporal(&key).await?,
                Meaning::Unused(reason) => self.fit.report.add(Outcome::Unused, &key, "", reason),
            }
        }
        Ok(())
    }

    /// Compares the first row of the table of frame positions, the only one that FLOWER uses.
    async fn temporal(&mut self, key: &str) -> Result<()> {
        let stored = &self.files.tensors()[key];
        let width = stored.shape.last().copied().unwrap_or(0);
        let right = stored.shape.len() == 2 && converter(stored.dtype).is_some() && {
            let values = self.files.read(key).await?;
            let row = values.iter().take(width).enumerate();
            values.len() >= width && row.into_iter().all(|(i, &x)| x == (i % 2) as f32)
        };
        let (outcome, reason) = if right {
            (Outcome::Unused, "a constant; its first row is as expected")
        } else {
            let fault = format!(
                "tensor `{key}` in {}: the first row of a table of frame positions is 0, 1, 0, 1, \
                 ..., this one is another",
                self.files.file_of(stored)
            );
            self.fit.faults.push(fault);
            (Outcome::Unfit, "its first row is not 0, 1, 0, 1, ...")
        };
        self.fit.report.add(outcome, key, "", reason);
        Ok(())
    }

    /// Gives every parameter its tensor.
    pub(crate) async fn assign(&mut self) -> Result<()> {
        let specs: Vec<ParameterSpec> = self.fit.table.iter().cloned().collect();
        let mut missing = Vec::new();
        for spec in &specs {
            match self.sources.remove(&spec.name) {
                Some(keys) => self.take(spec, keys).await?,
                None if spec.name == PROMPT => {}
                None => missing.push(spec.name.as_str()),
            }
        }
        self.missing(&missing);
        let decoder_only = self.config.language.decoder.is_some();
        for (name, keys) in std::mem::take(&mut self.sources) {
            for (key, _) in keys {
                if let Some(reason) = names::dropped(&name, decoder_only) {
                    self.fit.report.add(Outcome::Unused, &key, "", reason);
                    continue;
                }
                let allowed = self.options.allow_unexpected.iter();
                let mut allowed = allowed.map(String::as_str);
                let reason = "the recipe's model has no such parameter";
                self.fit
                    .report
                    .add(Outcome::Unexpected, &key, &name, reason);
                if !allowed.any(|prefix| key.starts_with(prefix) || name.starts_with(prefix)) {
                    self.fit.faults.push(format!(
                        "tensor `{key}` in {}: the recipe's model has no parameter `{name}`; \
                         correct the recipe, or leave it out with --allow-unexpected",
                        self.files.file_of(&self.files.tensors()[&key])
                    ));
                }
            }
        }
        Ok(())
    }

    /// Reports the parameters that no key holds; those of a group share one fault.
    fn missing(&mut self, names: &[&str]) {
        for group in ["vlm", "head"] {
            let mut gaps = Vec::new();
            for &name in names {
                if !is_named(name, &[group.into()]) {
                    continue;
                }
                let allowed = is_named(name, &self.options.allow_missing);
                let reason = if allowed {
                    "allowed; it keeps its random initial values"
                } else {
                    gaps.push(format!("`{name}`"));
                    "no tensor has it"
                };
                self.fit.report.add(Outcome::Missing, name, name, reason);
            }
            let first = gaps.iter().take(MOST_NAMES).cloned().collect::<Vec<_>>();
            let more = match gaps.len() - first.len() {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            if !gaps.is_empty() {
                self.fit.faults.push(format!(
                    "{}{more} missing in {}; to leave them random, say --allow-missing PREFIX or \
                     --allow-missing {group}",
                    first.join(", "),
                    self.files.url()
                ));
            }
        }
    }

    /// Takes one of the keys that hold a parameter, if it fits.
    async fn take(&mut self, spec: &ParameterSpec, keys: Vec<(String, names::Key)>) -> Result<()> {
        let (key, read) = &keys[0];
        for (other, _) in &keys[1..] {
            if self.files.same(key, other).await? {
                let reason = format!("the same bytes as `{key}`");
                self.fit
                    .report
                    .add(Outcome::Unused, other, &spec.name, &reason);
            } else {
                self.unfit(
                    other,
                    spec,
                    &format!("it is another tensor than `{key}`, which is the same parameter"),
                );
            }
        }
        let stored = &self.files.tensors()[key];
        if converter(stored.dtype).is_none() {
            let fault = wrong_dtype(key, stored.dtype);
            let fault = fault.split_once("is of").map_or("", |(_, rest)| rest);
            self.unfit(key, spec, &format!("it is of{fault}"));
            return Ok(());
        }
        let transposed = matches!(
            read.meaning,
            Meaning::Parameter {
                transposed: true,
                ..
            }
        );
        match part(spec, key, &stored.shape, transposed, self.native_table()) {
            Ok((part, reason)) => {
                let outcome = if matches!(part, Part::Copy(_)) {
                    Outcome::Loaded
                } else {
                    Outcome::Reshaped
                };
                let reason = match stored.dtype {
                    Dtype::F32 => reason,
                    dtype if reason.is_empty() => format!("from {dtype}"),
                    dtype => format!("{reason}; from {dtype}"),
                };
                self.fit.report.add(outcome, key, &spec.name, &reason);
                self.fit.parts.insert(spec.name.clone(), part);
            }
            Err(reason) => self.unfit(key, spec, &reason),
        }
        Ok(())
    }

    /// Says whether the rows behind the words of a token table are not FLOWER's: `transformers`
    /// has tokens of its own there.
    fn native_table(&self) -> bool {
        self.native && !self.files.tensors().contains_key(PROMPT)
    }

    fn unfit(&mut self, key: &str, spec: &ParameterSpec, reason: &str) {
        self.fit.report.add(Outcome::Unfit, key, &spec.name, reason);
        let file = self.files.file_of(&self.files.tensors()[key]);
        self.fit
            .faults
            .push(format!("tensor `{key}` in {file}: {reason}"));
    }

    /// Finds the prompt vector when no tensor holds it.
    pub(crate) fn prompt(&mut self) {
        if self.fit.parts.contains_key(PROMPT) || is_named(PROMPT, &self.options.allow_missing) {
            return;
        }
        let table = self.fit.table.token_table();
        let own = match table.and_then(|table| self.fit.parts.get(&table.name)) {
            Some(Part::Copy(key) | Part::Tokens(key)) => Some(key.clone()),
            _ => None,
        };
        let (part, reason) = match (&self.options.prompt, own) {
            (Some(PromptSource::Of(other)), _) => match token_table(other, self.config) {
                Ok(key) => (
                    Part::MeanOfOther(key),
                    format!("the mean row of the token table of {}", other.url()),
                ),
                Err(fault) => return self.fit.faults.push(fault),
            },
            (Some(PromptSource::Mean), Some(key)) => (
                Part::Mean(key),
                "the mean row of this source's token table, as asked for".into(),
            ),
            (None, Some(key)) if !self.has_head() => {
                (Part::Mean(key), "the mean row of the token table".into())
            }
            (_, own) => {
                self.fit
                    .report
                    .add(Outcome::Missing, PROMPT, PROMPT, "no tensor has it");
                return self.fit.faults.push(if own.is_none() {
                    format!("`{PROMPT}` is missing, and so is the token table it is the mean of")
                } else {
                    format!(
                        "`{PROMPT}` is missing: published checkpoints do not hold it. It is the \
                         mean row of Florence-2's token table: say --prompt-from URL of \
                         Florence-2's weights, or --prompt-from mean where the table was not \
                         trained (it is frozen in FLOWER's pretraining)"
                    )
                });
            }
        };
        self.fit
            .report
            .add(Outcome::Reshaped, PROMPT, PROMPT, &reason);
        self.fit.parts.insert(PROMPT.into(), part);
    }

    pub(crate) fn has_head(&self) -> bool {
        self.fit.parts.keys().any(|name| name.starts_with("dit."))
    }
}

/// Says how a tensor of `shape` becomes a parameter, and why if it is not just taken.
fn part(
    spec: &ParameterSpec,
    key: &str,
    shape: &[usize],
    transposed: bool,
    native: bool,
) -> Result<(Part, String), String> {
    let key = key.to_owned();
    let wanted = &spec.shape;
    if spec.name == TOKEN_TABLE && shape.len() == 2 && shape[1] == wanted[1] {
        let words = wanted[0] - 1;
        if shape[0] == words || native && shape[0] > words {
            let reason = format!(
                "the first {words} of {} rows, and their mean for the prompt token",
                shape[0]
            );
            return Ok((Part::Tokens(key), reason));
        }
    }
    if spec.name == SPACE_EMBEDDINGS && shape.len() == 2 && shape[1] == wanted[1] {
        if shape[0] == wanted[0] {
            return Ok((Part::Copy(key), String::new()));
        }
        let reason = format!(
            "{} rows of {}, which no output depends on",
            wanted[0], shape[0]
        );
        return Ok((Part::Rows(key), reason));
    }
    let reversed: Vec<usize> = shape.iter().rev().copied().collect();
    if transposed {
        if reversed == *wanted && shape.len() == 2 {
            return Ok((Part::Transpose(key, shape[0]), "transposed".into()));
        }
        return Err(format!(
            "its shape is {shape:?}, the transpose of {wanted:?} is wanted"
        ));
    }
    if shape == wanted {
        return Ok((Part::Copy(key), String::new()));
    }
    let hint = if reversed == *wanted {
        ": it is transposed"
    } else {
        ""
    };
    Err(format!(
        "its shape is {shape:?}, the recipe's model wants {wanted:?}{hint}"
    ))
}

/// Returns the key of a source's token table.
fn token_table(files: &WeightFiles, config: &FlowerConfig) -> Result<String, String> {
    let language = &config.language;
    let found = files.tensors().iter().find(|(key, _)| {
        matches!(names::read(key).meaning, Meaning::Parameter { name, .. } if name == TOKEN_TABLE)
    });
    match found {
        Some((key, stored))
            if stored.shape.len() == 2
                && stored.shape[1] == language.width
                && stored.shape[0] >= language.vocab_size - 1
                && converter(stored.dtype).is_some() =>
        {
            Ok(key.clone())
        }
        Some((key, stored)) => Err(format!(
            "tensor `{key}` in {}: a token table of at least {} rows of {} numbers is wanted for \
             the prompt vector, this one is {:?} of {}",
            files.file_of(stored),
            language.vocab_size - 1,
            language.width,
            stored.shape,
            stored.dtype
        )),
        None => Err(format!("{} has no token table", files.url())),
    }
}

//! What an import is told, and what fitting a source to a model gives.

use std::collections::BTreeMap;

use pollen_core::ActionSpace;
use pollen_model::{CrossAttentionMask, FlowerConfig, NormVariant, PROMPT, ParameterTable};

use crate::choices::Choices;
use crate::error::{Error, Result};
use crate::files::WeightFiles;
use crate::fitting::Fitting;
use crate::report::Report;

/// Faults that an error lists; the report has all.
const MOST_FAULTS: usize = 8;

/// What an import is told, because weights do not show it.
#[derive(Debug, Default)]
pub struct FitOptions {
    /// Parameters that may be missing: prefixes of canonical names, or `head` or `vlm`.
    pub allow_missing: Vec<String>,
    /// Keys that may be left over: prefixes, as the source has them.
    pub allow_unexpected: Vec<String>,
    /// Cross-attention mask that a flow transformer was trained with.
    pub cross_attention_mask: Option<CrossAttentionMask>,
    /// Norm that a flow transformer was trained with.
    pub norm: Option<NormVariant>,
    /// Rotary base, where the source has no tables.
    pub rope_theta: Option<f64>,
    /// Which of two sets of weights is taken: the averaged ones or the others.
    pub averaged: Option<bool>,
    /// Where the prompt vector comes from when a source with a flow transformer has none.
    pub prompt: Option<PromptSource>,
}

/// Where a prompt vector comes from. It is the mean row of Florence-2's own token table, so that
/// of a source whose table was trained is only near it.
#[derive(Debug)]
pub enum PromptSource {
    /// The mean row of the source's table.
    Mean,
    /// The mean row of another source's table.
    Of(WeightFiles),
}

/// Where a parameter comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// A tensor as it is.
    Copy(String),
    /// The transpose of a tensor with this many rows.
    Transpose(String, usize),
    /// The first rows of a tensor; zeros where it has fewer.
    Rows(String),
    /// The first rows of a token table, and their mean as the last.
    Tokens(String),
    /// The mean of the first rows of a token table.
    Mean(String),
    /// The mean of the first rows of the token table of the other source.
    MeanOfOther(String),
}

/// A source that fits a model.
#[derive(Debug)]
pub struct Fit {
    /// What became of every key and parameter.
    pub report: Report,
    /// Every reason why the source cannot be taken; empty when it can.
    pub faults: Vec<String>,
    /// What the flow transformer was trained with, if the source has one.
    pub choices: Option<Choices>,
    pub(crate) parts: BTreeMap<String, Part>,
    pub(crate) table: ParameterTable,
}

impl Fit {
    /// Fails with the first faults, if there are any.
    pub fn check(&self, url: &str) -> Result<()> {
        if self.faults.is_empty() {
            return Ok(());
        }
        let mut faults: Vec<String> = self.faults.iter().take(MOST_FAULTS).cloned().collect();
        if self.faults.len() > MOST_FAULTS {
            let more = self.faults.len() - MOST_FAULTS;
            faults.push(format!("and {more} more, see the report"));
        }
        Err(Error::Unfit {
            url: url.into(),
            faults,
        })
    }
}

/// Says whether a parameter is meant by one of these prefixes or groups.
pub fn is_named(name: &str, prefixes: &[String]) -> bool {
    let vlm = name.starts_with("vlm.") || name == PROMPT;
    prefixes.iter().any(|prefix| match prefix.as_str() {
        "vlm" => vlm,
        "head" => !vlm,
        prefix => name.starts_with(prefix),
    })
}

/// Fits a source to the model of `config` with these action spaces.
pub async fn fit(
    files: &WeightFiles,
    config: &FlowerConfig,
    spaces: &[ActionSpace],
    options: &FitOptions,
) -> Result<Fit, FitError> {
    let mut fitting = Fitting {
        files,
        config,
        options,
        sources: BTreeMap::new(),
        tables: (Vec::new(), Vec::new()),
        native: false,
        fit: Fit {
            report: Report::default(),
            faults: Vec::new(),
            choices: None,
            parts: BTreeMap::new(),
            table: config.parameter_table(spaces)?,
        },
    };
    fitting.read_keys().await?;
    fitting.assign().await?;
    fitting.prompt();
    fitting.choose().await?;
    fitting.fit.report.sort();
    Ok(fitting.fit)
}

/// Why nothing can be fitted at all.
#[derive(Debug, thiserror::Error)]
pub enum FitError {
    /// The weights cannot be read.
    #[error(transparent)]
    Weights(#[from] Error),
    /// The model's configuration is at fault.
    #[error(transparent)]
    Model(#[from] pollen_model::Error),
}

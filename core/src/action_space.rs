//! Action spaces are data: one TOML file names the dimensions, units and conventions.
//!
//! The files live in `configs/embodiments/`; adding one is all it takes to train a new embodiment.

use serde::{Deserialize, Serialize};

use crate::layered::ConfigError;

/// How a dimension is brought into [-1, 1] before training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalize {
    /// By the 1 % and 99 % quantiles of the dataset.
    Quantiles,
    /// Left as it is: grippers, and values already scaled.
    Keep,
}

/// One dimension of an action.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActionDim {
    /// Name, for example `dx` or `left_gripper`.
    pub name: String,
    /// Physical unit: `m`, `rad`, `rad/s`, `open_fraction`, `none`.
    pub unit: String,
    /// How it is normalised.
    pub normalize: Normalize,
}

/// An action space: the order, units and conventions of an embodiment's action vector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActionSpace {
    /// Name, used in weights (`action_encoders.<name>`) and recipes.
    pub name: String,
    /// Wording in the prompt, for example `Delta End-Effector`.
    pub prompt: String,
    /// Number of arms, for the prompt.
    pub num_arms: u32,
    /// Whether the policy sees proprioception in this space, and its width if so.
    #[serde(default)]
    pub proprio_dim: usize,
    /// The dimensions in order.
    pub dims: Vec<ActionDim>,
}

impl ActionSpace {
    /// Returns the number of action dimensions.
    pub fn dim(&self) -> usize {
        self.dims.len()
    }

    /// Returns every fault of the definition.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.name.is_empty()
            || !self
                .name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || c == '_')
        {
            faults.push(format!(
                "action space name `{}`: use letters, digits and underscores",
                self.name
            ));
        }
        if self.dims.is_empty() {
            faults.push(format!("action space `{}` has no dims", self.name));
        }
        for (i, dim) in self.dims.iter().enumerate() {
            if self.dims[..i].iter().any(|other| other.name == dim.name) {
                faults.push(format!(
                    "action space `{}` names `{}` twice",
                    self.name, dim.name
                ));
            }
        }
        faults
    }
}

/// The file of one embodiment, `configs/embodiments/<name>.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActionSpaceFile {
    /// Version of the file's schema; 1.
    pub version: u32,
    /// The action space.
    pub action_space: ActionSpace,
}

impl ActionSpaceFile {
    /// Parses and checks the text of an embodiment file; `origin` names it in errors.
    pub fn parse(text: &str, origin: &str) -> Result<ActionSpace, ConfigError> {
        let table: toml::Table = text.parse().map_err(|source| ConfigError::Syntax {
            path: origin.into(),
            source: Box::new(source),
        })?;
        let file: Self = crate::layered::parse_table(table, origin)?;
        let mut faults = file.action_space.faults();
        if file.version != 1 {
            faults.push(format!(
                "version = {} is not known; this build reads 1",
                file.version
            ));
        }
        if faults.is_empty() {
            Ok(file.action_space)
        } else {
            Err(ConfigError::Invalid {
                origin: origin.into(),
                faults,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EEF: &str = r#"
        version = 1
        [action_space]
        name = "eef_delta"
        prompt = "Delta End-Effector"
        num_arms = 1
        dims = [
            { name = "dx", unit = "m", normalize = "quantiles" },
            { name = "gripper", unit = "open_fraction", normalize = "keep" },
        ]
    "#;

    #[test]
    fn parses_and_counts() {
        let space = ActionSpaceFile::parse(EEF, "eef.toml").expect("valid");
        assert_eq!((space.dim(), space.proprio_dim), (2, 0));
    }

    #[test]
    fn names_the_fault() {
        let twice = EEF.replace("\"gripper\"", "\"dx\"");
        let error = ActionSpaceFile::parse(&twice, "eef.toml").expect_err("a name twice");
        assert!(error.to_string().contains("names `dx` twice"), "{error}");
        let typo = EEF.replace("num_arms", "num_arm");
        let error = ActionSpaceFile::parse(&typo, "eef.toml").expect_err("a typo");
        assert!(
            error.to_string().contains("did you mean `num_arms`"),
            "{error}"
        );
    }
}

//! Configuration in layers: `extends` < recipe < environment < `--set`, each value with its origin.
//!
//! A recipe is a TOML file whose `extends = ["model/flower-tiny"]` names parts in the configuration
//! folder. Tables merge key by key, everything else is replaced. `POLLEN_TRAIN__STEPS=5` in the
//! environment and `--set train.steps=5` on the command line set one value each.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::{Table, Value};

/// Why a configuration could not be used. Every variant says which key or file to change.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A file is not TOML.
    #[error("{path} is not valid TOML: {source}")]
    Syntax {
        /// The file.
        path: String,
        /// Line, column and reason.
        source: Box<toml::de::Error>,
    },
    /// A key is unknown, missing or of the wrong type.
    #[error("{origin}: `{key}`: {reason}{hint}")]
    Key {
        /// Where the value came from.
        origin: String,
        /// Dotted path of the key.
        key: String,
        /// What is wrong with it.
        reason: String,
        /// A suggestion, or nothing.
        hint: String,
    },
    /// Values are well-formed but do not fit together.
    #[error("{origin}: {}", faults.join("; "))]
    Invalid {
        /// The recipe or section.
        origin: String,
        /// All faults at once.
        faults: Vec<String>,
    },
    /// A `--set` or environment override is not `key=value`.
    #[error("`{text}` is not an override: write a.b=c, for example train.steps=100")]
    Override {
        /// What was given.
        text: String,
    },
}

/// A merged configuration that remembers where each value came from.
#[derive(Clone, Debug, Default)]
pub struct Layered {
    table: Table,
    origins: BTreeMap<String, String>,
}

impl Layered {
    /// Reads `path` and everything it extends; parts are looked up below `parts_dir`.
    pub fn load(path: &Path, parts_dir: &Path) -> Result<Self, ConfigError> {
        let mut layered = Self::default();
        layered.merge_file(path, parts_dir, &mut Vec::new())?;
        Ok(layered)
    }

    /// Builds a configuration from one text, without `extends`.
    pub fn from_text(text: &str, origin: &str) -> Result<Self, ConfigError> {
        let table: Table = text.parse().map_err(|source| ConfigError::Syntax {
            path: origin.into(),
            source: Box::new(source),
        })?;
        let mut layered = Self::default();
        merge(&mut layered.table, table, "", origin, &mut layered.origins);
        Ok(layered)
    }

    fn merge_file(
        &mut self,
        path: &Path,
        parts_dir: &Path,
        stack: &mut Vec<PathBuf>,
    ) -> Result<(), ConfigError> {
        let origin = path.display().to_string();
        if stack.iter().any(|open| open == path) {
            return Err(ConfigError::Invalid {
                origin,
                faults: vec!["extends itself; remove the circle".into()],
            });
        }
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: origin.clone(),
            source,
        })?;
        let mut table: Table = text.parse().map_err(|source| ConfigError::Syntax {
            path: origin.clone(),
            source: Box::new(source),
        })?;
        stack.push(path.to_owned());
        for part in extends(&mut table, &origin)? {
            self.merge_file(&parts_dir.join(format!("{part}.toml")), parts_dir, stack)?;
        }
        stack.pop();
        merge(&mut self.table, table, "", &origin, &mut self.origins);
        Ok(())
    }

    /// Applies `POLLEN_A__B=value` variables; names without a double underscore are not settings.
    pub fn apply_env(
        &mut self,
        vars: impl Iterator<Item = (String, String)>,
    ) -> Result<(), ConfigError> {
        for (name, value) in vars {
            if let Some(key) = name
                .strip_prefix("POLLEN_")
                .filter(|key| key.contains("__"))
            {
                let key = key.to_lowercase().replace("__", ".");
                self.set_value(&key, scalar(&value), &format!("environment {name}"))?;
            }
        }
        Ok(())
    }

    /// Applies one `a.b=c`. The value is TOML if it parses as such, else a string.
    pub fn set(&mut self, text: &str) -> Result<(), ConfigError> {
        let (key, value) = text
            .split_once('=')
            .filter(|(key, _)| !key.is_empty() && !key.split('.').any(str::is_empty))
            .ok_or_else(|| ConfigError::Override { text: text.into() })?;
        self.set_value(key, scalar(value), &format!("--set {text}"))
    }

    /// Sets one value that a program computed; `origin` says from what.
    pub fn insert(&mut self, key: &str, value: Value, origin: &str) -> Result<(), ConfigError> {
        self.set_value(key, value, origin)
    }

    /// Removes a top-level key and returns its value.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        self.table.remove(key)
    }

    fn set_value(&mut self, key: &str, value: Value, origin: &str) -> Result<(), ConfigError> {
        let mut table = &mut self.table;
        let mut parts: Vec<&str> = key.split('.').collect();
        let last = parts.pop().expect("split yields at least one part");
        for part in parts {
            table = table
                .entry(part)
                .or_insert_with(|| Value::Table(Table::new()))
                .as_table_mut()
                .ok_or_else(|| ConfigError::Key {
                    origin: origin.into(),
                    key: key.into(),
                    reason: format!("`{part}` holds a value, not a section"),
                    hint: String::new(),
                })?;
        }
        table.insert(last.into(), value);
        self.origins.insert(key.into(), origin.into());
        Ok(())
    }

    /// Removes a top-level section and parses it.
    pub fn take_section<T: DeserializeOwned>(&mut self, section: &str) -> Result<T, ConfigError> {
        let value = self
            .table
            .remove(section)
            .unwrap_or_else(|| Value::Table(Table::new()));
        let mut wrapper = Table::new();
        wrapper.insert(section.into(), value);
        let parsed: BTreeMap<String, T> = self.parse_with_origins(wrapper)?;
        Ok(parsed.into_values().next().expect("one section went in"))
    }

    /// Parses the whole configuration.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, ConfigError> {
        self.parse_with_origins(self.table.clone())
    }

    fn parse_with_origins<T: DeserializeOwned>(&self, table: Table) -> Result<T, ConfigError> {
        parse_table(table, "configuration").map_err(|error| match error {
            ConfigError::Key {
                key, reason, hint, ..
            } => ConfigError::Key {
                origin: self.origin_of(&key),
                key,
                reason,
                hint,
            },
            other => other,
        })
    }

    fn origin_of(&self, key: &str) -> String {
        let exact = self.origins.get(key);
        let below = || {
            self.origins
                .iter()
                .find(|(k, _)| k.starts_with(&format!("{key}.")))
        };
        exact
            .or_else(|| below().map(|(_, origin)| origin))
            .cloned()
            .unwrap_or_else(|| "configuration".into())
    }

    /// Returns every value as (dotted key, TOML text, origin), sorted by key.
    pub fn explain(&self) -> Vec<(String, String, String)> {
        let mut rows = Vec::new();
        flatten(&self.table, "", &mut |key, value| {
            let origin = self.origins.get(&key).cloned().unwrap_or_default();
            rows.push((key, value.to_string(), origin));
        });
        rows.sort();
        rows
    }

    /// Returns the merged table.
    pub fn table(&self) -> &Table {
        &self.table
    }
}

fn extends(table: &mut Table, origin: &str) -> Result<Vec<String>, ConfigError> {
    let Some(value) = table.remove("extends") else {
        return Ok(Vec::new());
    };
    let parts = match value {
        Value::Array(items) => items
            .into_iter()
            .map(|item| item.as_str().map(str::to_owned))
            .collect(),
        _ => None,
    };
    parts.ok_or_else(|| ConfigError::Key {
        origin: origin.into(),
        key: "extends".into(),
        reason: "must be a list of part names".into(),
        hint: ", for example extends = [\"model/flower\"]".into(),
    })
}

fn merge(
    into: &mut Table,
    from: Table,
    prefix: &str,
    origin: &str,
    origins: &mut BTreeMap<String, String>,
) {
    for (key, value) in from {
        let path = if prefix.is_empty() {
            key.clone()
        } else {
            format!("{prefix}.{key}")
        };
        match (into.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => merge(old, new, &path, origin, origins),
            (_, value) => {
                origins.retain(|known, _| !known.starts_with(&format!("{path}.")));
                if let Value::Table(table) = &value {
                    flatten(table, &path, &mut |leaf, _| {
                        origins.insert(leaf, origin.into());
                    });
                }
                origins.insert(path, origin.into());
                into.insert(key, value);
            }
        }
    }
}

fn flatten(table: &Table, prefix: &str, visit: &mut impl FnMut(String, &Value)) {
    for (key, value) in table {
        let path = if prefix.is_empty() {
            key.clone()
        } else {
            format!("{prefix}.{key}")
        };
        match value {
            Value::Table(inner) => flatten(inner, &path, visit),
            leaf => visit(path, leaf),
        }
    }
}

/// Reads an override's right-hand side as TOML, else as a plain string.
fn scalar(text: &str) -> Value {
    format!("v = {text}")
        .parse::<Table>()
        .ok()
        .and_then(|mut table| table.remove("v"))
        .unwrap_or_else(|| Value::String(text.into()))
}

/// Parses a table strictly: the error names the exact key and the nearest known one.
pub fn parse_table<T: DeserializeOwned>(table: Table, origin: &str) -> Result<T, ConfigError> {
    serde_path_to_error::deserialize(Value::Table(table)).map_err(|error| {
        let mut key = error.path().to_string();
        let reason = error.inner().message().trim().to_owned();
        let mut hint = String::new();
        let mut names = reason.split('`').skip(1).step_by(2);
        if reason.starts_with("unknown field") || reason.starts_with("unknown variant") {
            let wrong = names.next().unwrap_or_default().to_owned();
            let nearest = names
                .map(|known| (strsim::damerau_levenshtein(known, &wrong), known))
                .min()
                .filter(|(distance, known)| *distance <= known.len().max(4) / 2);
            if let Some((_, known)) = nearest {
                hint = format!(" (did you mean `{known}`?)");
            }
            if key == "." {
                key = wrong;
            }
        }
        ConfigError::Key {
            origin: origin.into(),
            key,
            reason,
            hint,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Run {
        name: String,
        train: Train,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Train {
        steps: u32,
        seed: u64,
    }

    fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().expect("below dir")).expect("folder");
        std::fs::write(&path, text).expect("file");
        path
    }

    #[test]
    fn later_layers_win_and_origins_follow() {
        let dir = tempfile::tempdir().expect("tempdir");
        write(
            dir.path(),
            "base/train.toml",
            "[train]\nsteps = 1\nseed = 1",
        );
        let recipe = write(
            dir.path(),
            "demo.toml",
            "extends = [\"base/train\"]\nname = \"demo\"\n[train]\nsteps = 2",
        );
        let mut config = Layered::load(&recipe, dir.path()).expect("loads");
        config
            .apply_env([("POLLEN_TRAIN__SEED".to_owned(), "5".to_owned())].into_iter())
            .expect("env");
        config.set("train.steps=3").expect("set");
        let run: Run = config.parse().expect("parses");
        assert_eq!(
            run,
            Run {
                name: "demo".into(),
                train: Train { steps: 3, seed: 5 }
            }
        );
        let origins: Vec<String> = config.explain().into_iter().map(|row| row.2).collect();
        assert!(origins[0].ends_with("demo.toml"));
        assert_eq!(
            origins[1..],
            ["environment POLLEN_TRAIN__SEED", "--set train.steps=3"]
        );
    }

    #[test]
    fn an_unknown_key_is_named_with_its_origin_and_the_nearest_key() {
        let mut config =
            Layered::from_text("name = \"x\"\n[train]\nsteps = 1\nseed = 1", "x.toml").expect("ok");
        config.set("train.stepz=3").expect("set");
        let error = config.parse::<Run>().expect_err("unknown").to_string();
        assert!(error.contains("--set train.stepz=3"), "{error}");
        assert!(error.contains("did you mean `steps`"), "{error}");
    }

    #[test]
    fn a_circle_is_refused() {
        let dir = tempfile::tempdir().expect("tempdir");
        write(dir.path(), "a.toml", "extends = [\"b\"]");
        let b = write(dir.path(), "b.toml", "extends = [\"a\"]");
        let error = Layered::load(&b, dir.path())
            .expect_err("circle")
            .to_string();
        assert!(error.contains("circle"), "{error}");
    }

    #[test]
    fn a_bad_override_says_how_to_write_one() {
        let error = Layered::default()
            .set("train.steps")
            .expect_err("no value")
            .to_string();
        assert!(error.contains("a.b=c"), "{error}");
    }
}

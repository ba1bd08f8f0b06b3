//! From a recipe's name to everything that a run needs, checked as a whole.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pollen_core::{ActionSpace, ActionSpaceFile, ConfigError, Layered};
use pollen_trainer::RunConfig;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use toml::{Table, Value};

/// Recipe section `[run]`: where the run's files go and what is put into the store first.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RunSettings {
    /// Object-store folder of all runs: checkpoints go to `<url>/<recipe>/<run id>`. Empty: the
    /// local folder of runs.
    #[serde(default)]
    pub(crate) url: String,
    /// Local folder of datasets that is copied to `data.root` where files are missing there.
    #[serde(default)]
    pub(crate) stage_from: Option<PathBuf>,
}

/// A resolved recipe.
#[derive(Debug)]
pub(crate) struct Recipe {
    pub(crate) config: RunConfig,
    pub(crate) launch: pollen_launcher::Config,
    pub(crate) run: RunSettings,
    /// Every value with its origin.
    pub(crate) layered: Layered,
}

/// Keys that do not make another run: how long it may go, what it may cost, where and how it runs.
const NOT_IDENTITY: [&[&str]; 13] = [
    &["train", "steps"],
    &["train", "device"],
    &["train", "overlap"],
    &["train", "shard_optimizer"],
    &["budget"],
    &["launch"],
    &["run"],
    &["observe"],
    &["storage"],
    &["communicator"],
    &["checkpoint"],
    &["watchdog"],
    &["eval"],
];

impl Recipe {
    /// Reads a recipe by name or path, with the environment and `--set` on top.
    pub(crate) fn load(name: &str, overrides: &[String]) -> Result<Self> {
        let path = recipe_path(name)?;
        let root = path
            .parent()
            .and_then(Path::parent)
            .unwrap_or(Path::new("."));
        let configs = root.join("configs");
        let mut layered = Layered::load(&path, &configs)?;
        layered.apply_env(std::env::vars())?;
        for text in overrides {
            layered.set(text)?;
        }
        resolve_embodiments(&mut layered, &configs)?;
        Self::from_layered(layered)
    }

    /// Reads a resolved configuration, as it lies in a run's folder.
    pub(crate) fn load_resolved(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the resolved recipe {}", path.display()))?;
        Self::from_layered(Layered::from_text(&text, &path.display().to_string())?)
    }

    fn from_layered(layered: Layered) -> Result<Self> {
        let mut rest = layered.clone();
        let launch: pollen_launcher::Config = rest.take_section("launch")?;
        let run: RunSettings = rest.take_section("run")?;
        let config: RunConfig = rest.parse()?;
        let mut faults = config.faults();
        faults.extend(launch.validate());
        if faults.is_empty() {
            Ok(Self {
                config,
                launch,
                run,
                layered,
            })
        } else {
            Err(ConfigError::Invalid {
                origin: config.name,
                faults,
            }
            .into())
        }
    }

    /// Returns the resolved configuration as TOML.
    pub(crate) fn to_toml(&self) -> Result<String> {
        toml::to_string(self.layered.table()).context("the resolved recipe is not valid TOML")
    }

    /// Returns the hash that says whether two commands mean the same run.
    pub(crate) fn identity(&self) -> String {
        let mut table = self.layered.table().clone();
        for path in NOT_IDENTITY {
            remove(&mut table, path);
        }
        let text = serde_json::to_vec(&sorted(Value::Table(table))).expect("TOML values serialise");
        Sha256::digest(&text)
            .iter()
            .take(16)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

fn remove(table: &mut Table, path: &[&str]) {
    match path {
        [key] => drop(table.remove(*key)),
        [key, rest @ ..] => {
            if let Some(Value::Table(inner)) = table.get_mut(*key) {
                remove(inner, rest);
            }
        }
        [] => {}
    }
}

/// Brings all tables into the order of their keys, so that the order of a file changes no hash.
fn sorted(value: Value) -> serde_json::Value {
    match value {
        Value::Table(table) => {
            let mut entries: Vec<(String, Value)> = table.into_iter().collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            entries
                .into_iter()
                .map(|(key, value)| (key, sorted(value)))
                .collect()
        }
        Value::Array(items) => items.into_iter().map(sorted).collect(),
        other => serde_json::to_value(other).expect("scalars serialise"),
    }
}

fn recipe_path(name: &str) -> Result<PathBuf> {
    let direct = PathBuf::from(name);
    if direct
        .extension()
        .is_some_and(|extension| extension == "toml")
    {
        return Ok(direct);
    }
    let path = Path::new("recipes").join(format!("{name}.toml"));
    if path.exists() {
        return Ok(path);
    }
    let mut known: Vec<String> = std::fs::read_dir("recipes")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().file_stem()?.to_str()?.to_owned()))
        .collect();
    known.sort();
    Err(ConfigError::Invalid {
        origin: format!("recipe `{name}`"),
        faults: vec![if known.is_empty() {
            "there is no folder recipes/ here; run pollen in the repository's root or give a path \
             that ends in .toml"
                .into()
        } else {
            format!(
                "recipes/{name}.toml does not exist; there are: {}",
                known.join(", ")
            )
        }],
    }
    .into())
}

/// Replaces `embodiments = ["name", ...]` by the action spaces of `configs/embodiments/`.
fn resolve_embodiments(layered: &mut Layered, configs: &Path) -> Result<()> {
    let Some(names) = layered.remove("embodiments") else {
        return Ok(());
    };
    let names = names.as_array().cloned().unwrap_or_default();
    let mut spaces = Vec::new();
    for name in names {
        let space = action_space(configs, name.as_str().unwrap_or_default())?;
        spaces.push(Value::try_from(space)?);
    }
    layered.insert("action_spaces", Value::Array(spaces), "embodiments")?;
    Ok(())
}

/// Reads the action space `name` of `configs/embodiments/`.
pub(crate) fn action_space(configs: &Path, name: &str) -> Result<ActionSpace> {
    let path = configs.join("embodiments").join(format!("{name}.toml"));
    let origin = path.display().to_string();
    let text = std::fs::read_to_string(&path).map_err(|source| ConfigError::Read {
        path: origin.clone(),
        source,
    })?;
    Ok(ActionSpaceFile::parse(&text, &origin)?)
}

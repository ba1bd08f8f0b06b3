//! What `pollen data stats` and its kin are asked about: a URL, a dataset file or a recipe.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use pollen_core::{ActionSpace, ConfigError, Layered};
use pollen_dataloader::{ColumnTransform, DatasetConfig, Dimension, Survey};
use pollen_launcher::ObjectServerKind;
use pollen_storage::{Silent, Storage, StorageConfig};
use serde::Deserialize;

use crate::args::DataTargetArgs;
use crate::recipe::{Recipe, action_space};

/// Where indexes of datasets go that cannot be written to, unless a recipe says otherwise.
const INDEX_DIR: &str = ".cache/pollen/index";
const ROOT_VARIABLE: &str = "POLLEN_DATA__ROOT";

/// One dataset to look at.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) name: String,
    pub(crate) url: String,
    /// Its section of a recipe and its action space; without them, columns are taken as stored.
    pub(crate) declared: Option<(DatasetConfig, ActionSpace)>,
    pub(crate) storage: StorageConfig,
    pub(crate) index_dir: PathBuf,
}

/// The part of a dataset file that is read.
#[derive(Deserialize)]
struct DataSection {
    datasets: BTreeMap<String, DatasetConfig>,
}

impl Target {
    pub(crate) fn open_storage(&self) -> Result<Storage> {
        Ok(Storage::open(&self.url, &self.storage, Arc::new(Silent))?)
    }

    pub(crate) async fn survey(&self) -> Result<Survey> {
        let storage = self.open_storage()?;
        Ok(Survey::open(storage, &self.name, &self.index_dir).await?)
    }

    /// Returns what becomes of the stored columns.
    pub(crate) fn transform(&self, survey: &Survey) -> Result<ColumnTransform> {
        if let Some((config, space)) = &self.declared {
            return Ok(survey.transform(config, space)?);
        }
        let features = &survey.metadata().info.features;
        let state = "observation.state";
        let state = if features.contains_key(state) {
            state
        } else {
            ""
        };
        Ok(ColumnTransform::columns("action", state))
    }

    /// Describes the dimensions of transformed actions and states of these widths.
    pub(crate) fn dimensions(
        &self,
        survey: &Survey,
        transform: &ColumnTransform,
        [action, state]: [usize; 2],
    ) -> [Vec<Dimension>; 2] {
        let features = &survey.metadata().info.features;
        let names = |feature: &str, as_stored: bool| {
            let feature = features.get(feature).filter(|_| as_stored);
            feature.and_then(pollen_dataloader::lerobot::Feature::dim_names)
        };
        let actions = match &self.declared {
            Some((_, space)) => Dimension::of_space(space),
            None => Dimension::stored(
                names(&transform.action, transform.steps.action.is_empty()),
                action,
            ),
        };
        let states = names(&transform.state, transform.steps.state.is_empty());
        [actions, Dimension::stored(states, state)]
    }
}

/// Finds what a command line means.
pub(crate) fn resolve(args: &DataTargetArgs) -> Result<Vec<Target>> {
    let root = args
        .root
        .clone()
        .or_else(|| std::env::var(ROOT_VARIABLE).ok());
    let text = &args.target;
    if text.contains("://") || Path::new(text).join("meta/info.json").is_file() {
        return Ok(vec![of_url(text, args.dataset.as_deref())?]);
    }
    let path = Path::new(text);
    let is_recipe = path
        .extension()
        .is_some_and(|extension| extension == "toml")
        || Path::new("recipes").join(format!("{text}.toml")).is_file();
    if !is_recipe {
        let (name, config) = dataset_file(text)?;
        if root.is_none() && !config.url.contains("://") {
            return Err(ConfigError::Invalid {
                origin: format!("dataset `{name}`"),
                faults: vec![format!(
                    "it lies below data.root, which nobody gives: add --root URL or set \
                     {ROOT_VARIABLE}"
                )],
            }
            .into());
        }
        let space = action_space(Path::new("configs"), &config.embodiment)?;
        return Ok(vec![Target {
            url: config.location(&root.unwrap_or_default(), &name),
            name,
            declared: Some((config, space)),
            storage: StorageConfig::default(),
            index_dir: INDEX_DIR.into(),
        }]);
    }
    let overrides: Vec<String> = args
        .root
        .iter()
        .map(|r| format!("data.root={r:?}"))
        .collect();
    let recipe = Recipe::load(text, &overrides)?;
    let data = &recipe.config.data;
    let local = local_copy(&recipe).filter(|_| root.is_none());
    if let Some(copy) = &local {
        writeln!(
            std::io::stderr(),
            "reading {copy}, of which {} is a copy",
            data.root
        )?;
    }
    let root = local.as_ref().unwrap_or(&data.root);
    let wanted = |name: &str| args.dataset.as_deref().is_none_or(|only| only == name);
    let mut targets = Vec::new();
    for (name, config) in data.used().filter(|(name, _)| wanted(name)) {
        let spaces = &recipe.config.action_spaces;
        let space = spaces.iter().find(|space| space.name == config.embodiment);
        let space = space.with_context(|| {
            format!("data.datasets.{name}.embodiment is none of the recipe's action spaces")
        })?;
        targets.push(Target {
            name: name.clone(),
            url: config.location(root, name),
            declared: Some((config.clone(), space.clone())),
            storage: recipe.config.storage.clone(),
            index_dir: data.index_dir.clone(),
        });
    }
    if targets.is_empty() {
        let used: Vec<&str> = data.used().map(|(name, _)| &**name).collect();
        return Err(ConfigError::Invalid {
            origin: format!("recipe `{text}`"),
            faults: vec![format!("--dataset names none of its datasets {used:?}")],
        }
        .into());
    }
    Ok(targets)
}

/// Returns the folder that a recipe's own object server is filled from: the server runs only beside
/// a run.
fn local_copy(recipe: &Recipe) -> Option<String> {
    if recipe.launch.object_server == ObjectServerKind::None {
        return None;
    }
    let folder = recipe.run.stage_from.as_ref()?;
    Some(folder.to_string_lossy().into_owned())
}

pub(super) fn of_url(url: &str, dataset: Option<&str>) -> Result<Target> {
    let end = url.trim_end_matches('/').rsplit('/').next();
    let mut target = Target {
        name: end.unwrap_or(url).to_owned(),
        url: url.to_owned(),
        declared: None,
        storage: StorageConfig::default(),
        index_dir: INDEX_DIR.into(),
    };
    if let Some(dataset) = dataset {
        let (name, config) = dataset_file(dataset)?;
        let space = action_space(Path::new("configs"), &config.embodiment)?;
        target.name = name;
        target.declared = Some((config, space));
    }
    Ok(target)
}

/// Reads the datasets of the text of a dataset file.
pub(super) fn dataset_file_text(
    text: &str,
    origin: &str,
) -> Result<BTreeMap<String, DatasetConfig>> {
    let section: DataSection = Layered::from_text(text, origin)?.take_section("data")?;
    Ok(section.datasets)
}

/// Finds a dataset's section: by the name of its file in `configs/datasets`, by a path, or by the
/// name of its table.
fn dataset_file(name: &str) -> Result<(String, DatasetConfig)> {
    let configs = Path::new("configs");
    let folder = configs.join("datasets");
    let direct = match Path::new(name).extension() {
        Some(extension) if extension == "toml" => PathBuf::from(name),
        _ => folder.join(format!("{name}.toml")),
    };
    if direct.is_file() {
        let datasets = sections(&direct, configs)?;
        return datasets
            .into_iter()
            .next()
            .with_context(|| format!("{} has no table [data.datasets.NAME]", direct.display()));
    }
    let mut known = Vec::new();
    for entry in std::fs::read_dir(&folder).into_iter().flatten() {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "toml")
        {
            known.extend(sections(&path, configs)?);
        }
    }
    if let Some(at) = known.iter().position(|(key, _)| key == name) {
        return Ok(known.swap_remove(at));
    }
    let mut names: Vec<String> = known.into_iter().map(|(key, _)| key).collect();
    names.sort();
    Err(ConfigError::Invalid {
        origin: format!("`{name}`"),
        faults: vec![format!(
            "is no URL, no folder with meta/info.json, no recipe in recipes/ and no dataset in \
             configs/datasets/ ({})",
            names.join(", ")
        )],
    }
    .into())
}

fn sections(path: &Path, configs: &Path) -> Result<BTreeMap<String, DatasetConfig>> {
    let mut layered = Layered::load(path, configs)?;
    let section: DataSection = layered.take_section("data")?;
    Ok(section.datasets)
}

//! Checks a dataset's section of the recipe against the features that are stored.

use pollen_core::ActionSpace;

use crate::dataset_config::{DatasetConfig, Source};
use crate::lerobot::{Feature, Metadata};

/// Checks the recipe's columns against `info.json`.
pub(crate) fn feature_faults(
    name: &str,
    config: &DatasetConfig,
    metadata: &Metadata,
    space: &ActionSpace,
    cameras: &[String],
    faults: &mut Vec<String>,
) {
    let key = format!("data.datasets.{name}");
    let features = &metadata.info.features;
    let mut known = |what: &str, feature: &str| {
        let found = features.get(feature);
        if found.is_none() {
            let names: Vec<&String> = features.keys().collect();
            faults.push(format!(
                "{key}.{what} = \"{feature}\" is not a feature; it has {names:?}"
            ));
        }
        found
    };
    let action = known("action", &config.action).cloned();
    let state = if config.state.is_empty() {
        None
    } else {
        known("state", &config.state).cloned()
    };
    let images: Vec<_> = cameras
        .iter()
        .filter_map(|role| config.cameras.get(role).map(|feature| (role, feature)))
        .filter_map(|(role, feature)| {
            let found = known(&format!("cameras.{role}"), feature)?;
            Some((role, feature, found.clone()))
        })
        .collect();
    for (role, feature, found) in images {
        if found.dtype != "image" {
            faults.push(format!(
                "{key}.cameras.{role} = \"{feature}\" is of type {}; Pollen reads images, convert \
                 the dataset with `pollen data convert`",
                found.dtype
            ));
        }
    }
    let width = |feature: Option<Feature>| feature.map_or(0, |feature| feature.width());
    let stored = action.is_some();
    for (what, feature, fields) in [
        ("action", &action, &config.source.action),
        ("state", &state, &config.source.state),
    ] {
        let Some((feature, declared)) = feature.as_ref().zip(Source::width(fields)) else {
            continue;
        };
        let found = width(Some(feature.clone()));
        if found != declared {
            faults.push(format!(
                "{key}.source.{what} names fields of {declared} dimensions, the dataset stores \
                 {found}: it is another release, or was converted from other fields; correct \
                 {key}.source and {key}.transform"
            ));
        }
    }
    let widths = config.transform.widths(width(action), width(state));
    let (action, state) = match widths {
        Ok(widths) => widths,
        Err(found) => {
            let found = found.iter().filter(|_| stored);
            faults.extend(found.map(|fault| format!("{key}.transform.{fault}")));
            return;
        }
    };
    if stored && action != space.dim() {
        let what = if config.transform.action.is_empty() {
            format!("action = \"{}\" has", config.action)
        } else {
            "transform.action makes".to_owned()
        };
        faults.push(format!(
            "{key}.{what} {action} dimensions, the action space `{}` has {}",
            space.name,
            space.dim()
        ));
    }
    if space.proprio_dim > 0 && state != space.proprio_dim {
        faults.push(format!(
            "{key}.state = \"{}\" does not have the {} dimensions that the action space `{}` shows \
             the policy",
            config.state, space.proprio_dim, space.name
        ));
    }
}

//! What an RLDS dataset holds: its files, its fields, and which of them matter.

use bytes::Bytes;
use pollen_storage::Storage;

use crate::error::{Error, Result};
use crate::example::{Example, Values};
use crate::source::{Field, FieldKind, Profile};
use crate::tfds::{DatasetInfo, Leaf, LeafKind};
use crate::tfrecord::{Record, RecordFile};

/// A file of a split and, where known, its number of records.
#[derive(Clone, Debug)]
pub(crate) struct Shard {
    pub(crate) path: String,
    pub(crate) records: Option<u64>,
}

/// Finds the files of a split.
pub(crate) async fn find_shards(
    storage: &Storage,
    info: Option<&DatasetInfo>,
    split: Option<&str>,
) -> Result<Vec<Shard>> {
    let url = storage.url();
    if let Some(info) = info.filter(|info| !info.splits.is_empty()) {
        let names: Vec<&str> = info
            .splits
            .iter()
            .map(|split| split.name.as_str())
            .collect();
        let wanted = split.unwrap_or(if names.contains(&"train") {
            "train"
        } else {
            names[0]
        });
        let Some(found) = info.splits.iter().find(|split| split.name == wanted) else {
            return Err(Error::arguments(format!(
                "{url} has no split `{wanted}`; it has {}",
                names.join(", ")
            )));
        };
        let shards = found
            .shards(&info.name)
            .map_err(|e| Error::invalid(format!("{url}/dataset_info.json"), e))?;
        let shards = shards.into_iter().map(|(path, records)| Shard {
            path,
            records: Some(records),
        });
        return Ok(shards.collect());
    }
    let wanted = format!("-{}.tfrecord", split.unwrap_or("train"));
    let listing = storage.list("").await?;
    let files = || {
        listing
            .iter()
            .map(|object| &object.path)
            .filter(|p| p.contains(".tfrecord"))
    };
    let mut found: Vec<&String> = files().filter(|path| path.contains(&wanted)).collect();
    if found.is_empty() && split.is_none() {
        found = files().collect();
    }
    if found.is_empty() {
        return Err(Error::arguments(format!(
            "{url} has no file of the split `{}`",
            split.unwrap_or("train")
        )));
    }
    let shards = found.into_iter().map(|path| Shard {
        path: path.clone(),
        records: None,
    });
    Ok(shards.collect())
}

/// Describes the fields of a dataset without `features.json` by its first record.
pub(crate) async fn infer(storage: &Storage, shards: &[Shard]) -> Result<Vec<Leaf>> {
    let first = shards
        .first()
        .map(|shard| shard.path.as_str())
        .unwrap_or_default();
    let mut file = RecordFile::open(storage, first).await?;
    let name = file.name();
    let Some(record) = file.read().await? else {
        return Err(Error::invalid(
            name,
            "it is empty and there is no features.json",
        ));
    };
    let example = parse(&record, &name)?;
    let values = |key: &str| {
        let values = example.values(key);
        values.map_err(|e| Error::corrupt(&name, record.offset + e.offset as u64, e.reason))
    };
    let steps = ["steps/is_first", "steps/is_last", "steps/reward"].into_iter();
    let mut num_steps = 0;
    for key in steps {
        num_steps = num_steps.max(values(key)?.len());
    }
    if num_steps == 0 {
        let reason = "there is no features.json and no `steps/is_first`; add features.json";
        return Err(Error::invalid(name, reason));
    }
    let mut leaves = Vec::new();
    for key in example.keys().map(String::from).collect::<Vec<_>>() {
        let values = values(&key)?;
        let count = values.len();
        let kind = match &values {
            Values::None => LeafKind::Other,
            Values::Floats(_) | Values::Integers(_) => LeafKind::Numbers,
            Values::Bytes(list) => match list.first().map(Bytes::as_ref) {
                Some([0xff, 0xd8, ..] | [0x89, b'P', b'N', b'G', ..]) => LeafKind::Image,
                _ => LeafKind::Text,
            },
        };
        let shape = match count.checked_rem(num_steps) {
            Some(0) if count == num_steps => Some(vec![]),
            Some(0) => Some(vec![count / num_steps]),
            _ => None,
        };
        let field = key.strip_prefix("steps/").map(String::from);
        leaves.push(Leaf {
            ragged: shape.is_none() && field.is_some(),
            key,
            field,
            kind,
            shape,
        });
    }
    Ok(leaves)
}

/// Chooses fields by the names that Open X-Embodiment datasets use.
pub(crate) fn profile(dataset: &str, leaves: &[Leaf], shards: &[Shard]) -> Profile {
    let mut profile = Profile::default();
    for leaf in leaves {
        let Some(name) = &leaf.field else { continue };
        let kind = match leaf.kind {
            LeafKind::Image => FieldKind::Image,
            LeafKind::Text => FieldKind::Text,
            LeafKind::Numbers | LeafKind::Packed { .. } => FieldKind::Numbers,
            LeafKind::Other => FieldKind::Other,
        };
        profile.fields.push(Field::new(name, kind));
    }
    let has = |name: &str, kind| profile.fields.contains(&Field::new(name, kind));
    let first = |names: &[&str], kind| {
        let found = names.iter().find(|name| has(name, kind));
        found.map(|name| (*name).to_string())
    };
    let images = profile
        .fields
        .iter()
        .filter(|field| field.kind == FieldKind::Image);
    let images = images.filter(|field| !field.name.contains("depth"));
    let cameras = images.map(|field| {
        let camera = field
            .name
            .strip_prefix("observation/")
            .unwrap_or(&field.name);
        (field.name.clone(), camera.replace('/', "_"))
    });
    let cameras = cameras.collect();
    let state = first(
        &[
            "observation/state",
            "observation/proprio",
            "observation/EEF_state",
        ],
        FieldKind::Numbers,
    );
    let action = first(&["action"], FieldKind::Numbers);
    let instruction = first(
        &[
            "language_instruction",
            "observation/natural_language_instruction",
            "observation/language_instruction",
            "natural_language_instruction",
        ],
        FieldKind::Text,
    );
    profile.cameras = cameras;
    profile.state = state.into_iter().collect();
    profile.action = action.into_iter().collect();
    profile.instruction = instruction;
    let known = [
        ("bridge", 5.0, "widowx"),
        ("fractal20220817_data", 3.0, "google_robot"),
        ("libero", 20.0, "panda"),
        ("kuka", 10.0, "kuka"),
        ("taco_play", 15.0, "panda"),
        ("droid", 15.0, "panda"),
    ];
    if let Some((_, fps, robot)) = known.iter().find(|(name, ..)| dataset.starts_with(name)) {
        profile.fps = Some(*fps);
        profile.robot_type = Some((*robot).into());
    }
    let counts: Option<Vec<u64>> = shards.iter().map(|shard| shard.records).collect();
    profile.num_episodes = counts.map(|counts| counts.iter().sum());
    profile.fingerprint = format!("rlds {dataset} {shards:?}");
    profile
}

/// Opens the message of a record.
pub(crate) fn parse(record: &Record, file: &str) -> Result<Example> {
    Example::parse(record.payload.clone())
        .map_err(|e| Error::corrupt(file, record.offset + e.offset as u64, e.reason))
}

//! The two JSON files of a TFDS folder: `features.json` and `dataset_info.json`.

use serde::Deserialize;
use serde_json::Value;

/// How a leaf's values are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LeafKind {
    /// Numbers in a float or integer list.
    Numbers,
    /// One byte string a step that holds little-endian numbers.
    Packed { dtype: String, zlib: bool },
    /// UTF-8 text.
    Text,
    /// One encoded image a step.
    Image,
    /// A feature class that is not known.
    Other,
}

/// A leaf of the features of an episode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Leaf {
    /// Key in the example: `steps/observation/state`.
    pub(crate) key: String,
    /// Key below `steps/`; none for what an episode has once.
    pub(crate) field: Option<String>,
    pub(crate) kind: LeafKind,
    /// Shape of one step's value; none when a dimension is unknown.
    pub(crate) shape: Option<Vec<usize>>,
    /// Whether each step has a list of values of its own length.
    pub(crate) ragged: bool,
}

/// Returns the leaves of `features.json`; the error says what is wrong with it.
pub(crate) fn leaves(text: &[u8]) -> Result<Vec<Leaf>, String> {
    let root: Value = serde_json::from_slice(text).map_err(|e| e.to_string())?;
    let mut leaves = Vec::new();
    walk(&root, "", false, 0, &mut leaves)?;
    if leaves.iter().all(|leaf| leaf.field.is_none()) {
        return Err("it describes no `steps`; this is not an RLDS dataset of episodes".into());
    }
    Ok(leaves)
}

/// `lists` is the number of sequences around the node.
fn walk(
    node: &Value,
    key: &str,
    in_steps: bool,
    lists: usize,
    leaves: &mut Vec<Leaf>,
) -> Result<(), String> {
    // JSON that is nested deeper than any dataset would overflow the stack.
    if lists > 8 || key.len() > 4096 {
        return Err(format!("`{key}` is nested too deeply"));
    }
    if let Some(features) = node["featuresDict"]["features"].as_object() {
        for (name, child) in features {
            let key = match key {
                "" => name.clone(),
                _ => format!("{key}/{name}"),
            };
            walk(child, &key, in_steps, lists, leaves)?;
        }
        return Ok(());
    }
    let list = ["sequence", "dataset"]
        .into_iter()
        .find_map(|name| node.get(name));
    if let Some(list) = list {
        let in_steps = in_steps || key == "steps";
        return walk(&list["feature"], key, in_steps, lists + 1, leaves);
    }
    let class = node["pythonClassName"].as_str().unwrap_or_default();
    let has = |payload: &str, ending: &str| node.get(payload).is_some() || class.ends_with(ending);
    let mut shape = None;
    let kind = if has("image", ".Image") {
        LeafKind::Image
    } else if has("text", ".Text") {
        LeafKind::Text
    } else if has("classLabel", ".ClassLabel") {
        shape = Some(vec![]);
        LeafKind::Numbers
    } else if let Some(tensor) = node.get("tensor") {
        shape = dimensions(&tensor["shape"]);
        let dtype = tensor["dtype"].as_str().unwrap_or_default().to_string();
        match (dtype.as_str(), tensor["encoding"].as_str()) {
            ("string", _) => LeafKind::Text,
            (_, Some("zlib")) => LeafKind::Packed { dtype, zlib: true },
            (_, Some("bytes")) => LeafKind::Packed { dtype, zlib: false },
            _ => LeafKind::Numbers,
        }
    } else {
        LeafKind::Other
    };
    let field = in_steps.then(|| key.strip_prefix("steps/").unwrap_or(key).to_string());
    leaves.push(Leaf {
        key: key.into(),
        field,
        kind,
        shape,
        ragged: lists > 1,
    });
    Ok(())
}

/// Dimensions are strings; unknown ones are -1.
fn dimensions(shape: &Value) -> Option<Vec<usize>> {
    let Some(dimensions) = shape.get("dimensions") else {
        return Some(vec![]);
    };
    let number = |value: &Value| match value {
        Value::String(text) => text.parse().ok(),
        other => other.as_u64().map(|number| number as usize),
    };
    dimensions.as_array()?.iter().map(number).collect()
}

/// What is used of `dataset_info.json`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct DatasetInfo {
    #[serde(default)]
    pub(crate) name: String,
    pub(crate) file_format: Option<String>,
    #[serde(default)]
    pub(crate) splits: Vec<Split>,
}

/// A split of a dataset.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Split {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) shard_lengths: Vec<String>,
    pub(crate) filepath_template: Option<String>,
}

impl Split {
    /// Returns the files of the split with their numbers of records; the error says what is wrong.
    pub(crate) fn shards(&self, dataset: &str) -> Result<Vec<(String, u64)>, String> {
        let count = self.shard_lengths.len();
        let default = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}";
        let template = self.filepath_template.as_deref().unwrap_or(default);
        let shards = self
            .shard_lengths
            .iter()
            .enumerate()
            .map(|(shard, length)| {
                let records = length
                    .parse()
                    .map_err(|_| format!("`{length}` in shardLengths is not a number"))?;
                let name = template
                    .replace("{DATASET}", dataset)
                    .replace("{SPLIT}", &self.name)
                    .replace("{FILEFORMAT}", "tfrecord")
                    .replace("{SHARD_X_OF_Y}", &format!("{shard:05}-of-{count:05}"))
                    .replace("{SHARD_INDEX}", &format!("{shard:05}"))
                    .replace("{NUM_SHARDS}", &format!("{count:05}"));
                if name.contains('{') {
                    Err(format!(
                        "the filepathTemplate `{template}` is not understood"
                    ))
                } else {
                    Ok((name, records))
                }
            });
        shards.collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn nested_names_shapes_and_lists() {
        let text = br#"{"featuresDict": {"features": {
            "steps": {"sequence": {"length": "-1", "feature": {"featuresDict": {"features": {
                "action": {"tensor": {"shape": {"dimensions": ["7"]}, "dtype": "float32"}},
                "clip/pose": {"tensor": {"shape": {"dimensions": ["-1"]}, "dtype": "float32"}},
                "is_first": {"tensor": {"shape": {}, "dtype": "bool"}},
                "code": {"tensor": {"shape": {"dimensions": ["3"]}, "dtype": "int32",
                         "encoding": "zlib"}},
                "boxes": {"sequence": {"feature": {"tensor": {"shape": {}, "dtype": "int64"}}}},
                "observation": {"featuresDict": {"features": {"image": {"image": {}}}}}
            }}}}},
            "episode_metadata": {"featuresDict": {"features": {"path": {"text": {}}}}}
        }}}"#;
        let leaves = leaves(text).unwrap();
        let find = |key: &str| leaves.iter().find(|leaf| leaf.key == key).unwrap();
        assert_eq!(find("steps/action").shape, Some(vec![7]));
        assert_eq!(find("steps/clip/pose").shape, None);
        assert_eq!(find("steps/is_first").shape, Some(vec![]));
        assert_eq!(
            find("steps/observation/image").field.as_deref(),
            Some("observation/image")
        );
        assert!(find("steps/boxes").ragged && !find("steps/action").ragged);
        assert_eq!(find("episode_metadata/path").field, None);
        let zlib = LeafKind::Packed {
            dtype: "int32".into(),
            zlib: true,
        };
        assert_eq!(find("steps/code").kind, zlib);
    }

    #[test]
    fn names_of_shards() {
        let mut split = Split {
            name: "train".into(),
            shard_lengths: vec!["3".into(), "4".into()],
            filepath_template: None,
        };
        let shards = split.shards("bridge").unwrap();
        assert_eq!(
            shards[1],
            ("bridge-train.tfrecord-00001-of-00002".into(), 4)
        );
        split.shard_lengths[0] = "x".into();
        assert!(split.shards("bridge").unwrap_err().contains("shardLengths"));
    }
}

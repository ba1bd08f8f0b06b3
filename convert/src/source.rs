//! What every format gives: its fields, and episodes one after the other.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use async_trait::async_trait;
use pollen_storage::Storage;
use serde::{Deserialize, Serialize};

use crate::episode::Recording;
use crate::error::{Error, Result};
use crate::reader::get_if_present;
use crate::selection::Selection;

/// A format that can be converted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceKind {
    /// RLDS: TFDS folders of TFRecord files.
    Rlds,
    /// LeRobot v2.0, v2.1 and v3.0.
    LeRobot,
    /// CALVIN: a file for each step.
    Calvin,
    /// HDF5 as LIBERO, robomimic and robosuite write it.
    Hdf5,
}

impl fmt::Display for SourceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rlds => "rlds",
            Self::LeRobot => "lerobot",
            Self::Calvin => "calvin",
            Self::Hdf5 => "hdf5",
        })
    }
}

impl FromStr for SourceKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let kinds = [Self::Rlds, Self::LeRobot, Self::Calvin, Self::Hdf5];
        let found = kinds.into_iter().find(|kind| kind.to_string() == text);
        found.ok_or_else(|| format!("`{text}` is none of rlds, lerobot, calvin, hdf5"))
    }
}

/// What a field holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FieldKind {
    Image,
    Numbers,
    Text,
    /// Nothing that a conversion can use.
    Other,
}

/// A field of a source's frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Field {
    pub(crate) name: String,
    pub(crate) kind: FieldKind,
}

impl Field {
    pub(crate) fn new(name: impl Into<String>, kind: FieldKind) -> Self {
        Self {
            name: name.into(),
            kind,
        }
    }
}

/// What a source says of itself, and what is taken from it unless told otherwise.
#[derive(Clone, Debug, Default)]
pub(crate) struct Profile {
    pub(crate) fields: Vec<Field>,
    pub(crate) fps: Option<f64>,
    pub(crate) robot_type: Option<String>,
    /// Fields and the cameras they become.
    pub(crate) cameras: Vec<(String, String)>,
    pub(crate) state: Vec<String>,
    pub(crate) action: Vec<String>,
    pub(crate) instruction: Option<String>,
    /// Names of the numbers of a field.
    pub(crate) names: BTreeMap<String, Vec<String>>,
    /// The images are stored upside down; turning them by 180 degrees is what others do.
    pub(crate) rotate: bool,
    pub(crate) num_episodes: Option<u64>,
    /// What the user should know.
    pub(crate) notes: Vec<String>,
    /// Changes when the source does.
    pub(crate) fingerprint: String,
}

/// Reads one episode, on a thread that may block.
pub(crate) type Work = Box<dyn FnOnce(&Selection) -> Result<Recording> + Send>;

/// A dataset of another format.
#[async_trait]
pub(crate) trait Source: Send {
    fn profile(&self) -> &Profile;

    /// Makes `episode` the next one.
    async fn seek(&mut self, episode: u64) -> Result<()>;

    /// Returns the work of reading the next episode, or nothing at the end.
    async fn next(&mut self) -> Result<Option<Work>>;
}

/// Returns the path that a URL of the local file system names.
pub(crate) fn local_path(url: &str) -> Option<&str> {
    match url.split_once("://") {
        None => Some(url),
        Some(("file", path)) => Some(path),
        Some(_) => None,
    }
}

/// Finds out the format of a source, and the folder in it where the dataset is.
pub(crate) async fn detect(url: &str, storage: &Storage) -> Result<(SourceKind, String)> {
    let ends = |ending: &str| url.to_ascii_lowercase().ends_with(ending);
    if [".hdf5", ".h5"].into_iter().any(ends) {
        return Ok((SourceKind::Hdf5, String::new()));
    }
    let marks = [
        (SourceKind::LeRobot, "meta/info.json"),
        (SourceKind::Rlds, "dataset_info.json"),
        (SourceKind::Rlds, "features.json"),
        (SourceKind::Calvin, "ep_start_end_ids.npy"),
        (SourceKind::Calvin, "training/ep_start_end_ids.npy"),
    ];
    for (kind, mark) in marks {
        if get_if_present(storage, mark).await?.is_some() {
            return Ok((kind, String::new()));
        }
    }
    let listing = storage.list("").await?;
    let paths = || listing.iter().map(|object| object.path.as_str());
    if paths().any(|path| {
        [".hdf5", ".h5"]
            .into_iter()
            .any(|ending| path.ends_with(ending))
    }) {
        return Ok((SourceKind::Hdf5, String::new()));
    }
    let below = |mark: &'static str| paths().filter_map(move |path| path.strip_suffix(mark));
    let mut folders: Vec<(SourceKind, &str)> = below("/dataset_info.json")
        .map(|folder| (SourceKind::Rlds, folder))
        .chain(below("/meta/info.json").map(|folder| (SourceKind::LeRobot, folder)))
        .collect();
    folders.dedup();
    match folders[..] {
        [(kind, folder)] => Ok((kind, folder.into())),
        [] if paths().any(|path| path.contains(".tfrecord")) => {
            Ok((SourceKind::Rlds, String::new()))
        }
        [] => Err(Error::arguments(format!(
            "{url} holds no dataset of a known format (rlds, lerobot, calvin, hdf5); \
             correct the path"
        ))),
        _ => {
            let names: Vec<&str> = folders.iter().map(|(_, folder)| *folder).collect();
            Err(Error::arguments(format!(
                "{url} holds {} datasets; give one of them: {}",
                names.len(),
                names.join(", ")
            )))
        }
    }
}

//! The `[data]` section of a recipe.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use bytesize::ByteSize;
use pollen_processing::{Augmentation, CropAndColor, ResizeKind};
use serde::{Deserialize, Serialize};

use crate::dataset_config::DatasetConfig;
use crate::error::{Error, Result};

/// Which datasets are mixed, how their frames become model inputs, and what the loader may use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// URL of the folder that holds the datasets: `s3://bucket/prefix`, `az://container/prefix`,
    /// `gs://bucket/prefix`, `file:///path`, or `https://host/folder` to read only.
    pub root: String,
    /// Datasets by name. The mixture takes them in the order of their names.
    pub datasets: BTreeMap<String, DatasetConfig>,
    /// Camera roles in the order the model sees them. A dataset without one gives a black image.
    pub cameras: Vec<String>,
    /// What a weight means.
    #[serde(default)]
    pub weight_meaning: WeightMeaning,
    /// Side of the square images handed to the model, in pixels.
    pub image_size: usize,
    /// How frames are resized.
    #[serde(default = "defaults::resize")]
    pub resize: ResizeKind,
    /// How training images are augmented.
    #[serde(default)]
    pub augment: Augment,
    /// Bytes of a dataset's row groups whose frames are mixed at a time. Part of the sample order.
    #[serde(default = "defaults::window_bytes")]
    pub window_bytes: ByteSize,
    /// Bytes of row groups, with their columns, and of files' footers in memory, whatever the number
    /// of datasets; only what a single micro-batch needs may go beyond. Two windows of each dataset,
    /// divided by the number of ranks, should fit.
    #[serde(default = "defaults::cache_bytes")]
    pub cache_bytes: ByteSize,
    /// Keeps row groups on this node's disk as well; off unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_cache: Option<DiskCacheConfig>,
    /// Micro-batches made ahead of the training step.
    #[serde(default = "defaults::prefetch_batches")]
    pub prefetch_batches: usize,
    /// Threads that decode images; 0 takes one per core that the process may use.
    #[serde(default)]
    pub decode_threads: usize,
    /// Whether action steps past the end of an episode are left out of the loss. They always repeat
    /// the last action; FLOWER counts them.
    #[serde(default)]
    pub mask_padding: bool,
    /// Control frequency told to the model for every dataset, in hertz; 0 tells it each one's own.
    #[serde(default)]
    pub frequency_hz: f64,
    /// How many steps of a chunk count.
    #[serde(default)]
    pub chunk_length: ChunkLength,
    /// Samples of a run that cannot be loaded (corrupt image or file, missing object, an action that
    /// is no number) and are left out of the loss, each recorded, before the run stops.
    ///
    /// Every occurrence counts, so a bad frame counts again in the next epoch: the number is a sum
    /// that ranks add up each step and a checkpoint carries, the same for every number of ranks and
    /// after every restart, and it bounds the share of training that is lost. Distinct frames would
    /// need a set that all ranks agree on and every checkpoint holds.
    #[serde(default = "defaults::max_bad_samples")]
    pub max_bad_samples: u64,
    /// Path of the tokenizer (`tokenizer.json`).
    pub tokenizer: PathBuf,
    /// Whether Florence-2's 1,024 tokens are appended to it.
    #[serde(default)]
    pub florence_tokens: bool,
    /// Length that texts are padded and cut to, special tokens included.
    #[serde(default = "defaults::text_length")]
    pub text_length: usize,
    /// Folder for the indexes of datasets in storage that cannot be written to.
    #[serde(default = "defaults::index_dir")]
    pub index_dir: PathBuf,
}

/// Row groups kept on a node's disk: `disk_cache = { dir = "/scratch/pollen", bytes = "200GiB" }`.
///
/// All processes of the node may share the folder. A disk that is full or broken is a warning, and
/// row groups come from storage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskCacheConfig {
    /// A folder on the node's own disk; made if it is not there.
    pub dir: PathBuf,
    /// What its files may hold together.
    pub bytes: ByteSize,
}

/// How many steps of an action chunk count in the loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChunkLength {
    /// All that the model predicts.
    #[default]
    Model,
    /// As many as the dataset's `chunk_length` says.
    Dataset,
}

/// What the weight of a dataset means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightMeaning {
    /// Proportional to the dataset's share of samples.
    #[default]
    Share,
    /// Multiplied by the dataset's eligible frames first: 1 everywhere is the natural mixture.
    TimesFrames,
}

/// How training images are augmented, after the resize.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Augment {
    /// Not at all.
    #[default]
    None,
    /// A random shift by up to `pads[role]` pixels each way; a role without a pad is left alone.
    /// FLOWER's finetuning.
    RandomShift {
        /// Pixels by camera role.
        pads: BTreeMap<String, u32>,
    },
    /// A random crop, then brightness, contrast, saturation and hue. FLOWER's pretraining.
    Photometric {
        /// Roles whose picture is not cropped.
        #[serde(default = "defaults::uncropped")]
        uncropped: BTreeSet<String>,
    },
}

impl Augment {
    /// Returns what is done to the images of a camera.
    pub fn of(&self, role: &str) -> Augmentation {
        match self {
            Self::None => Augmentation::None,
            Self::RandomShift { pads } => pads
                .get(role)
                .map_or(Augmentation::None, |&pad| Augmentation::RandomShift { pad }),
            Self::Photometric { uncropped } => Augmentation::CropAndColor(CropAndColor {
                crop: !uncropped.contains(role),
                ..CropAndColor::default()
            }),
        }
    }
}

mod defaults {
    use super::{BTreeSet, ByteSize, PathBuf, ResizeKind};

    pub(super) fn resize() -> ResizeKind {
        ResizeKind::Lanczos3Square
    }
    pub(super) fn window_bytes() -> ByteSize {
        ByteSize::gib(1)
    }
    pub(super) fn cache_bytes() -> ByteSize {
        ByteSize::gib(4)
    }
    pub(super) fn prefetch_batches() -> usize {
        4
    }
    pub(super) fn max_bad_samples() -> u64 {
        100
    }
    pub(super) fn text_length() -> usize {
        50
    }
    pub(super) fn index_dir() -> PathBuf {
        ".cache/pollen/index".into()
    }
    pub(super) fn uncropped() -> BTreeSet<String> {
        BTreeSet::from(["wrist".to_owned()])
    }
}

impl DataConfig {
    /// Reports every fault at once.
    pub fn validate(&self) -> Result<()> {
        let mut faults = Vec::new();
        if self.used().next().is_none() {
            faults.push("data.datasets has no dataset with a weight above 0".to_owned());
        }
        if self.root.is_empty() {
            faults.push(
                "data.root is empty: set POLLEN_DATA__ROOT=s3://bucket/folder, or data.root in the \
                 recipe, to where the datasets lie"
                    .to_owned(),
            );
        }
        if !(self.frequency_hz.is_finite() && self.frequency_hz >= 0.0) {
            faults.push(format!(
                "data.frequency_hz = {} is not a frequency",
                self.frequency_hz
            ));
        }
        if self.cameras.is_empty() {
            faults.push("data.cameras is empty; name at least one role".to_owned());
        }
        for (key, value) in [
            ("image_size", self.image_size),
            ("prefetch_batches", self.prefetch_batches),
            ("window_bytes", self.window_bytes.as_u64() as usize),
            ("cache_bytes", self.cache_bytes.as_u64() as usize),
        ] {
            if value == 0 {
                faults.push(format!("data.{key} is 0; set it to at least 1"));
            }
        }
        if let Some(cache) = &self.disk_cache {
            if cache.dir.as_os_str().is_empty() {
                faults.push("data.disk_cache.dir is empty; name a folder".to_owned());
            }
            if cache.bytes.as_u64() == 0 {
                faults.push("data.disk_cache.bytes is 0; leave data.disk_cache out".to_owned());
            }
        }
        if self.text_length < 2 {
            faults.push("data.text_length leaves no room for `<s>` and `</s>`".to_owned());
        }
        for (i, role) in self.cameras.iter().enumerate() {
            if self.cameras[..i].contains(role) {
                faults.push(format!("data.cameras names `{role}` twice"));
            }
        }
        if let Augment::RandomShift { pads } = &self.augment {
            for role in pads.keys().filter(|role| !self.cameras.contains(role)) {
                faults.push(format!(
                    "data.augment.pads.{role} is for a camera that data.cameras does not name"
                ));
            }
        }
        for (name, dataset) in &self.datasets {
            dataset.faults(name, &self.cameras, &mut faults);
        }
        if faults.is_empty() {
            Ok(())
        } else {
            Err(Error::Config { faults })
        }
    }

    /// Returns the datasets with a weight above zero, in the order of their names, without those
    /// whose every frame is left out for want of an instruction.
    pub fn used(&self) -> impl Iterator<Item = (&String, &DatasetConfig)> {
        self.datasets
            .iter()
            .filter(|(_, dataset)| dataset.weight != 0.0 && !dataset.is_wordless())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollen_core::Layered;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Recipe {
        data: DataConfig,
    }

    fn parse(text: &str) -> std::result::Result<DataConfig, pollen_core::ConfigError> {
        Ok(Layered::from_text(text, "recipe.toml")?
            .parse::<Recipe>()?
            .data)
    }

    const SMALL: &str = r#"
        [data]
        root = "s3://bucket/data/"
        cameras = ["primary", "wrist"]
        image_size = 64
        tokenizer = "tokenizer.json"
        window_bytes = "1 MiB"
        augment = { kind = "random_shift", pads = { primary = 4 } }
        [data.datasets.b]
        embodiment = "eef_delta"
        robot = "Panda"
        cameras = { primary = "observation.images.primary" }
        [data.datasets.a]
        url = "file:///elsewhere/a/"
        weight = 0
        embodiment = "eef_delta"
        robot = "Panda"
        cameras = {}
    "#;

    #[test]
    fn reads_a_section() {
        let config = parse(SMALL).expect("parses");
        config.validate().expect("valid");
        assert_eq!(config.window_bytes, ByteSize::mib(1));
        let used: Vec<&String> = config.used().map(|(name, _)| name).collect();
        assert_eq!(used, ["b"]);
        let location = |name: &str| config.datasets[name].location(&config.root, name);
        assert_eq!(location("b"), "s3://bucket/data/b");
        assert_eq!(location("a"), "file:///elsewhere/a");
    }

    #[test]
    fn a_typo_is_named() {
        let text = SMALL.replace("robot = \"Panda\"", "robott = \"Panda\"");
        let error = parse(&text).expect_err("a typo").to_string();
        assert!(error.contains("did you mean `robot`"), "{error}");
        let text = SMALL.replace("random_shift", "random_shifts");
        assert!(parse(&text).is_err());
    }

    #[test]
    fn all_faults_are_reported() {
        let text = SMALL
            .replace("image_size = 64", "image_size = 0")
            .replace("primary = 4", "left = 4")
            .replace(
                "[data.datasets.b]",
                "disk_cache = { dir = \"\", bytes = 0 }\n[data.datasets.b]",
            )
            .replace("cameras = { primary", "cameras = { left");
        let error = parse(&text)
            .expect("parses")
            .validate()
            .expect_err("five faults")
            .to_string();
        for part in [
            "image_size",
            "data.augment.pads.left",
            "data.disk_cache.dir",
            "data.disk_cache.bytes",
            "data.datasets.b.cameras",
        ] {
            assert!(error.contains(part), "{error}");
        }
    }
}

//! What a checkpoint expects of an observation: written beside the weights as `contract.json`, and
//! all that serving needs to turn a camera image and an instruction into a model input and the
//! model's output into an action.

use std::collections::BTreeMap;

use pollen_core::ActionSpace;
use pollen_core::action_space::Normalize;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::normalize::Normalizer;
use crate::pixels::{PIXEL_MEAN, PIXEL_STD};
use crate::prompt::Prompt;
use crate::resize::ResizeKind;
use crate::stats::ActionStats;
use crate::tokenize::TextLength;

/// Size and scaling of every camera's image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageContract {
    /// Side of the square in pixels.
    pub side: usize,
    /// How it is reached.
    pub resize: ResizeKind,
    /// Mean of each channel, for pixels in [0, 1].
    pub mean: [f32; 3],
    /// Standard deviation of each channel.
    pub std: [f32; 3],
}

impl ImageContract {
    /// Makes the contract of a size and a resize rule, with this build's constants.
    pub fn new(side: usize, resize: ResizeKind) -> Self {
        Self {
            side,
            resize,
            mean: PIXEL_MEAN,
            std: PIXEL_STD,
        }
    }
}

/// Tokenizer and length of the text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextContract {
    /// SHA-256 of the tokenizer file, in hexadecimal.
    pub tokenizer_sha256: String,
    /// Whether Florence-2's 1,024 tokens are appended to it.
    pub florence_tokens: bool,
    /// Length and padding.
    pub length: TextLength,
}

/// How actions and proprioception are normalised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalization {
    /// 1 % and 99 % quantiles to [-1, 1], clipped; idle dimensions to 0.
    #[default]
    QuantilesClipped,
    /// Less the mean, divided by the deviation, not clipped. Proprioception goes by quantiles.
    MeanStd,
    /// Actions as they are. Proprioception goes by quantiles.
    None,
}

/// One dataset that the weights were trained on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetContract {
    /// Order, units and conventions of an action.
    pub action_space: ActionSpace,
    /// How actions and proprioception are normalised.
    pub normalization: Normalization,
    /// Statistics of the transformed actions.
    pub action_stats: ActionStats,
    /// Statistics of the proprioception, if the action space uses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proprio_stats: Option<ActionStats>,
    /// How an instruction becomes a prompt.
    pub prompt: Prompt,
    /// Actions per second.
    pub frequency_hz: f64,
}

impl DatasetContract {
    /// Returns the normaliser of actions.
    pub fn action_normalizer(&self) -> Result<Normalizer, Error> {
        let normalizer = Normalizer::for_actions(&self.action_stats, &self.action_space)?;
        let scaled: Vec<bool> = (self.action_space.dims.iter())
            .map(|dim| dim.normalize == Normalize::Quantiles)
            .collect();
        let stats = &self.action_stats;
        Ok(match self.normalization {
            Normalization::QuantilesClipped => normalizer,
            Normalization::MeanStd => {
                Normalizer::reference_gaussian(&stats.mean, &stats.std, &scaled)
            }
            Normalization::None => {
                let none = vec![false; scaled.len()];
                Normalizer::reference_bounds(&stats.q01, &stats.q99, &none)
            }
        })
    }

    /// Returns the normaliser of proprioception, if the action space uses it.
    pub fn proprio_normalizer(&self) -> Result<Option<Normalizer>, Error> {
        self.proprio_stats
            .as_ref()
            .map(|stats| Normalizer::for_proprio(stats, self.action_space.proprio_dim))
            .transpose()
    }

    fn faults(&self, name: &str) -> Vec<String> {
        let mut faults = self.action_space.faults();
        faults.extend(
            self.action_stats
                .faults(&format!("dataset `{name}`: actions")),
        );
        let mut fit = |what: &str, expected: usize, found: usize| {
            if expected != found {
                faults.push(format!(
                    "dataset `{name}`: {what} statistics have {found} dimensions, the action \
                     space {expected}"
                ));
            }
        };
        fit("action", self.action_space.dim(), self.action_stats.dim());
        let proprio = self.proprio_stats.as_ref();
        let found = proprio.map_or(0, ActionStats::dim);
        fit("proprioception", self.action_space.proprio_dim, found);
        if let Some(stats) = proprio {
            faults.extend(stats.faults(&format!("dataset `{name}`: proprioception")));
        }
        if !(self.frequency_hz.is_finite() && self.frequency_hz > 0.0) {
            let hz = self.frequency_hz;
            faults.push(format!(
                "dataset `{name}`: frequency_hz = {hz} is not positive"
            ));
        }
        faults
    }
}

/// Everything between an observation and the model, and between the model and an action.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObservationContract {
    /// Version of the file's schema; 1.
    pub version: u32,
    /// Camera roles in the order of the model's image tokens, for example `primary`, `wrist`.
    pub cameras: Vec<String>,
    /// Size and scaling of their images. A missing camera is all zeros before scaling.
    pub image: ImageContract,
    /// Tokenizer and length of the text.
    pub text: TextContract,
    /// The datasets by name.
    pub datasets: BTreeMap<String, DatasetContract>,
}

impl ObservationContract {
    /// The version that this build writes and reads.
    pub const VERSION: u32 = 1;

    /// Parses and checks the bytes of a `contract.json`; `origin` names it in errors.
    pub fn parse(bytes: &[u8], origin: &str) -> Result<Self, Error> {
        /// Read first, so that a newer file is called newer and not malformed.
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let syntax = |source| Error::ContractSyntax {
            origin: origin.into(),
            source,
        };
        let faults = |faults| Error::ContractFaults {
            origin: origin.into(),
            faults,
        };
        let Version { version } = serde_json::from_slice(bytes).map_err(syntax)?;
        if version != Self::VERSION {
            return Err(faults(vec![format!(
                "version = {version} is not known; this build reads {}",
                Self::VERSION
            )]));
        }
        let contract: Self = serde_json::from_slice(bytes).map_err(syntax)?;
        match contract.faults() {
            none if none.is_empty() => Ok(contract),
            some => Err(faults(some)),
        }
    }

    /// Returns the text of a `contract.json`.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("the maps' keys are strings")
    }

    /// Returns every fault.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.cameras.is_empty() {
            faults.push("no cameras".into());
        }
        for (i, camera) in self.cameras.iter().enumerate() {
            if self.cameras[..i].contains(camera) {
                faults.push(format!("camera `{camera}` is named twice"));
            }
        }
        if self.image.side == 0 {
            faults.push("image.side is 0".into());
        }
        let hash = &self.text.tokenizer_sha256;
        if hash.len() != 64 || !hash.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            faults.push(format!("text.tokenizer_sha256 `{hash}` is not a SHA-256"));
        }
        if self.text.length.max < 2 {
            faults.push("text.length.max leaves no room for `<s>` and `</s>`".into());
        }
        if self.datasets.is_empty() {
            faults.push("no datasets".into());
        }
        for (name, dataset) in &self.datasets {
            faults.extend(dataset.faults(name));
        }
        faults
    }

    /// Returns the dataset to serve: the named one, or the only one. With several and no name there
    /// is no right answer, because statistics of another dataset fail silently.
    pub fn dataset(&self, name: Option<&str>) -> Result<&DatasetContract, Error> {
        let found = match name {
            Some(name) => self.datasets.get(name),
            None if self.datasets.len() == 1 => self.datasets.values().next(),
            None => None,
        };
        found.ok_or_else(|| Error::UnknownDataset {
            asked: name.map_or_else(
                || "the weights were trained on several datasets".into(),
                |name| format!("the weights were not trained on `{name}`"),
            ),
            known: self.datasets.keys().cloned().collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenize::Padding;
    use pollen_core::ActionSpaceFile;

    fn embodiment(name: &str) -> ActionSpace {
        let path = format!(
            "{}/../configs/embodiments/{name}",
            env!("CARGO_MANIFEST_DIR")
        );
        let text = std::fs::read_to_string(&path).expect("the committed file");
        ActionSpaceFile::parse(&text, &path).expect("valid")
    }

    #[test]
    fn every_embodiment_parses() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/embodiments");
        let mut sizes = BTreeMap::new();
        for entry in std::fs::read_dir(folder).expect("the committed folder") {
            let file = entry
                .expect("an entry")
                .file_name()
                .into_string()
                .expect("UTF-8");
            let space = embodiment(&file);
            assert_eq!(
                format!("{}.toml", space.name),
                file,
                "the file is named after the space"
            );
            sizes.insert(space.name.clone(), (space.dim(), space.proprio_dim));
        }
        for (name, size) in [
            ("bimanual_eef_delta", (14, 0)),
            ("bimanual_nav", (16, 16)),
            ("eef_delta", (7, 0)),
            ("joint_single", (8, 0)),
        ] {
            assert_eq!(sizes.get(name), Some(&size), "{name}");
        }
    }

    fn contract() -> ObservationContract {
        let dataset = |space: ActionSpace| {
            let frame = |dim: usize| (0..dim).map(|i| i as f32 / 7.0).collect::<Vec<f32>>();
            let proprio = (space.proprio_dim > 0).then(|| frame(space.proprio_dim));
            let proprio = proprio.map(|p| ActionStats::of(&p, p.len()).expect("finite"));
            DatasetContract {
                normalization: Normalization::QuantilesClipped,
                action_stats: ActionStats::of(&frame(space.dim()), space.dim()).expect("finite"),
                proprio_stats: proprio,
                prompt: Prompt::minimal(&space, "Franka Panda"),
                frequency_hz: 10.0,
                action_space: space,
            }
        };
        ObservationContract {
            version: 1,
            cameras: vec!["primary".into(), "wrist".into()],
            image: ImageContract::new(112, ResizeKind::BilinearShortSide),
            text: TextContract {
                tokenizer_sha256: "0f".repeat(32),
                florence_tokens: false,
                length: TextLength {
                    max: 50,
                    padding: Padding::MaxLength,
                },
            },
            datasets: [
                ("lift".to_owned(), dataset(embodiment("eef_delta.toml"))),
                ("aloha".to_owned(), dataset(embodiment("bimanual_nav.toml"))),
            ]
            .into(),
        }
    }

    #[test]
    fn what_is_written_is_read_to_the_bit() {
        let contract = contract();
        let read = ObservationContract::parse(contract.to_json().as_bytes(), "contract.json");
        assert_eq!(read.expect("valid"), contract);
        let aloha = &contract.datasets["aloha"];
        assert_eq!(aloha.action_normalizer().expect("fits").dim(), 16);
        let proprio = aloha.proprio_normalizer().expect("fits").expect("is used");
        assert_eq!(proprio.dim(), 16);
        assert!(
            contract.datasets["lift"]
                .proprio_normalizer()
                .expect("fits")
                .is_none()
        );
    }

    #[test]
    fn an_ambiguous_dataset_is_refused() {
        let mut contract = contract();
        assert!(contract.dataset(Some("lift")).is_ok());
        let error = contract
            .dataset(None)
            .expect_err("two datasets")
            .to_string();
        assert!(
            error.contains("several datasets: name one of aloha, lift"),
            "{error}"
        );
        let error = contract
            .dataset(Some("lft"))
            .expect_err("a typo")
            .to_string();
        assert!(error.contains("not trained on `lft`"), "{error}");
        contract.datasets.remove("aloha");
        assert_eq!(contract.dataset(None).expect("one left").frequency_hz, 10.0);
    }

    #[test]
    fn faults_are_listed_together() {
        let mut contract = contract();
        contract.cameras.push("wrist".into());
        contract.text.tokenizer_sha256.pop();
        let lift = contract.datasets.get_mut("lift").expect("present");
        lift.frequency_hz = 0.0;
        lift.action_stats = ActionStats::of(&[0.0; 6], 6).expect("finite");
        contract
            .datasets
            .get_mut("aloha")
            .expect("present")
            .proprio_stats = None;
        let error = ObservationContract::parse(contract.to_json().as_bytes(), "contract.json")
            .expect_err("five faults")
            .to_string();
        for part in [
            "contract.json: camera `wrist` is named twice",
            "is not a SHA-256",
            "`lift`: action statistics have 6 dimensions, the action space 7",
            "`lift`: frequency_hz = 0 is not positive",
            "`aloha`: proprioception statistics have 0 dimensions, the action space 16",
        ] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_newer_contract_is_called_newer() {
        let error = ObservationContract::parse(br#"{"version": 2, "sound": 1}"#, "contract.json")
            .expect_err("newer")
            .to_string();
        assert_eq!(
            error,
            "contract.json: version = 2 is not known; this build reads 1"
        );
        let text = contract().to_json().replace("\"cameras\"", "\"camera\"");
        let error = ObservationContract::parse(text.as_bytes(), "contract.json")
            .expect_err("a typo")
            .to_string();
        assert!(error.contains("unknown field `camera`"), "{error}");
    }
}

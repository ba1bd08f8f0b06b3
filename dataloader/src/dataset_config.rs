//! One dataset's section of a recipe: a file of `configs/datasets/`.

use std::collections::{BTreeMap, BTreeSet};

use pollen_processing::{Normalization, Transform};
use serde::{Deserialize, Serialize};

/// One dataset of a mixture; lives in `configs/datasets/<name>.toml` or in the recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetConfig {
    /// Where it lies: a URL, or a path below `data.root`. Empty: its name.
    #[serde(default)]
    pub url: String,
    /// Weight in the mixture; 0 leaves the dataset out.
    #[serde(default = "one")]
    pub weight: f64,
    /// Name of its action space.
    pub embodiment: String,
    /// Camera role -> image feature.
    pub cameras: BTreeMap<String, String>,
    /// Feature that holds the actions.
    #[serde(default = "action")]
    pub action: String,
    /// Feature that holds the proprioception; empty for none.
    #[serde(default = "state")]
    pub state: String,
    /// What stored actions and states become.
    #[serde(default)]
    pub transform: Transform,
    /// What the actions are, after the transform.
    #[serde(default)]
    pub motion: Motion,
    /// Frames that no sample starts at.
    #[serde(default)]
    pub filters: Filters,
    /// Steps of an action chunk that its control rate asks for; 0 takes the model's.
    #[serde(default)]
    pub chunk_length: usize,
    /// Where the instruction comes from.
    #[serde(default)]
    pub instruction: Instruction,
    /// Robot's name in the prompt.
    pub robot: String,
    /// Wording of the action space in the prompt; empty takes the embodiment's.
    #[serde(default)]
    pub prompt_space: String,
    /// What poses and motions are relative to.
    #[serde(default)]
    pub frame: Frame,
    /// What the gripper's number means, after the transform.
    #[serde(default)]
    pub gripper: Gripper,
    /// Unit of motion, where it is not the embodiment's.
    #[serde(default)]
    pub motion_unit: String,
    /// How actions are normalised.
    #[serde(default)]
    pub normalization: Normalization,
    /// What was converted into the stored columns.
    #[serde(default)]
    pub source: Source,
    /// Why the dataset cannot be trained on; empty where it can.
    #[serde(default)]
    pub refused: String,
    /// Control frequency told to the model; 0 takes the `fps` of `info.json`.
    #[serde(default)]
    pub hz: f64,
    /// Episodes kept for evaluation: never trained on.
    #[serde(default)]
    pub holdout_episodes: BTreeSet<u64>,
}

/// The fields of the original release that stand side by side in the stored columns.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Source {
    /// Name of the release.
    pub release: String,
    /// Fields of the action with their widths; a width of 0 is not known.
    pub action: Vec<(String, usize)>,
    /// Fields of the state with their widths.
    pub state: Vec<(String, usize)>,
    /// The text field with the instruction.
    pub instruction: String,
}

impl Source {
    /// Returns the width that fields make together, if all are known.
    pub fn width(fields: &[(String, usize)]) -> Option<usize> {
        let known = !fields.is_empty() && fields.iter().all(|(_, width)| *width > 0);
        known.then(|| fields.iter().map(|(_, width)| width).sum())
    }
}

/// What poses and motions are relative to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Frame {
    /// The release does not say.
    #[default]
    Unstated,
    /// The robot's base.
    Base,
    /// The world.
    World,
    /// The tool.
    Tool,
    /// The joints: no frame.
    Joints,
}

/// What the gripper's number means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gripper {
    /// 1 = open, 0 = closed: the convention of every embodiment.
    #[default]
    OneIsOpen,
    /// 1 = closed, 0 = open.
    OneIsClosed,
    /// Nobody has checked it.
    Unverified,
    /// There is none, or it is not commanded.
    None,
}

/// Frames that no sample starts at. They stay in storage and in the chunks of the frames before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Filters {
    /// Those without an instruction.
    pub unlabelled: bool,
    /// Those in which no dimension moves by more than this, in its own unit, and the gripper stays
    /// as it is; 0 keeps them.
    pub idle_below: f32,
}

/// What an action is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Motion {
    /// A change within the step.
    #[default]
    Delta,
    /// A target.
    Absolute,
    /// A change per second.
    Velocity,
}

/// Where an episode's instruction comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Instruction {
    /// The text of the frame's task, inside the prompt.
    #[default]
    Task,
    /// The text of the frame's task, without a prompt around it.
    Raw,
    /// None: the prompt ends with an empty instruction.
    Empty,
    /// No text at all.
    None,
}

fn one() -> f64 {
    1.0
}

fn action() -> String {
    "action".into()
}

fn state() -> String {
    "observation.state".into()
}

impl DatasetConfig {
    /// Returns where the dataset named `name` lies.
    pub fn location(&self, root: &str, name: &str) -> String {
        if self.url.contains("://") {
            return self.url.trim_end_matches('/').to_owned();
        }
        let below = if self.url.is_empty() { name } else { &self.url };
        format!("{}/{}", root.trim_end_matches('/'), below.trim_matches('/'))
    }

    /// Returns whether no frame has a text, and frames without one are left out.
    pub(crate) fn is_wordless(&self) -> bool {
        self.instruction == Instruction::None && self.filters.unlabelled
    }

    pub(crate) fn faults(&self, name: &str, roles: &[String], faults: &mut Vec<String>) {
        let key = format!("data.datasets.{name}");
        if !self.weight.is_finite() || self.weight < 0.0 {
            faults.push(format!(
                "{key}.weight = {} is not a number of at least 0",
                self.weight
            ));
        }
        if !self.hz.is_finite() || self.hz < 0.0 {
            faults.push(format!("{key}.hz = {} is not a frequency", self.hz));
        }
        if self.weight != 0.0 && !self.refused.is_empty() {
            faults.push(format!(
                "{key} cannot be trained on: {}; or set {key}.weight to 0",
                self.refused
            ));
        }
        if self.action.is_empty() {
            faults.push(format!("{key}.action is empty; name a feature"));
        }
        if self.weight != 0.0 && !roles.iter().any(|role| self.cameras.contains_key(role)) {
            faults.push(format!(
                "{key}.cameras has none of the roles {roles:?} of data.cameras"
            ));
        }
    }
}

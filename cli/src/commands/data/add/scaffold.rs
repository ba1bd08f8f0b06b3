//! The text of a dataset file.

use std::fmt::Write;

use anyhow::Result;
use pollen_core::ActionSpace;
use pollen_dataloader::dataset_check::IDLE_BELOW;
use pollen_dataloader::lerobot::{Feature, Info};
use pollen_dataloader::{Finding, Motion, Verdict};

use super::invalid;
use crate::args::AddArgs;

/// Roles that recipes know, for cameras that stand in the room.
const ROOM_ROLES: [&str; 2] = ["primary", "secondary"];
/// Share of idle frames that is worth leaving out.
const MANY_IDLE: f64 = 0.1;
/// Width of comments.
const COLUMNS: usize = 100;

/// What goes into the file.
#[derive(Debug)]
pub(super) struct Scaffold<'a> {
    name: &'a str,
    url: &'a str,
    robot: String,
    pub(super) space: &'a ActionSpace,
    /// (role, feature)
    cameras: Vec<(String, String)>,
    /// Image features that no role was found for.
    unused: Vec<String>,
    has_state: bool,
    motion: Motion,
    gripper: &'static str,
    /// Parts of `transform.action`; none where nothing is to be done.
    parts: Vec<String>,
    hz: f64,
    verdict: &'a Verdict,
    /// What was found while it was made.
    pub(super) findings: Vec<Finding>,
}

impl<'a> Scaffold<'a> {
    pub(super) fn new(
        (name, url): (&'a str, &'a str),
        info: &Info,
        verdict: &'a Verdict,
        spaces: &'a [ActionSpace],
        args: &AddArgs,
    ) -> Result<Self> {
        let mut images = Vec::new();
        for (feature, kind) in &info.features {
            match &*kind.dtype {
                "image" => images.push(feature.clone()),
                "video" => {
                    return Err(invalid(
                        name,
                        format!(
                            "`{feature}` is a video; make images of it with `pollen data convert \
                             {url} DST`"
                        ),
                    ));
                }
                _ => {}
            }
        }
        if images.is_empty() {
            return Err(invalid(name, "it has no image feature".into()));
        }
        let (cameras, unused) = roles(images);
        let width = info.features["action"].width();
        let state = info.features.get("observation.state");
        let space = choose(
            name,
            spaces,
            [width, state.map_or(0, Feature::width)],
            verdict.motion,
            args.embodiment.as_deref(),
        )?;
        let robot = args.robot.clone().or_else(|| info.robot_type.clone());
        let mut scaffold = Self {
            name,
            url,
            robot: robot
                .filter(|robot| !robot.is_empty())
                .unwrap_or("robot".into()),
            space,
            cameras,
            unused,
            has_state: state.is_some(),
            motion: verdict.motion.unwrap_or(default_motion(space)),
            gripper: "none",
            parts: Vec::new(),
            hz: info.fps,
            verdict,
            findings: Vec::new(),
        };
        scaffold.transform(width);
        Ok(scaffold)
    }

    /// Fills in the transform, what the actions are after it, and what the gripper means.
    fn transform(&mut self, width: usize) {
        let mut to_delta = None;
        if self.motion == Motion::Absolute && default_motion(self.space) == Motion::Delta {
            to_delta = self.contiguous_state(width);
            if to_delta.is_some() {
                self.motion = Motion::Delta;
            } else {
                self.findings.push(Finding {
                    check: "transform",
                    subject: String::new(),
                    evidence: format!(
                        "actions are targets, the action space `{}` is one of changes, and the \
                         states that they aim at do not stand side by side",
                        self.space.name
                    ),
                    fix:
                        "write transform.action with { kind = \"minus_state\" }, or choose another \
                          --embodiment"
                            .into(),
                });
            }
        }
        let grippers = &self.verdict.grippers;
        let at = |dim: usize| grippers.iter().find(|gripper| gripper.dim == dim);
        let mut changed = to_delta.is_some();
        let mut dim = 0;
        while dim < width {
            let mut ops = Vec::new();
            let mut end = dim + 1;
            if let Some(gripper) = at(dim) {
                if gripper.relative {
                    ops.push("{ kind = \"relative_to_absolute\" }".to_owned());
                } else {
                    if gripper.signed {
                        ops.push("{ kind = \"scale\", factor = 0.5, offset = 0.5 }".to_owned());
                    }
                    if gripper.inverted == Some(true) {
                        ops.push("{ kind = \"invert\" }".to_owned());
                    }
                }
                changed |= !ops.is_empty();
            } else {
                while end < width && at(end).is_none() {
                    end += 1;
                }
                if let Some(first) = to_delta {
                    let angles: Vec<String> = (dim..end)
                        .filter(|&d| self.space.dims[d].unit == "rad")
                        .map(|d| (d - dim).to_string())
                        .collect();
                    let from = first + dim;
                    ops.push(format!(
                        "{{ kind = \"minus_state\", dims = [{from}, {}], angles = [{}] }}",
                        from + end - dim,
                        angles.join(", ")
                    ));
                }
            }
            let ops = match ops.len() {
                0 => String::new(),
                _ => format!(", ops = [{}]", ops.join(", ")),
            };
            self.parts.push(format!(
                "{{ from = \"action\", dims = [{dim}, {end}]{ops} }}"
            ));
            dim = end;
        }
        if !changed {
            self.parts.clear();
        }
        self.gripper = match grippers.len() {
            0 => "none",
            _ if grippers.iter().all(|g| g.relative || g.inverted.is_some()) => "one_is_open",
            _ => "unverified",
        };
    }

    /// Returns how far the states that the arm's dimensions aim at are ahead of them, if they all
    /// are the same way.
    fn contiguous_state(&self, width: usize) -> Option<usize> {
        let arm = (0..width).filter(|dim| !self.verdict.grippers.iter().any(|g| g.dim == *dim));
        let mut offset = None;
        for dim in arm {
            let ahead = self
                .verdict
                .followed_by
                .get(dim)
                .copied()
                .flatten()?
                .checked_sub(dim)?;
            if *offset.get_or_insert(ahead) != ahead {
                return None;
            }
        }
        offset
    }

    /// Returns the file, with what was found as comments.
    pub(super) fn to_toml(&self, findings: &[Finding]) -> String {
        let mut text = String::new();
        comment(
            &mut text,
            &format!(
                "Made by `pollen data add {} {}`. Its checks:",
                self.url, self.name
            ),
        );
        for finding in findings {
            let subject = match &*finding.subject {
                "" => String::new(),
                subject => format!(" ({subject})"),
            };
            comment(
                &mut text,
                &format!("- {}{subject}: {}", finding.check, finding.evidence),
            );
            if !finding.fix.is_empty() {
                comment(&mut text, &format!("  TO LOOK AT: {}", finding.fix));
            }
        }
        for feature in &self.unused {
            comment(
                &mut text,
                &format!("Not used: {feature}; give it a role that recipes name."),
            );
        }
        let string = |value: &str| toml::Value::from(value).to_string();
        let mut line = |key: &str, value: String| {
            writeln!(text, "{key} = {value}").expect("a String takes all");
        };
        line("[data.datasets.NAME]\nurl", string(self.url));
        line("embodiment", string(&self.space.name));
        line("robot", string(&self.robot));
        let cameras = self.cameras.iter();
        let cameras: Vec<String> = cameras
            .map(|(role, feature)| format!("{role} = {}", string(feature)))
            .collect();
        line("cameras", format!("{{ {} }}", cameras.join(", ")));
        if !self.has_state {
            line("state", string(""));
        }
        let motion = match self.motion {
            Motion::Delta => "delta",
            Motion::Absolute => "absolute",
            Motion::Velocity => "velocity",
        };
        line("motion", string(motion));
        if self.space.name.contains("joint") {
            line("frame", string("joints"));
        }
        line("gripper", string(self.gripper));
        line("hz", self.hz.to_string());
        // A second of motion, as the datasets of FLOWER.
        line(
            "chunk_length",
            (self.hz.round().max(1.0) as u64).to_string(),
        );
        if self.verdict.labelled == 0.0 {
            line("instruction", string("empty"));
        }
        let mut filters = Vec::new();
        if self.verdict.labelled > 0.0 && self.verdict.labelled < 1.0 {
            filters.push("unlabelled = true".to_owned());
        }
        if self.verdict.idle > MANY_IDLE {
            filters.push(format!("idle_below = {IDLE_BELOW}"));
        }
        if !filters.is_empty() {
            line("filters", format!("{{ {} }}", filters.join(", ")));
        }
        if !self.parts.is_empty() {
            let parts = self.parts.join(",\n    ");
            line("transform.action", format!("[\n    {parts},\n]"));
        }
        text.replace(
            "[data.datasets.NAME]",
            &format!("[data.datasets.{}]", self.name),
        )
    }
}

/// Gives cameras roles: `wrist` to the first on a hand, the others in the order of their names, one
/// called `primary` first.
fn roles(mut images: Vec<String>) -> (Vec<(String, String)>, Vec<String>) {
    let on_hand = |feature: &String| {
        let name = feature.rsplit('.').next().unwrap_or(feature).to_lowercase();
        ["wrist", "hand", "gripper"]
            .iter()
            .any(|part| name.contains(part))
    };
    images.sort_by_key(|feature| (!feature.ends_with("primary"), feature.clone()));
    let (hands, room): (Vec<_>, Vec<_>) = images.into_iter().partition(on_hand);
    let mut found = Vec::new();
    let mut unused = Vec::new();
    for (number, feature) in room.into_iter().enumerate() {
        match ROOM_ROLES.get(number) {
            Some(role) => found.push(((*role).to_owned(), feature)),
            None => unused.push(feature),
        }
    }
    for (number, feature) in hands.into_iter().enumerate() {
        match number {
            0 => found.push(("wrist".to_owned(), feature)),
            _ => unused.push(feature),
        }
    }
    (found, unused)
}

/// Chooses the action space of this width that suits the motion.
fn choose<'a>(
    name: &str,
    spaces: &'a [ActionSpace],
    [action, state]: [usize; 2],
    motion: Option<Motion>,
    wanted: Option<&str>,
) -> Result<&'a ActionSpace> {
    let known: Vec<String> = spaces
        .iter()
        .map(|space| format!("{} ({} dimensions)", space.name, space.dim()))
        .collect();
    if let Some(wanted) = wanted {
        let found = spaces.iter().find(|space| space.name == wanted);
        return found.ok_or_else(|| {
            invalid(
                name,
                format!("--embodiment {wanted} is none of {}", known.join(", ")),
            )
        });
    }
    let fits = |space: &&ActionSpace| {
        space.dim() == action && (space.proprio_dim == 0 || space.proprio_dim == state)
    };
    let mut fitting: Vec<&ActionSpace> = spaces.iter().filter(fits).collect();
    fitting.sort_by_key(|space| motion.is_some_and(|motion| motion != default_motion(space)));
    fitting.first().copied().ok_or_else(|| {
        invalid(
            name,
            format!(
                "its actions have {action} dimensions, its states {state}; no action space fits: \
                 {}. Add one to configs/embodiments/",
                known.join(", ")
            ),
        )
    })
}

/// What the actions of a space are, by its name.
fn default_motion(space: &ActionSpace) -> Motion {
    if space.name.contains("delta") {
        Motion::Delta
    } else {
        Motion::Absolute
    }
}

/// Writes a comment over as many lines as it takes.
fn comment(text: &mut String, words: &str) {
    let mut line = String::from("#");
    for word in words.split(' ') {
        if line.len() + 1 + word.len() > COLUMNS && line.len() > 1 {
            text.push_str(&line);
            text.push('\n');
            line = "#  ".into();
        }
        line.push(' ');
        line.push_str(word);
    }
    text.push_str(&line);
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use pollen_dataloader::{DatasetConfig, GripperVerdict};

    use super::super::super::target::dataset_file_text;
    use super::*;

    fn info(width: usize, cameras: &[&str]) -> Info {
        let mut features = serde_json::json!({
            "action": { "dtype": "float32", "shape": [width] },
            "observation.state": { "dtype": "float32", "shape": [width + 1] },
        });
        for camera in cameras {
            features[format!("observation.images.{camera}")] =
                serde_json::json!({ "dtype": "image", "shape": [96, 96, 3] });
        }
        let info = serde_json::json!({
            "codebase_version": "v3.0", "fps": 12.5, "total_episodes": 4, "total_frames": 400,
            "robot_type": "UR5", "features": features,
        });
        serde_json::from_value(info).expect("an info.json")
    }

    fn gripper(inverted: Option<bool>) -> GripperVerdict {
        GripperVerdict {
            dim: 6,
            inverted,
            signed: false,
            relative: false,
        }
    }

    fn verdict(motion: Motion, gripper: GripperVerdict) -> Verdict {
        Verdict {
            motion: Some(motion),
            followed_by: (0..6).map(|dim| Some(dim + 1)).chain([None]).collect(),
            grippers: vec![gripper],
            labelled: 1.0,
            idle: 0.0,
            copies: Vec::new(),
            findings: Vec::new(),
        }
    }

    fn args() -> AddArgs {
        AddArgs {
            url: "s3://bucket/arm".into(),
            name: "arm".into(),
            embodiment: None,
            robot: None,
            out: None,
            force: false,
        }
    }

    fn made(info: &Info, verdict: &Verdict, args: &AddArgs) -> Result<DatasetConfig> {
        let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
        let spaces = super::super::spaces(&configs)?;
        let scaffold = Scaffold::new((&args.name, &args.url), info, verdict, &spaces, args)?;
        let text = scaffold.to_toml(&scaffold.findings);
        assert!(
            text.lines()
                .all(|line| !line.starts_with('#') || line.len() <= COLUMNS + 40)
        );
        let mut datasets = dataset_file_text(&text, "test")?;
        Ok(datasets.remove("arm").expect("its own table"))
    }

    #[test]
    fn a_plain_dataset_needs_no_transform() {
        let cameras = ["front", "primary", "hand_left", "side", "wrist_right"];
        let verdict = verdict(Motion::Delta, gripper(Some(false)));
        let config = made(&info(7, &cameras), &verdict, &args()).expect("it fits");
        assert_eq!((&*config.url, &*config.robot), ("s3://bucket/arm", "UR5"));
        assert_eq!(
            (&*config.embodiment, config.chunk_length),
            ("eef_delta", 13)
        );
        assert_eq!((config.hz, config.motion), (12.5, Motion::Delta));
        assert_eq!(config.gripper, pollen_dataloader::Gripper::OneIsOpen);
        assert!(config.transform.is_identity());
        let of = |role: &str| config.cameras.get(role).map(String::as_str);
        assert_eq!(of("primary"), Some("observation.images.primary"));
        assert_eq!(of("secondary"), Some("observation.images.front"));
        assert_eq!(of("wrist"), Some("observation.images.hand_left"));
        assert_eq!(config.cameras.len(), 3);
    }

    #[test]
    fn what_was_found_is_set() {
        let mut found = verdict(
            Motion::Absolute,
            GripperVerdict {
                signed: true,
                ..gripper(Some(true))
            },
        );
        (found.labelled, found.idle) = (0.5, 0.3);
        let config = made(&info(7, &["front"]), &found, &args()).expect("it fits");
        // Targets of an action space of changes: the state in front of them is taken off.
        assert_eq!(
            (&*config.embodiment, config.motion),
            ("eef_delta", Motion::Delta)
        );
        assert!(config.filters.unlabelled && config.filters.idle_below == IDLE_BELOW);
        let state: Vec<f32> = (0..16).map(|v| v as f32 * 0.25).collect();
        let action = [
            0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 1.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, -1.0,
        ];
        let transformed = config.transform.apply(pollen_processing::Stored {
            action: &action,
            action_width: 7,
            state: &state,
            state_width: 8,
        });
        let made = transformed.expect("it applies").action;
        assert_eq!(made[..6], [0.25; 6]);
        // +1 was closed, -1 open.
        assert_eq!((made[6], made[13]), (0.0, 1.0));
        let relative = GripperVerdict {
            relative: true,
            ..gripper(None)
        };
        let wordless = Verdict {
            labelled: 0.0,
            ..verdict(Motion::Velocity, relative)
        };
        let config = made_text(&wordless);
        assert!(config.contains("relative_to_absolute") && config.contains("velocity"));
        assert!(config.contains("instruction = \"empty\""), "{config}");
        let unclear = made_text(&verdict(Motion::Delta, gripper(None)));
        assert!(unclear.contains("gripper = \"unverified\""), "{unclear}");
    }

    fn made_text(verdict: &Verdict) -> String {
        let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
        let spaces = super::super::spaces(&configs).expect("the committed ones");
        let (info, args) = (info(7, &["front"]), args());
        let scaffold = Scaffold::new(("arm", "file:///arm"), &info, verdict, &spaces, &args);
        scaffold.expect("it fits").to_toml(&[])
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let verdict = verdict(Motion::Delta, gripper(None));
        let refused = |info: &Info, args: &AddArgs| {
            let error = made(info, &verdict, args).expect_err("it does not fit");
            error.to_string()
        };
        let error = refused(&info(5, &["front"]), &args());
        assert!(
            error.contains("5 dimensions") && error.contains("eef_delta (7"),
            "{error}"
        );
        assert!(refused(&info(7, &[]), &args()).contains("no image"));
        let mut video = info(7, &["front"]);
        let camera = video.features.get_mut("observation.images.front");
        camera.expect("it is there").dtype = "video".into();
        assert!(refused(&video, &args()).contains("pollen data convert"));
        let other = AddArgs {
            embodiment: Some("tentacle".into()),
            ..args()
        };
        assert!(refused(&info(7, &["front"]), &other).contains("tentacle"));
    }
}

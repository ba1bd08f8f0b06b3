//! Which fields of a source become which features.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::episode::{Episode, Matrix, Recording};
use crate::error::{Error, Result};
use crate::picture::{ColorHistogram, Frame, PictureRule};
use crate::schema::{CameraFeature, DatasetSpec, NumberFeature};
use crate::source::{FieldKind, Profile};

const ACTION: &str = "action";
const STATE: &str = "observation.state";
const IMAGES: &str = "observation.images.";
/// Frames of each camera and episode whose pixels go into the image statistics.
const SAMPLED_FRAMES: usize = 16;

/// The user's choice of fields; what is empty is found by the names that the formats use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// Image fields and the cameras they become: (`observation/image_0`, `primary`).
    pub cameras: Vec<(String, String)>,
    /// Number fields that make `observation.state`, side by side.
    pub state: Vec<String>,
    /// Number fields that make `action`, side by side.
    pub action: Vec<String>,
    /// The text field with the instruction.
    pub instruction: Option<String>,
}

/// A mapping that fits its source.
#[derive(Clone, Debug)]
pub(crate) struct Selection {
    pub(crate) cameras: Vec<(String, String)>,
    pub(crate) state: Vec<String>,
    pub(crate) action: Vec<String>,
    pub(crate) instruction: Option<String>,
    /// Names of the numbers of a field, where the source has them.
    names: BTreeMap<String, Vec<String>>,
    pub(crate) pictures: PictureRule,
    /// Used where an episode has no instruction.
    pub(crate) task: Option<String>,
}

impl Selection {
    /// Checks a mapping against the fields of a source.
    pub(crate) fn new(
        mapping: &Mapping,
        profile: &Profile,
        pictures: PictureRule,
        task: Option<String>,
    ) -> Result<Self> {
        let or = |given: &Vec<String>, found: &Vec<String>| {
            if given.is_empty() {
                found.clone()
            } else {
                given.clone()
            }
        };
        let selection = Self {
            cameras: if mapping.cameras.is_empty() {
                profile.cameras.clone()
            } else {
                mapping.cameras.clone()
            },
            state: or(&mapping.state, &profile.state),
            action: or(&mapping.action, &profile.action),
            instruction: mapping
                .instruction
                .clone()
                .or_else(|| profile.instruction.clone()),
            names: profile.names.clone(),
            pictures,
            task,
        };
        let listed = |kind| {
            let names = profile.fields.iter().filter(|field| field.kind == kind);
            let names: Vec<&str> = names.map(|field| field.name.as_str()).collect();
            if names.is_empty() {
                "it has none".to_string()
            } else {
                format!("it has {}", names.join(", "))
            }
        };
        let find = |name: &String, kind, what: &str| {
            if profile
                .fields
                .iter()
                .any(|field| field.kind == kind && field.name == *name)
            {
                Ok(())
            } else {
                Err(Error::arguments(format!(
                    "the source has no {what} field `{name}`; {}",
                    listed(kind)
                )))
            }
        };
        for (field, camera) in &selection.cameras {
            find(field, FieldKind::Image, "image")?;
            let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
            if camera.is_empty() || !camera.chars().all(plain) {
                return Err(Error::arguments(format!(
                    "`{camera}` cannot name a camera; use letters, digits and underscores"
                )));
            }
        }
        let mut names: Vec<&str> = selection
            .cameras
            .iter()
            .map(|(_, name)| name.as_str())
            .collect();
        names.sort_unstable();
        if let Some((name, _)) = names.iter().zip(names.iter().skip(1)).find(|(a, b)| a == b) {
            return Err(Error::arguments(format!(
                "two image fields become the camera `{name}`; name them apart in the mapping"
            )));
        }
        for field in selection.state.iter().chain(&selection.action) {
            find(field, FieldKind::Numbers, "number")?;
        }
        if let Some(field) = &mapping.instruction {
            find(field, FieldKind::Text, "text")?;
        }
        if selection.action.is_empty() {
            return Err(Error::arguments(format!(
                "it is not clear which fields are the action; name them in the mapping: {}",
                listed(FieldKind::Numbers)
            )));
        }
        Ok(selection)
    }

    /// Returns the number fields, each once.
    pub(crate) fn number_fields(&self) -> Vec<&str> {
        let mut fields: Vec<&str> = Vec::new();
        for field in self.state.iter().chain(&self.action) {
            if !fields.contains(&field.as_str()) {
                fields.push(field);
            }
        }
        fields
    }

    /// Returns the image fields, each once.
    pub(crate) fn image_fields(&self) -> Vec<&str> {
        let mut fields: Vec<&str> = Vec::new();
        for (field, _) in &self.cameras {
            if !fields.contains(&field.as_str()) {
                fields.push(field);
            }
        }
        fields
    }

    /// Makes an episode of a recording.
    pub(crate) fn assemble(&self, mut recording: Recording) -> Result<Episode> {
        let name = std::mem::take(&mut recording.name);
        let unusable = |reason: String| Error::unusable(&name, reason);
        let number = |fields: &[String]| {
            let parts: Option<Vec<Matrix>> = fields
                .iter()
                .map(|field| recording.numbers.get(field).cloned())
                .collect();
            let parts =
                parts.ok_or_else(|| unusable(format!("{} is missing", fields.join(", "))))?;
            Matrix::beside(&parts, recording.num_frames)
                .map_err(|e| unusable(format!("{} {e}", fields.join(", "))))
        };
        let mut numbers = Vec::new();
        if !self.state.is_empty() {
            numbers.push(number(&self.state)?);
        }
        numbers.push(number(&self.action)?);
        let (mut cameras, mut histograms) = (Vec::new(), Vec::new());
        for (field, _) in &self.cameras {
            let frames = recording.cameras.get(field).cloned();
            let frames = frames.ok_or_else(|| unusable(format!("{field} is missing")))?;
            let histogram = sample(&frames).map_err(|e| unusable(format!("{field}: {e}")))?;
            histograms.push(histogram);
            cameras.push(frames);
        }
        let task = recording
            .instruction
            .take()
            .filter(|text| !text.trim().is_empty());
        Ok(Episode {
            task: task
                .or_else(|| self.task.clone())
                .unwrap_or_default()
                .trim()
                .into(),
            num_frames: recording.num_frames,
            numbers,
            cameras,
            histograms,
            name,
        })
    }

    /// Returns the features of a dataset whose first episode is given.
    pub(crate) fn spec(&self, first: &Episode, fps: f64, robot_type: String) -> DatasetSpec {
        let state = (!self.state.is_empty()).then_some((STATE, &self.state));
        let names = state.into_iter().chain([(ACTION, &self.action)]);
        let numbers = names
            .zip(&first.numbers)
            .map(|((name, fields), matrix)| NumberFeature {
                name: name.into(),
                width: matrix.width,
                names: self
                    .names_of(fields)
                    .filter(|names| names.len() == matrix.width),
            });
        let cameras = self.cameras.iter().zip(&first.cameras);
        let cameras = cameras.filter_map(|((_, camera), frames)| {
            let header = frames.first()?.header;
            Some(CameraFeature {
                name: format!("{IMAGES}{}", camera.strip_prefix(IMAGES).unwrap_or(camera)),
                height: header.height,
                width: header.width,
            })
        });
        DatasetSpec {
            fps,
            robot_type,
            cameras: cameras.collect(),
            numbers: numbers.collect(),
        }
    }

    /// Returns the names of the numbers of fields side by side, if all have names.
    fn names_of(&self, fields: &[String]) -> Option<Vec<String>> {
        let names: Option<Vec<&Vec<String>>> = fields.iter().map(|f| self.names.get(f)).collect();
        names.map(|names| names.into_iter().flatten().cloned().collect())
    }
}

/// Counts the pixels of evenly spaced frames.
fn sample(frames: &[Frame]) -> Result<ColorHistogram, String> {
    let mut histogram = ColorHistogram::default();
    let count = frames.len().min(SAMPLED_FRAMES);
    for i in 0..count {
        let frame = i * frames.len() / count;
        let pixels = frames[frame]
            .decode()
            .map_err(|e| format!("frame {frame}: {e}"))?;
        histogram.count(&pixels);
    }
    Ok(histogram)
}

//! HDF5 files as LIBERO, robomimic and robosuite write them: `data/demo_k` with `actions`, `states`
//! and `obs/*`.
//!
//! LIBERO's own files hold the observation *after* each action and their images upside down; both
//! are put right here and noted in the report.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use hdf5_pure::{AttrValue, DType, Dataset, File, Group};
use serde_json::Value;

use crate::episode::{Matrix, Recording};
use crate::error::{Error, Result};
use crate::reader::blocking;
use crate::selection::Selection;
use crate::source::{Field, FieldKind, Profile, Source, Work, local_path};

/// Frames of a camera that are read at once.
const WINDOW: u64 = 32;
/// Bytes that one read may take; a broken header can announce any number.
const MAX_READ: u64 = 4 << 30;

/// A demonstration in one of the files.
#[derive(Clone, Debug)]
struct Demo {
    file: Arc<DemoFile>,
    group: String,
}

#[derive(Debug)]
struct DemoFile {
    path: PathBuf,
    instruction: Option<String>,
    /// Observations are those after the action of the same row.
    late: bool,
}

/// A file or a folder of files.
#[derive(Debug)]
pub(crate) struct Hdf5 {
    profile: Profile,
    demos: Vec<Demo>,
    next: usize,
}

impl Hdf5 {
    pub(crate) async fn open(url: &str) -> Result<Self> {
        let Some(path) = local_path(url) else {
            return Err(Error::arguments(format!(
                "{url}: HDF5 files are read from a local disk only; copy them there first"
            )));
        };
        let path = PathBuf::from(path);
        blocking(move || Self::open_path(&path)).await
    }

    fn open_path(path: &Path) -> Result<Self> {
        let files = files_of(path)?;
        let mut profile = Profile::default();
        let (mut demos, mut prints) = (Vec::new(), Vec::new());
        for path in files {
            let name = path.display().to_string();
            let file = File::open_streaming(&path).map_err(|e| bad(&name, e))?;
            let data = file.group("data").map_err(|e| {
                Error::invalid(
                    &name,
                    format!("it has no group `data` ({e}); it is no demonstration file"),
                )
            })?;
            let attributes = data.attrs().map_err(|e| bad(&name, e))?;
            let text = |key: &str| attributes.get(key).and_then(text_of);
            let libero = attributes.contains_key("problem_info")
                || attributes.contains_key("bddl_file_name");
            let late = libero && attributes.contains_key("env_args");
            let instruction = text("problem_info").and_then(|json| instruction_in(&json));
            let instruction = match (instruction, libero) {
                (None, true) => Some(instruction_of_name(&path)),
                (found, _) => found,
            };
            let mut groups: Vec<String> = data.groups().map_err(|e| bad(&name, e))?;
            // `demo_10` comes after `demo_9`.
            groups.sort_by_cached_key(|group| {
                let digits = group
                    .rsplit('_')
                    .next()
                    .and_then(|digits| digits.parse().ok());
                (digits.unwrap_or(u64::MAX), group.clone())
            });
            if let (true, Some(first)) = (demos.is_empty(), groups.first()) {
                let demo = data.group(first).map_err(|e| bad(&name, e))?;
                profile = profile_of(&demo, libero, late).map_err(|e| bad(&name, e))?;
            }
            let size = file.file_size();
            prints.push(format!("hdf5 {name} {size} {}", groups.len()));
            let file = Arc::new(DemoFile {
                path,
                instruction,
                late,
            });
            demos.extend(groups.into_iter().map(|group| Demo {
                file: Arc::clone(&file),
                group,
            }));
        }
        profile.num_episodes = Some(demos.len() as u64);
        profile.fingerprint = prints.join("; ");
        Ok(Self {
            profile,
            demos,
            next: 0,
        })
    }
}

#[async_trait]
impl Source for Hdf5 {
    fn profile(&self) -> &Profile {
        &self.profile
    }

    async fn seek(&mut self, episode: u64) -> Result<()> {
        self.next = episode as usize;
        Ok(())
    }

    async fn next(&mut self) -> Result<Option<Work>> {
        let Some(demo) = self.demos.get(self.next).cloned() else {
            return Ok(None);
        };
        self.next += 1;
        Ok(Some(Box::new(move |selection| demo.read(selection))))
    }
}

impl Demo {
    fn read(&self, selection: &Selection) -> Result<Recording> {
        let path = &self.file.path;
        let file_name = path.display().to_string();
        let stem = path.file_name().unwrap_or_default().to_string_lossy();
        let name = format!("{stem}/{}", self.group);
        let unusable =
            |reason: String| Error::unusable(format!("{file_name}/{}", self.group), reason);
        let file = File::open_streaming(path).map_err(|e| bad(&file_name, e))?;
        let group = format!("data/{}", self.group);
        let open = |field: &str| {
            let path = format!("{group}/{field}");
            let dataset = file
                .dataset(&path)
                .map_err(|e| unusable(format!("{field}: {e}")))?;
            let shape = dataset
                .shape()
                .map_err(|e| unusable(format!("{field}: {e}")))?;
            check_size(&dataset, &shape).map_err(|e| unusable(format!("{field}: {e}")))?;
            Ok::<_, Error>((dataset, shape))
        };
        let mut rows: Option<(u64, String)> = None;
        let mut same_rows = |field: &str, shape: &[u64]| {
            let found = shape.first().copied().unwrap_or(0);
            match &rows {
                Some((expected, first)) if *expected != found => Err(unusable(format!(
                    "{field} has {found} rows and {first} has {expected}"
                ))),
                _ => {
                    rows = Some((found, field.into()));
                    Ok(found)
                }
            }
        };
        let mut recording = Recording {
            name: name.clone(),
            instruction: self.file.instruction.clone(),
            ..Recording::default()
        };
        for field in selection.number_fields() {
            let (dataset, shape) = open(field)?;
            let rows = same_rows(field, &shape)? as usize;
            let width: u64 = shape.iter().skip(1).product();
            let mut values = numbers(&dataset).map_err(|e| unusable(format!("{field}: {e}")))?;
            let width = width as usize;
            if values.len() != rows * width || width == 0 {
                return Err(unusable(format!("{field} has {} values", values.len())));
            }
            let (first, last) = self.file.rows(field, rows);
            values = values[first * width..last * width].to_vec();
            recording.num_frames = last - first;
            recording
                .numbers
                .insert(field.into(), Matrix { width, values });
        }
        for field in selection.image_fields() {
            let (dataset, shape) = open(field)?;
            let rows = same_rows(field, &shape)? as usize;
            let [_, height, width, 3] = shape[..] else {
                return Err(unusable(format!("{field} has the shape {shape:?}")));
            };
            let (first, last) = self.file.rows(field, rows);
            let size = (height * width * 3) as usize;
            let mut frames = Vec::with_capacity(last - first);
            let mut start = first as u64;
            while start < last as u64 {
                let count = WINDOW.min(last as u64 - start);
                let pixels = dataset
                    .read_raw_rows(start, count)
                    .map_err(|e| unusable(format!("{field}, row {start}: {e}")))?;
                for image in pixels.chunks(size.max(1)) {
                    let frame =
                        selection
                            .pictures
                            .pixels(height as u32, width as u32, image.to_vec());
                    frames.push(frame.map_err(|e| unusable(format!("{field}: {e}")))?);
                }
                start += count;
            }
            recording.num_frames = last - first;
            recording.cameras.insert(field.into(), frames);
        }
        Ok(recording)
    }
}

impl DemoFile {
    /// Returns the rows of a field that make frames: the observation after an action belongs to
    /// the next action.
    fn rows(&self, field: &str, rows: usize) -> (usize, usize) {
        match (self.late, field.starts_with("obs/")) {
            (false, _) => (0, rows),
            (true, true) => (0, rows.saturating_sub(1)),
            (true, false) => (1.min(rows), rows),
        }
    }
}

fn bad(file: &str, error: impl std::fmt::Display) -> Error {
    Error::invalid(file, format!("it is no readable HDF5 file: {error}"))
}

/// Returns the files of a source in order.
fn files_of(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.into()]);
    }
    let failed = |source| Error::Io {
        file: path.display().to_string(),
        source,
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        if file
            .extension()
            .is_some_and(|extension| extension == "hdf5" || extension == "h5")
        {
            files.push(file);
        }
    }
    files.sort();
    if files.is_empty() {
        Err(Error::arguments(format!(
            "{} holds no .hdf5 file",
            path.display()
        )))
    } else {
        Ok(files)
    }
}

fn check_size(dataset: &Dataset, shape: &[u64]) -> Result<(), String> {
    let size = dataset.element_size().map_err(|e| e.to_string())?;
    let bytes = shape
        .iter()
        .try_fold(size, |bytes, n| bytes.checked_mul(*n));
    if bytes.is_some_and(|bytes| bytes <= MAX_READ) || shape.len() == 4 {
        Ok(())
    } else {
        Err(format!("shape {shape:?} is too large to be right"))
    }
}

fn numbers(dataset: &Dataset) -> Result<Vec<f32>, String> {
    let dtype = dataset.dtype().map_err(|e| e.to_string())?;
    let values = match dtype {
        DType::F32 => dataset.read_f32(),
        DType::F64 => dataset
            .read_f64()
            .map(|v| v.into_iter().map(|v| v as f32).collect()),
        DType::I8 => dataset
            .read_i8()
            .map(|v| v.into_iter().map(f32::from).collect()),
        DType::I16 => dataset
            .read_i16()
            .map(|v| v.into_iter().map(f32::from).collect()),
        DType::I32 => dataset
            .read_i32()
            .map(|v| v.into_iter().map(|v| v as f32).collect()),
        DType::I64 => dataset
            .read_i64()
            .map(|v| v.into_iter().map(|v| v as f32).collect()),
        DType::U8 => dataset
            .read_u8()
            .map(|v| v.into_iter().map(f32::from).collect()),
        other => return Err(format!("{other} is no type of numbers")),
    };
    values.map_err(|e| e.to_string())
}

fn text_of(value: &AttrValue) -> Option<String> {
    value.as_str().map(String::from)
}

/// Finds `language_instruction` in LIBERO's `problem_info`; some files hold a list of characters.
fn instruction_in(json: &str) -> Option<String> {
    let info: Value = serde_json::from_str(json).ok()?;
    match &info["language_instruction"] {
        Value::String(text) => Some(text.clone()),
        Value::Array(letters) => Some(letters.iter().filter_map(Value::as_str).collect()),
        _ => None,
    }
}

/// Makes an instruction of a file's name: `KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5`.
fn instruction_of_name(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let stem = stem.strip_suffix("_demo").unwrap_or(&stem);
    let scene = |word: &&str| !word.chars().any(|c| c.is_ascii_lowercase());
    let words: Vec<&str> = stem.split('_').skip_while(scene).collect();
    words.join(" ")
}

fn profile_of(demo: &Group, libero: bool, late: bool) -> Result<Profile, hdf5_pure::Error> {
    let mut profile = Profile {
        fps: Some(20.0),
        robot_type: Some("panda".into()),
        rotate: libero,
        ..Profile::default()
    };
    let add = |profile: &mut Profile, prefix: &str, group: &Group| {
        let mut names = group.datasets()?;
        names.sort();
        for name in names {
            let dataset = group.dataset(&name)?;
            let kind = match (dataset.shape()?.as_slice(), dataset.dtype()?) {
                ([_, _, _, 3], DType::U8) => FieldKind::Image,
                (_, DType::F32 | DType::F64 | DType::I8 | DType::I16 | DType::I32 | DType::I64)
                | ([_] | [_, _], DType::U8) => FieldKind::Numbers,
                _ => FieldKind::Other,
            };
            profile
                .fields
                .push(Field::new(format!("{prefix}{name}"), kind));
        }
        Ok::<_, hdf5_pure::Error>(())
    };
    add(&mut profile, "", demo)?;
    if let Ok(observations) = demo.group("obs") {
        add(&mut profile, "obs/", &observations)?;
    }
    let has = |name: &&&str| {
        profile
            .fields
            .contains(&Field::new(**name, FieldKind::Numbers))
    };
    let states: [&[&str]; 3] = [
        &["obs/ee_states", "obs/gripper_states"],
        &[
            "obs/robot0_eef_pos",
            "obs/robot0_eef_quat",
            "obs/robot0_gripper_qpos",
        ],
        &["states"],
    ];
    let state = states
        .iter()
        .find(|fields| fields.iter().all(|field| has(&field)));
    let state: Vec<String> = state
        .into_iter()
        .flat_map(|fields| fields.iter().map(|f| (*f).to_string()))
        .collect();
    let action = has(&&"actions").then(|| "actions".to_string());
    let images = profile
        .fields
        .iter()
        .filter(|field| field.kind == FieldKind::Image);
    let cameras = images.map(|field| {
        let camera = field.name.strip_prefix("obs/").unwrap_or(&field.name);
        let camera = camera.strip_suffix("_rgb").unwrap_or(camera);
        (
            field.name.clone(),
            camera.strip_suffix("_image").unwrap_or(camera).to_string(),
        )
    });
    profile.cameras = cameras.collect();
    if profile.cameras.is_empty() {
        profile.notes.push(
            "the files hold no images: replay `states` in the simulator to render them".into(),
        );
    }
    if state == ["states"] {
        profile
            .notes
            .push("the state is the simulator's, not the robot's".into());
    }
    if libero {
        profile
            .notes
            .push("images are turned by 180 degrees; evaluation must do the same".into());
    }
    if late {
        profile.notes.push(
            "each observation is paired with the next action: the files hold the observation \
             after the action, so an episode has one frame less"
                .into(),
        );
    }
    profile.state = state;
    profile.action = action.into_iter().collect();
    Ok(profile)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions() {
        let name = |text: &str| instruction_of_name(Path::new(text));
        assert_eq!(
            name("a/KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5"),
            "turn on the stove"
        );
        assert_eq!(name("pick_up_the_bowl_demo.hdf5"), "pick up the bowl");
        let json = r#"{"language_instruction": ["p", "u", "t"]}"#;
        assert_eq!(instruction_in(json).as_deref(), Some("put"));
        assert_eq!(instruction_in("{}"), None);
    }
}

//! CALVIN: one `.npz` file a step, recordings in `ep_start_end_ids.npy`, language segments beside.
//!
//! An episode is a language segment. The annotations are a Python pickle, which is not read here:
//! `scripts/calvin_annotations.py` turns it into JSON once. Frames are taken only from recordings
//! that are listed; the folders hold stray ones.

use std::sync::Arc;

use async_trait::async_trait;
use pollen_storage::Storage;
use serde::Deserialize;

use crate::episode::{Matrix, Recording};
use crate::error::{Error, Result};
use crate::npy::{Archive, Array, Malformed};
use crate::reader::{Reader, get_if_present};
use crate::selection::Selection;
use crate::source::{Field, FieldKind, Profile, Source, Work};

const IDS: &str = "ep_start_end_ids.npy";
const ANNOTATIONS: &str = "lang_annotations/auto_lang_ann.json";

/// Frames that make an episode; the end is inclusive.
#[derive(Clone, Debug, Deserialize)]
struct Segment {
    start: u64,
    end: u64,
    #[serde(default)]
    text: String,
}

#[derive(Deserialize)]
struct Annotations {
    version: u32,
    segments: Vec<Segment>,
}

/// The training or the validation folder.
#[derive(Debug)]
pub(crate) struct Calvin {
    reader: Reader,
    profile: Profile,
    segments: Arc<Vec<Segment>>,
    /// Digits of a frame number in file names.
    digits: usize,
    next: usize,
}

impl Calvin {
    pub(crate) async fn open(storage: Storage, split: Option<&str>) -> Result<Self> {
        let (storage, ids) = if let Some(ids) = get_if_present(&storage, IDS).await? {
            (storage, ids)
        } else {
            let storage = storage.join(split.unwrap_or("training"));
            let ids = storage.get(IDS).await?;
            (storage, ids)
        };
        let reader = Reader::new(storage.clone());
        let failed = |e: Malformed| Error::corrupt(reader.name(IDS), e.offset, e.reason);
        let ids = Array::parse(&ids).map_err(failed)?;
        let pairs = ids
            .integers()
            .filter(|_| ids.shape.len() == 2 && ids.shape[1] == 2);
        let Some(pairs) = pairs else {
            let reason = format!("it holds {} {:?} in place of pairs", ids.dtype, ids.shape);
            return Err(Error::invalid(reader.name(IDS), reason));
        };
        let (pairs, _) = pairs.as_chunks::<2>();
        let recordings = pairs.iter().map(|[start, end]| {
            let range = u64::try_from(*start).ok().zip(u64::try_from(*end).ok());
            let (start, end) = range.filter(|(start, end)| start <= end).ok_or_else(|| {
                Error::invalid(
                    reader.name(IDS),
                    format!("{start} to {end} is no recording"),
                )
            })?;
            let text = String::new();
            Ok(Segment { start, end, text })
        });
        let recordings: Vec<Segment> = recordings.collect::<Result<_>>()?;
        let (segments, notes) = segments(&storage, &reader, recordings).await?;
        let Some(first) = segments.first() else {
            return Err(Error::invalid(reader.name(IDS), "it lists no recording"));
        };
        let (digits, file) = first_frame(&storage, first.start).await?;
        let name = reader.name(&frame_name(first.start, digits));
        let failed = |e: Malformed| Error::corrupt(&name, e.offset, e.reason);
        let archive = Archive::parse(&file).map_err(failed)?;
        let mut profile = profile(&archive).map_err(failed)?;
        profile.notes.extend(notes);
        profile.num_episodes = Some(segments.len() as u64);
        profile.fingerprint = format!("calvin {} {segments:?}", storage.url());
        Ok(Self {
            reader,
            profile,
            segments: Arc::new(segments),
            digits,
            next: 0,
        })
    }
}

#[async_trait]
impl Source for Calvin {
    fn profile(&self) -> &Profile {
        &self.profile
    }

    async fn seek(&mut self, episode: u64) -> Result<()> {
        self.next = episode as usize;
        Ok(())
    }

    async fn next(&mut self) -> Result<Option<Work>> {
        let Some(segment) = self.segments.get(self.next).cloned() else {
            return Ok(None);
        };
        self.next += 1;
        let (reader, digits) = (self.reader.clone(), self.digits);
        Ok(Some(Box::new(move |selection| {
            read(&reader, digits, &segment, selection)
        })))
    }
}

fn read(
    reader: &Reader,
    digits: usize,
    segment: &Segment,
    selection: &Selection,
) -> Result<Recording> {
    let name = format!("frames {} to {}", segment.start, segment.end);
    let mut recording = Recording {
        name: name.clone(),
        num_frames: (segment.end - segment.start + 1) as usize,
        instruction: Some(segment.text.clone()).filter(|text| !text.is_empty()),
        ..Recording::default()
    };
    for frame in segment.start..=segment.end {
        let path = frame_name(frame, digits);
        let file_name = reader.name(&path);
        let failed = |e: Malformed| Error::corrupt(&file_name, e.offset, e.reason);
        let unusable = |reason: String| Error::unusable(&name, format!("{file_name}: {reason}"));
        let file = match reader.get(&path) {
            Ok(file) => file,
            Err(Error::Storage(error)) if error.is_not_found() => {
                return Err(unusable("the file is missing".into()));
            }
            Err(error) => return Err(error),
        };
        let archive = Archive::parse(&file).map_err(failed)?;
        let array = |field: &str| {
            let array = archive.array(field).map_err(failed)?;
            array.ok_or_else(|| unusable(format!("it has no {field}")))
        };
        for field in selection.number_fields() {
            let numbers = array(field)?.numbers();
            let matrix = recording
                .numbers
                .entry(field.into())
                .or_insert_with(|| Matrix {
                    width: numbers.len(),
                    values: Vec::new(),
                });
            if numbers.len() != matrix.width {
                return Err(unusable(format!("{field} has {} numbers", numbers.len())));
            }
            matrix.values.extend(numbers);
        }
        for field in selection.image_fields() {
            let array = array(field)?;
            let ([height, width, 3], "uint8") = (&array.shape[..], array.dtype) else {
                return Err(unusable(format!(
                    "{field} is {} {:?}",
                    array.dtype, array.shape
                )));
            };
            let (height, width) = (*height as u32, *width as u32);
            let image = selection.pictures.pixels(height, width, array.bytes);
            let image = image.map_err(|e| unusable(format!("{field}: {e}")))?;
            recording
                .cameras
                .entry(field.into())
                .or_default()
                .push(image);
        }
    }
    Ok(recording)
}

/// Returns the language segments, or the recordings where there are no annotations at all.
async fn segments(
    storage: &Storage,
    reader: &Reader,
    recordings: Vec<Segment>,
) -> Result<(Vec<Segment>, Option<String>)> {
    let Some(text) = get_if_present(storage, ANNOTATIONS).await? else {
        let pickle = "lang_annotations/auto_lang_ann.npy";
        return match storage.head(pickle).await {
            Ok(_) => Err(Error::invalid(
                reader.name(pickle),
                "it is a Python pickle; run `python convert/scripts/calvin_annotations.py` on its \
                 folder first, which writes the JSON file that is read here",
            )),
            Err(error) if error.is_not_found() => {
                let note = "there are no language annotations: whole recordings become episodes";
                Ok((recordings, Some(note.into())))
            }
            Err(error) => Err(error.into()),
        };
    };
    let bad = |reason: String| Error::invalid(reader.name(ANNOTATIONS), reason);
    let found: Annotations = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
    if found.version != 1 {
        return Err(bad(format!(
            "version {} is not known; write it again",
            found.version
        )));
    }
    for segment in &found.segments {
        let inside = |whole: &Segment| whole.start <= segment.start && segment.end <= whole.end;
        if segment.start > segment.end || !recordings.iter().any(inside) {
            let (start, end) = (segment.start, segment.end);
            return Err(bad(format!("frames {start} to {end} lie in no recording")));
        }
    }
    Ok((found.segments, None))
}

fn frame_name(frame: u64, digits: usize) -> String {
    format!("episode_{frame:0digits$}.npz")
}

/// Finds out how many digits frame numbers have: seven in the published datasets.
async fn first_frame(storage: &Storage, frame: u64) -> Result<(usize, bytes::Bytes)> {
    for digits in [7, 6, 8, 5, 9, 1] {
        if let Some(file) = get_if_present(storage, &frame_name(frame, digits)).await? {
            return Ok((digits, file));
        }
    }
    Err(Error::invalid(
        format!("{}/{}", storage.url(), frame_name(frame, 7)),
        "the first frame of the first episode is missing",
    ))
}

fn profile(archive: &Archive) -> Result<Profile, Malformed> {
    let mut profile = Profile {
        fps: Some(30.0),
        robot_type: Some("panda".into()),
        ..Profile::default()
    };
    for name in archive.names().map(String::from).collect::<Vec<_>>() {
        let Some(array) = archive.array(&name)? else {
            continue;
        };
        let kind = match (&array.shape[..], array.dtype) {
            ([_, _, 3], "uint8") => FieldKind::Image,
            ([_], "float32" | "float64") => FieldKind::Numbers,
            _ => FieldKind::Other,
        };
        profile.fields.push(Field::new(name, kind));
    }
    let has = |name: &str, kind| profile.fields.contains(&Field::new(name, kind));
    let cameras = [("rgb_static", "static"), ("rgb_gripper", "gripper")];
    let cameras = cameras
        .into_iter()
        .filter(|(field, _)| has(field, FieldKind::Image));
    let cameras = cameras.map(|(field, camera)| (field.to_string(), camera.to_string()));
    let numbers = |name: &str| has(name, FieldKind::Numbers).then(|| name.to_string());
    let (state, action) = (numbers("robot_obs"), numbers("rel_actions"));
    profile.cameras = cameras.collect();
    profile.state = state.into_iter().collect();
    profile.action = action.into_iter().collect();
    Ok(profile)
}

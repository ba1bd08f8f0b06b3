//! The whole way from a source to a verified dataset.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use pollen_storage::{Observer, Silent, Storage, StorageConfig};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::calvin::Calvin;
use crate::data_file::hex;
use crate::error::{Error, Result};
use crate::hdf5::Hdf5;
use crate::lerobot::LeRobot;
use crate::picture::PictureRule;
use crate::progress::{self, Conversion, Destination};
use crate::rlds::Rlds;
use crate::run::Run;
use crate::selection::{Mapping, Selection};
use crate::source::{Profile, Source, SourceKind, detect};
use crate::writer::{Dropped, WriterConfig};

/// What to convert, and how.
#[derive(Clone, Debug)]
pub struct ConvertArgs {
    /// Folder, file or URL of the source. HDF5 files and videos must be local.
    pub source: String,
    /// Folder or URL of the dataset to make.
    pub destination: String,
    /// Format of the source; found out when not given.
    pub kind: Option<SourceKind>,
    /// Split of an RLDS dataset (`train`) or folder of CALVIN (`training`).
    pub split: Option<String>,
    /// Fields of the source and the features they become.
    pub mapping: Mapping,
    /// Short side of the images, in pixels; none keeps every image byte for byte.
    pub resize: Option<u32>,
    /// Encode PNG files and arrays as JPEG of this quality; none keeps them without loss.
    pub jpeg_quality: Option<u8>,
    /// Turn images by 180 degrees; none: where the format stores them upside down.
    pub rotate: Option<bool>,
    /// Frames a second; needed where the source does not say.
    pub fps: Option<f64>,
    /// The robot; needed for nothing, written to `info.json`.
    pub robot_type: Option<String>,
    /// Instruction of the episodes that have none.
    pub task: Option<String>,
    /// Episodes that are read and decoded at once; each is in memory.
    pub jobs: NonZeroUsize,
    /// Sizes of row groups and files.
    pub writer: WriterConfig,
    /// Limits of requests.
    pub storage: StorageConfig,
    /// Who is told about retries.
    pub observer: Arc<dyn Observer>,
}

impl ConvertArgs {
    /// Returns arguments that leave everything to what the source says.
    pub fn new(source: impl Into<String>, destination: impl Into<String>) -> Self {
        let one = NonZeroUsize::MIN;
        Self {
            source: source.into(),
            destination: destination.into(),
            kind: None,
            split: None,
            mapping: Mapping::default(),
            resize: None,
            jpeg_quality: None,
            rotate: None,
            fps: None,
            robot_type: None,
            task: None,
            jobs: std::thread::available_parallelism().unwrap_or(one),
            writer: WriterConfig::default(),
            storage: StorageConfig::default(),
            observer: Arc::new(Silent),
        }
    }
}

/// What a conversion is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// Episodes are read and written.
    #[default]
    Converting,
    /// All is read back and checked; statistics are taken.
    Verifying,
}

/// How far a conversion is, over all its runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// What it is doing.
    pub stage: Stage,
    /// Episodes written.
    pub episodes: u64,
    /// Episodes dropped.
    pub dropped: u64,
    /// Episodes of the source, where it says.
    pub total_episodes: Option<u64>,
    /// Frames written.
    pub frames: u64,
    /// Bytes of images and numbers written.
    pub bytes: u64,
    /// Data files finished.
    pub files: u64,
}

/// What a conversion made.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Format of the source.
    pub kind: SourceKind,
    /// Episodes in the dataset.
    pub episodes: u64,
    /// Frames in the dataset.
    pub frames: u64,
    /// Episodes left out, and why.
    pub dropped: Vec<Dropped>,
    /// Bytes of the data files.
    pub bytes: u64,
    /// Number of data files.
    pub files: u64,
    /// How long this run took.
    pub seconds: f64,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// Converts a dataset. The callback hears of every episode and may stop the conversion; the same
/// call goes on behind the last finished data file, and makes the same bytes as one that was not
/// stopped. Must run on a tokio runtime.
pub async fn convert(
    args: &ConvertArgs,
    progress: impl FnMut(&Progress) -> ControlFlow<()> + Send,
) -> Result<Report> {
    let started = Instant::now();
    let destination = Storage::open(&args.destination, &args.storage, Arc::clone(&args.observer))?;
    let (kind, source) = Box::pin(open_source(args)).await?;
    let profile = source.profile().clone();
    let pictures = PictureRule {
        jpeg_quality: args.jpeg_quality,
        resize: args.resize,
        rotate: args.rotate.unwrap_or(profile.rotate),
    };
    check(args)?;
    let selection = Selection::new(&args.mapping, &profile, pictures, args.task.clone())?;
    let fps = args.fps.or(profile.fps).ok_or_else(|| {
        Error::arguments(format!(
            "{} does not say how many frames a second it has; give --fps",
            args.source
        ))
    })?;
    if !(fps.is_finite() && fps > 0.0) {
        return Err(Error::arguments(format!(
            "{fps} frames a second is not a frequency"
        )));
    }
    let robot = args.robot_type.clone().or(profile.robot_type.clone());
    let robot = robot.unwrap_or_else(|| "unknown".into());
    let identity = identity(args, kind, &profile, &selection, fps, &robot);
    let (spec, files) = match Destination::look(&destination, &identity).await? {
        Destination::Finished(done) => {
            progress::clean(&destination).await?;
            return Ok(report(*done, started));
        }
        Destination::Unfinished(plan, files) => (Some(plan.spec), files),
        Destination::Empty => (None, Vec::new()),
    };
    let mut run = Run {
        destination: destination.clone(),
        selection: Arc::new(selection),
        writer_config: args.writer,
        identity,
        fps,
        robot,
        spec,
        writer: None,
        notes: profile.notes.clone(),
        files,
        dropped_since: Vec::new(),
        progress,
        state: Progress {
            total_episodes: profile.num_episodes,
            ..Progress::default()
        },
    };
    Box::pin(run.episodes(source, args.jobs)).await?;
    let spec = run.verify().await?;
    let done = run.conversion(args, kind, &spec);
    progress::finish(&destination, &done).await?;
    Ok(report(done, started))
}

/// Opens the source and finds out its format.
async fn open_source(args: &ConvertArgs) -> Result<(SourceKind, Box<dyn Source>)> {
    let url = &args.source;
    let mut storage = Storage::open(url, &args.storage, Arc::clone(&args.observer))?;
    let kind = if let Some(kind) = args.kind {
        kind
    } else {
        let (kind, folder) = detect(url, &storage).await?;
        if !folder.is_empty() {
            storage = storage.join(&folder);
        }
        kind
    };
    let split = args.split.as_deref();
    if split.is_some() && matches!(kind, SourceKind::LeRobot | SourceKind::Hdf5) {
        return Err(Error::arguments(format!(
            "{kind} datasets have no splits; leave it out"
        )));
    }
    let source: Box<dyn Source> = match kind {
        SourceKind::Rlds => Box::new(Rlds::open(storage, split).await?),
        SourceKind::LeRobot => Box::new(LeRobot::open(storage).await?),
        SourceKind::Calvin => Box::new(Calvin::open(storage, split).await?),
        SourceKind::Hdf5 => Box::new(Hdf5::open(url).await?),
    };
    Ok((kind, source))
}

fn check(args: &ConvertArgs) -> Result<()> {
    if let Some(quality) = args
        .jpeg_quality
        .filter(|quality| !(1..=100).contains(quality))
    {
        return Err(Error::arguments(format!(
            "a JPEG quality is from 1 to 100, not {quality}"
        )));
    }
    if let Some(side) = args.resize.filter(|side| !(8..=4096).contains(side)) {
        return Err(Error::arguments(format!(
            "images are resized to 8 to 4096 pixels, not {side}"
        )));
    }
    Ok(())
}

/// Hashes all that changes the bytes of the result.
fn identity(
    args: &ConvertArgs,
    kind: SourceKind,
    profile: &Profile,
    selection: &Selection,
    fps: f64,
    robot: &str,
) -> String {
    let all = json!([
        "pollen conversion 1",
        kind,
        profile.fingerprint,
        selection.cameras,
        selection.state,
        selection.action,
        selection.instruction,
        selection.task,
        selection.pictures,
        fps,
        robot,
        args.writer,
    ]);
    hex(&Sha256::digest(all.to_string()))
}

fn report(done: Conversion, started: Instant) -> Report {
    Report {
        kind: done.kind,
        episodes: done.episodes,
        frames: done.frames,
        bytes: done.bytes,
        files: done.files.len() as u64,
        dropped: done.dropped,
        seconds: started.elapsed().as_secs_f64(),
        notes: done.notes,
    }
}

//! `pollen data inspect`: some episodes as a page and a contact sheet, without a display.

mod canvas;
mod page;
mod sheet;

use std::io::Write;

use anyhow::{Context, Result};
use pollen_core::ExitCode;
use pollen_core::action_space::Normalize;
use pollen_dataloader::decode::decode_jpeg;
use pollen_dataloader::{Columns, Dimension, Picture, Statistics};
use pollen_processing::{ActionStats, Normalization, Normalizer};

use super::target::{Target, resolve};
use crate::args::InspectArgs;

/// Episodes that are shown when nobody says which.
const EPISODES: u64 = 3;

/// What is shown of a dataset.
#[derive(Debug)]
struct Look {
    name: String,
    url: String,
    fps: f64,
    episodes: u64,
    frames: u64,
    /// (role or feature, size that info.json promises)
    cameras: Vec<(String, Option<(usize, usize)>)>,
    dimensions: Vec<Dimension>,
    shown: Vec<Shown>,
}

/// One episode.
#[derive(Debug)]
struct Shown {
    episode: u64,
    instruction: String,
    pictures: Vec<Picture>,
    /// Transformed, and transformed and normalised: [frames, dimensions].
    raw: Vec<f32>,
    normalised: Vec<f32>,
    width: usize,
}

impl Look {
    fn time(&self, frame: u64) -> String {
        format!("{:.2} s", frame as f64 / self.fps)
    }

    #[expect(clippy::unused_self, reason = "said beside the other texts")]
    fn label(&self, dimension: &Dimension) -> String {
        match &*dimension.unit {
            "" => dimension.name.clone(),
            unit => format!("{} [{unit}]", dimension.name),
        }
    }

    fn summary(&self) -> String {
        let cameras: Vec<&str> = self.cameras.iter().map(|(role, _)| &**role).collect();
        format!(
            "{}: {} episodes, {} frames, {} Hz, cameras {}; shown: {}",
            self.url,
            self.episodes,
            self.frames,
            self.fps,
            cameras.join(", "),
            self.shown.len()
        )
    }
}

impl Shown {
    fn frames(&self) -> usize {
        self.raw.len().checked_div(self.width).unwrap_or(0)
    }

    fn title(&self, look: &Look) -> String {
        format!(
            "{}, episode {}: {} frames, {}",
            look.name,
            self.episode,
            self.frames(),
            look.time(self.frames() as u64)
        )
    }

    fn raw(&self, dim: usize) -> Vec<f32> {
        self.raw
            .iter()
            .skip(dim)
            .step_by(self.width)
            .copied()
            .collect()
    }

    fn normalised(&self, dim: usize) -> Vec<f32> {
        self.normalised
            .iter()
            .skip(dim)
            .step_by(self.width)
            .copied()
            .collect()
    }

    /// Returns what is wrong with the pictures and the values.
    fn faults(&self, look: &Look) -> Vec<String> {
        let mut faults = Vec::new();
        for picture in &self.pictures {
            for ((role, size), image) in look.cameras.iter().zip(&picture.images) {
                let fault = match image {
                    None => Some("there is no image".to_owned()),
                    Some(jpeg) => decode_jpeg(jpeg, *size).err(),
                };
                let at = picture.frame;
                faults.extend(fault.map(|fault| format!("frame {at}, camera {role}: {fault}")));
            }
        }
        let bad = self.raw.iter().filter(|value| !value.is_finite()).count();
        if bad > 0 {
            faults.push(format!("{bad} action values are not finite"));
        }
        faults
    }
}

/// Returns the least and the largest finite value, apart from each other.
fn bounds(values: &[f32]) -> [f32; 2] {
    let finite = || values.iter().copied().filter(|value| value.is_finite());
    let low = finite().fold(f32::INFINITY, f32::min);
    let high = finite().fold(f32::NEG_INFINITY, f32::max);
    match high > low {
        true => [low, high],
        _ if high == low => [low - 0.5, high + 0.5],
        _ => [0.0, 1.0],
    }
}

pub(crate) fn run(args: &InspectArgs) -> Result<ExitCode> {
    let targets = resolve(&args.target)?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the I/O threads")?;
    let mut out = std::io::stdout().lock();
    for target in &targets {
        let look = runtime.block_on(Box::pin(look(target, args)))?;
        let folder = args.out.join(&look.name);
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
        let (page, sheet) = (folder.join("index.html"), folder.join("sheet.png"));
        std::fs::write(&page, page::html(&look))
            .with_context(|| format!("cannot write {}", page.display()))?;
        std::fs::write(&sheet, sheet::png(&look)?)
            .with_context(|| format!("cannot write {}", sheet.display()))?;
        writeln!(out, "{}", look.summary())?;
        for shown in &look.shown {
            writeln!(out, "  {}: {}", shown.title(&look), shown.instruction)?;
            for (dim, dimension) in look.dimensions.iter().enumerate() {
                let [low, high] = bounds(&shown.raw(dim));
                let bar = sparkline(&shown.raw(dim), [low, high]);
                let label = look.label(dimension);
                writeln!(out, "    {label:<26} {bar} {low:.4} to {high:.4}")?;
            }
            for fault in shown.faults(&look) {
                writeln!(out, "    warning: {fault}")?;
            }
        }
        writeln!(out, "  written: {} and {}", page.display(), sheet.display())?;
    }
    Ok(ExitCode::Done)
}

/// A curve of one line.
fn sparkline(values: &[f32], [low, high]: [f32; 2]) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    const LENGTH: usize = 40;
    let length = LENGTH.min(values.len());
    (0..length)
        .map(|at| {
            let value = values[at * values.len() / length];
            let share = ((value - low) / (high - low)).clamp(0.0, 1.0);
            if value.is_finite() {
                BARS[(share * 7.0).round() as usize]
            } else {
                '?'
            }
        })
        .collect()
}

async fn look(target: &Target, args: &InspectArgs) -> Result<Look> {
    let survey = target.survey().await?;
    let transform = target.transform(&survey)?;
    let statistics = survey.statistics(&transform).await?;
    let state_width = statistics.proprio.as_ref().map_or(0, ActionStats::dim);
    let widths = [statistics.action.dim(), state_width];
    let [dimensions, _] = target.dimensions(&survey, &transform, widths);
    let info = &survey.metadata().info;
    let declared = target.declared.as_ref();
    let declared = declared.map(|(config, _)| config.cameras.clone().into_iter().collect());
    let cameras: Vec<(String, String)> = declared.unwrap_or_else(|| {
        let images = info
            .features
            .iter()
            .filter(|(_, kind)| kind.dtype == "image");
        images
            .map(|(name, _)| (name.clone(), name.clone()))
            .collect()
    });
    let features: Vec<String> = cameras.iter().map(|(_, feature)| feature.clone()).collect();
    let episodes = match args.episodes.len() {
        0 => spread(info.total_episodes),
        _ => args.episodes.iter().cloned().flatten().collect(),
    };
    let recorded = survey.record(&episodes, &transform, &features, args.frames.get());
    let normalizer = normalizer(target, &statistics)?;
    let tasks = &survey.metadata().tasks;
    let mut shown = Vec::new();
    for recording in recorded.await? {
        let task = recording.columns.task.first().copied().unwrap_or_default();
        let columns: Columns = survey.transformed(&transform, recording.columns)?;
        let mut normalised = columns.action.values.clone();
        if let Some(normalizer) = &normalizer {
            normalizer.normalize(&mut normalised);
        }
        let words = tasks.get(task as usize).map(|words| words.trim());
        let words = words.filter(|words| !words.is_empty());
        shown.push(Shown {
            episode: recording.episode,
            instruction: words.unwrap_or("(no instruction)").to_owned(),
            pictures: recording.pictures,
            width: columns.action.width,
            raw: columns.action.values,
            normalised,
        });
    }
    let sizes = cameras.into_iter().map(|(role, feature)| {
        let size = info.features.get(&feature);
        (
            role,
            size.and_then(pollen_dataloader::lerobot::Feature::image_size),
        )
    });
    Ok(Look {
        name: target.name.clone(),
        url: target.url.clone(),
        fps: info.fps,
        episodes: info.total_episodes,
        frames: info.total_frames,
        cameras: sizes.collect(),
        dimensions,
        shown,
    })
}

/// The first, the last and what lies between them.
fn spread(episodes: u64) -> Vec<u64> {
    let wanted = EPISODES.min(episodes);
    let mut numbers: Vec<u64> = (0..wanted)
        .map(|at| at * episodes.saturating_sub(1) / (wanted - 1).max(1))
        .collect();
    numbers.dedup();
    numbers
}

/// Makes what training brings the actions to [-1, 1] with; nothing where it leaves them.
fn normalizer(target: &Target, statistics: &Statistics) -> Result<Option<Normalizer>> {
    let stats = &statistics.action;
    let Some((config, space)) = &target.declared else {
        return Ok(Some(Normalizer::for_proprio(stats, stats.dim())?));
    };
    Ok(match config.normalization {
        Normalization::QuantilesClipped => Some(Normalizer::for_actions(stats, space)?),
        Normalization::MeanStd => {
            let scaled: Vec<bool> = space
                .dims
                .iter()
                .map(|dim| dim.normalize == Normalize::Quantiles)
                .collect();
            Some(Normalizer::reference_gaussian(
                &stats.mean,
                &stats.std,
                &scaled,
            ))
        }
        Normalization::None => None,
    })
}

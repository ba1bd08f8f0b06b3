//! `pollen data stats`: what the values of each dimension are, and what is suspicious about them.

use std::io::Write;

use anyhow::{Context, Result};
use pollen_core::ExitCode;
use pollen_core::action_space::Normalize;
use pollen_dataloader::{Dimension, DimensionCheck, Finding, Statistics, Survey};
use pollen_processing::{ActionStats, Normalization};
use serde::Serialize;

use super::target::{Target, resolve};
use crate::args::StatsArgs;

/// The statistics of one dataset.
#[derive(Serialize)]
struct Report {
    dataset: String,
    url: String,
    /// Its action space; absent when columns are taken as stored.
    embodiment: Option<String>,
    episodes: u64,
    frames: u64,
    data_hash: String,
    transform_hash: String,
    action: Vec<Row>,
    state: Vec<Row>,
    #[serde(skip_serializing_if = "Option::is_none")]
    findings: Option<Vec<Finding>>,
}

/// The statistics of one dimension.
#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    dimension: Dimension,
    mean: f32,
    std: f32,
    min: f32,
    q01: f32,
    q99: f32,
    max: f32,
    /// How training brings it to [-1, 1]; absent without an action space.
    normalized_by: Option<&'static str>,
}

pub(crate) fn run(args: &StatsArgs) -> Result<ExitCode> {
    let targets = resolve(&args.target)?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the I/O threads")?;
    let mut out = std::io::stdout().lock();
    for target in &targets {
        let report = runtime.block_on(Box::pin(report(target, args.warn)))?;
        if args.json {
            serde_json::to_writer(&mut out, &report)?;
            writeln!(out)?;
        } else {
            print(&mut out, &report)?;
        }
    }
    Ok(ExitCode::Done)
}

async fn report(target: &Target, warn: bool) -> Result<Report> {
    let survey = target.survey().await?;
    let transform = target.transform(&survey)?;
    let statistics = survey.statistics(&transform).await?;
    let widths = [
        statistics.action.dim(),
        statistics.proprio.as_ref().map_or(0, ActionStats::dim),
    ];
    let [actions, states] = target.dimensions(&survey, &transform, widths);
    let findings = if warn {
        Some(findings(&survey, &statistics, &actions, &states).await?)
    } else {
        None
    };
    let space = target.declared.as_ref().map(|(_, space)| space);
    let normalized_by = |dim: usize| {
        let (config, space) = target.declared.as_ref()?;
        Some(match (space.dims[dim].normalize, config.normalization) {
            (Normalize::Keep, _) | (_, Normalization::None) => "kept",
            (Normalize::Quantiles, Normalization::QuantilesClipped) => "quantiles",
            (Normalize::Quantiles, Normalization::MeanStd) => "mean and std",
        })
    };
    let info = &survey.metadata().info;
    let states = statistics
        .proprio
        .as_ref()
        .map(|stats| rows(stats, states, |_| None));
    Ok(Report {
        dataset: target.name.clone(),
        url: target.url.clone(),
        embodiment: space.map(|space| space.name.clone()),
        episodes: info.total_episodes,
        frames: info.total_frames,
        data_hash: statistics.dataset_hash,
        transform_hash: statistics.transform.hash,
        action: rows(&statistics.action, actions, normalized_by),
        state: states.unwrap_or_default(),
        findings,
    })
}

/// Reads the columns once more, for what statistics do not tell: how many, and where.
async fn findings(
    survey: &Survey,
    statistics: &Statistics,
    actions: &[Dimension],
    states: &[Dimension],
) -> Result<Vec<Finding>> {
    let transform = &statistics.transform;
    let mut action = DimensionCheck::new("action", &statistics.action, actions);
    let mut state = statistics.proprio.as_ref();
    let mut state = state
        .take()
        .map(|stats| DimensionCheck::new("state", stats, states));
    let mut failed = None;
    let visit = survey.visit(transform, |columns| {
        match survey.transformed(transform, columns) {
            Ok(columns) => {
                action.push(&columns, &columns.action);
                if let Some(state) = &mut state {
                    state.push(&columns, &columns.state);
                }
            }
            Err(error) => failed = failed.take().or(Some(error)),
        }
    });
    visit.await?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    let mut found = action.finish();
    found.extend(state.into_iter().flat_map(DimensionCheck::finish));
    Ok(found)
}

fn rows(
    stats: &ActionStats,
    dimensions: Vec<Dimension>,
    normalized_by: impl Fn(usize) -> Option<&'static str>,
) -> Vec<Row> {
    let rows = dimensions.into_iter().enumerate();
    rows.map(|(dim, dimension)| Row {
        dimension,
        mean: stats.mean[dim],
        std: stats.std[dim],
        min: stats.min[dim],
        q01: stats.q01[dim],
        q99: stats.q99[dim],
        max: stats.max[dim],
        normalized_by: normalized_by(dim),
    })
    .collect()
}

fn print(out: &mut impl Write, report: &Report) -> Result<()> {
    let space = report.embodiment.as_deref();
    writeln!(
        out,
        "{}: {} episodes, {} frames, {}",
        report.dataset,
        report.episodes,
        report.frames,
        space.unwrap_or("columns as stored")
    )?;
    writeln!(
        out,
        "  data {}, transform {}",
        short(&report.data_hash),
        short(&report.transform_hash)
    )?;
    for (of, rows) in [("action", &report.action), ("state", &report.state)] {
        if rows.is_empty() {
            continue;
        }
        writeln!(
            out,
            "  {of:<20} {:<14}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}  normalised by",
            "unit", "mean", "std", "min", "q01", "q99", "max"
        )?;
        for row in rows {
            let unit = match &*row.dimension.unit {
                "" => "-",
                unit => unit,
            };
            write!(out, "  {:<20} {unit:<14}", row.dimension.name)?;
            for value in [row.mean, row.std, row.min, row.q01, row.q99, row.max] {
                write!(out, "{:>10}", figure(value))?;
            }
            writeln!(out, "  {}", row.normalized_by.unwrap_or("-"))?;
        }
    }
    if let Some(findings) = &report.findings {
        print_findings(out, findings)?;
    }
    Ok(())
}

/// Prints findings with what to do about them.
pub(crate) fn print_findings(out: &mut impl Write, findings: &[Finding]) -> Result<()> {
    if findings.is_empty() {
        writeln!(out, "  nothing suspicious")?;
    }
    for finding in findings {
        let mark = if finding.fix.is_empty() {
            "ok"
        } else {
            "warning"
        };
        let subject = match &*finding.subject {
            "" => String::new(),
            subject => format!(" {subject}"),
        };
        writeln!(
            out,
            "  {mark}: {}{subject}: {}",
            finding.check, finding.evidence
        )?;
        if !finding.fix.is_empty() {
            writeln!(out, "      {}", finding.fix)?;
        }
    }
    Ok(())
}

fn short(hash: &str) -> &str {
    hash.get(..16).unwrap_or(hash)
}

/// Four significant digits in at most nine characters.
fn figure(value: f32) -> String {
    let size = value.abs();
    if value == 0.0 {
        "0".into()
    } else if !(1e-4..1e5).contains(&size) {
        format!("{value:.2e}")
    } else {
        let digits = (3 - size.log10().floor() as i32).clamp(0, 6) as usize;
        format!("{value:.digits$}")
    }
}

#[cfg(test)]
mod tests {
    use super::figure;

    #[test]
    fn figures_fit_their_columns() {
        let values = [0.0, 1.0, -0.000_123_456, 12_345.6, -3.2e-8, 9.99e9, -0.25];
        let texts = values.map(figure);
        assert_eq!(
            texts,
            [
                "0",
                "1.000",
                "-0.000123",
                "12346",
                "-3.20e-8",
                "9.99e9",
                "-0.2500"
            ]
        );
        assert!(texts.iter().all(|text| text.len() <= 9));
    }
}

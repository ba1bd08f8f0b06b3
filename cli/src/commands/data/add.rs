//! `pollen data add`: a dataset file from what a dataset says of itself, checked.

mod scaffold;

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pollen_core::{ActionSpace, ActionSpaceFile, ConfigError, ExitCode};
use pollen_dataloader::{DatasetCheck, DatasetConfig, DimensionCheck, Finding, Survey, Verdict};
use pollen_processing::ActionStats;

use super::stats::print_findings;
use super::target::{Target, dataset_file_text, of_url};
use crate::args::AddArgs;
use scaffold::Scaffold;

pub(crate) fn run(args: &AddArgs) -> Result<ExitCode> {
    let path = args
        .out
        .clone()
        .unwrap_or_else(|| Path::new("configs/datasets").join(format!("{}.toml", args.name)));
    check_name(&args.name, &path, args.force)?;
    let mut target = of_url(&args.url, None)?;
    target.name.clone_from(&args.name);
    target.url = absolute(&args.url)?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the I/O threads")?;
    let (survey, verdict, mut findings) = runtime.block_on(Box::pin(look(&target)))?;
    let spaces = spaces(Path::new("configs"))?;
    let scaffold = {
        let info = &survey.metadata().info;
        Scaffold::new((&target.name, &target.url), info, &verdict, &spaces, args)?
    };
    findings.extend(scaffold.findings.iter().cloned());
    let text = scaffold.to_toml(&findings);
    // What is written must load: the same checks as at the start of a run.
    let config = parsed(&args.name, &text)?;
    survey.transform(&config, scaffold.space)?;
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
    }
    std::fs::write(&path, &text).with_context(|| format!("cannot write {}", path.display()))?;
    let mut out = std::io::stdout().lock();
    let info = &survey.metadata().info;
    writeln!(
        out,
        "{}: {} episodes, {} frames, {} frames a second, embodiment {}",
        args.name, info.total_episodes, info.total_frames, info.fps, scaffold.space.name
    )?;
    print_findings(&mut out, &findings)?;
    writeln!(out, "written: {}", path.display())?;
    writeln!(
        out,
        "next: pollen data inspect {} --dataset {}, then extends = [\"datasets/{}\"] in a recipe \
         or mixture",
        target.url,
        path.display(),
        args.name
    )?;
    Ok(ExitCode::Done)
}

/// Reads the columns twice: for statistics, and for what goes with what.
async fn look(target: &Target) -> Result<(Survey, Verdict, Vec<Finding>)> {
    let survey = target.survey().await?;
    let info = &survey.metadata().info;
    if !info.features.contains_key("action") {
        let names: Vec<&String> = info.features.keys().collect();
        return Err(invalid(
            &target.name,
            format!("it has no feature `action`, but {names:?}; convert it with --action FIELD"),
        ));
    }
    let transform = target.transform(&survey)?;
    let statistics = survey.statistics(&transform).await?;
    let state_width = statistics.proprio.as_ref().map_or(0, ActionStats::dim);
    let widths = [statistics.action.dim(), state_width];
    let [actions, states] = target.dimensions(&survey, &transform, widths);
    let tasks = &survey.metadata().tasks;
    let mut whole = DatasetCheck::new(&actions, &states, info.fps, tasks);
    let mut action = DimensionCheck::new("action", &statistics.action, &actions);
    let visit = survey.visit(&transform, |columns| {
        action.push(&columns, &columns.action);
        whole.push(&columns);
    });
    visit.await?;
    let verdict = whole.finish();
    let mut findings = verdict.findings.clone();
    findings.extend(action.finish());
    Ok((survey, verdict, findings))
}

fn check_name(name: &str, path: &Path, force: bool) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if name.is_empty() || !name.chars().all(plain) {
        return Err(invalid(
            name,
            "a dataset's name has letters, digits, _ and - only".into(),
        ));
    }
    if path.exists() && !force {
        return Err(invalid(
            name,
            format!("{} exists; --force writes it anew", path.display()),
        ));
    }
    Ok(())
}

/// A URL that means the same from any folder.
fn absolute(url: &str) -> Result<String> {
    if url.contains("://") {
        return Ok(url.trim_end_matches('/').to_owned());
    }
    let path = std::fs::canonicalize(url).with_context(|| format!("cannot find {url}"))?;
    Ok(format!("file://{}", path.display()))
}

fn spaces(configs: &Path) -> Result<Vec<ActionSpace>> {
    let folder = configs.join("embodiments");
    let entries = std::fs::read_dir(&folder).with_context(|| {
        format!(
            "cannot list {}; run pollen in the repository's root",
            folder.display()
        )
    })?;
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    paths.sort();
    let mut spaces = Vec::new();
    for path in paths {
        let origin = path.display().to_string();
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {origin}"))?;
        spaces.push(ActionSpaceFile::parse(&text, &origin)?);
    }
    Ok(spaces)
}

fn parsed(name: &str, text: &str) -> Result<DatasetConfig> {
    let mut datasets = dataset_file_text(text, "the scaffold")?;
    datasets
        .remove(name)
        .context("the scaffold lacks its own table")
}

fn invalid(name: &str, fault: String) -> anyhow::Error {
    ConfigError::Invalid {
        origin: format!("dataset `{name}`"),
        faults: vec![fault],
    }
    .into()
}

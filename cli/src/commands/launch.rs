//! `pollen launch`: run folder, store, plan, workers, summary.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context, Result};
use pollen_core::{ConfigError, ExitCode};
use pollen_launcher::{
    Job, ObjectServer, ObjectServerKind, Plan, RunDir, RunLock, RunRequest, StepTime, Supervisor,
    WorkerCommand, find_weed,
};
use pollen_observe::{EventLog, NextCommand, Progress, RunView, Sink, read_events, summary};
use pollen_storage::{Silent, Storage};
use pollen_trainer::device::Offer;

use super::plan::plan_of;
use crate::args::LaunchArgs;
use crate::recipe::Recipe;
use crate::stage::stage;

pub(crate) fn run(args: &LaunchArgs) -> Result<ExitCode> {
    let recipe = Recipe::load(&args.recipe.recipe, &args.recipe.overrides)?;
    recipe.launch.check()?;
    if args.dry_run {
        write!(
            std::io::stdout().lock(),
            "{}",
            plan_of(&recipe, 0, 0.0, None)?.render()
        )?;
        return Ok(ExitCode::Done);
    }
    let request = RunRequest {
        root: &args.runs,
        recipe: &recipe.config.name,
        identity: &recipe.identity(),
        steps: recipe.config.train.steps,
        now: SystemTime::now(),
    };
    if let Some(text) = already_complete(&request)? {
        say(&text)?;
        return Ok(ExitCode::Done);
    }
    if let (_, Some(note)) = recipe.config.train.device.resolve(&Offer::here())? {
        tracing::warn!("{note}");
    }
    let mut run = RunDir::find_or_create(&request)?;
    let lock = run.lock()?;
    let history = past_events(&run)?;
    let view = RunView::of(&history);
    run.write_config(&recipe.to_toml()?)?;

    let server = object_server(&recipe, &args.runs)?;
    let variables = server
        .as_ref()
        .map(ObjectServer::variables)
        .unwrap_or_default();
    prepare_store(&recipe, &variables)?;
    let plan = announce(&recipe, &run, &view, server.as_ref())?;
    let outcome = supervise(&recipe, &mut run, &lock, args, &variables, &history, &plan)?;
    if let Some(server) = server {
        server.stop()?;
    }
    let view = RunView::of(&past_events(&run)?);
    say(&summary(&view, &next_commands(&recipe, outcome.exit)))?;
    if let Some(log) = &outcome.log {
        anyhow::bail!(WorkerFailed {
            exit: outcome.exit,
            text: format!("{}\n{log}", outcome.reason)
        });
    }
    Ok(outcome.exit)
}

/// A worker's failure with the end of its log: printed as it is, and it keeps its exit code.
#[derive(Debug)]
pub(crate) struct WorkerFailed {
    pub(crate) exit: ExitCode,
    text: String,
}

impl std::fmt::Display for WorkerFailed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for WorkerFailed {}

/// Says so if the newest run of this recipe has reached its last step.
fn already_complete(request: &RunRequest<'_>) -> Result<Option<String>> {
    let runs = RunDir::list(request.root, request.recipe)?;
    let newest = runs
        .iter()
        .rev()
        .find(|run| run.record().identity == request.identity);
    let Some(run) = newest else { return Ok(None) };
    let Some(step) = run.record().final_step.filter(|_| run.record().finished) else {
        return Ok(None);
    };
    if step < request.steps {
        return Ok(None);
    }
    Ok(Some(format!(
        "run {} is complete: step {step} of {}. To train it further: make pretrain RECIPE={} \
         STEPS={}; for another run: SET=\"seed=...\"\n",
        run.id(),
        request.steps,
        request.recipe,
        step * 3 / 2
    )))
}

fn past_events(run: &RunDir) -> Result<Vec<pollen_observe::Record>> {
    let path = run.events();
    Ok(if path.exists() {
        read_events(&path)?
    } else {
        Vec::new()
    })
}

fn say(text: &str) -> Result<()> {
    Ok(write!(std::io::stdout().lock(), "{text}")?)
}

/// Starts the demo's S3 server, or adopts the one that a killed launcher left.
pub(crate) fn object_server(recipe: &Recipe, runs: &Path) -> Result<Option<ObjectServer>> {
    if recipe.launch.object_server == ObjectServerKind::None {
        return Ok(None);
    }
    let root = &recipe.config.data.root;
    let bucket = root
        .strip_prefix("s3://")
        .and_then(|rest| rest.split('/').next())
        .filter(|bucket| !bucket.is_empty())
        .ok_or_else(|| ConfigError::Invalid {
            origin: recipe.config.name.clone(),
            faults: vec![format!(
                "launch.object_server needs data.root = \"s3://bucket/...\", not `{root}`"
            )],
        })?;
    let checkout = std::env::current_dir().context("cannot find the current folder")?;
    let weed = find_weed(|name| std::env::var(name).ok(), &checkout)?;
    Ok(Some(ObjectServer::start(
        &weed,
        &runs.join(".store"),
        bucket,
    )?))
}

/// Checks that the store answers and copies the datasets that are missing in it.
fn prepare_store(recipe: &Recipe, variables: &[(String, String)]) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new().context("cannot start the I/O threads")?;
    let mut environment: std::collections::HashMap<String, String> = std::env::vars().collect();
    environment.extend(variables.iter().cloned());
    let config = &recipe.config;
    let data = Storage::open_with(
        &config.data.root,
        &config.storage,
        Arc::new(Silent),
        &environment,
    )?;
    runtime.block_on(async {
        data.check().await?;
        if let Some(from) = &recipe.run.stage_from {
            let count = stage(from, &data).await?;
            if count > 0 {
                say(&format!("uploaded {count} files to {}\n", data.url()))?;
            }
        }
        Ok(())
    })
}

fn announce(
    recipe: &Recipe,
    run: &RunDir,
    view: &RunView,
    server: Option<&ObjectServer>,
) -> Result<Plan> {
    let step = view
        .checkpoint
        .as_ref()
        .map_or(0, |checkpoint| checkpoint.step);
    let measured = view.seconds_per_step().map(|seconds| StepTime {
        seconds,
        source: "measured in this run".into(),
    });
    let plan = plan_of(recipe, step, view.gpu_hours().unwrap_or(0.0), measured)?;
    let action = if run.is_new() {
        "new run"
    } else {
        "continuing run"
    };
    let server = server.map_or_else(String::new, |server| {
        let how = if server.is_adopted() {
            "adopted"
        } else {
            "started"
        };
        format!("S3 server {how} at {}\n", server.endpoint())
    });
    let (id, folder) = (run.id(), run.path().display());
    let text = format!("{action} {id} in {folder}\n{server}{}", plan.render());
    say(&text)?;
    Ok(plan)
}

fn supervise(
    recipe: &Recipe,
    run: &mut RunDir,
    lock: &RunLock,
    args: &LaunchArgs,
    variables: &[(String, String)],
    history: &[pollen_observe::Record],
    plan: &Plan,
) -> Result<pollen_launcher::Outcome> {
    let mut progress = Progress::stderr(&recipe.config.observe);
    progress.replay(history);
    let log = EventLog::open(&run.events(), run.id(), run.record().generation + 1, None)?;
    log.append(plan.event())?;
    let outcome = {
        let command = worker_command(recipe, run, args, variables)?;
        let job = Job {
            run,
            lock,
            config: &recipe.launch,
            command,
            steps: recipe.config.train.steps,
        };
        let mut quiet = Quiet;
        let observer: &mut dyn pollen_launcher::Observer =
            if recipe.config.observe.has(Sink::Progress) {
                &mut progress
            } else {
                &mut quiet
            };
        Supervisor::default().run_with_signals(job, observer)?
    };
    progress.finish();
    Ok(outcome)
}

/// Shows nothing.
struct Quiet;

impl pollen_launcher::Observer for Quiet {
    fn records(&mut self, _: &[pollen_observe::Record]) {}
    fn say(&mut self, _: &str) {}
}

fn worker_command(
    recipe: &Recipe,
    run: &RunDir,
    args: &LaunchArgs,
    variables: &[(String, String)],
) -> Result<WorkerCommand> {
    let program = std::env::current_exe().context("cannot find the pollen program itself")?;
    let url = run_url(recipe, &args.runs, run.id())?;
    let mut words = vec![
        "worker".into(),
        "--config".into(),
        run.config().into_os_string(),
        "--run-dir".into(),
        run.path().as_os_str().to_owned(),
        "--run-url".into(),
        url.into(),
    ];
    if args.accept_new_data {
        words.push("--accept-new-data".into());
    }
    let mut env = variables.to_vec();
    if std::env::var_os("RAYON_NUM_THREADS").is_none() {
        // The workers share this machine's cores; more threads than cores only get in each
        // other's way.
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let threads = (cores / recipe.launch.workers.get() as usize).max(1);
        env.push(("RAYON_NUM_THREADS".into(), threads.to_string()));
    }
    let env_remove = if variables.is_empty() {
        Vec::new()
    } else {
        ObjectServer::foreign_variables()
    };
    Ok(WorkerCommand {
        program,
        args: words,
        env,
        env_remove,
    })
}

/// Returns the object-store folder of a run.
pub(crate) fn run_url(recipe: &Recipe, runs: &Path, run_id: &str) -> Result<String> {
    let base = if recipe.run.url.is_empty() {
        let folder = std::path::absolute(runs).context("cannot resolve the folder of runs")?;
        format!("file://{}", folder.display())
    } else {
        recipe.run.url.trim_end_matches('/').to_owned()
    };
    Ok(format!("{base}/{}/{run_id}", recipe.config.name))
}

fn next_commands(recipe: &Recipe, exit: ExitCode) -> Vec<NextCommand> {
    let next = |purpose: &str, command: String| NextCommand {
        purpose: purpose.into(),
        command,
    };
    let name = &recipe.config.name;
    let steps = recipe.config.train.steps;
    match exit {
        ExitCode::Done => vec![
            next(
                "train further:",
                format!(
                    "make pretrain RECIPE={name} STEPS={}",
                    steps + (steps / 2).max(1)
                ),
            ),
            next(
                "what was trained:",
                format!("target/debug/pollen model describe {name}"),
            ),
        ],
        _ => vec![next("go on:", format!("make pretrain RECIPE={name}"))],
    }
}

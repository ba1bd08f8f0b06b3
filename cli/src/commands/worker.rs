//! `pollen worker`: one rank of a run.

use anyhow::{Context, Result, bail};
use pollen_core::ExitCode;
use pollen_launcher::{WorkerEnv, WorkerFlags};
use pollen_trainer::{StopFlags, run_worker};

use crate::args::WorkerArgs;
use crate::recipe::Recipe;

pub(crate) fn run(args: WorkerArgs) -> Result<ExitCode> {
    let stop = StopFlags::install().context("cannot install signal handlers")?;
    let lookup = |name: &str| std::env::var(name).ok();
    pollen_launcher::die_with_launcher(lookup)?;
    let worker = WorkerEnv::detect(lookup, &WorkerFlags::default())?;
    tracing::info!(rank = worker.rank, world_size = worker.world_size, source = %worker.source, "worker");
    let recipe = Recipe::load_resolved(&args.config)?;
    let Some(run_id) = args.run_dir.file_name().and_then(|name| name.to_str()) else {
        bail!(
            "--run-dir {} has no last part that could be a run id",
            args.run_dir.display()
        );
    };
    let outcome = run_worker(
        pollen_trainer::WorkerArgs {
            config_hash: recipe.identity(),
            run_id: run_id.to_owned(),
            run_dir: args.run_dir.clone(),
            run_url: args.run_url,
            rank: worker.rank,
            local_rank: worker.local_rank,
            world_size: worker.world_size,
            generation: worker.generation,
            store: format!("{}:{}", worker.master_addr, worker.master_port),
            accept_new_data: args.accept_new_data,
            config: recipe.config,
        },
        stop,
    )?;
    tracing::info!(exit = %outcome.exit, reason = outcome.reason, "worker ends");
    Ok(outcome.exit)
}

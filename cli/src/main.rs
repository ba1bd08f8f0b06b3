//! The `pollen` command: thin glue over the library crates.

mod args;
mod commands;
mod exit;
mod recipe;
mod stage;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("POLLEN_LOG")
                .unwrap_or_else(|_| "warn".into()),
        )
        .with_target(false)
        .init();
    let result = match Cli::parse().command {
        Command::Launch(args) => commands::launch::run(&args),
        Command::Plan(args) => commands::plan::run(&args),
        Command::Ps(args) => commands::ps::run(&args),
        Command::Logs(args) => commands::logs::run(&args),
        Command::Stop(args) => commands::stop::run(&args),
        Command::Worker(args) => commands::worker::run(args),
        Command::Checkpoint(args) => commands::checkpoint::run(&args),
        Command::Config(args) => commands::config::run(&args),
        Command::Data(args) => commands::data::run(&args),
        Command::Model(args) => commands::model::run(&args),
        Command::Bench(args) => commands::bench::run(&args),
        Command::GpuCheck(args) => commands::gpu_check::run(&args),
        Command::Export(args) => commands::export::run(&args),
        Command::Weights(args) => commands::weights::run(&args),
    };
    exit::report(result)
}

//! `pollen weights import`: published weights, checked and written under canonical names.

use std::io::Write;
use std::sync::Arc;

use anyhow::{Context, Result};
use pollen_core::ExitCode;
use pollen_storage::{Silent, Storage, StorageConfig};
use pollen_weights::{FitOptions, PromptSource, WeightFiles, fit, import};

use crate::args::{ImportArgs, WeightsCommand, WhichWeights};
use crate::recipe::Recipe;

pub(crate) fn run(command: &WeightsCommand) -> Result<ExitCode> {
    let WeightsCommand::Import(args) = command;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the I/O threads")?;
    runtime.block_on(Box::pin(import_weights(args)))
}

async fn import_weights(args: &ImportArgs) -> Result<ExitCode> {
    let recipe = Recipe::load(&args.recipe, &args.overrides)?;
    let config = &recipe.config;
    let files = open(&args.source, &config.storage).await?;
    let prompt = match args.prompt_from.as_deref() {
        None => None,
        Some("mean") => Some(PromptSource::Mean),
        Some(url) => Some(PromptSource::Of(open(url, &config.storage).await?)),
    };
    let options = FitOptions {
        allow_missing: args.allow_missing.clone(),
        allow_unexpected: args.allow_unexpected.clone(),
        cross_attention_mask: args.cross_attention_mask,
        norm: args.norm,
        rope_theta: args.rope_theta,
        averaged: args.weights.map(|which| which == WhichWeights::Ema),
        prompt,
    };
    let fitted = fit(&files, &config.model, &config.action_spaces, &options).await?;
    writeln!(std::io::stdout().lock(), "{}", fitted.report)?;
    fitted.check(files.url())?;
    if args.dry_run {
        return Ok(ExitCode::Done);
    }
    let destination = Storage::open(&args.destination, &config.storage, Arc::new(Silent))?;
    let written = import(&files, &fitted, &options, &destination).await?;
    writeln!(
        std::io::stdout().lock(),
        "wrote {} tensors, {} bytes, in {} shards to {}; start a run from them with --set \
         init.from={}",
        written.tensors,
        written.bytes,
        written.shards,
        destination.url(),
        destination.url()
    )?;
    Ok(ExitCode::Done)
}

async fn open(url: &str, config: &StorageConfig) -> Result<WeightFiles> {
    Ok(WeightFiles::open(url, config, Arc::new(Silent)).await?)
}

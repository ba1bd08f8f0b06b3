//! `pollen data`: a recipe's datasets, indexed where they are not yet; statistics; conversion.

mod add;
mod inspect;
mod stats;
mod target;

use std::io::Write;
use std::sync::Arc;

use anyhow::{Context, Result};
use pollen_core::{ActionSpace, ExitCode, Seed};
use pollen_dataloader::{Data, ModelShape, Summary};
use pollen_storage::{Silent, Storage};

use crate::args::{DataCommand, RecipeArgs};
use crate::recipe::Recipe;

pub(crate) fn run(command: &DataCommand) -> Result<ExitCode> {
    match command {
        DataCommand::Index(args) => index(args),
        DataCommand::Convert(args) => super::convert::run(args),
        DataCommand::Stats(args) => stats::run(args),
        DataCommand::Add(args) => add::run(args),
        DataCommand::Inspect(args) => inspect::run(args),
    }
}

fn index(args: &RecipeArgs) -> Result<ExitCode> {
    let recipe = Recipe::load(&args.recipe, &args.overrides)?;
    let config = &recipe.config;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the I/O threads")?;
    let widest =
        |of: fn(&ActionSpace) -> usize| config.action_spaces.iter().map(of).max().unwrap_or(0);
    let shape = ModelShape {
        action_horizon: config.model.flow.action_horizon,
        action_width: widest(ActionSpace::dim),
        proprio_width: widest(|space| space.proprio_dim),
    };
    let open = |url: &str| Storage::open(url, &config.storage, Arc::new(Silent));
    let data = runtime.block_on(Data::open(
        &config.data,
        &config.action_spaces,
        shape,
        &open,
    ))?;
    let mixture = data.mixture(Seed::new(config.seed))?;
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "dataset\tepisodes\theld out\tframes\trow groups\twindows\tbytes\tshare"
    )?;
    for d in Summary::new(&data, &mixture).datasets {
        writeln!(
            out,
            "{}\t{}\t{}\t{}\t{}\t{}\t{}\t{:.3}",
            d.name,
            d.episodes,
            d.held_out_episodes,
            d.frames,
            d.row_groups,
            d.windows,
            d.bytes,
            d.share
        )?;
    }
    Ok(ExitCode::Done)
}

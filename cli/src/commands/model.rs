//! `pollen model describe`: the parameters of a recipe's model.

use std::io::Write;

use anyhow::Result;
use pollen_core::ExitCode;

use crate::args::ModelCommand;
use crate::recipe::Recipe;

pub(crate) fn run(command: &ModelCommand) -> Result<ExitCode> {
    let ModelCommand::Describe(args) = command;
    let recipe = Recipe::load(&args.recipe, &args.overrides)?;
    let table = recipe
        .config
        .model
        .parameter_table(&recipe.config.action_spaces)?;
    writeln!(std::io::stdout().lock(), "{table}")?;
    Ok(ExitCode::Done)
}

//! `pollen config explain`: every value with where it came from.

use std::io::Write;

use anyhow::Result;
use pollen_core::ExitCode;

use crate::args::ConfigCommand;
use crate::recipe::Recipe;

pub(crate) fn run(command: &ConfigCommand) -> Result<ExitCode> {
    let ConfigCommand::Explain(args) = command;
    let recipe = Recipe::load(&args.recipe, &args.overrides)?;
    let rows = recipe.layered.explain();
    let width = rows
        .iter()
        .map(|(key, value, _)| key.len() + value.len())
        .max()
        .unwrap_or(0);
    let mut out = std::io::stdout().lock();
    for (key, value, origin) in rows {
        let setting = format!("{key} = {value}");
        writeln!(
            out,
            "{setting:<pad$}  # {origin}",
            pad = (width + 3).min(60)
        )?;
    }
    Ok(ExitCode::Done)
}

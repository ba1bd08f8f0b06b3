//! `pollen model describe`: parameters, work and memory of a recipe's model.

use std::io::Write;

use anyhow::Result;
use pollen_core::ExitCode;
use pollen_model::{ModelCost, ParameterTable};
use serde_json::{Map, Value, json};

use crate::args::ModelCommand;
use crate::recipe::Recipe;

pub(crate) fn run(command: &ModelCommand) -> Result<ExitCode> {
    let ModelCommand::Describe(args) = command;
    let recipe = Recipe::load(&args.recipe.recipe, &args.recipe.overrides)?;
    let config = &recipe.config;
    let table = config.model.parameter_table(&config.action_spaces)?;
    let cost = config.model.cost(
        &config.action_spaces,
        config.data.text_length,
        config.train.micro_batch.into(),
        config.train.precision.value_bytes(),
    )?;
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{:#}", to_json(&table, &cost))?;
    } else {
        writeln!(out, "{table}\n\n{cost}")?;
    }
    Ok(ExitCode::Done)
}

fn to_json(table: &ParameterTable, cost: &ModelCost) -> Value {
    let modules: Map<String, Value> = table
        .summary()
        .into_iter()
        .map(|(module, count)| (module, count.into()))
        .collect();
    let parts: Vec<Value> = cost
        .parts
        .iter()
        .chain([&cost.total()])
        .map(|part| {
            json!({
                "part": part.part,
                "parameters": part.parameters,
                "trained": part.trained,
                "forward_flops_per_sample": part.forward_flops,
                "training_flops_per_sample": part.training_flops,
                "weight_bytes": part.weight_bytes(),
                "gradient_bytes": part.gradient_bytes(),
                "optimizer_bytes": part.optimizer_bytes(),
                "activation_bytes": part.activation_bytes(cost.micro_batch, cost.value_bytes),
            })
        })
        .collect();
    json!({
        "modules": modules,
        "parts": parts,
        "micro_batch": cost.micro_batch,
        "modulation_parameters": {
            "global_adaln": cost.modulation.global_adaln,
            "adaln_zero": cost.modulation.adaln_zero,
        },
    })
}

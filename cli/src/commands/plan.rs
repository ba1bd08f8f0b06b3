//! `pollen plan`: what a recipe would do and cost.

use std::io::Write;

use anyhow::Result;
use pollen_core::ExitCode;
use pollen_launcher::{Plan, PlanInput, StepTime};

use crate::args::RecipeArgs;
use crate::recipe::Recipe;

pub(crate) fn run(args: &RecipeArgs) -> Result<ExitCode> {
    let recipe = Recipe::load(&args.recipe, &args.overrides)?;
    let plan = plan_of(&recipe, 0, 0.0, None)?;
    let memory = pollen_trainer::memory::table(&recipe.config)?;
    write!(std::io::stdout().lock(), "{}{memory}", plan.render())?;
    Ok(ExitCode::Done)
}

/// Returns the plan of a recipe from `first_step` on.
pub(crate) fn plan_of(
    recipe: &Recipe,
    first_step: u64,
    gpu_hours_before: f64,
    step_time: Option<StepTime>,
) -> Result<Plan> {
    let config = &recipe.config;
    Ok(Plan::new(PlanInput {
        recipe: config.name.clone(),
        parameters: config.model.parameter_table(&config.action_spaces)?.count() as u64,
        device: "cpu".into(),
        world_size: recipe.launch.workers.get(),
        global_batch: u64::from(config.train.global_batch),
        micro_batch: u64::from(config.train.micro_batch),
        first_step,
        steps: config.train.steps,
        step_time,
        max_gpu_hours: Some(config.budget.max_gpu_hours),
        gpu_hours_before,
        usd_per_gpu_hour: recipe.launch.usd_per_gpu_hour,
    })?)
}

//! `pollen plan`: what a recipe would do and cost.

use std::io::Write;

use anyhow::Result;
use pollen_core::ExitCode;
use pollen_launcher::{
    Link, Measured, Plan, PlanInput, Prediction, RunDir, ScalingModel, StepTime, Workload,
};
use pollen_observe::{Event, Record, read_events, units};
use pollen_trainer::RunConfig;
use pollen_trainer::config::ReduceDtype;
use pollen_trainer::device::Offer;
use pollen_trainer::memory::{self, Memory};
use serde_json::{Value, json};

use super::simulate::Simulations;
use crate::args::PlanArgs;
use crate::recipe::Recipe;

/// Most GPUs that are predicted unless they are asked for.
const MOST: u32 = 1024;
/// Deviation of a step's compute time where it was not measured: that of the cost model's sources.
const JITTER: f64 = 0.01;

pub(crate) fn run(args: &PlanArgs) -> Result<ExitCode> {
    let recipe = Recipe::load(&args.recipe.recipe, &args.recipe.overrides)?;
    let plan = plan_of(&recipe, 0, 0.0, None)?;
    let scaling = match model(args, &recipe.config)? {
        Some(model) => Some(Scaling::new(args, &recipe, model)?),
        None => None,
    };
    let simulations = match &scaling {
        Some(scaling) if args.simulation.simulate => {
            let (model, rows) = (&scaling.model, &scaling.predictions);
            Some(Simulations::run(
                &args.simulation,
                &recipe.config,
                model,
                rows,
            )?)
        }
        _ => None,
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        let Event::Plan(event) = plan.event() else {
            unreachable!("a plan's event is a plan");
        };
        let scaling = scaling.as_ref().map(Scaling::to_json).transpose()?;
        let object = json!({
            "recipe": recipe.config.name,
            "plan": event,
            "scaling": scaling,
            "simulation": simulations.as_ref().map(|simulations| &simulations.choices),
        });
        writeln!(out, "{object:#}")?;
    } else {
        let memory = memory::table(&recipe.config)?;
        let scaling = scaling.as_ref().map(Scaling::render).transpose()?;
        let scaling = scaling.unwrap_or_default();
        let simulations = simulations.as_ref().map(Simulations::render);
        let simulations = simulations.unwrap_or_default();
        write!(out, "{}{memory}{scaling}{simulations}", plan.render())?;
    }
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
    let workers = recipe.launch.workers.get();
    let memory = Memory::of(config, workers, config.train.shard_optimizer)?;
    Ok(Plan::new(PlanInput {
        recipe: config.name.clone(),
        parameters: config.model.parameter_table(&config.action_spaces)?.count() as u64,
        device: config.train.device.planned(&Offer::here()).name().into(),
        world_size: workers,
        global_batch: u64::from(config.train.global_batch),
        micro_batch: u64::from(config.train.micro_batch),
        worker_bytes: memory.total(),
        first_step,
        steps: config.train.steps,
        step_time,
        max_gpu_hours: Some(config.budget.max_gpu_hours),
        gpu_hours_before,
        usd_per_gpu_hour: recipe.launch.usd_per_gpu_hour,
    })?)
}

/// Returns the model of a step on more devices, if one of them was measured.
fn model(args: &PlanArgs, config: &RunConfig) -> Result<Option<ScalingModel>> {
    let train = &config.train;
    let mut on_cpu = false;
    let (own_micro_batch, assumed) = (u64::from(train.micro_batch), |sample_s, source| Measured {
        sample_s,
        optimizer_s: 0.0,
        jitter: JITTER,
        micro_batch: args.micro_batch.unwrap_or(train.micro_batch.into()),
        source,
    });
    let mut measured = if let Some(seconds) = args.step_seconds {
        let samples = args.micro_batch.unwrap_or(own_micro_batch);
        let source = format!("{seconds} s for a micro-batch of {samples}, as given");
        assumed(seconds / samples as f64, source)
    } else if let Some(name) = &args.from {
        let run = RunDir::find(&args.runs, name)?;
        let records = read_events(&run.events())?;
        let theirs = Recipe::load_resolved(&run.config())?.config.train;
        on_cpu = runs_on_cpu(&records);
        let (micro_batch, shards) = (theirs.micro_batch.into(), theirs.shard_optimizer);
        Measured::of_run(run.id(), &records, micro_batch, shards)?
    } else if let Some(mfu) = args.mfu {
        let text_len = config.data.text_length;
        let cost = config
            .model
            .cost(&config.action_spaces, text_len, own_micro_batch, 2)?;
        let flops = cost.total().training_flops as f64;
        let source = format!(
            "{:.1} GFLOP a sample at {} of {} TFLOP/s, assumed",
            flops / 1e9,
            units::percent(mfu),
            args.peak
        );
        assumed(flops / (mfu * args.peak * 1e12), source)
    } else {
        return Ok(None);
    };
    measured.optimizer_s = args.optimizer_seconds.unwrap_or(measured.optimizer_s);
    measured.jitter = args.jitter.unwrap_or(measured.jitter);
    let link = match &args.link {
        Some(link) => link.clone(),
        None => Link::parse(if on_cpu { "loopback" } else { "h100-ndr" })?,
    };
    Ok(Some(ScalingModel {
        workload: Workload {
            steps: train.steps,
            global_batch: train.global_batch.into(),
            micro_batch: own_micro_batch,
            trained_parameters: Memory::of(config, 1, false)?.gradients / 4,
            gradient_value_bytes: match train.reduce_dtype {
                ReduceDtype::F32 => 4,
                ReduceDtype::Bf16 => 2,
            },
            overlap: train.overlap,
            shard_optimizer: train.shard_optimizer,
        },
        measured,
        link,
    }))
}

fn runs_on_cpu(records: &[Record]) -> bool {
    let last = records.iter().rev().find_map(|record| match &record.event {
        Event::Start(start) => Some(start.device.as_str()),
        _ => None,
    });
    last == Some("cpu")
}

/// Predictions for the asked numbers of devices.
struct Scaling<'a> {
    model: ScalingModel,
    predictions: Vec<Prediction>,
    config: &'a RunConfig,
    usd_per_gpu_hour: Option<f64>,
}

impl<'a> Scaling<'a> {
    fn new(args: &PlanArgs, recipe: &'a Recipe, model: ScalingModel) -> Result<Self> {
        let mut sizes = args.gpus.clone();
        if sizes.is_empty() {
            sizes = model.usual_sizes(MOST);
        }
        sizes.sort_unstable();
        sizes.dedup();
        let predictions = sizes.into_iter().map(|gpus| model.predict(gpus));
        Ok(Self {
            predictions: predictions.collect::<Result<_, _>>()?,
            model,
            config: &recipe.config,
            usd_per_gpu_hour: args.price.or(recipe.launch.usd_per_gpu_hour),
        })
    }

    fn usd(&self, prediction: &Prediction) -> Option<f64> {
        Some(prediction.gpu_hours * self.usd_per_gpu_hour?)
    }

    fn render(&self) -> Result<String> {
        let (work, measured) = (&self.model.workload, &self.model.measured);
        let mut lines = vec![
            format!(
                "  scaling {} a sample ({}); jitter {:.1}%",
                milliseconds(measured.sample_s),
                measured.source,
                100.0 * measured.jitter
            ),
            format!(
                "          gradients {} in {}, {}; link {}",
                units::bytes(work.trained_parameters * work.gradient_value_bytes),
                if work.gradient_value_bytes == 2 {
                    "bf16"
                } else {
                    "f32"
                },
                if work.overlap {
                    "sent during the backward pass"
                } else {
                    "sent after it"
                },
                self.model.link.name
            ),
        ];
        let row = |cells: [&str; 11]| {
            let [
                gpus,
                batch,
                compute,
                reduce,
                exposed,
                other,
                step,
                efficiency,
                hours,
                spent,
                usd,
            ] = cells;
            format!(
                "          {gpus:>5} {batch:>9} {compute:>9} {reduce:>10} {exposed:>9} {other:>9} \
                 {step:>9} {efficiency:>10} {hours:>8} {spent:>9} {usd:>10}"
            )
        };
        lines.push(row([
            "GPUs",
            "batch",
            "compute",
            "all-reduce",
            "exposed",
            "other",
            "step",
            "efficiency",
            "hours",
            "GPU-hours",
            "USD",
        ]));
        for prediction in &self.predictions {
            let other = prediction.jitter_s + prediction.gather_s + prediction.optimizer_s;
            let usd = self.usd(prediction);
            lines.push(row([
                &prediction.gpus.to_string(),
                &format!("{}x{}", prediction.micro_batch, prediction.accumulation),
                &milliseconds(prediction.compute_s),
                &milliseconds(prediction.reduce_s),
                &milliseconds(prediction.exposed_s),
                &milliseconds(other),
                &milliseconds(prediction.step_s),
                &format!("{:.1}%", 100.0 * prediction.efficiency),
                &units::hours(prediction.hours),
                &units::hours(prediction.gpu_hours),
                &usd.map_or("-".into(), |usd| format!("{usd:.2}")),
            ]));
        }
        lines.push(
            "          batch: micro-batch x accumulation on each GPU; exposed: what of the \
             all-reduce lengthens the step;"
                .into(),
        );
        lines.push(
            "          other: waiting for the slowest GPU, gathering weights, the update. Waiting \
             for data is not in it."
                .into(),
        );
        self.caution(&mut lines);
        self.budget(&mut lines)?;
        Ok(lines.join("\n") + "\n")
    }

    fn caution(&self, lines: &mut Vec<String>) {
        let measured = self.model.measured.micro_batch;
        let smaller = |row: &&Prediction| row.micro_batch < measured;
        if let Some(first) = self.predictions.iter().find(smaller) {
            lines.push(format!(
                "  note    measured at a micro-batch of {measured}; on {} it is {}, and small ones \
                 take longer a sample: measure that",
                units::counted(u64::from(first.gpus), "GPU", "GPUs"),
                first.micro_batch
            ));
        }
    }

    fn budget(&self, lines: &mut Vec<String>) -> Result<()> {
        let max = self.config.budget.max_gpu_hours;
        let hours = units::hours;
        for prediction in &self.predictions {
            let advice = self.model.advise(prediction.gpus, max)?;
            let gpus = units::counted(u64::from(advice.gpus), "GPU", "GPUs");
            let Some(cause) = advice.cause else {
                lines.push(format!(
                    "  budget  {gpus}: {} of {} GPU-hours",
                    hours(advice.gpu_hours),
                    hours(max)
                ));
                continue;
            };
            lines.push(format!(
                "  budget  {gpus}: {} GPU-hours break the budget of {}; {cause} costs {} of them; \
                 {} of {} steps fit",
                hours(advice.gpu_hours),
                hours(max),
                hours(advice.cause_gpu_hours),
                units::count(advice.affordable_steps),
                units::count(self.model.workload.steps)
            ));
            for remedy in &advice.remedies {
                let price = match remedy.price {
                    "" => String::new(),
                    price => format!(" ({price})"),
                };
                lines.push(format!(
                    "            {}: {} GPU-hours{}{price}",
                    remedy.change,
                    hours(remedy.gpu_hours),
                    if remedy.fits {
                        ", fits"
                    } else {
                        ", not enough alone"
                    }
                ));
            }
            if !advice.remedies.iter().any(|remedy| remedy.fits) {
                lines.push(format!(
                    "            no single change is enough: make the step {:.0}% faster, or raise \
                     budget.max_gpu_hours",
                    100.0 * (advice.gpu_hours / max - 1.0)
                ));
            }
        }
        Ok(())
    }

    fn to_json(&self) -> Result<Value> {
        let max = self.config.budget.max_gpu_hours;
        let shards = self.config.train.shard_optimizer;
        let mut rows = Vec::new();
        for prediction in &self.predictions {
            let mut row = serde_json::to_value(prediction)?;
            row["usd"] = json!(self.usd(prediction));
            row["budget"] = serde_json::to_value(self.model.advise(prediction.gpus, max)?)?;
            row["memory_bytes"] =
                serde_json::to_value(Memory::of(self.config, prediction.gpus, shards)?)?;
            rows.push(row);
        }
        Ok(json!({"model": self.model, "predictions": rows}))
    }
}

fn milliseconds(seconds: f64) -> String {
    match seconds * 1e3 {
        ms if ms >= 9999.5 => format!("{seconds:.1}s"),
        ms if ms >= 99.95 => format!("{ms:.0}ms"),
        ms if ms >= 9.995 => format!("{ms:.1}ms"),
        ms => format!("{ms:.2}ms"),
    }
}

//! `pollen plan --simulate`: runs with failures in fast motion, and the checkpoint interval.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pollen_core::Seed;
use pollen_launcher::{Choice, Prediction, Saving, ScalingModel, Scenario, Trouble};
use pollen_observe::units;
use pollen_trainer::RunConfig;
use pollen_trainer::memory::Memory;

use crate::args::SimulationArgs;

const HOUR_S: f64 = 3600.0;
const MINUTE_S: f64 = 60.0;
const GIGA: f64 = 1e9;

/// A chosen interval for each number of devices.
pub(crate) struct Simulations {
    pub(crate) choices: Vec<Choice>,
    /// The recipe's own interval.
    every_steps: u64,
    checkpoint_bytes: u64,
    repeats: u32,
}

impl Simulations {
    /// Simulates what was predicted; progress goes to standard error.
    pub(crate) fn run(
        args: &SimulationArgs,
        config: &RunConfig,
        model: &ScalingModel,
        predictions: &[Prediction],
    ) -> Result<Self> {
        let state = Memory::of(config, 1, false)?;
        let checkpoint_bytes = state.weights + state.moments + state.averages;
        let trouble = Trouble {
            mtbf_s: args.mtbf_hours * HOUR_S,
            restart_s: args.restart_seconds,
            straggler_every_s: args.straggler_hours * HOUR_S,
            straggler_slowdown: args.straggler_slowdown,
            straggler_lasts_s: args.straggler_minutes * MINUTE_S,
        };
        let every_steps = config.checkpoint.every_steps;
        let (steps, jitter) = (model.workload.steps, model.measured.jitter);
        let mut choices = Vec::new();
        for prediction in predictions {
            // Every worker copies and writes its part.
            let part = checkpoint_bytes as f64 / f64::from(prediction.gpus);
            let saving = Saving {
                stall_s: part / (args.copy_rate * GIGA),
                write_s: part / (args.write_rate * GIGA) + args.publish_seconds,
            };
            let scenario = Scenario::new(prediction, steps, jitter, trouble, saving);
            let mut progress = Progress::start(prediction.gpus);
            let seed = Seed::new(args.seed).child("plan");
            choices.push(scenario.choose(
                &[every_steps],
                args.repeats,
                seed,
                &mut |done, total| progress.show(done, total),
            ));
        }
        Ok(Self {
            choices,
            every_steps,
            checkpoint_bytes,
            repeats: args.repeats,
        })
    }

    /// Returns a table for each number of devices, with the choice.
    pub(crate) fn render(&self) -> String {
        let mut text = String::new();
        for choice in &self.choices {
            let scenario = &choice.scenario;
            let _ = writeln!(
                text,
                "  simulation of {}: one fails every {}; a checkpoint of {} stands still for {:.0}ms \
                 and is written in {}; means of {} of {} steps",
                units::counted(u64::from(scenario.gpus), "GPU", "GPUs"),
                units::seconds(scenario.mtbf_s()),
                units::bytes(self.checkpoint_bytes),
                1e3 * scenario.saving.stall_s,
                units::seconds(scenario.saving.write_s),
                units::counted(u64::from(self.repeats), "run", "runs"),
                units::count(choice.simulated_steps),
            );
            let mut row = |cells: [&str; 7]| {
                let [steps, time, goodput, again, saving, restarting, note] = cells;
                let line = format!(
                    "          {steps:>9} {time:>9} {goodput:>16} {again:>11} {saving:>9} \
                     {restarting:>10}  {note}"
                );
                let _ = writeln!(text, "{}", line.trim_end());
            };
            row([
                "steps",
                "apart",
                "goodput",
                "done again",
                "saving",
                "restarting",
                "",
            ]);
            for candidate in &choice.candidates {
                let mean = &candidate.mean;
                let note = match candidate.every_steps {
                    _ if !mean.finished => "never gets on",
                    steps if steps == choice.every_steps && steps == self.every_steps => {
                        "picked, and the recipe's"
                    }
                    steps if steps == choice.every_steps => "picked",
                    steps if steps == self.every_steps => "the recipe's",
                    _ => "",
                };
                let share = |seconds: f64| format!("{:.3}%", 100.0 * seconds / mean.wall_s);
                row([
                    &units::count(candidate.every_steps),
                    &units::seconds(candidate.every_s),
                    &format!(
                        "{:.2}% +- {:.2}",
                        100.0 * mean.goodput,
                        100.0 * candidate.standard_error
                    ),
                    &share(mean.lost_s),
                    &share(mean.saving_s),
                    &share(mean.restarting_s),
                    note,
                ]);
            }
            let step_s = scenario.undisturbed_step_s();
            let run_s = scenario.steps as f64 * step_s / choice.goodput;
            let _ = writeln!(
                text,
                "          picked: checkpoint.every_steps = {}, the longest within 0.05 points of the \
                 best; for the stall alone Young says {}, Daly {}\n          this run: {} hours, \
                 {:.2} failures expected",
                choice.every_steps,
                of_theory(choice.young_s, step_s),
                of_theory(choice.daly_s, step_s),
                units::hours(run_s / HOUR_S),
                run_s / scenario.mtbf_s(),
            );
        }
        text
    }
}

fn of_theory(seconds: f64, step_s: f64) -> String {
    let steps = (seconds / step_s).round() as u64;
    format!("{} ({})", units::count(steps), units::seconds(seconds))
}

/// How many runs are simulated: a line that moves on a terminal, a line a tenth elsewhere.
struct Progress {
    bar: Option<ProgressBar>,
    gpus: u32,
    tenths: usize,
}

impl Progress {
    fn start(gpus: u32) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}");
            bar.with_style(style.expect("the template is well formed"))
                .with_message(format!("simulating {gpus} GPUs"))
        });
        Self {
            bar,
            gpus,
            tenths: 0,
        }
    }

    fn show(&mut self, done: usize, total: usize) {
        if let Some(bar) = &self.bar {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
            if done == total {
                bar.finish_and_clear();
            }
            return;
        }
        let tenths = 10 * done / total;
        if tenths > self.tenths {
            self.tenths = tenths;
            // Nothing can be done when standard error is gone.
            let _ = writeln!(
                std::io::stderr(),
                "simulating {} GPUs: {done} of {total} runs",
                self.gpus
            );
        }
    }
}

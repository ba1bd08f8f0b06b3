//! What a run is going to do and cost, before it costs anything. Pure arithmetic.

use pollen_observe::units;
use pollen_observe::{Event, PlanEvent};

use crate::error::Error;

/// What the plan is made from.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanInput {
    /// The recipe's name.
    pub recipe: String,
    /// Model parameters.
    pub parameters: u64,
    /// Kind of device: cpu, cuda.
    pub device: String,
    /// Number of workers.
    pub world_size: u32,
    /// Samples per optimizer step, over all workers.
    pub global_batch: u64,
    /// Samples per forward pass and worker.
    pub micro_batch: u64,
    /// Bytes of weights, gradients and optimizer state that each worker keeps.
    pub worker_bytes: u64,
    /// The step the run goes on from.
    pub first_step: u64,
    /// The step the run ends at.
    pub steps: u64,
    /// Seconds per step, if known.
    pub step_time: Option<StepTime>,
    /// The recipe's cap on GPU-hours.
    pub max_gpu_hours: Option<f64>,
    /// GPU-hours spent before.
    pub gpu_hours_before: f64,
    /// Price of one worker's hour.
    pub usd_per_gpu_hour: Option<f64>,
}

/// Seconds per step and where the figure comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct StepTime {
    /// Seconds per optimizer step.
    pub seconds: f64,
    /// Such as "measured in this run" or "given by the recipe".
    pub source: String,
}

/// A plan whose arithmetic works out.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    input: PlanInput,
    accumulation: u64,
}

impl Plan {
    /// Makes a plan, or says which world sizes fit if this one does not.
    pub fn new(input: PlanInput) -> Result<Self, Error> {
        let accumulation = accumulation(input.global_batch, input.micro_batch, input.world_size)?;
        Ok(Self {
            input,
            accumulation,
        })
    }

    /// Returns forward passes per optimizer step and worker.
    pub fn accumulation(&self) -> u64 {
        self.accumulation
    }

    /// Returns the samples of the whole run.
    pub fn samples(&self) -> u64 {
        self.input.steps * self.input.global_batch
    }

    /// Returns the expected seconds from here to the last step.
    pub fn expected_s(&self) -> Option<f64> {
        let left = self.input.steps.saturating_sub(self.input.first_step);
        Some(left as f64 * self.input.step_time.as_ref()?.seconds)
    }

    /// Returns the expected GPU-hours from here to the last step.
    pub fn gpu_hours(&self) -> Option<f64> {
        Some(f64::from(self.input.world_size) * self.expected_s()? / 3600.0)
    }

    /// Returns the expected price from here to the last step.
    pub fn cost_usd(&self) -> Option<f64> {
        Some(self.gpu_hours()? * self.input.usd_per_gpu_hour?)
    }

    /// Returns the step at which the cap on GPU-hours ends the run, if it comes before the last.
    pub fn cut_at_step(&self) -> Option<u64> {
        let left = self.input.max_gpu_hours? - self.input.gpu_hours_before;
        let seconds = left.max(0.0) * 3600.0 / f64::from(self.input.world_size);
        let steps = (seconds / self.input.step_time.as_ref()?.seconds).floor() as u64;
        let step = self.input.first_step.saturating_add(steps);
        (step < self.input.steps).then_some(step)
    }

    /// Returns the plan as an event.
    pub fn event(&self) -> Event {
        let input = &self.input;
        Event::Plan(PlanEvent {
            world_size: input.world_size,
            global_batch: input.global_batch,
            micro_batch: input.micro_batch,
            accumulation: self.accumulation,
            steps: input.steps,
            samples: self.samples(),
            parameters: input.parameters,
            expected_s: self.expected_s(),
            gpu_hours: self.gpu_hours(),
            cost_usd: self.cost_usd(),
        })
    }

    /// Returns the plan as text, ending in a line break.
    pub fn render(&self) -> String {
        let input = &self.input;
        let hours = units::worker_hours(&input.device);
        let mut lines = vec![
            format!("plan for {}", input.recipe),
            format!(
                "  model   {} parameters, {} in f32, {} a worker with gradients and optimizer state",
                units::count(input.parameters),
                units::bytes(input.parameters * 4),
                units::bytes(input.worker_bytes)
            ),
            format!(
                "  batch   {} samples a step = {} a micro-batch x {} x {} accumulated",
                units::count(input.global_batch),
                units::count(input.micro_batch),
                units::counted(u64::from(input.world_size), "worker", "workers"),
                self.accumulation
            ),
            format!("  steps   {}", self.extent()),
        ];
        lines.push(match (&input.step_time, self.expected_s()) {
            (Some(step), Some(seconds)) => format!(
                "  time    about {} at {} a step ({})",
                units::seconds(seconds),
                step_time(step.seconds),
                step.source
            ),
            _ => "  time    unknown until a few steps are measured".into(),
        });
        let mut cost = Vec::new();
        if let Some(expected) = self.gpu_hours() {
            cost.push(format!("about {} {hours}", units::hours(expected)));
        }
        if let Some(usd) = self.cost_usd() {
            cost.push(format!("{usd:.2} USD"));
        }
        if input.gpu_hours_before > 0.0 {
            cost.push(format!(
                "{} spent before",
                units::hours(input.gpu_hours_before)
            ));
        }
        cost.push(match input.max_gpu_hours {
            Some(max) => format!("capped at {} {hours}", units::hours(max)),
            None => "no cap".into(),
        });
        lines.push(format!("  cost    {}", cost.join(", ")));
        if let Some(step) = self.cut_at_step() {
            lines.push(format!(
                "  note    the cap ends the run at about step {}, before its last",
                units::count(step)
            ));
        }
        lines.join("\n") + "\n"
    }

    fn extent(&self) -> String {
        let input = &self.input;
        let whole = format!(
            "{}, {} samples",
            units::count(input.steps),
            units::count(self.samples())
        );
        match input.first_step {
            0 => whole,
            first if first >= input.steps => format!("{whole}; all done"),
            first => format!("{whole}; goes on from step {}", units::count(first)),
        }
    }
}

/// Returns how often a worker must go forward and backward for one optimizer step, or an error
/// that names the world sizes that fit.
pub fn accumulation(global_batch: u64, micro_batch: u64, world_size: u32) -> Result<u64, Error> {
    let refuse = |reason: String| Err(Error::WorldSize { reason });
    if global_batch == 0 || micro_batch == 0 || world_size == 0 {
        return refuse(format!(
            "global batch {global_batch}, micro-batch {micro_batch} and {world_size} workers: \
             none of them may be 0"
        ));
    }
    if !global_batch.is_multiple_of(micro_batch) {
        let near: Vec<u64> = (1..=micro_batch)
            .rev()
            .filter(|size| global_batch.is_multiple_of(*size))
            .take(3)
            .collect();
        return refuse(format!(
            "global batch {global_batch} is not made of micro-batches of {micro_batch} at any \
             world size: micro-batches that fit are {}",
            join(&near)
        ));
    }
    let per_step = micro_batch * u64::from(world_size);
    if !global_batch.is_multiple_of(per_step) {
        let fit: Vec<u64> = world_sizes(global_batch, micro_batch)
            .into_iter()
            .map(u64::from)
            .collect();
        return refuse(format!(
            "global batch {global_batch} cannot be made of micro-batches of {micro_batch} on \
             {world_size} workers: world sizes that fit are {}",
            join(&fit)
        ));
    }
    Ok(global_batch / per_step)
}

/// Returns all world sizes at which the global batch is made of whole micro-batches.
pub fn world_sizes(global_batch: u64, micro_batch: u64) -> Vec<u32> {
    if micro_batch == 0 || !global_batch.is_multiple_of(micro_batch) {
        return Vec::new();
    }
    let most = u32::try_from(global_batch / micro_batch).unwrap_or(u32::MAX);
    let passes = global_batch / micro_batch;
    (1..=most)
        .filter(|size| passes.is_multiple_of(u64::from(*size)))
        .collect()
}

fn step_time(seconds: f64) -> String {
    if seconds < 1.0 {
        format!("{:.0}ms", seconds * 1000.0)
    } else {
        format!("{seconds:.2}s")
    }
}

fn join(numbers: &[u64]) -> String {
    let texts: Vec<String> = numbers.iter().map(u64::to_string).collect();
    texts.join(", ")
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;

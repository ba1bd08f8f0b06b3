//! What takes a prediction above its budget, and what would bring it back.

use pollen_observe::units;
use serde::Serialize;

use super::{Prediction, ScalingModel};
use crate::error::Error;
use crate::plan;

/// A change must save this share of the GPU-hours to be worth a line.
const WORTH: f64 = 0.01;

/// A prediction against the budget of GPU-hours.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Advice {
    /// Number of devices.
    pub gpus: u32,
    /// GPU-hours predicted.
    pub gpu_hours: f64,
    /// GPU-hours allowed.
    pub max_gpu_hours: f64,
    /// GPU-hours of the compute alone, at any number of devices.
    pub compute_gpu_hours: f64,
    /// What costs most, if the budget is broken: `compute` if that alone breaks it, otherwise
    /// `all-reduce`, `gather`, `jitter` or `optimizer`.
    pub cause: Option<&'static str>,
    /// GPU-hours of the cause.
    pub cause_gpu_hours: f64,
    /// What to change, the best first; nothing if the budget holds.
    pub remedies: Vec<Remedy>,
    /// Steps that fit into the budget as things are.
    pub affordable_steps: u64,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Remedy {
    /// What to change, with the key.
    pub change: String,
    /// What it asks for in return, if anything.
    pub price: &'static str,
    /// GPU-hours with it.
    pub gpu_hours: f64,
    /// Whether it is enough.
    pub fits: bool,
}

impl ScalingModel {
    /// Says what breaks the budget on `gpus` devices and which single changes help. Each is
    /// predicted by the same model.
    ///
    /// # Errors
    /// As [`ScalingModel::predict`].
    pub fn advise(&self, gpus: u32, max_gpu_hours: f64) -> Result<Advice, Error> {
        let now = self.predict(gpus)?;
        let per_second = self.workload.steps as f64 * f64::from(gpus) / 3600.0;
        let compute_gpu_hours = now.compute_s * per_second;
        let mut advice = Advice {
            gpus,
            gpu_hours: now.gpu_hours,
            max_gpu_hours,
            compute_gpu_hours,
            cause: None,
            cause_gpu_hours: 0.0,
            remedies: Vec::new(),
            affordable_steps: (max_gpu_hours / now.gpu_hours * self.workload.steps as f64) as u64,
        };
        if now.gpu_hours <= max_gpu_hours {
            return Ok(advice);
        }
        let (cause, seconds) = cause(&now, compute_gpu_hours > max_gpu_hours);
        advice.cause = Some(cause);
        advice.cause_gpu_hours = seconds * per_second;
        let mut remedies: Vec<Remedy> = self
            .changes(&now, max_gpu_hours)
            .into_iter()
            .filter_map(|change| {
                // A change that cannot be made (a batch that cannot be dealt) is no remedy.
                let gpu_hours = change.model.predict(change.gpus).ok()?.gpu_hours;
                (gpu_hours < now.gpu_hours * (1.0 - WORTH)).then_some(Remedy {
                    change: change.text,
                    price: change.price,
                    gpu_hours,
                    fits: gpu_hours <= max_gpu_hours,
                })
            })
            .collect();
        remedies.sort_by(|a, b| a.gpu_hours.total_cmp(&b.gpu_hours));
        advice.remedies = remedies;
        Ok(advice)
    }

    fn changes(&self, now: &Prediction, max_gpu_hours: f64) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut change = |text: String, price, edit: &dyn Fn(&mut Self)| {
            let mut model = self.clone();
            edit(&mut model);
            changes.push(Change {
                text,
                price,
                gpus: now.gpus,
                model,
            });
        };
        let work = &self.workload;
        if work.gradient_value_bytes > 2 {
            change(
                "train.reduce_dtype = \"bf16\"".into(),
                "gradients are rounded on the wire",
                &|model| model.workload.gradient_value_bytes = 2,
            );
        }
        change(format!("train.overlap = {}", !work.overlap), "", &|model| {
            model.workload.overlap = !work.overlap;
        });
        change(
            format!("train.shard_optimizer = {}", !work.shard_optimizer),
            "",
            &|model| model.workload.shard_optimizer = !work.shard_optimizer,
        );
        if now.accumulation > 1 {
            let whole = work.global_batch / u64::from(now.gpus);
            change(
                format!("train.micro_batch = {whole}"),
                "needs the memory for its activations",
                &|model| model.workload.micro_batch = whole,
            );
        }
        for factor in [2, 4] {
            let (batch, steps) = (work.global_batch * factor, work.steps / factor);
            change(
                format!("train.global_batch = {batch} with train.steps = {steps}"),
                "the same samples in fewer updates: tune the learning rate again",
                &|model| {
                    model.workload.global_batch = batch;
                    model.workload.steps = steps;
                },
            );
        }
        // As few GPUs fewer as will do, so that the run takes no longer than it must.
        let fewer = plan::world_sizes(work.global_batch, now.micro_batch);
        let enough = fewer.into_iter().rev().find(|size| {
            let prediction = self.predict(*size);
            *size < now.gpus && prediction.is_ok_and(|other| other.gpu_hours <= max_gpu_hours)
        });
        changes.extend(enough.map(|gpus| Change {
            text: units::counted(u64::from(gpus), "GPU", "GPUs"),
            price: "the run takes longer",
            gpus,
            model: self.clone(),
        }));
        changes
    }
}

struct Change {
    text: String,
    price: &'static str,
    gpus: u32,
    model: ScalingModel,
}

/// Returns what costs most beside the compute, or the compute if that alone is too much.
fn cause(now: &Prediction, compute_alone: bool) -> (&'static str, f64) {
    if compute_alone {
        return ("compute", now.compute_s);
    }
    let parts = [
        ("all-reduce", now.exposed_s),
        ("gather", now.gather_s),
        ("jitter", now.jitter_s),
        ("optimizer", now.optimizer_s),
    ];
    parts
        .into_iter()
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .expect("the list is not empty")
}

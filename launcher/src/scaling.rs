//! What a step takes on more devices, predicted from one: time, efficiency, hours, cost.
//!
//! With t the seconds of one sample's forward and backward pass, G the global batch, M the
//! micro-batch and n devices, a step takes
//!
//! ```text
//! compute   = t G / n
//! jitter    = compute x sigma x sqrt(2 ln n)          the slowest of n devices sets the pace
//! reduce    = bytes x 2 (n - 1) / n / bus             the gradients' all-reduce
//! exposed   = reduce                                  when nothing overlaps
//!           = max(0, reduce / e - 0.95 x 2/3 x t M) + tail      when it overlaps
//! gather    = weights x (n - 1) / n / bus             only with a sharded optimizer
//! optimizer = o, or o / n with a sharded optimizer
//! ```
//!
//! and the efficiency is (t G + o) / (n x step). The terms: sqrt(2 ln n) is the expected largest of
//! n standard normal numbers to first order, so sigma is the deviation of a step's compute time as
//! a share of it. The backward pass is 2/3 of the compute (two of three matrix products), and only
//! that of the last micro-batch can hide communication; 95 % of it, because the first bucket must
//! be there before anything is sent. Sent bucket by bucket, an all-reduce reaches only the share e
//! of the bus ([`Link::bucket_efficiency`]), and the last bucket (the tail) hides behind nothing.
//! With a sharded optimizer the reduce-scatter of the gradients takes half an all-reduce and the
//! gathering of the f32 weights the other half of one; the latter waits for the update, so that
//! nothing hides it. What is not in it: waiting for data (the loader's slowest worker counts, not
//! the mean) and time lost to failures and checkpoints,
//! which [`crate::simulation`] has.

mod advice;
mod link;
mod measure;

use serde::Serialize;

pub use advice::{Advice, Remedy};
pub use link::Link;

use crate::error::Error;
use crate::plan;

/// Share of the compute that is the backward pass.
const BACKWARD: f64 = 2.0 / 3.0;
/// Share of a backward pass behind which gradients can be sent.
const HIDEABLE: f64 = 0.95;
/// Bytes of an f32 weight.
const WEIGHT_BYTES: f64 = 4.0;

/// What is trained, and how.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Workload {
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// Samples of a step over all devices.
    pub global_batch: u64,
    /// Most samples of one forward pass on one device.
    pub micro_batch: u64,
    /// Trained parameters.
    pub trained_parameters: u64,
    /// Bytes of one gradient value on the wire: 4 for f32, 2 for bf16.
    pub gradient_value_bytes: u64,
    /// Whether gradients are sent while the backward pass goes on.
    pub overlap: bool,
    /// Whether each device keeps and updates a part of the optimizer's state (ZeRO-1).
    pub shard_optimizer: bool,
}

/// What one device was measured to do.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// Seconds of the forward and backward pass of one sample, as part of a micro-batch.
    pub sample_s: f64,
    /// Seconds of an update of all parameters.
    pub optimizer_s: f64,
    /// Deviation of a step's compute time, as a share of it.
    pub jitter: f64,
    /// Samples of the micro-batch at which it was measured.
    pub micro_batch: u64,
    /// Where the figures come from, for people.
    pub source: String,
}

/// A step on a number of devices, all times in seconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// Number of devices.
    pub gpus: u32,
    /// Samples of one forward pass on one device.
    pub micro_batch: u64,
    /// Forward passes of a step on one device.
    pub accumulation: u64,
    /// Forward and backward passes.
    pub compute_s: f64,
    /// Waiting for the slowest device.
    pub jitter_s: f64,
    /// The gradients' all-reduce alone, hidden or not.
    pub reduce_s: f64,
    /// The part of it that lengthens the step.
    pub exposed_s: f64,
    /// Gathering updated weights.
    pub gather_s: f64,
    /// The update.
    pub optimizer_s: f64,
    /// All of it.
    pub step_s: f64,
    /// Against one device, between 0 and 1.
    pub efficiency: f64,
    /// Samples a second over all devices.
    pub samples_per_s: f64,
    /// Hours of the whole run.
    pub hours: f64,
    /// Those times the devices.
    pub gpu_hours: f64,
}

/// Everything a prediction is made from.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ScalingModel {
    /// What is trained.
    pub workload: Workload,
    /// What one device does.
    pub measured: Measured,
    /// What the devices are joined by.
    pub link: Link,
}

impl ScalingModel {
    /// Predicts a step on `gpus` devices. Where the global batch is smaller than a micro-batch on
    /// each of them, the micro-batch shrinks.
    ///
    /// # Errors
    /// When the global batch cannot be dealt to that many devices, with the numbers that work; when
    /// the link does not say how fast nodes are joined.
    pub fn predict(&self, gpus: u32) -> Result<Prediction, Error> {
        let (work, measured) = (&self.workload, &self.measured);
        let (micro_batch, accumulation) = self.micro_batches(gpus)?;
        let count = f64::from(gpus);
        let alone_s = measured.sample_s * work.global_batch as f64;
        let compute_s = alone_s / count;
        let jitter_s = compute_s * measured.jitter * (2.0 * count.ln()).sqrt();
        let parameters = work.trained_parameters as f64;
        let gradients = parameters * work.gradient_value_bytes as f64;
        // A reduce-scatter is half an all-reduce, and so is an all-gather.
        let part = if work.shard_optimizer { 0.5 } else { 1.0 };
        let reduce_s = part * self.link.all_reduce_s(gradients, gpus)?;
        let exposed_s = if work.overlap {
            let sent_s = reduce_s / self.link.bucket_efficiency;
            let hidden_s = HIDEABLE * BACKWARD * measured.sample_s * micro_batch as f64;
            (sent_s - hidden_s).max(0.0) + self.link.tail_s.min(sent_s)
        } else {
            reduce_s
        };
        let (gather_s, shards) = if work.shard_optimizer {
            let weights = parameters * WEIGHT_BYTES;
            (0.5 * self.link.all_reduce_s(weights, gpus)?, count)
        } else {
            (0.0, 1.0)
        };
        let optimizer_s = measured.optimizer_s / shards;
        let step_s = compute_s + jitter_s + exposed_s + gather_s + optimizer_s;
        let hours = step_s * work.steps as f64 / 3600.0;
        Ok(Prediction {
            gpus,
            micro_batch,
            accumulation,
            compute_s,
            jitter_s,
            reduce_s,
            exposed_s,
            gather_s,
            optimizer_s,
            step_s,
            efficiency: (alone_s + measured.optimizer_s) / (count * step_s),
            samples_per_s: work.global_batch as f64 / step_s,
            hours,
            gpu_hours: hours * count,
        })
    }

    /// Returns the powers of two, at most `limit`, to which the global batch can be dealt.
    pub fn usual_sizes(&self, limit: u32) -> Vec<u32> {
        let sizes = std::iter::successors(Some(1_u32), |size| size.checked_mul(2));
        sizes
            .take_while(|size| *size <= limit)
            .filter(|size| self.micro_batches(*size).is_ok())
            .collect()
    }

    fn micro_batches(&self, gpus: u32) -> Result<(u64, u64), Error> {
        let (global, micro) = (self.workload.global_batch, self.workload.micro_batch);
        let share = global / u64::from(gpus.max(1));
        if share >= micro {
            return Ok((micro, plan::accumulation(global, micro, gpus)?));
        }
        // Refused here where no micro-batch at all would do.
        plan::accumulation(global, 1, gpus)?;
        Ok((share, 1))
    }
}

#[cfg(test)]
#[path = "scaling_tests.rs"]
mod tests;

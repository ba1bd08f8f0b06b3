//! How many steps to leave between checkpoints.

use pollen_core::Seed;
use serde::Serialize;

use super::{Outcome, Scenario};

/// Intervals tried to each side of Daly's, at half powers of two.
const TO_EACH_SIDE: i32 = 6;
/// A difference in goodput that is not worth more checkpoints.
const INDIFFERENT: f64 = 0.0005;

/// Failures that a simulated run should see, so that the choice does not hang on one of them.
const FAILURES: f64 = 100.0;

/// Returns Young's interval sqrt(2 delta M) for a checkpoint that costs `delta_s` and a mean time
/// between failures of `mtbf_s` (J. W. Young, "A first order approximation to the optimum
/// checkpoint interval", CACM 1974).
pub fn young_s(delta_s: f64, mtbf_s: f64) -> f64 {
    (2.0 * delta_s * mtbf_s).sqrt()
}

/// Returns Daly's interval, of higher order: sqrt(2 delta M) (1 + x / 3 + x^2 / 9) - delta with
/// x = sqrt(delta / 2 M), or M where delta >= 2 M (J. T. Daly, "A higher order estimate of the
/// optimum checkpoint interval for restart dumps", FGCS 2006, equation 37).
pub fn daly_s(delta_s: f64, mtbf_s: f64) -> f64 {
    if delta_s >= 2.0 * mtbf_s {
        return mtbf_s;
    }
    let x = (delta_s / (2.0 * mtbf_s)).sqrt();
    young_s(delta_s, mtbf_s) * (1.0 + x / 3.0 + x * x / 9.0) - delta_s
}

/// An interval that was simulated, with the steps that it takes for enough failures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Candidate {
    /// Steps from one checkpoint to the next.
    pub every_steps: u64,
    /// Their time when nothing disturbs, seconds.
    pub every_s: f64,
    /// Means over the simulated runs; `failures` and `lost_steps` are rounded.
    pub mean: Outcome,
    /// Standard error of the goodput's mean.
    pub standard_error: f64,
}

/// The interval to take, and what it is compared with.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Choice {
    /// The run.
    pub scenario: Scenario,
    /// Steps of a simulated one.
    pub simulated_steps: u64,
    /// All intervals, ascending.
    pub candidates: Vec<Candidate>,
    /// The longest one whose goodput is that of the best but for 0.05 points.
    pub every_steps: u64,
    /// Its goodput.
    pub goodput: f64,
    /// Young's interval for the stall alone, seconds.
    pub young_s: f64,
    /// Daly's, seconds.
    pub daly_s: f64,
}

impl Scenario {
    /// Simulates `seeds` runs for each of a range of intervals around Daly's, and for those in
    /// `also`, and takes the best. Each simulated run is as long as this one, or so long that it
    /// should see a hundred failures. `progress` hears of every one: how many are done, of how many.
    pub fn choose(
        &self,
        also: &[u64],
        seeds: u32,
        seed: Seed,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Choice {
        let (step_s, stall_s) = (self.undisturbed_step_s(), self.saving.stall_s);
        let daly = daly_s(stall_s, self.mtbf_s());
        let around = (-TO_EACH_SIDE..=TO_EACH_SIDE)
            .map(|half| (daly / step_s * 2_f64.powf(f64::from(half) / 2.0)).round() as u64);
        let mut intervals: Vec<u64> = around
            .chain(also.iter().copied())
            .map(|interval| interval.clamp(1, self.steps))
            .collect();
        intervals.sort_unstable();
        intervals.dedup();
        let enough = (FAILURES * self.mtbf_s() / step_s) as u64;
        let long = Self {
            steps: self.steps.max(enough),
            ..self.clone()
        };
        let total = intervals.len() * seeds as usize;
        let mut done = 0;
        let mut candidates = Vec::with_capacity(intervals.len());
        for every_steps in intervals {
            let outcomes: Vec<Outcome> = (0..seeds)
                .map(|index| {
                    let outcome = long.simulate(every_steps, seed.index(u64::from(index)));
                    done += 1;
                    progress(done, total);
                    outcome
                })
                .collect();
            let (mean, standard_error) = mean_of(&outcomes);
            candidates.push(Candidate {
                every_steps,
                every_s: every_steps as f64 * step_s,
                mean,
                standard_error,
            });
        }
        let goodputs = candidates.iter().map(|candidate| candidate.mean.goodput);
        let best = goodputs.fold(0.0, f64::max);
        let picked = candidates
            .iter()
            .rev()
            .find(|candidate| candidate.mean.goodput >= best - INDIFFERENT)
            .expect("the best one is among them");
        Choice {
            scenario: self.clone(),
            simulated_steps: long.steps,
            every_steps: picked.every_steps,
            goodput: picked.mean.goodput,
            young_s: young_s(stall_s, self.mtbf_s()),
            daly_s: daly,
            candidates,
        }
    }
}

fn mean_of(outcomes: &[Outcome]) -> (Outcome, f64) {
    let count = outcomes.len().max(1) as f64;
    let mean = |of: &dyn Fn(&Outcome) -> f64| outcomes.iter().map(of).sum::<f64>() / count;
    let goodput = mean(&|outcome| outcome.goodput);
    let squares = mean(&|outcome| (outcome.goodput - goodput).powi(2));
    let means = Outcome {
        goodput,
        wall_s: mean(&|outcome| outcome.wall_s),
        failures: mean(&|outcome| outcome.failures as f64).round() as u64,
        lost_steps: mean(&|outcome| outcome.lost_steps as f64).round() as u64,
        lost_s: mean(&|outcome| outcome.lost_s),
        saving_s: mean(&|outcome| outcome.saving_s),
        restarting_s: mean(&|outcome| outcome.restarting_s),
        finished: outcomes.iter().all(|outcome| outcome.finished),
    };
    (means, (squares / (count - 1.0).max(1.0)).sqrt())
}

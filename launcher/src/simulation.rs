//! A run of many devices in fast motion: jitter, stragglers, failures and checkpoints.
//!
//! ```text
//! Scenario --Seed--> every rank's failures and slow hours --> steps, saves, restarts --> Outcome
//! intervals x seeds --> goodput of each interval --> Choice, beside Young's and Daly's
//! ```
//! A discrete simulation: every rank has its own stream of failures and of slow phases, as events
//! in order of time; between them steps follow each other. A step takes as long as its slowest
//! rank, and everything after that (gradients, update) a fixed time. A failure of any rank takes
//! all of them back to the newest checkpoint that was published before it. Saving is asynchronous
//! and one at a time, as in the trainer: the step stands still for the copy, the write goes on
//! beside the next steps, a save that comes too early waits for the one before. The same seed gives
//! the same failures at the same times whatever the interval, so that intervals are compared on
//! the same luck.

mod interval;
mod slowest;

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use pollen_core::{Draws, Seed};
use serde::Serialize;

pub use interval::{Candidate, Choice, daly_s, young_s};
use slowest::Slowest;

use crate::scaling::Prediction;

/// A simulation that takes this many times as long as its steps is given up: it does not get on.
const HOPELESS: f64 = 50.0;
/// Fewest steps that are taken at once.
const BLOCK: u64 = 32;
/// Deviations that a step or a sum of steps is never off by.
const SURE: f64 = 8.0;

/// What is simulated; all times in seconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scenario {
    /// Number of devices, one rank each.
    pub gpus: u32,
    /// Optimizer steps.
    pub steps: u64,
    /// Mean forward and backward passes of a step on one rank.
    pub compute_s: f64,
    /// What a step takes after its slowest rank is done.
    pub fixed_s: f64,
    /// Standard deviation of a rank's compute time, as a share of it.
    pub jitter: f64,
    /// What goes wrong.
    pub trouble: Trouble,
    /// What a checkpoint costs.
    pub saving: Saving,
}

/// What goes wrong, all of it memoryless (exponentially distributed).
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Trouble {
    /// Mean time between failures of one device.
    pub mtbf_s: f64,
    /// From a failure to the next step: notice, replace, start, restore.
    pub restart_s: f64,
    /// Mean time between the slow phases of one device.
    pub straggler_every_s: f64,
    /// How many times longer its passes take then.
    pub straggler_slowdown: f64,
    /// Mean length of a slow phase.
    pub straggler_lasts_s: f64,
}

/// What a checkpoint costs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Saving {
    /// Time that training stands still.
    pub stall_s: f64,
    /// Time from then until it is published.
    pub write_s: f64,
}

/// How a simulated run went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Outcome {
    /// Share of the time that undisturbed steps would have taken, 0 to 1.
    pub goodput: f64,
    /// All of the time, seconds.
    pub wall_s: f64,
    /// Failures of any rank.
    pub failures: u64,
    /// Steps done again.
    pub lost_steps: u64,
    /// Seconds in which training stood still for checkpoints.
    pub saving_s: f64,
    /// Seconds from failures to next steps.
    pub restarting_s: f64,
    /// Seconds of the steps done again, undisturbed.
    pub lost_s: f64,
    /// Whether the last step was reached; a run that loses more than it gains is given up.
    pub finished: bool,
}

impl Scenario {
    /// Returns the scenario of a predicted step.
    pub fn new(
        prediction: &Prediction,
        steps: u64,
        jitter: f64,
        trouble: Trouble,
        saving: Saving,
    ) -> Self {
        Self {
            gpus: prediction.gpus,
            steps,
            compute_s: prediction.compute_s,
            fixed_s: prediction.exposed_s + prediction.gather_s + prediction.optimizer_s,
            jitter,
            trouble,
            saving,
        }
    }

    /// Returns the mean time between failures of any device.
    pub fn mtbf_s(&self) -> f64 {
        self.trouble.mtbf_s / f64::from(self.gpus)
    }

    /// Returns the mean time of a step in which no rank is slow, its slowest one by jitter alone.
    pub fn undisturbed_step_s(&self) -> f64 {
        self.step_s(Slowest::of(self.gpus).mean())
    }

    /// Simulates the run with a checkpoint every `interval` steps and at the end.
    pub fn simulate(&self, interval: u64, seed: Seed) -> Outcome {
        Run::new(self, interval.max(1), seed).finish()
    }

    fn step_s(&self, deviations: f64) -> f64 {
        self.compute_s * (1.0 + self.jitter * deviations).max(0.0) + self.fixed_s
    }
}

/// What happens to a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Failure,
    Slow,
    Well,
}

/// Something that happens to a rank, ordered by time.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Happening {
    at_s: f64,
    rank: u32,
    kind: Kind,
}

impl Eq for Happening {}

impl Ord for Happening {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let by_time = self.at_s.total_cmp(&other.at_s);
        by_time.then_with(|| (self.rank, self.kind).cmp(&(other.rank, other.kind)))
    }
}

impl PartialOrd for Happening {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// One rank's luck.
struct Fate {
    failures: Draws,
    phases: Draws,
    slow: bool,
}

/// How long a step takes.
#[derive(Clone, Copy)]
struct Pace {
    mean_s: f64,
    deviation_s: f64,
}

struct Run<'a> {
    scenario: &'a Scenario,
    interval: u64,
    slowest: Slowest,
    /// By number of slow ranks.
    paces: Vec<Option<Pace>>,
    luck: Draws,
    fates: Vec<Fate>,
    happenings: BinaryHeap<Reverse<Happening>>,
    num_slow: usize,
    now_s: f64,
    step: u64,
    /// The newest published step.
    published: u64,
    /// A save in flight: its step, and when it will be published.
    in_flight: Option<(u64, f64)>,
    outcome: Outcome,
}

impl<'a> Run<'a> {
    fn new(scenario: &'a Scenario, interval: u64, seed: Seed) -> Self {
        let mut run = Self {
            scenario,
            interval,
            slowest: Slowest::of(scenario.gpus),
            paces: Vec::new(),
            luck: seed.child("jitter").draws(),
            fates: Vec::with_capacity(scenario.gpus as usize),
            happenings: BinaryHeap::new(),
            num_slow: 0,
            now_s: 0.0,
            step: 0,
            published: 0,
            in_flight: None,
            outcome: Outcome::default(),
        };
        for rank in 0..scenario.gpus {
            let own = seed.child("rank").index(u64::from(rank));
            run.fates.push(Fate {
                failures: own.child("failures").draws(),
                phases: own.child("phases").draws(),
                slow: false,
            });
            run.expect_failure(rank, 0.0);
            run.expect_slow_phase(rank, 0.0);
        }
        run
    }

    fn finish(mut self) -> Outcome {
        let useful_s = self.scenario.steps as f64 * self.scenario.undisturbed_step_s();
        while self.published < self.scenario.steps && self.now_s < HOPELESS * useful_s {
            if self.step == self.scenario.steps {
                self.settle();
                continue;
            }
            let (steps, span_s) = self.next_steps();
            if !self.pass(span_s) {
                continue;
            }
            self.step += steps;
            if self.step.is_multiple_of(self.interval) || self.step == self.scenario.steps {
                self.save();
            }
        }
        let finished = self.published == self.scenario.steps;
        let share = self.published as f64 / self.scenario.steps as f64;
        Outcome {
            lost_s: self.outcome.lost_steps as f64 * self.scenario.undisturbed_step_s(),
            goodput: share * useful_s / self.now_s,
            wall_s: self.now_s,
            finished,
            ..self.outcome
        }
    }

    /// Returns how many steps are taken now, and their time: one, or as many as surely end before
    /// the next checkpoint and before anything happens to a rank.
    fn next_steps(&mut self) -> (u64, f64) {
        let next_s = self.happenings.peek().map(|next| next.0.at_s);
        let quiet_s = next_s.map_or(f64::INFINITY, |at_s| at_s - self.now_s);
        let to_save = self.interval - self.step % self.interval;
        let most = to_save.min(self.scenario.steps - self.step);
        if let Some(pace) = self.pace() {
            let surely_s =
                |steps: f64| steps * pace.mean_s + SURE * steps.sqrt() * pace.deviation_s;
            let mut steps = most;
            if surely_s(most as f64) > quiet_s {
                // Halved: short of the happening whatever the deviation is, and half the way to it.
                steps = most.min((quiet_s / surely_s(1.0) / 2.0) as u64);
            }
            if steps >= BLOCK {
                let deviation = slowest::normal(self.luck.uniform_f64()).clamp(-SURE, SURE);
                let count = steps as f64;
                let span_s = count * pace.mean_s + deviation * count.sqrt() * pace.deviation_s;
                return (steps, span_s);
            }
        }
        (1, self.next_step_s())
    }

    /// Returns mean and deviation of a step as the ranks are now, unless slow and healthy ranks
    /// could each be the slowest.
    fn pace(&mut self) -> Option<Pace> {
        let (scenario, num_slow) = (self.scenario, self.num_slow);
        let (slowdown, jitter) = (scenario.trouble.straggler_slowdown, scenario.jitter);
        if num_slow > 0 && slowdown - 1.0 < SURE * jitter {
            return None;
        }
        if self.paces.len() <= num_slow {
            self.paces.resize(num_slow + 1, None);
        }
        Some(*self.paces[num_slow].get_or_insert_with(|| {
            let (slowest, factor) = match num_slow {
                0 => (Slowest::of(scenario.gpus), 1.0),
                slow => (Slowest::of(slow as u32), slowdown),
            };
            let compute_s = scenario.compute_s * factor;
            Pace {
                mean_s: compute_s * (1.0 + jitter * slowest.mean()) + scenario.fixed_s,
                deviation_s: compute_s * jitter * slowest.deviation(),
            }
        }))
    }

    fn next_step_s(&mut self) -> f64 {
        let jitter = self.scenario.jitter;
        let mut worst_s = self.scenario.step_s(self.slowest.draw(&mut self.luck));
        for _ in 0..self.num_slow {
            let deviation = slowest::normal(self.luck.uniform_f64());
            let slowdown = self.scenario.trouble.straggler_slowdown;
            let compute_s = self.scenario.compute_s * slowdown * (1.0 + jitter * deviation);
            worst_s = worst_s.max(compute_s + self.scenario.fixed_s);
        }
        worst_s
    }

    /// Stands still for a checkpoint, and before it for one that is still being written.
    fn save(&mut self) {
        if self.in_flight.is_some() && !self.settle() {
            return;
        }
        let stall_s = self.scenario.saving.stall_s;
        if self.pass(stall_s) {
            self.outcome.saving_s += stall_s;
            self.in_flight = Some((self.step, self.now_s + self.scenario.saving.write_s));
        }
    }

    /// Waits for the save in flight; says whether it was published.
    fn settle(&mut self) -> bool {
        let Some((step, at_s)) = self.in_flight else {
            // A failure took it: the steps since are done again.
            return false;
        };
        let wait_s = (at_s - self.now_s).max(0.0);
        if !self.pass(wait_s) {
            return false;
        }
        self.outcome.saving_s += wait_s;
        self.published = step;
        self.in_flight = None;
        true
    }

    /// Lets time pass; says whether no rank failed in it.
    fn pass(&mut self, span_s: f64) -> bool {
        let end_s = self.now_s + span_s;
        while let Some(Reverse(next)) = self.happenings.peek().copied() {
            if next.at_s > end_s {
                break;
            }
            self.happenings.pop();
            match next.kind {
                Kind::Failure => {
                    self.fail(next);
                    return false;
                }
                kind => self.change(next, kind),
            }
        }
        self.now_s = end_s;
        true
    }

    /// Takes all ranks back to the newest checkpoint.
    fn fail(&mut self, failure: Happening) {
        if let Some((step, at_s)) = self.in_flight.take()
            && at_s <= failure.at_s
        {
            self.published = step;
        }
        self.outcome.lost_steps += self.step - self.published;
        self.step = self.published;
        let mut failed = failure;
        loop {
            self.outcome.failures += 1;
            // The device is replaced: the new one fails and is slow in its own time.
            let fate = &mut self.fates[failed.rank as usize];
            self.num_slow -= usize::from(std::mem::take(&mut fate.slow));
            self.expect_failure(failed.rank, failed.at_s);
            let back_s = failed.at_s + self.scenario.trouble.restart_s;
            let Some(again) = self.next_failure_until(back_s) else {
                self.outcome.restarting_s += back_s - failure.at_s;
                self.now_s = back_s;
                return;
            };
            failed = again;
        }
    }

    /// Lets the time of a restart pass; returns the failure that begins it anew, if there is one.
    fn next_failure_until(&mut self, end_s: f64) -> Option<Happening> {
        while let Some(Reverse(next)) = self.happenings.peek().copied() {
            if next.at_s > end_s {
                return None;
            }
            self.happenings.pop();
            match next.kind {
                Kind::Failure => return Some(next),
                kind => self.change(next, kind),
            }
        }
        None
    }

    /// A rank becomes slow, or well again.
    fn change(&mut self, next: Happening, kind: Kind) {
        let fate = &mut self.fates[next.rank as usize];
        let was_slow = std::mem::replace(&mut fate.slow, kind == Kind::Slow);
        self.num_slow = self.num_slow + usize::from(fate.slow) - usize::from(was_slow);
        if kind == Kind::Slow {
            let lasts_s = self.scenario.trouble.straggler_lasts_s;
            let at_s = next.at_s + exponential(&mut fate.phases, lasts_s);
            self.expect(at_s, next.rank, Kind::Well);
        } else {
            self.expect_slow_phase(next.rank, next.at_s);
        }
    }

    fn expect_failure(&mut self, rank: u32, from_s: f64) {
        let draws = &mut self.fates[rank as usize].failures;
        let at_s = from_s + exponential(draws, self.scenario.trouble.mtbf_s);
        self.expect(at_s, rank, Kind::Failure);
    }

    fn expect_slow_phase(&mut self, rank: u32, from_s: f64) {
        let draws = &mut self.fates[rank as usize].phases;
        let at_s = from_s + exponential(draws, self.scenario.trouble.straggler_every_s);
        self.expect(at_s, rank, Kind::Slow);
    }

    fn expect(&mut self, at_s: f64, rank: u32, kind: Kind) {
        if at_s.is_finite() {
            self.happenings
                .push(Reverse(Happening { at_s, rank, kind }));
        }
    }
}

/// Draws an exponentially distributed time; an infinite mean is never.
fn exponential(draws: &mut Draws, mean_s: f64) -> f64 {
    // 1 - u lies in (0, 1], so the logarithm is finite.
    -(1.0 - draws.uniform_f64()).ln() * mean_s
}

#[cfg(test)]
#[path = "simulation_tests.rs"]
mod tests;

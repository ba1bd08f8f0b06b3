//! What the events say about the run so far: a fold, the same from a file and from a live tail.

use std::collections::{BTreeMap, VecDeque};
use std::time::SystemTime;

use crate::budget::Budget;
use crate::events::{Event, MixtureShare, PlanEvent, Record, SpaceError, StartEvent, StepEvent};

/// Steps over which the pace is measured.
const PACE_WINDOW: usize = 32;

/// The newest published checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointView {
    /// Optimizer step it holds.
    pub step: u64,
    /// Where it lies.
    pub url: String,
    /// Size of all its files.
    pub bytes: u64,
}

/// One rank's line of a gradient exchange.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExchangeView {
    /// Hash of the rank's own gradient.
    pub own_hash: String,
    /// Hash of the reduced gradient.
    pub reduced_hash: String,
}

/// The state of a run after some of its records.
#[derive(Clone, Debug, Default)]
pub struct RunView {
    /// The run's id.
    pub run: String,
    /// The latest generation seen.
    pub generation: u64,
    /// Time of the first record.
    pub first: Option<SystemTime>,
    /// Time of the newest record.
    pub last: Option<SystemTime>,
    /// What the run planned to do.
    pub plan: Option<PlanEvent>,
    /// The latest start.
    pub start: Option<StartEvent>,
    /// The account opened by the latest start.
    pub budget: Option<Budget>,
    /// The latest step.
    pub step: Option<StepEvent>,
    /// Seconds by phase, added up over all steps of all generations.
    pub phases: BTreeMap<String, f64>,
    /// The newest checkpoint.
    pub checkpoint: Option<CheckpointView>,
    /// Checkpoints published.
    pub num_checkpoints: u64,
    /// Seconds that training stood still for checkpoints.
    pub stall_s: f64,
    /// Restores from a checkpoint.
    pub num_restores: u64,
    /// Restarts by the launcher.
    pub num_restarts: u64,
    /// Samples that could not be used.
    pub num_bad_samples: u64,
    /// Steps skipped because they were not finite.
    pub num_non_finite: u64,
    /// Storage operations that failed and were tried again.
    pub num_store_retries: u64,
    /// Storage operations that succeeded after retries.
    pub num_store_recovered: u64,
    /// Seconds waited in storage operations that succeeded after retries.
    pub store_waited_s: f64,
    /// The latest held-out errors and their step.
    pub eval: Option<(u64, BTreeMap<String, SpaceError>)>,
    /// What the datasets have given: samples in all, and by dataset.
    pub mixture: Option<(u64, BTreeMap<String, MixtureShare>)>,
    /// The latest gradient exchange: its step and each rank's hashes.
    pub exchange: Option<(u64, BTreeMap<u32, ExchangeView>)>,
    /// Exit code and reason, once the run has ended.
    pub end: Option<(i32, String)>,
    pace: VecDeque<(u64, SystemTime)>,
}

impl RunView {
    /// Returns the state after all of `records`.
    pub fn of(records: &[Record]) -> Self {
        let mut view = Self::default();
        for record in records {
            view.apply(record);
        }
        view
    }

    /// Takes one more record in. What every rank reports alike is taken from rank 0.
    pub fn apply(&mut self, record: &Record) {
        self.run.clone_from(&record.run);
        self.generation = self.generation.max(record.generation);
        self.first.get_or_insert(record.time);
        self.last = self.last.max(Some(record.time));
        let leads = record.rank.is_none_or(|rank| rank == 0);
        match &record.event {
            Event::Plan(plan) => self.plan = Some(plan.clone()),
            Event::Start(start) if leads => {
                self.budget = Some(Budget::of_start(start, record.time));
                self.start = Some(start.clone());
                self.end = None;
                self.pace.clear();
                self.pace.push_back((start.step, record.time));
            }
            Event::Step(step) if leads => self.apply_step(step, record.time),
            Event::Checkpoint {
                step,
                url,
                bytes,
                stall_s,
                ..
            } if leads => {
                self.num_checkpoints += 1;
                self.stall_s += stall_s;
                self.checkpoint = Some(CheckpointView {
                    step: *step,
                    url: url.clone(),
                    bytes: *bytes,
                });
            }
            Event::Restore { .. } if leads => self.num_restores += 1,
            Event::BadSample { .. } => self.num_bad_samples += 1,
            Event::NonFinite { .. } if leads => self.num_non_finite += 1,
            Event::Restart { .. } => {
                self.num_restarts += 1;
                self.end = None;
            }
            Event::Eval { step, spaces } if leads => self.eval = Some((*step, spaces.clone())),
            Event::Mixture {
                samples, datasets, ..
            } if leads => self.mixture = Some((*samples, datasets.clone())),
            Event::StoreRetry { .. } => self.num_store_retries += 1,
            Event::StoreRecovered { waited_s, .. } => {
                self.num_store_recovered += 1;
                self.store_waited_s += waited_s;
            }
            Event::GradientExchange {
                step,
                own_hash,
                reduced_hash,
            } => self.apply_exchange(*step, record.rank, own_hash, reduced_hash),
            Event::End { exit_code, reason } if record.rank.is_none() => {
                self.end = Some((*exit_code, reason.clone()));
            }
            Event::End { exit_code, reason } if leads && self.end.is_none() => {
                self.end = Some((*exit_code, reason.clone()));
            }
            _ => {}
        }
    }

    fn apply_step(&mut self, step: &StepEvent, time: SystemTime) {
        for (phase, seconds) in &step.phases {
            *self.phases.entry(phase.clone()).or_default() += seconds;
        }
        if self.pace.back().is_some_and(|(last, _)| *last >= step.step) {
            self.pace.clear();
        }
        self.pace.push_back((step.step, time));
        if self.pace.len() > PACE_WINDOW {
            self.pace.pop_front();
        }
        self.step = Some(step.clone());
    }

    fn apply_exchange(&mut self, step: u64, rank: Option<u32>, own: &str, reduced: &str) {
        let (seen, ranks) = self.exchange.get_or_insert_default();
        if *seen != step {
            *seen = step;
            ranks.clear();
        }
        ranks.insert(
            rank.unwrap_or(0),
            ExchangeView {
                own_hash: own.to_owned(),
                reduced_hash: reduced.to_owned(),
            },
        );
    }

    /// Returns the number of steps done.
    pub fn steps_done(&self) -> u64 {
        match (&self.step, &self.start) {
            (Some(step), _) => step.step,
            (None, Some(start)) => start.step,
            (None, None) => 0,
        }
    }

    /// Returns the number of steps the run ends at, when known.
    pub fn steps_total(&self) -> Option<u64> {
        let of_start = self.start.as_ref().map(|start| start.steps);
        of_start.or_else(|| self.plan.as_ref().map(|plan| plan.steps))
    }

    /// Returns seconds per step over the last steps of this generation.
    pub fn seconds_per_step(&self) -> Option<f64> {
        let (first_step, first) = self.pace.front()?;
        let (last_step, last) = self.pace.back()?;
        let steps = last_step.checked_sub(*first_step).filter(|&n| n > 0)?;
        let wall = last.duration_since(*first).ok()?;
        Some(wall.as_secs_f64() / steps as f64)
    }

    /// Returns the expected seconds until the last step.
    pub fn seconds_left(&self) -> Option<f64> {
        let left = self.steps_total()?.saturating_sub(self.steps_done());
        Some(left as f64 * self.seconds_per_step()?)
    }

    /// Returns GPU-hours spent at the newest record.
    pub fn gpu_hours(&self) -> Option<f64> {
        Some(self.budget.as_ref()?.spent(self.last?))
    }

    /// Returns the kind of device the workers use.
    pub fn device(&self) -> &str {
        self.start.as_ref().map_or("", |start| &start.device)
    }

    /// Returns the share of the measured time by phase, largest first.
    pub fn phase_shares(&self) -> Vec<(&str, f64)> {
        let total: f64 = self.phases.values().sum();
        if total <= 0.0 {
            return Vec::new();
        }
        let mut shares: Vec<(&str, f64)> = self
            .phases
            .iter()
            .map(|(phase, seconds)| (phase.as_str(), seconds / total))
            .collect();
        shares.sort_by(|a, b| b.1.total_cmp(&a.1));
        shares
    }

    /// Returns how many workers are proved to have exchanged gradients at the latest exchange:
    /// their own gradients differ and the reduced one is the same on all.
    pub fn exchange_proved(&self) -> Option<(u64, usize)> {
        let (step, ranks) = self.exchange.as_ref()?;
        let first = ranks.values().next()?;
        let same = ranks
            .values()
            .all(|rank| rank.reduced_hash == first.reduced_hash);
        let mut own: Vec<&str> = ranks.values().map(|rank| rank.own_hash.as_str()).collect();
        own.sort_unstable();
        own.dedup();
        (same && ranks.len() > 1 && own.len() == ranks.len()).then_some((*step, ranks.len()))
    }
}

#[cfg(test)]
#[path = "view_tests.rs"]
mod tests;

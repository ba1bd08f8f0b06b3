//! The phases of a step: timed, and the places where tests inject faults.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use pollen_core::Clock;

use crate::pulse::Pulse;

/// What a rank is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Meeting the other ranks.
    Rendezvous,
    /// Opening the data and building the model.
    Open,
    /// Claiming the run and reading a checkpoint.
    Restore,
    /// Waiting for the loader.
    Data,
    /// Copying the batch and running the model.
    Forward,
    /// Computing gradients.
    Backward,
    /// Summing gradients over ranks.
    AllReduce,
    /// Clipping and updating the weights.
    Optimizer,
    /// Saving.
    Checkpoint,
    /// Measuring on held-out episodes.
    Eval,
    /// Logging and deciding, after one step and before the next.
    Between,
}

impl Phase {
    /// Returns the name used in events and fault specifications.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rendezvous => "rendezvous",
            Self::Open => "open",
            Self::Restore => "restore",
            Self::Data => "data",
            Self::Forward => "forward",
            Self::Backward => "backward",
            Self::AllReduce => "all_reduce",
            Self::Optimizer => "optimizer",
            Self::Checkpoint => "checkpoint",
            Self::Eval => "eval",
            Self::Between => "between",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Adds up the time of each phase of a step.
#[derive(Debug)]
pub struct PhaseTimer {
    clock: Arc<dyn Clock>,
    pulse: Arc<Pulse>,
    open: Option<(Phase, Duration)>,
    spent: BTreeMap<Phase, Duration>,
    step: u64,
}

impl PhaseTimer {
    /// Returns a timer with no phase open, which tells `pulse` where it is.
    pub fn new(clock: Arc<dyn Clock>, pulse: Arc<Pulse>) -> Self {
        Self {
            clock,
            pulse,
            open: None,
            spent: BTreeMap::new(),
            step: 0,
        }
    }

    /// Starts a step: forgets the times of the one before.
    pub fn begin_step(&mut self, step: u64) {
        self.add_up();
        self.spent.clear();
        self.step = step;
    }

    /// Closes the open phase and opens `phase`; a fault asked for here strikes.
    pub fn enter(&mut self, phase: Phase) {
        self.add_up();
        self.open = Some((phase, self.clock.monotonic()));
        self.pulse.enter(self.step, phase);
        crate::faults::reach(self.step, phase.name());
    }

    /// Closes the open phase.
    pub fn close(&mut self) {
        self.add_up();
        self.pulse.enter(self.step, Phase::Between);
    }

    fn add_up(&mut self) {
        if let Some((phase, since)) = self.open.take() {
            *self.spent.entry(phase).or_default() += self.clock.monotonic().saturating_sub(since);
        }
    }

    /// Returns the seconds of each phase since the step began.
    pub fn seconds(&self) -> BTreeMap<String, f64> {
        let spent = self.spent.iter();
        spent
            .map(|(phase, time)| (phase.name().to_owned(), time.as_secs_f64()))
            .collect()
    }

    /// Returns the time of one phase since the step began.
    pub fn spent(&self, phase: Phase) -> Duration {
        self.spent.get(&phase).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollen_core::ManualClock;

    #[test]
    fn times_add_up_by_phase_and_start_anew_each_step() {
        let clock = Arc::new(ManualClock::default());
        let pulse = Pulse::new(
            Arc::<ManualClock>::clone(&clock),
            pollen_collectives::WatchdogConfig::default(),
            Duration::ZERO,
        );
        let mut timer = PhaseTimer::new(Arc::<ManualClock>::clone(&clock), Arc::new(pulse));
        timer.begin_step(1);
        for _ in 0..2 {
            timer.enter(Phase::Data);
            clock.advance(Duration::from_secs(1));
            timer.enter(Phase::Forward);
            clock.advance(Duration::from_secs(3));
        }
        timer.close();
        assert_eq!(timer.spent(Phase::Data), Duration::from_secs(2));
        assert_eq!(timer.seconds()["forward"], 6.0);
        timer.begin_step(2);
        assert_eq!(timer.spent(Phase::Data), Duration::ZERO);
    }
}

//! Where the training thread is, and how long it may stay there: what this rank's beats say.
//!
//! Limits come from the rank's own history. A phase that computes may take twenty times as long as
//! it ever took, and at least `watchdog.max_timeout`; before it has been seen twice it may take as
//! long as it likes, because first steps compile kernels and fill caches. A phase that waits for
//! storage may take as long as the storage may be away; waits for other ranks are bounded by their
//! own deadlines. A process without any sign of life is judged in every phase.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pollen_collectives::{Beat, WatchdogConfig};
use pollen_core::Clock;

use crate::phases::Phase;

/// Phases that are remembered for a report.
const HISTORY: usize = 64;
/// How much longer than ever before a phase that computes may take.
const STUCK_FACTOR: u32 = 20;
/// How much longer than the slowest phase so far a rank may be silent.
const SILENCE_FACTOR: u32 = 10;

/// The training thread's position, shared with the thread that tells others of it.
#[derive(Debug)]
pub struct Pulse {
    clock: Arc<dyn Clock>,
    config: WatchdogConfig,
    /// How long an operation on storage is tried.
    storage_away: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    step: u64,
    phase: Phase,
    entered: Duration,
    beats: u64,
    /// Times and the longest one of each finished phase.
    seen: BTreeMap<Phase, (u32, Duration)>,
    history: VecDeque<(u64, Phase, Duration)>,
}

impl Pulse {
    /// Returns the pulse of a rank that is about to meet the others.
    pub fn new(clock: Arc<dyn Clock>, config: WatchdogConfig, storage_away: Duration) -> Self {
        let entered = clock.monotonic();
        Self {
            clock,
            config,
            storage_away,
            state: Mutex::new(State {
                step: 0,
                phase: Phase::Rendezvous,
                entered,
                beats: 0,
                seen: BTreeMap::new(),
                history: VecDeque::new(),
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is one assignment after another: a panic leaves nothing half done that
        // matters to a report.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the training thread enters a phase.
    pub fn enter(&self, step: u64, phase: Phase) {
        let now = self.clock.monotonic();
        let mut state = self.state();
        let spent = now.saturating_sub(state.entered);
        let (left, of_step) = (state.phase, state.step);
        let (times, longest) = state.seen.entry(left).or_default();
        *times += 1;
        *longest = spent.max(*longest);
        if state.history.len() == HISTORY {
            state.history.pop_front();
        }
        state.history.push_back((of_step, left, spent));
        state.step = step;
        state.phase = phase;
        state.entered = now;
    }

    /// Returns the next beat of a rank; `last` says that it ends in order.
    pub(crate) fn beat(&self, host: &str, last: bool) -> Beat {
        let mut state = self.state();
        state.beats += 1;
        Beat {
            number: state.beats,
            host: host.to_owned(),
            pid: std::process::id(),
            step: state.step,
            phase: state.phase.name().to_owned(),
            in_phase: self.clock.monotonic().saturating_sub(state.entered),
            patience: self.patience(&state),
            sent: self.clock.wall(),
            silence: self.silence(&state),
            last,
        }
    }

    /// How long the training thread may stay in its phase.
    fn patience(&self, state: &State) -> Option<Duration> {
        let seen = state.seen.get(&state.phase);
        let learned = seen
            .filter(|(times, _)| *times >= 2)
            .map(|(_, longest)| (*longest * STUCK_FACTOR).max(self.config.max_timeout));
        // Two operations after each other may both wait as long as they can.
        let storage = self.storage_away * 2 + self.config.max_timeout;
        match state.phase {
            Phase::Forward | Phase::Between => learned,
            Phase::Data => Some(learned.unwrap_or_default().max(storage)),
            // They may wait for a rank that waits for its data.
            Phase::Backward | Phase::Optimizer | Phase::Eval => {
                learned.map(|limit| limit.max(storage))
            }
            // Others bound them: the join deadline, the communicator's, the storage's.
            Phase::Rendezvous
            | Phase::Open
            | Phase::Restore
            | Phase::AllReduce
            | Phase::Checkpoint => None,
        }
    }

    /// How long the process may give no sign of life.
    fn silence(&self, state: &State) -> Duration {
        let (min, max) = (self.config.min_timeout, self.config.max_timeout);
        let computing = [Phase::Forward, Phase::Backward, Phase::Optimizer];
        let slowest = computing
            .iter()
            .filter_map(|phase| state.seen.get(phase))
            .map(|(_, longest)| *longest)
            .max();
        slowest.map_or(max, |longest| (longest * SILENCE_FACTOR).clamp(min, max))
    }

    /// Returns what the training thread did last, for a report: one line a phase.
    pub(crate) fn history(&self) -> String {
        let state = self.state();
        let mut text = String::new();
        for (step, phase, spent) in &state.history {
            let _ = writeln!(
                text,
                "  step {step:>8} {:<10} {:.3} s",
                phase.name(),
                spent.as_secs_f64()
            );
        }
        let since = self.clock.monotonic().saturating_sub(state.entered);
        let _ = writeln!(
            text,
            "  step {:>8} {:<10} {:.3} s so far",
            state.step,
            state.phase.name(),
            since.as_secs_f64()
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollen_core::ManualClock;

    const SECOND: Duration = Duration::from_secs(1);

    fn pulse() -> (Pulse, Arc<ManualClock>) {
        let clock = Arc::new(ManualClock::default());
        let config = WatchdogConfig::default();
        let pulse = Pulse::new(Arc::<ManualClock>::clone(&clock), config, SECOND * 300);
        (pulse, clock)
    }

    /// One step of which each phase takes `each`.
    fn step(pulse: &Pulse, clock: &ManualClock, number: u64, each: Duration) {
        for phase in [Phase::Data, Phase::Forward, Phase::Backward] {
            pulse.enter(number, phase);
            clock.advance(each);
        }
    }

    #[test]
    fn a_first_step_may_take_as_long_as_it_likes() {
        let (pulse, clock) = pulse();
        pulse.enter(1, Phase::Forward);
        clock.advance(SECOND * 600);
        let beat = pulse.beat("n1", false);
        assert_eq!((beat.patience, beat.in_phase), (None, SECOND * 600));
        assert_eq!(
            beat.silence,
            SECOND * 30,
            "but a process must show that it lives"
        );
    }

    #[test]
    fn limits_are_learned_from_the_rank_s_own_phases() {
        let (pulse, clock) = pulse();
        for number in 1..=2 {
            step(&pulse, &clock, number, SECOND * 2);
        }
        pulse.enter(3, Phase::Forward);
        let beat = pulse.beat("n1", false);
        assert_eq!(beat.patience, Some(SECOND * 40));
        assert_eq!(beat.silence, SECOND * 20);
        assert_eq!(
            (beat.step, beat.phase.as_str(), beat.number),
            (3, "forward", 1)
        );
        // Fast steps stay above the floor, slow ones below the ceiling.
        let (fast, clock) = self::pulse();
        for number in 1..=2 {
            step(&fast, &clock, number, SECOND / 100);
        }
        fast.enter(3, Phase::Forward);
        let beat = fast.beat("n1", false);
        assert_eq!(
            (beat.patience, beat.silence),
            (Some(SECOND * 30), SECOND * 10)
        );
        step(&fast, &clock, 3, SECOND * 60);
        fast.enter(4, Phase::Backward);
        assert_eq!(fast.beat("n1", false).silence, SECOND * 30);
    }

    #[test]
    fn data_may_wait_as_long_as_the_storage_may_be_away() {
        let (pulse, clock) = pulse();
        for number in 1..=3 {
            step(&pulse, &clock, number, SECOND / 10);
        }
        pulse.enter(4, Phase::Data);
        clock.advance(SECOND * 299);
        let beat = pulse.beat("n1", false);
        assert_eq!(beat.patience, Some(SECOND * 630));
        for phase in [Phase::AllReduce, Phase::Checkpoint, Phase::Rendezvous] {
            pulse.enter(4, phase);
            clock.advance(SECOND * 10_000);
            assert_eq!(pulse.beat("n1", false).patience, None, "{phase}");
        }
    }

    #[test]
    fn the_history_ends_with_where_it_is_now() {
        let (pulse, clock) = pulse();
        for number in 1..100 {
            step(&pulse, &clock, number, SECOND);
        }
        let history = pulse.history();
        let lines: Vec<&str> = history.lines().collect();
        assert_eq!(lines.len(), HISTORY + 1);
        assert_eq!(
            lines.last(),
            Some(&"  step       99 backward   1.000 s so far")
        );
    }
}

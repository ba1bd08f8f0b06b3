//! GPU-hours spent against GPU-hours allowed.
//!
//! Spent = world size x wall time since this generation's start + what the checkpoint it started
//! from had already spent.

use std::time::{Duration, SystemTime};

use crate::events::{Event, StartEvent};

/// The account of one run; a pure function of its start and the time of day.
#[derive(Clone, Debug, PartialEq)]
pub struct Budget {
    before: f64,
    world_size: u32,
    started: SystemTime,
    max: Option<f64>,
}

impl Budget {
    /// Opens the account of a generation that started at `started`, `before` GPU-hours being
    /// spent already.
    pub fn new(before: f64, world_size: u32, started: SystemTime, max: Option<f64>) -> Self {
        Self {
            before,
            world_size,
            started,
            max,
        }
    }

    /// Opens the account that a `start` event written at `time` describes.
    pub fn of_start(start: &StartEvent, time: SystemTime) -> Self {
        Self::new(
            start.gpu_hours_before,
            start.world_size,
            time,
            start.max_gpu_hours,
        )
    }

    /// Returns the GPU-hours spent at `now`; a clock set back adds nothing.
    pub fn spent(&self, now: SystemTime) -> f64 {
        let wall = now.duration_since(self.started).unwrap_or(Duration::ZERO);
        self.before + gpu_hours(self.world_size, wall)
    }

    /// Returns the GPU-hours allowed.
    pub fn max(&self) -> Option<f64> {
        self.max
    }

    /// Returns whether the cap is reached at `now`.
    pub fn is_spent(&self, now: SystemTime) -> bool {
        self.max.is_some_and(|max| self.spent(now) >= max)
    }

    /// Returns the wall time left before the cap is reached.
    pub fn left(&self, now: SystemTime) -> Option<Duration> {
        let hours = (self.max? - self.spent(now)).max(0.0) / f64::from(self.world_size.max(1));
        Duration::try_from_secs_f64(hours * 3600.0).ok()
    }

    /// Returns the `budget` event for `now`.
    pub fn event(&self, now: SystemTime) -> Event {
        Event::Budget {
            gpu_hours: self.spent(now),
            max_gpu_hours: self.max,
        }
    }
}

/// Returns what `world_size` workers use up in `wall`.
pub fn gpu_hours(world_size: u32, wall: Duration) -> f64 {
    f64::from(world_size) * wall.as_secs_f64() / 3600.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: SystemTime = SystemTime::UNIX_EPOCH;

    #[test]
    fn all_workers_and_the_past_count() {
        let budget = Budget::new(1.5, 8, START, Some(5.5));
        let half = START + Duration::from_mins(15);
        assert_eq!(budget.spent(START), 1.5);
        assert_eq!(budget.spent(half), 3.5);
        assert_eq!(budget.left(half), Some(Duration::from_mins(15)));
        assert!(!budget.is_spent(half));
        assert!(budget.is_spent(START + Duration::from_mins(30)));
        assert_eq!(
            budget.left(START + Duration::from_hours(1)),
            Some(Duration::ZERO)
        );
    }

    #[test]
    fn a_run_without_a_cap_is_never_spent() {
        let budget = Budget::new(0.0, 1, START, None);
        assert!(!budget.is_spent(START + Duration::from_hours(100_000)));
        assert_eq!(budget.left(START), None);
    }

    #[test]
    fn a_clock_set_back_costs_nothing() {
        let budget = Budget::new(2.0, 4, START + Duration::from_hours(1), None);
        assert_eq!(budget.spent(START), 2.0);
    }
}

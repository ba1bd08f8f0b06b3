//! Time comes in through a trait, so that deadlines are tested without waiting.

use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

/// Monotonic time, wall time and sleeping.
pub trait Clock: Send + Sync + std::fmt::Debug {
    /// Returns the time since an arbitrary fixed point; never goes back.
    fn monotonic(&self) -> Duration;
    /// Returns the time of day.
    fn wall(&self) -> SystemTime;
    /// Blocks the calling thread.
    fn sleep(&self, duration: Duration);
}

/// The operating system's clock.
#[derive(Debug)]
pub struct SystemClock {
    start: Instant,
}

impl Default for SystemClock {
    fn default() -> Self {
        Self {
            start: Instant::now(),
        }
    }
}

impl Clock for SystemClock {
    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }

    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }

    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
}

/// A clock that moves only when told to; sleeping moves it.
#[derive(Debug, Default)]
pub struct ManualClock {
    now: Mutex<Duration>,
}

impl ManualClock {
    /// Moves the clock forward.
    pub fn advance(&self, by: Duration) {
        *self
            .now
            .lock()
            .expect("no test panics while it holds the clock") += by;
    }
}

impl Clock for ManualClock {
    fn monotonic(&self) -> Duration {
        *self
            .now
            .lock()
            .expect("no test panics while it holds the clock")
    }

    fn wall(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + self.monotonic()
    }

    fn sleep(&self, duration: Duration) {
        self.advance(duration);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_moves_only_when_told() {
        let clock = ManualClock::default();
        clock.sleep(Duration::from_secs(3));
        clock.advance(Duration::from_secs(4));
        assert_eq!(clock.monotonic(), Duration::from_secs(7));
    }
}

//! How long to wait before the next start: exponential, with chance.

use std::time::Duration;

use crate::config::Config;

/// Pauses between restarts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
}

impl Backoff {
    pub(crate) fn of(config: &Config) -> Self {
        Self {
            first: config.backoff,
            longest: config.max_backoff,
        }
    }

    /// Returns the pause before restart `number`, counted from 1 after every checkpoint; `chance`
    /// lies in `[0, 1)`.
    pub(crate) fn pause(self, number: u32, chance: f64) -> Duration {
        let doublings = number.saturating_sub(1).min(31);
        let whole = self.first.saturating_mul(1 << doublings).min(self.longest);
        whole.mul_f64(0.5 + chance.clamp(0.0, 1.0) / 2.0)
    }
}

/// Returns a number in `[0, 1)` that other launchers do not share.
pub(crate) fn chance() -> f64 {
    // Without a source of chance the pause is its shortest.
    f64::from(getrandom::u32().unwrap_or(0)) / (f64::from(u32::MAX) + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_keep_at_least_half() {
        let backoff = Backoff {
            first: Duration::from_secs(2),
            longest: Duration::from_secs(30),
        };
        let seconds =
            |chance: f64| [1, 2, 3, 4, 5, 99].map(|n| backoff.pause(n, chance).as_secs_f64());
        assert_eq!(seconds(1.0), [2.0, 4.0, 8.0, 16.0, 30.0, 30.0]);
        assert_eq!(seconds(0.0), [1.0, 2.0, 4.0, 8.0, 15.0, 15.0]);
        assert_eq!(seconds(0.5)[0], 1.5);
    }

    #[test]
    fn chance_stays_below_one_and_varies() {
        let draws: Vec<f64> = (0..64).map(|_| chance()).collect();
        assert!(draws.iter().all(|draw| (0.0..1.0).contains(draw)));
        assert!(draws.iter().any(|draw| *draw != draws[0]));
    }
}

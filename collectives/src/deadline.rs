//! A point in time that bounds every wait, and the limit it was made from, for error messages.

use std::time::{Duration, Instant};

/// The longest limit that is kept; longer ones are cut, so that adding to the clock cannot fail.
const LONGEST: Duration = Duration::from_hours(365 * 24);

/// A point in time, with the limit it was made from.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    at: Instant,
    limit: Duration,
}

impl Deadline {
    /// Returns the deadline that lies `limit` (at most a year) from now.
    pub fn after(limit: Duration) -> Self {
        let limit = limit.min(LONGEST);
        Self {
            at: Instant::now() + limit,
            limit,
        }
    }

    /// Returns how long a wait may still take; zero once the deadline has passed.
    pub fn remaining(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    /// Returns the limit that the deadline was made from.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Returns whether the deadline has passed.
    pub fn has_passed(&self) -> bool {
        self.remaining().is_zero()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_of_zero_has_passed_and_the_longest_one_has_not() {
        assert!(Deadline::after(Duration::ZERO).has_passed());
        let longest = Deadline::after(Duration::MAX);
        assert!(!longest.has_passed());
        assert_eq!(longest.limit(), LONGEST);
    }
}

//! Row groups that could not be read, so that they are not fetched again for each of their samples.
//!
//! A row group that fails is tried again when it is asked for the 2nd, 4th, 8th... time: a flipped
//! bit on the way or an object that is restored costs few samples, and one that stays broken costs a
//! number of requests that grows with the logarithm of its samples.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};

/// Row groups that are remembered; beyond them, the one not asked for the longest is forgotten.
pub(crate) const REMEMBERED: usize = 4096;
/// Longest reason that is kept, in bytes.
const REASON: usize = 512;

/// Why row groups could not be read.
#[derive(Debug)]
pub(crate) struct BadRowGroups<K> {
    known: Mutex<Known<K>>,
}

#[derive(Debug)]
struct Known<K> {
    by_key: HashMap<K, Bad>,
    clock: u64,
}

#[derive(Debug)]
struct Bad {
    reason: String,
    /// How often it was asked for, the first failure included.
    asked: u64,
    used: u64,
}

impl<K> Default for BadRowGroups<K> {
    fn default() -> Self {
        Self {
            known: Mutex::new(Known {
                by_key: HashMap::new(),
                clock: 0,
            }),
        }
    }
}

impl<K: Copy + Eq + Hash> BadRowGroups<K> {
    fn known(&self) -> std::sync::MutexGuard<'_, Known<K>> {
        // Nothing here panics between two writes that belong together.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns why a row group is not to be tried this time.
    pub(crate) fn refuse(&self, key: K) -> Option<String> {
        let mut known = self.known();
        known.clock += 1;
        let clock = known.clock;
        let bad = known.by_key.get_mut(&key)?;
        bad.asked += 1;
        bad.used = clock;
        (!bad.asked.is_power_of_two()).then(|| bad.reason.clone())
    }

    /// Remembers that a row group could not be read.
    pub(crate) fn failed(&self, key: K, reason: &str) {
        let mut known = self.known();
        if known.by_key.len() >= REMEMBERED && !known.by_key.contains_key(&key) {
            let oldest = known.by_key.iter().min_by_key(|(_, bad)| bad.used);
            if let Some(oldest) = oldest.map(|(key, _)| *key) {
                known.by_key.remove(&oldest);
            }
        }
        known.clock += 1;
        let used = known.clock;
        let end = reason.floor_char_boundary(REASON);
        let bad = known.by_key.entry(key).or_insert_with(|| Bad {
            reason: String::new(),
            asked: 1,
            used,
        });
        reason[..end].clone_into(&mut bad.reason);
    }

    /// Forgets a row group that could be read after all.
    pub(crate) fn read(&self, key: K) {
        self.known().by_key.remove(&key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_is_tried_ever_more_rarely() {
        let bad = BadRowGroups::default();
        assert_eq!(bad.refuse(7), None);
        bad.failed(7, "crc32c");
        let mut tried = vec![1];
        for asked in 2..=1000 {
            match bad.refuse(7) {
                None => {
                    tried.push(asked);
                    bad.failed(7, "crc32c again");
                }
                Some(reason) => assert!(reason.starts_with("crc32c")),
            }
        }
        assert_eq!(tried, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]);
        bad.read(7);
        assert_eq!(bad.refuse(7), None);
        assert_eq!(bad.refuse(7), None);
    }

    #[test]
    fn no_more_are_remembered_than_said() {
        let bad = BadRowGroups::default();
        for key in 0..REMEMBERED + 10 {
            bad.failed(key, &"ä".repeat(REASON));
            // The first is asked for all the time.
            bad.refuse(0);
        }
        let known = bad.known();
        assert_eq!(known.by_key.len(), REMEMBERED);
        assert!(known.by_key.contains_key(&0) && !known.by_key.contains_key(&1));
        assert!(known.by_key.values().all(|bad| bad.reason.len() <= REASON));
    }
}

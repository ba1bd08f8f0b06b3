//! A small bounded cache of things that are a pure function of their key.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// The values of the most recently used keys.
pub(crate) struct Recent<K, V> {
    capacity: usize,
    entries: Mutex<VecDeque<(K, Arc<V>)>>,
    /// Values made so far: what jumps cost is counted, not timed.
    #[cfg(test)]
    built: std::sync::atomic::AtomicUsize,
}

impl<K, V> fmt::Debug for Recent<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recent")
            .field("capacity", &self.capacity)
            .finish_non_exhaustive()
    }
}

impl<K: PartialEq + Copy, V> Recent<K, V> {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            capacity,
            entries: Mutex::new(VecDeque::with_capacity(capacity)),
            #[cfg(test)]
            built: 0.into(),
        }
    }

    /// Returns the value of `key`, built by `build` unless it was used lately.
    ///
    /// `build` is pure, so a panic inside it leaves nothing half-done behind the lock.
    pub(crate) fn get(&self, key: K, build: impl FnOnce() -> V) -> Arc<V> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = entries.iter().position(|(known, _)| *known == key) {
            if at > 0 {
                let entry = entries.remove(at).expect("`at` was just found");
                entries.push_front(entry);
            }
        } else {
            let value = Arc::new(build());
            #[cfg(test)]
            self.built
                .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            entries.truncate(self.capacity.saturating_sub(1));
            entries.push_front((key, value));
        }
        Arc::clone(&entries[0].1)
    }

    #[cfg(test)]
    pub(crate) fn num_built(&self) -> usize {
        self.built.load(std::sync::atomic::Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::Recent;

    #[test]
    fn forgets_the_least_recently_used() {
        let recent = Recent::new(2);
        let mut built = Vec::new();
        for key in [1, 2, 1, 3, 1, 2] {
            assert_eq!(
                *recent.get(key, || {
                    built.push(key);
                    key * 10
                }),
                key * 10
            );
        }
        assert_eq!(built, [1, 2, 3, 2]);
    }
}

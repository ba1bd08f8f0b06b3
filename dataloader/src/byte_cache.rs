//! What is kept in memory under a cap: row groups, and footers of files.
//!
//! Whoever needs values pins them first: what is pinned is not forgotten, and a pin that would
//! break the cap waits, unless it is the only one of its owner. So a cap holds however many
//! datasets there are, and an owner with a single pin, however large, always gets on.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, OnceCell};

use crate::error::Result;

/// What a value takes in memory.
pub(crate) trait Held: Send + Sync {
    fn held_bytes(&self) -> u64;
}

/// Bytes held: by what is open, and reserved for what is being opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeldBytes {
    /// Now.
    pub now: u64,
    /// At most so far.
    pub peak: u64,
}

/// Values by key; the least recently used are forgotten above a number of bytes.
#[derive(Debug)]
pub(crate) struct ByteCache<K, V> {
    capacity: u64,
    slots: Mutex<Slots<K, V>>,
    unpinned: Notify,
}

#[derive(Debug)]
struct Slots<K, V> {
    /// Each is pinned or open.
    by_key: HashMap<K, Slot<V>>,
    bytes: HeldBytes,
    pinned_bytes: u64,
    clock: u64,
}

#[derive(Debug)]
struct Slot<V> {
    cell: Arc<OnceCell<Arc<V>>>,
    /// What it takes, or is expected to take until it is open.
    bytes: u64,
    pins: usize,
    used: u64,
}

/// Whose pins they are; an owner with none may always pin once.
pub(crate) type Owner = Arc<AtomicUsize>;

/// Values that are kept until this is dropped.
#[derive(Debug)]
pub(crate) struct Pinned<K: Copy + Eq + Hash, V> {
    cache: Arc<ByteCache<K, V>>,
    keys: Vec<K>,
    owner: Owner,
}

impl<K: Copy + Eq + Hash, V: Held> ByteCache<K, V> {
    pub(crate) fn new(capacity: u64) -> Self {
        Self {
            capacity,
            slots: Mutex::new(Slots {
                by_key: HashMap::new(),
                bytes: HeldBytes::default(),
                pinned_bytes: 0,
                clock: 0,
            }),
            unpinned: Notify::new(),
        }
    }

    /// Pins different keys, each with the bytes that its value is expected to take; waits while
    /// they do not fit beside what is pinned already.
    pub(crate) async fn pin(self: &Arc<Self>, keys: &[(K, u64)], owner: &Owner) -> Pinned<K, V> {
        let unpinned = self.unpinned.notified();
        let mut unpinned = std::pin::pin!(unpinned);
        loop {
            // Listens before it looks, so that no change goes unnoticed in between.
            unpinned.as_mut().enable();
            if let Some(pinned) = self.try_pin(keys, owner) {
                return pinned;
            }
            unpinned.as_mut().await;
            unpinned.set(self.unpinned.notified());
        }
    }

    fn try_pin(self: &Arc<Self>, keys: &[(K, u64)], owner: &Owner) -> Option<Pinned<K, V>> {
        let mut slots = self.lock();
        let more = keys
            .iter()
            .map(|(key, expected)| match slots.by_key.get(key) {
                Some(slot) if slot.pins > 0 => 0,
                Some(slot) => slot.bytes,
                None => *expected,
            });
        let more: u64 = more.sum();
        let fits = slots.pinned_bytes.saturating_add(more) <= self.capacity;
        if !fits && owner.load(Ordering::Relaxed) > 0 {
            return None;
        }
        slots.clock += 1;
        let used = slots.clock;
        for &(key, expected) in keys {
            let Slots {
                by_key,
                bytes,
                pinned_bytes,
                ..
            } = &mut *slots;
            let slot = by_key.entry(key).or_insert_with(|| {
                bytes.now += expected;
                Slot {
                    cell: Arc::default(),
                    bytes: expected,
                    pins: 0,
                    used,
                }
            });
            if slot.pins == 0 {
                *pinned_bytes += slot.bytes;
            }
            slot.pins += 1;
            slot.used = used;
        }
        slots.shrink_to(self.capacity);
        owner.fetch_add(1, Ordering::Relaxed);
        Some(Pinned {
            cache: Arc::clone(self),
            keys: keys.iter().map(|(key, _)| *key).collect(),
            owner: Arc::clone(owner),
        })
    }

    pub(crate) fn held(&self) -> HeldBytes {
        self.lock().bytes
    }

    /// Puts the bytes that a value takes in the place of those that were expected.
    fn account(&self, key: K, found: u64) {
        let mut slots = self.lock();
        let slot = slots.by_key.get_mut(&key).expect("pinned by the caller");
        let expected = std::mem::replace(&mut slot.bytes, found);
        slots.pinned_bytes = slots.pinned_bytes - expected + found;
        slots.bytes.now = slots.bytes.now - expected + found;
        slots.shrink_to(self.capacity);
    }
}

impl<K, V> ByteCache<K, V> {
    fn lock(&self) -> MutexGuard<'_, Slots<K, V>> {
        // Nothing here panics between two writes that belong together.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Copy + Eq + Hash, V> Slots<K, V> {
    /// Forgets what nobody has pinned, the least recently used first.
    fn shrink_to(&mut self, capacity: u64) {
        while self.bytes.now > capacity {
            let idle = self.by_key.iter().filter(|(_, slot)| slot.pins == 0);
            let Some(oldest) = idle.min_by_key(|(_, slot)| slot.used).map(|(key, _)| *key) else {
                break;
            };
            self.forget(oldest);
        }
        self.bytes.peak = self.bytes.peak.max(self.bytes.now);
    }

    fn forget(&mut self, key: K) {
        if let Some(slot) = self.by_key.remove(&key) {
            self.bytes.now -= slot.bytes;
        }
    }
}

impl<K: Copy + Eq + Hash, V: Held> Pinned<K, V> {
    /// Returns a pinned value; `open` runs once, however many ask at the same time.
    pub(crate) async fn get<F>(&self, key: K, open: impl FnOnce() -> F) -> Result<Arc<V>>
    where
        F: Future<Output = Result<V>>,
    {
        let cell = {
            let slots = self.cache.lock();
            let slot = slots.by_key.get(&key).expect("pinned by this");
            Arc::clone(&slot.cell)
        };
        let value = cell
            .get_or_try_init(|| async {
                let value = open().await?;
                self.cache.account(key, value.held_bytes());
                Ok::<_, crate::Error>(Arc::new(value))
            })
            .await?;
        Ok(Arc::clone(value))
    }
}

impl<K: Copy + Eq + Hash, V> Drop for Pinned<K, V> {
    fn drop(&mut self) {
        let mut slots = self.cache.lock();
        for key in &self.keys {
            let slot = slots.by_key.get_mut(key).expect("pinned by this");
            slot.pins -= 1;
            if slot.pins == 0 {
                let (bytes, open) = (slot.bytes, slot.cell.initialized());
                slots.pinned_bytes -= bytes;
                if !open {
                    slots.forget(*key);
                }
            }
        }
        slots.shrink_to(self.cache.capacity);
        self.owner.fetch_sub(1, Ordering::Relaxed);
        drop(slots);
        self.cache.unpinned.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    impl Held for u64 {
        fn held_bytes(&self) -> u64 {
            *self
        }
    }

    type Cache = Arc<ByteCache<u32, u64>>;

    fn cache() -> Cache {
        Arc::new(ByteCache::new(100))
    }

    /// Opens a value of its own owner; returns whether it had to be opened.
    async fn open(cache: &Cache, key: u32, bytes: u64) -> bool {
        let opened = AtomicUsize::new(0);
        let pinned = cache.pin(&[(key, bytes)], &Owner::default()).await;
        let value = pinned.get(key, || async {
            opened.fetch_add(1, Ordering::Relaxed);
            Ok(bytes)
        });
        assert_eq!(*value.await.expect("opens"), bytes);
        opened.into_inner() > 0
    }

    #[tokio::test]
    async fn keeps_what_fits_and_forgets_the_oldest() {
        let cache = cache();
        for (key, fresh) in [(1, true), (2, true), (1, false)] {
            assert_eq!(open(&cache, key, 40).await, fresh);
        }
        assert_eq!(cache.held().now, 80);
        assert!(open(&cache, 3, 40).await);
        assert_eq!(cache.held().now, 80, "2 was the oldest");
        assert!(!open(&cache, 1, 40).await);
        assert!(open(&cache, 2, 40).await);
        // Larger than all: held as long as it is needed.
        assert!(open(&cache, 9, 500).await);
        assert_eq!(cache.held(), HeldBytes { now: 0, peak: 500 });
    }

    #[tokio::test]
    async fn one_opening_serves_all_who_wait() {
        let cache = cache();
        let opened = AtomicUsize::new(0);
        let pinned = cache.pin(&[(1, 10)], &Owner::default()).await;
        let get = || {
            pinned.get(1, || async {
                opened.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
                Ok(10)
            })
        };
        let (a, b) = tokio::join!(get(), get());
        assert!(Arc::ptr_eq(&a.expect("opens"), &b.expect("opens")));
        assert_eq!(opened.into_inner(), 1);
    }

    #[tokio::test]
    async fn a_failure_is_not_kept_and_holds_nothing() {
        let cache = cache();
        let pinned = cache.pin(&[(1, 30)], &Owner::default()).await;
        let failed = pinned.get(1, || async { Err(crate::Error::config("once")) });
        assert!(failed.await.is_err());
        assert!(pinned.get(1, || async { Ok(7) }).await.is_ok());
        assert_eq!(cache.held().now, 7);
        drop(pinned);
        assert_eq!(cache.held(), HeldBytes { now: 7, peak: 30 });
        drop(cache.pin(&[(2, 30)], &Owner::default()).await);
        assert_eq!(cache.held().now, 7, "was never opened");
    }

    #[tokio::test]
    async fn a_pin_waits_for_room_unless_it_is_its_owners_first() {
        let cache = cache();
        let (one, two) = (Owner::default(), Owner::default());
        let first = cache.pin(&[(1, 60)], &one).await;
        // What is pinned counts once.
        let again = cache.pin(&[(1, 60), (2, 40)], &one).await;
        let mut third = Box::pin(cache.pin(&[(3, 10)], &one));
        assert!((&mut third).now_or_never().is_none(), "no room");
        // Another owner gets on, over the cap, with one pin.
        let other = cache.pin(&[(4, 50)], &two).await;
        assert_eq!(cache.held().now, 150);
        assert!(cache.pin(&[(5, 50)], &two).now_or_never().is_none());
        drop(other);
        assert!((&mut third).now_or_never().is_none(), "still no room");
        drop(again);
        let third = third.now_or_never().expect("room for it");
        assert_eq!(cache.held().now, 70);
        drop((first, third));
        // Alone it may be larger than the cap.
        let large = cache.pin(&[(6, 1000)], &one).await;
        assert_eq!(cache.held().now, 1000);
        drop(large);
        assert_eq!(cache.held(), HeldBytes { now: 0, peak: 1000 });
    }
}

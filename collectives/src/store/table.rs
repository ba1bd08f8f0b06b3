//! The entries of the store, and waiting for them.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::frame::{MAX_BODY, Reply};
use crate::deadline::Deadline;

/// The most bytes that keys and values may hold together.
const CAPACITY: usize = 1 << 30;

/// Entries shared by all connections.
#[derive(Debug, Default)]
pub(super) struct Table {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<String, Vec<u8>>,
    bytes: usize,
    /// Who waits for a key: one condition per key, so that a new key wakes nobody else.
    waiting: HashMap<String, Arc<Condvar>>,
    closing: bool,
}

impl State {
    fn put(&mut self, key: String, value: Vec<u8>) -> Result<(), String> {
        let freed = self
            .entries
            .get(&key)
            .map_or(0, |old| old.len() + key.len());
        let bytes = self.bytes - freed + key.len() + value.len();
        if bytes > CAPACITY {
            return Err(format!("full: {CAPACITY} bytes; delete old prefixes"));
        }
        self.bytes = bytes;
        if let Some(condition) = self.waiting.remove(&key) {
            condition.notify_all();
        }
        self.entries.insert(key, value);
        Ok(())
    }
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("no code panics while it holds the table")
    }

    /// Lets every waiting connection go; later waits return at once.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closing = true;
        for condition in state.waiting.values() {
            condition.notify_all();
        }
    }

    pub(super) fn set(&self, key: String, value: Vec<u8>) -> Reply {
        match self.lock().put(key, value) {
            Ok(()) => Reply::Done,
            Err(reason) => Reply::Refused(reason),
        }
    }

    pub(super) fn get(&self, key: &str, wait: Duration) -> Reply {
        let state = wait_for(self.lock(), key, Deadline::after(wait));
        match state.entries.get(key) {
            Some(value) => Reply::Value(value.clone()),
            None => Reply::Absent,
        }
    }

    /// Adds to a decimal number, which starts at zero.
    pub(super) fn add(&self, key: String, by: i64) -> Reply {
        let mut state = self.lock();
        let old = match state.entries.get(&key) {
            None => Some(0),
            Some(value) => std::str::from_utf8(value)
                .ok()
                .and_then(|text| text.parse::<i64>().ok()),
        };
        let Some(old) = old else {
            return Reply::Refused(format!("`{key}` does not hold a number"));
        };
        let Some(new) = old.checked_add(by) else {
            return Reply::Refused(format!("`{key}` would overflow: {old} + {by}"));
        };
        match state.put(key, new.to_string().into_bytes()) {
            Ok(()) => Reply::Number(new),
            Err(reason) => Reply::Refused(reason),
        }
    }

    /// Replies `Done` if it was stored, else with what is there.
    pub(super) fn compare_and_set(
        &self,
        key: String,
        expected: Option<&[u8]>,
        value: Vec<u8>,
    ) -> Reply {
        let mut state = self.lock();
        let current = state.entries.get(&key);
        if current.map(Vec::as_slice) != expected {
            return current.map_or(Reply::Absent, |value| Reply::Value(value.clone()));
        }
        match state.put(key, value) {
            Ok(()) => Reply::Done,
            Err(reason) => Reply::Refused(reason),
        }
    }

    pub(super) fn delete_prefix(&self, prefix: &str) -> i64 {
        let mut state = self.lock();
        let doomed: Vec<String> = state
            .entries
            .range(prefix.to_owned()..)
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, _)| key.clone())
            .collect();
        for key in &doomed {
            if let Some(value) = state.entries.remove(key) {
                state.bytes -= key.len() + value.len();
            }
        }
        doomed.len() as i64
    }

    /// Waits for the keys of all ranks; replies with their values, or with who is missing.
    pub(super) fn collect(&self, prefix: &str, world: u32, wait: Duration) -> Reply {
        let deadline = Deadline::after(wait);
        let mut state = self.lock();
        for rank in 0..world {
            state = wait_for(state, &format!("{prefix}{rank}"), deadline);
        }
        let mut values = Vec::new();
        let mut missing = Vec::new();
        let mut bytes = 0;
        for rank in 0..world {
            match state.entries.get(&format!("{prefix}{rank}")) {
                Some(value) => {
                    bytes += value.len() + 4;
                    if bytes > MAX_BODY - 4 {
                        return Reply::Refused(format!("the values of `{prefix}` are too large"));
                    }
                    values.push(value.clone());
                }
                None => missing.push(rank),
            }
        }
        if missing.is_empty() {
            Reply::Values(values)
        } else {
            Reply::MissingRanks(missing)
        }
    }
}

/// Returns once `key` is present, the deadline has passed or the table is closing.
fn wait_for<'a>(
    mut state: MutexGuard<'a, State>,
    key: &str,
    deadline: Deadline,
) -> MutexGuard<'a, State> {
    while !state.entries.contains_key(key) && !state.closing && !deadline.has_passed() {
        let condition = Arc::clone(state.waiting.entry(key.to_owned()).or_default());
        state = condition
            .wait_timeout(state, deadline.remaining())
            .expect("no code panics while it holds the table")
            .0;
        // Two owners are this thread and the map: nobody else waits.
        if Arc::strong_count(&condition) == 2
            && state
                .waiting
                .get(key)
                .is_some_and(|c| Arc::ptr_eq(c, &condition))
        {
            state.waiting.remove(key);
        }
    }
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(table: &Table, key: &str, value: &str) {
        assert_eq!(table.set(key.into(), value.into()), Reply::Done);
    }

    fn get(table: &Table, key: &str) -> Reply {
        table.get(key, Duration::ZERO)
    }

    #[test]
    fn a_counter_counts_and_refuses_what_is_no_number() {
        let table = Table::default();
        assert_eq!(table.add("n".into(), 5), Reply::Number(5));
        assert_eq!(table.add("n".into(), -7), Reply::Number(-2));
        assert_eq!(get(&table, "n"), Reply::Value(b"-2".to_vec()));
        put(&table, "n", "many");
        assert!(matches!(table.add("n".into(), 1), Reply::Refused(r) if r.contains("`n`")));
        put(&table, "n", &i64::MAX.to_string());
        assert!(matches!(table.add("n".into(), 1), Reply::Refused(r) if r.contains("overflow")));
    }

    #[test]
    fn a_swap_happens_only_on_the_expected_value() {
        let table = Table::default();
        let swap = |expected: Option<&[u8]>, value: &str| {
            table.compare_and_set("k".into(), expected, value.into())
        };
        assert_eq!(swap(Some(b"x"), "a"), Reply::Absent);
        assert_eq!(swap(None, "a"), Reply::Done);
        assert_eq!(swap(None, "b"), Reply::Value(b"a".to_vec()));
        assert_eq!(swap(Some(b"a"), "b"), Reply::Done);
        assert_eq!(get(&table, "k"), Reply::Value(b"b".to_vec()));
    }

    #[test]
    fn deleting_a_prefix_frees_its_bytes_and_nothing_else() {
        let table = Table::default();
        for key in ["g2", "g2/a", "g2/b", "g3/a"] {
            put(&table, key, "value");
        }
        assert_eq!(table.delete_prefix("g2/"), 2);
        assert_eq!(get(&table, "g2/a"), Reply::Absent);
        assert_eq!(get(&table, "g3/a"), Reply::Value(b"value".to_vec()));
        assert_eq!(table.delete_prefix(""), 2);
        assert_eq!(table.lock().bytes, 0);
    }

    #[test]
    fn a_wait_ends_when_the_key_comes_and_leaves_no_trace() {
        let table = Table::default();
        let long = Duration::from_mins(1);
        std::thread::scope(|scope| {
            let waiters: Vec<_> = (0..3)
                .map(|_| scope.spawn(|| table.get("late", long)))
                .collect();
            put(&table, "late", "now");
            for waiter in waiters {
                assert_eq!(
                    waiter.join().expect("no panic"),
                    Reply::Value(b"now".to_vec())
                );
            }
        });
        assert_eq!(table.get("never", Duration::from_millis(1)), Reply::Absent);
        assert!(table.lock().waiting.is_empty());
    }

    #[test]
    fn collect_names_the_missing_ranks() {
        let table = Table::default();
        put(&table, "x/0", "a");
        put(&table, "x/2", "c");
        let reply = table.collect("x/", 4, Duration::from_millis(1));
        assert_eq!(reply, Reply::MissingRanks(vec![1, 3]));
        put(&table, "x/1", "b");
        let reply = table.collect("x/", 3, Duration::ZERO);
        assert_eq!(
            reply,
            Reply::Values(vec![b"a".into(), b"b".into(), b"c".into()])
        );
    }

    #[test]
    fn closing_lets_waiters_go() {
        let table = Table::default();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| table.get("never", Duration::from_mins(10)));
            table.close();
            assert_eq!(waiter.join().expect("no panic"), Reply::Absent);
        });
    }
}

//! Time limits and the number of requests at once.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The recipe's section `[storage]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StorageConfig {
    /// Longest wait for one attempt; large bodies get a second more for each 4 MiB.
    #[serde(with = "humantime_serde")]
    pub request_timeout: Duration,
    /// How long an operation is tried again before it is given up.
    #[serde(with = "humantime_serde")]
    pub retry_for: Duration,
    /// Requests at once, over all clones of a handle.
    pub max_concurrent_requests: usize,
}

impl Default for StorageConfig {
    fn default() -> Self {
        Self {
            request_timeout: Duration::from_secs(10),
            retry_for: Duration::from_mins(5),
            max_concurrent_requests: 8,
        }
    }
}

impl StorageConfig {
    /// Returns every fault of the section.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.request_timeout.is_zero() {
            faults.push("storage.request_timeout is 0: use for example \"10s\"".into());
        }
        if self.max_concurrent_requests == 0 {
            faults.push("storage.max_concurrent_requests is 0: use at least 1".into());
        }
        faults
    }

    /// Returns the limit of one attempt that moves `bytes`.
    pub(crate) fn attempt_limit(&self, bytes: u64) -> Duration {
        self.request_timeout + Duration::from_secs(bytes / (4 << 20))
    }
}

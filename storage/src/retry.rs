//! Attempts, back-off and counters.
//!
//! Each attempt runs under a time limit, so that a server that took the connection and then froze
//! leads to another attempt. The waits grow from 100 ms to 5 s and carry jitter, so that many ranks
//! do not come back at once.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pollen_core::{Draws, Seed};
use tokio::time::Instant;

use crate::backend::{Kind, Service};
use crate::error::{Error, Result};
use crate::observer::{Observer, Recovered, Retry};
use crate::verdict::{Failure, Verdict};

const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// What a handle and all its clones have done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Objects and ranges read.
    pub gets: u64,
    /// Objects written.
    pub puts: u64,
    /// Attempts made again, of reads, listings and look-ups.
    pub retried_gets: u64,
    /// Attempts made again, of writes and deletions.
    pub retried_puts: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
}

/// The counters while they are counted.
#[derive(Debug, Default)]
pub(crate) struct Tallies {
    gets: AtomicU64,
    puts: AtomicU64,
    retried_gets: AtomicU64,
    retried_puts: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
}

impl Tallies {
    pub(crate) fn read(&self, bytes: u64) {
        self.gets.fetch_add(1, Ordering::Relaxed);
        self.bytes_read.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn wrote(&self, bytes: u64) {
        self.puts.fetch_add(1, Ordering::Relaxed);
        self.bytes_written.fetch_add(bytes, Ordering::Relaxed);
    }

    fn retried(&self, writes: bool) {
        let tally = if writes {
            &self.retried_puts
        } else {
            &self.retried_gets
        };
        tally.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn snapshot(&self) -> Counters {
        let load = |tally: &AtomicU64| tally.load(Ordering::Relaxed);
        Counters {
            gets: load(&self.gets),
            puts: load(&self.puts),
            retried_gets: load(&self.retried_gets),
            retried_puts: load(&self.retried_puts),
            bytes_read: load(&self.bytes_read),
            bytes_written: load(&self.bytes_written),
        }
    }
}

/// Which failures an operation may be tried again after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Resend {
    /// All that may pass: the operation can be carried out twice without harm.
    Always,
    /// Only those after which the request was surely not carried out.
    IfNotSent,
}

/// An operation that may take several attempts.
#[derive(Clone, Debug)]
pub(crate) struct Operation {
    /// For reports: `get`, `put` ...
    pub(crate) name: &'static str,
    /// URL of the object.
    pub(crate) url: String,
    /// Whether it changes anything.
    pub(crate) writes: bool,
    /// Limit of one attempt.
    pub(crate) limit: Duration,
    /// Limit of all attempts.
    pub(crate) retry_for: Duration,
    /// What may be sent again.
    pub(crate) resend: Resend,
}

/// How an operation ended that did not succeed.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The verdict is final; the caller makes its own error of it.
    Final(Verdict, Failure),
    /// Ours already.
    Error(Error),
}

impl Outcome {
    /// Turns the outcome into the caller's error.
    pub(crate) fn into_error(self, operation: &Operation, kind: &Kind) -> Error {
        let (verdict, failure) = match self {
            Self::Error(error) => return error,
            Self::Final(verdict, failure) => (verdict, failure),
        };
        let url = operation.url.clone();
        let source = failure.into_cause();
        match (verdict, kind) {
            (Verdict::NotFound, _) => Error::NotFound { url },
            (
                Verdict::NoBucket,
                Kind::Bucket {
                    bucket, endpoint, ..
                },
            ) => Error::NoBucket {
                bucket: bucket.clone(),
                endpoint: endpoint.clone(),
            },
            (Verdict::Denied | Verdict::NoCredentials, _) => Error::PermissionDenied {
                operation: operation.name,
                url,
                hint: match (verdict, kind) {
                    (_, Kind::File) => "check the owner and the mode of the folder",
                    (_, Kind::Web) => "the web server must let anybody read it",
                    (
                        _,
                        Kind::Bucket {
                            service: Service::Azure,
                            ..
                        },
                    ) => {
                        "check AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY (or another way to \
                         sign in) and the container's access"
                    }
                    (
                        _,
                        Kind::Bucket {
                            service: Service::Google,
                            ..
                        },
                    ) => "check GOOGLE_APPLICATION_CREDENTIALS and the bucket's policy",
                    (Verdict::NoCredentials, _) => {
                        "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                    }
                    _ => "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy",
                },
                source,
            },
            (Verdict::DiskFull, _) => Error::DiskFull { url, source },
            (Verdict::Range, _) => Error::Short { url, end: 0 },
            (Verdict::Transient { .. }, _) => Error::Exhausted {
                operation: operation.name,
                url,
                attempts: 1,
                after: Duration::ZERO,
                source,
            },
            (Verdict::Exists | Verdict::Permanent | Verdict::NoBucket, _) => Error::Rejected {
                operation: operation.name,
                url,
                source,
            },
        }
    }
}

/// Makes attempts until one succeeds, one fails for good, or the time is over.
pub(crate) async fn attempts<T, F>(
    operation: &Operation,
    observer: &dyn Observer,
    tallies: &Tallies,
    mut attempt: impl FnMut() -> F,
) -> Result<T, Outcome>
where
    F: Future<Output = Result<T, Failure>>,
{
    let start = Instant::now();
    let mut waits = Waits::default();
    let mut number = 1;
    loop {
        let failure = match attempt().await {
            Ok(value) => {
                if number > 1 {
                    observer.recovered(&Recovered {
                        operation: operation.name,
                        path: operation.url.clone(),
                        attempts: number,
                        waited: start.elapsed(),
                    });
                }
                return Ok(value);
            }
            Err(failure) => failure,
        };
        let verdict = failure.verdict();
        let Verdict::Transient { sent } = verdict else {
            return Err(Outcome::Final(verdict, failure));
        };
        if sent && operation.resend == Resend::IfNotSent {
            return Err(Outcome::Error(Error::Ambiguous {
                url: operation.url.clone(),
                source: failure.into_cause(),
            }));
        }
        let wait = waits.next();
        let waited = start.elapsed();
        if waited + wait > operation.retry_for {
            return Err(Outcome::Error(Error::Exhausted {
                operation: operation.name,
                url: operation.url.clone(),
                attempts: number,
                after: waited,
                source: failure.into_cause(),
            }));
        }
        let error = failure.into_cause().to_string();
        if number == 1 {
            tracing::warn!(operation = operation.name, url = %operation.url, %error, "will retry");
        }
        tallies.retried(operation.writes);
        observer.retry(&Retry {
            operation: operation.name,
            path: operation.url.clone(),
            attempt: number,
            waited,
            error,
        });
        tokio::time::sleep(wait).await;
        number += 1;
    }
}

/// Waits that double, with jitter. They differ between processes on purpose.
#[derive(Debug)]
struct Waits {
    next: Duration,
    draws: Draws,
}

impl Default for Waits {
    fn default() -> Self {
        Self {
            next: FIRST_WAIT,
            draws: Seed::new(RandomState::new().hash_one(0_u8)).draws(),
        }
    }
}

impl Waits {
    fn next(&mut self) -> Duration {
        let wait = self.next.mul_f64(0.5 + 0.5 * self.draws.uniform_f64());
        self.next = (self.next * 2).min(LONGEST_WAIT);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_cap() {
        let mut waits = Waits::default();
        let all: Vec<Duration> = (0..12).map(|_| waits.next()).collect();
        assert!(all[0] >= FIRST_WAIT / 2 && all[0] <= FIRST_WAIT);
        assert!(all[11] >= LONGEST_WAIT / 2 && all[11] <= LONGEST_WAIT);
        assert!(all.iter().all(|wait| *wait <= LONGEST_WAIT));
    }
}

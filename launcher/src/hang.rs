//! Hangs as the launcher sees them: it watches its workers' beats like they watch each other's,
//! and it ends a worker that hangs once the others have written down what they know.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use pollen_collectives::{Deadline, Store, Watch};
use pollen_observe::{Event, EventLog, Record, threads_of};

use crate::error::Error;
use crate::run_dir::RunDir;

/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long the other workers get to write their reports and end. They end by themselves within
/// ten seconds.
const PATIENCE: Duration = Duration::from_secs(15);
/// The store is in this process.
const CONNECT: Duration = Duration::from_secs(5);

/// A worker that was found to hang.
#[derive(Debug)]
pub(crate) struct Hung {
    /// Its rank.
    rank: Option<u32>,
    /// When the launcher heard of it.
    heard: Instant,
    /// Who, where and since when.
    pub(crate) text: String,
}

impl Hung {
    /// Returns the hang that a record tells of.
    pub(crate) fn of(record: &Record) -> Option<Self> {
        let Event::Hang {
            who,
            hung_rank,
            step,
            phase,
            since_s,
        } = &record.event
        else {
            return None;
        };
        Some(Self {
            rank: *hung_rank,
            heard: Instant::now(),
            text: format!("{who} hung in {phase} of step {step} for {since_s:.0} s"),
        })
    }

    /// Returns whether this is the worker that hangs.
    pub(crate) fn is(&self, rank: u32) -> bool {
        self.rank == Some(rank)
    }

    /// Returns whether nobody is left but the one that hangs, or the others had their time.
    pub(crate) fn is_over(&self, now: Instant, running: &[(u32, u32)]) -> bool {
        let alone = running.iter().all(|(rank, _)| Some(*rank) == self.rank);
        alone || now >= self.heard + PATIENCE
    }
}

/// Watches all workers of one generation through the store that this launcher hosts. It sees what
/// no worker can: the silence of the only one, or of all.
#[derive(Debug)]
pub(crate) struct Sentinel {
    address: String,
    prefix: String,
    report: std::path::PathBuf,
    log: EventLog,
    store: Option<Store>,
    watches: Vec<Watch>,
    began: Instant,
    next: Instant,
    done: bool,
}

impl Sentinel {
    pub(crate) fn new(
        address: SocketAddr,
        run: &RunDir,
        generation: u64,
        workers: u32,
    ) -> Result<Self, Error> {
        let now = Instant::now();
        Ok(Self {
            address: address.to_string(),
            prefix: format!("g{generation}/"),
            report: run
                .path()
                .join(format!("logs/hang-launcher.g{generation}.txt")),
            log: EventLog::open(&run.events(), run.id(), generation, None)?,
            store: None,
            watches: (0..workers)
                .map(|rank| Watch::new(rank, INTERVAL))
                .collect(),
            began: now,
            next: now,
            done: false,
        })
    }

    /// Looks at all workers' beats if it is time to; tells of the first that hangs.
    pub(crate) fn look(&mut self) {
        let now = Instant::now();
        if self.done || now < self.next {
            return;
        }
        self.next = now + INTERVAL;
        if let Err(error) = self.look_at_all(now) {
            tracing::debug!(%error, "the workers' beats could not be read");
        }
    }

    fn look_at_all(&mut self, now: Instant) -> Result<(), Box<dyn std::error::Error>> {
        let store = if let Some(store) = &self.store {
            store.clone()
        } else {
            let store = Store::connect(&self.address, Deadline::after(CONNECT))?;
            let store = store.prefixed(&self.prefix);
            self.store.insert(store).clone()
        };
        for watch in &mut self.watches {
            let newest = store.newest_beat(watch.rank())?;
            let Some(hang) = watch.look(now - self.began, newest) else {
                continue;
            };
            self.done = true;
            // A worker may have been first: then it also writes the event and the report.
            if store.declare_hang(&hang)? {
                let text = format!("{hang}\n\nrank {}: {}", hang.rank, threads_of(hang.pid));
                std::fs::write(&self.report, text)?;
                self.log.append(Event::Hang {
                    who: format!("rank {} on {}", hang.rank, hang.host),
                    hung_rank: Some(hang.rank),
                    step: hang.step,
                    phase: hang.phase,
                    since_s: hang.since.as_secs_f64(),
                })?;
            }
            break;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_that_hangs_is_ended_when_it_is_alone_or_the_others_had_their_time() {
        let heard = Instant::now();
        let hung = Hung {
            rank: Some(1),
            heard,
            text: String::new(),
        };
        assert!(!hung.is_over(heard, &[(0, 10), (1, 11)]));
        assert!(hung.is_over(heard, &[(1, 11)]));
        assert!(!hung.is_over(heard + PATIENCE / 2, &[(0, 10), (1, 11)]));
        assert!(hung.is_over(heard + PATIENCE, &[(0, 10), (1, 11)]));
    }
}

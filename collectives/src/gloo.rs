//! Gloo over TCP: the CPU engine that PyTorch uses, behind one communication thread.
//!
//! Operations run in the order of submission. Sums go around a ring: part p of the buffer is added
//! up in a fixed order of ranks and then copied to all, so the bits depend on the world size, the
//! element type and the length only. bf16 travels and is added as f32 and is rounded once.
//!
//! Every operation is tagged with its number, kind, type and length. Ranks that disagree do not
//! mix their bytes: both time out and each report shows what that rank was doing. A watching
//! thread hears from the store who died, left or failed, and ends a running operation at once.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::backend::{Communicator, Handle};
use crate::buffer::{Buffer, HostBuffer, ReduceOp};
use crate::deadline::Deadline;
use crate::error::{Absence, Absent, Error, Result};
use crate::ffi::Engine;
use crate::store::{Event, Presence};

const NAME: &str = "gloo";
/// Submitted operations that may wait; submitting more blocks.
const QUEUE: usize = 1024;
/// How long a failed operation waits to hear whose fault it was.
const INQUEST: Duration = Duration::from_secs(3);

/// A communicator over Gloo. Dropping it finishes what was submitted, then says good-bye.
#[derive(Debug)]
pub struct Gloo {
    shared: Arc<Shared>,
    jobs: Option<SyncSender<Job>>,
    watcher: Option<JoinHandle<()>>,
    worker: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    rank: u32,
    /// In rank order.
    hosts: Vec<String>,
    timeout: Duration,
    engine: Engine,
    presence: Presence,
    fate: Mutex<Fate>,
    /// Notified when `fate` changes.
    news: Condvar,
}

/// What is known about this communicator's end and about the other ranks.
#[derive(Debug, Default)]
struct Fate {
    aborted: bool,
    /// The first failure: what was being done, and the reason.
    failure: Option<(String, String)>,
    absent: BTreeMap<u32, Absence>,
    reports: BTreeMap<u32, String>,
    watching: bool,
}

#[derive(Debug)]
struct Job {
    operation: Operation,
    buffer: HostBuffer,
    done: SyncSender<Result<Buffer>>,
}

#[derive(Clone, Copy, Debug)]
enum Operation {
    AllReduce(ReduceOp),
    ReduceScatter(ReduceOp),
    AllGather,
    Broadcast(u32),
    Barrier,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AllReduce(op) => write!(f, "all-reduce ({op})"),
            Self::ReduceScatter(op) => write!(f, "reduce-scatter ({op})"),
            Self::AllGather => f.write_str("all-gather"),
            Self::Broadcast(root) => write!(f, "broadcast (root {root})"),
            Self::Barrier => f.write_str("barrier"),
        }
    }
}

impl Gloo {
    pub(crate) fn start(
        rank: u32,
        hosts: Vec<String>,
        timeout: Duration,
        engine: Engine,
        presence: Presence,
    ) -> Result<Self> {
        let shared = Arc::new(Shared {
            rank,
            hosts,
            timeout,
            engine,
            presence,
            fate: Mutex::new(Fate {
                watching: true,
                ..Fate::default()
            }),
            news: Condvar::new(),
        });
        let (jobs, queue) = mpsc::sync_channel(QUEUE);
        let mut gloo = Self {
            shared: Arc::clone(&shared),
            jobs: Some(jobs),
            watcher: None,
            worker: None,
        };
        gloo.watcher = Some(gloo.spawn("gloo-watch", Shared::watch)?);
        gloo.worker = Some(gloo.spawn("gloo", move |shared| shared.work(&queue))?);
        Ok(gloo)
    }

    fn spawn(
        &self,
        name: &str,
        body: impl FnOnce(&Shared) + Send + 'static,
    ) -> Result<JoinHandle<()>> {
        let shared = Arc::clone(&self.shared);
        let rank = shared.rank;
        let spawned = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || body(&shared));
        spawned.map_err(|source| {
            tracing::error!(rank, name, %source, "cannot start a communication thread");
            Error::ThreadEnded { rank }
        })
    }

    fn submit(&self, operation: Operation, buffer: Buffer) -> Result<Handle> {
        let buffer = buffer.into_host(NAME)?;
        let rank = self.shared.rank;
        let (handle, done) = Handle::pending(rank);
        let job = Job {
            operation,
            buffer,
            done,
        };
        let jobs = self.jobs.as_ref().ok_or(Error::ThreadEnded { rank })?;
        jobs.send(job).map_err(|_| Error::ThreadEnded { rank })?;
        Ok(handle)
    }

    /// Ends the communicator because something beside it failed, and tells the other ranks; returns
    /// the error for the caller.
    pub(crate) fn fail(&self, what: String, reason: String) -> Error {
        self.shared.fail(what, reason)
    }

    fn refuse(&self, operation: &'static str, reason: String) -> Error {
        Error::Argument {
            rank: self.shared.rank,
            operation,
            reason,
        }
    }
}

impl Communicator for Gloo {
    fn rank(&self) -> u32 {
        self.shared.rank
    }

    fn world_size(&self) -> u32 {
        self.shared.world()
    }

    fn name(&self) -> &'static str {
        NAME
    }

    fn takes_device_memory(&self) -> bool {
        false
    }

    fn all_reduce(&self, buffer: Buffer, op: ReduceOp) -> Result<Handle> {
        self.submit(Operation::AllReduce(op), buffer)
    }

    fn reduce_scatter(&self, buffer: Buffer, op: ReduceOp) -> Result<Handle> {
        let buffer = buffer.into_host(NAME)?;
        let (len, world) = (buffer.len(), self.world_size());
        if !len.is_multiple_of(world as usize) {
            let reason = format!("{len} elements do not divide by {world} ranks: pad the buffer");
            return Err(self.refuse("reduce-scatter", reason));
        }
        self.submit(Operation::ReduceScatter(op), buffer.into())
    }

    fn all_gather(&self, buffer: Buffer) -> Result<Handle> {
        self.submit(Operation::AllGather, buffer)
    }

    fn broadcast(&self, buffer: Buffer, root: u32) -> Result<Handle> {
        let world = self.world_size();
        if root >= world {
            let reason = format!("root {root} is not below the world size {world}");
            return Err(self.refuse("broadcast", reason));
        }
        self.submit(Operation::Broadcast(root), buffer)
    }

    fn barrier(&self) -> Result<()> {
        let nothing = HostBuffer::U8(Vec::new());
        self.submit(Operation::Barrier, nothing.into())?.wait()?;
        Ok(())
    }

    fn abort(&self) {
        self.shared.abort();
    }

    fn poll_error(&self) -> Option<Error> {
        self.shared.error(&self.shared.fate())
    }
}

impl Drop for Gloo {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.shared.abort();
        }
        self.jobs = None;
        // Before the good-bye: what was submitted still runs, and a failure is heard of.
        if let Some(thread) = self.worker.take() {
            let _ = thread.join();
        }
        if let Err(error) = self.shared.presence.leave() {
            tracing::debug!(rank = self.shared.rank, %error, "left without a good-bye");
        }
        if let Some(thread) = self.watcher.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn world(&self) -> u32 {
        self.hosts.len() as u32
    }

    fn fate(&self) -> MutexGuard<'_, Fate> {
        self.fate
            .lock()
            .expect("no code panics while it holds the fate")
    }

    /// Runs operations until the queue is closed.
    fn work(&self, queue: &Receiver<Job>) {
        for (number, job) in queue.iter().enumerate() {
            let Job {
                operation,
                mut buffer,
                done,
            } = job;
            let known = self.error(&self.fate());
            let result = if let Some(error) = known {
                Err(error)
            } else {
                let (dtype, len) = (buffer.dtype(), buffer.len());
                let what = format!("{operation} number {number} of {len} x {dtype}");
                self.run(operation, &what, &mut buffer)
                    .map_err(|reason| self.fail(what, reason))
            };
            // Whoever dropped the handle does not want the buffer.
            let _ = done.send(result.map(|()| buffer.into()));
        }
    }

    fn run(&self, operation: Operation, what: &str, buffer: &mut HostBuffer) -> Result<(), String> {
        let world = self.world();
        let tag = fingerprint(what);
        let (engine, timeout) = (&self.engine, self.timeout);
        if matches!(operation, Operation::Barrier) {
            return engine.barrier(tag, timeout);
        }
        if buffer.is_empty() {
            return Ok(());
        }
        match operation {
            Operation::AllReduce(op) => engine.all_reduce(buffer, op, tag, timeout),
            Operation::ReduceScatter(op) => {
                engine.all_reduce(buffer, op, tag, timeout)?;
                let (part, rank) = (buffer.len() / world as usize, self.rank as usize);
                buffer.keep(part * rank..part * (rank + 1));
                Ok(())
            }
            Operation::AllGather => {
                *buffer = buffer.spread(self.rank as usize, world as usize);
                engine.all_gather(buffer, world, tag, timeout)
            }
            Operation::Broadcast(root) => engine.broadcast(buffer, root, tag, timeout),
            Operation::Barrier => Ok(()),
        }
    }

    /// Ends this communicator because an operation failed; returns the error for its caller.
    fn fail(&self, what: String, reason: String) -> Error {
        self.engine.abort(&reason);
        let report = format!("rank {}: {what}: {reason}", self.rank);
        let told = self.presence.report(&report);
        let mut fate = self.fate();
        // An operation that was ended because of news is the better account of what happened.
        fate.failure = Some((what, reason));
        // The connection to a dead peer may break before the store has said that it died.
        let deadline = Deadline::after(INQUEST);
        while told.is_ok() && !fate.aborted && fate.watching && !self.is_clear(&fate) {
            let left = deadline.remaining();
            if left.is_zero() {
                for rank in 0..self.world() {
                    if rank != self.rank && !fate.reports.contains_key(&rank) {
                        fate.absent.entry(rank).or_insert(Absence::Silent);
                    }
                }
                break;
            }
            let woken = self.news.wait_timeout(fate, left);
            fate = woken.expect("no code panics while it holds the fate").0;
        }
        self.error(&fate)
            .expect("`failure` was set above and is never unset")
    }

    /// Returns whether the other ranks' whereabouts explain a failure.
    fn is_clear(&self, fate: &Fate) -> bool {
        let known = |rank| fate.absent.contains_key(&rank) || fate.reports.contains_key(&rank);
        fate.absent.values().any(|how| *how == Absence::Died)
            || (0..self.world()).all(|rank| rank == self.rank || known(rank))
    }

    fn error(&self, fate: &Fate) -> Option<Error> {
        let rank = self.rank;
        if fate.aborted {
            return Some(Error::Aborted { rank });
        }
        let (operation, reason) = fate.failure.clone()?;
        let missing = fate.absent.iter().map(|(rank, how)| Absent {
            rank: *rank,
            host: self.hosts.get(*rank as usize).cloned(),
            how: *how,
        });
        Some(Error::Collective {
            rank,
            world: self.world(),
            operation,
            reason,
            missing: missing.collect(),
            reports: fate.reports.values().cloned().collect(),
        })
    }

    fn abort(&self) {
        self.fate().aborted = true;
        self.news.notify_all();
        self.engine.abort("aborted on request");
        let report = format!("rank {}: aborted on request", self.rank);
        if let Err(error) = self.presence.report(&report) {
            tracing::debug!(rank = self.rank, %error, "nobody was told of the abort");
        }
    }

    /// Listens to what becomes of the other ranks until this one leaves.
    fn watch(&self) {
        loop {
            let news = match self.presence.next_event() {
                Ok(Some(Event::Lost { rank, host })) => {
                    self.fate().absent.insert(rank, Absence::Died);
                    Some(format!("rank {rank} on {host} died"))
                }
                Ok(Some(Event::Left { rank })) => {
                    // It may have given all that the running operation needs.
                    self.fate().absent.insert(rank, Absence::Left);
                    None
                }
                Ok(Some(Event::Reported { rank, text })) => {
                    let news = format!("rank {rank} failed");
                    self.fate().reports.insert(rank, text);
                    Some(news)
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(rank = self.rank, %error, "no more news of the other ranks");
                    break;
                }
            };
            if let Some(news) = news {
                let between = || ("the idle communicator".to_owned(), news.clone());
                self.fate().failure.get_or_insert_with(between);
                self.engine.abort(&news);
            }
            self.news.notify_all();
        }
        self.fate().watching = false;
        self.news.notify_all();
    }
}

/// FNV-1a: equal on all ranks, and different for operations that do not match.
fn fingerprint(what: &str) -> u32 {
    what.bytes().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

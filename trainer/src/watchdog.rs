//! A thread beside the training: tells the others that this rank lives, watches the next rank, and
//! ends this one when a rank hangs.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use pollen_collectives::{Communicator, Hang, Store, Watch, WatchdogConfig};
use pollen_core::{Clock, ExitCode};
use pollen_observe::{Event, EventLog, threads_of};

use crate::error::Error;
use crate::pulse::Pulse;

/// How long the training thread gets to end by itself once the communicator is aborted.
const LAST_CHANCE: Duration = Duration::from_secs(10);

/// What the thread works with.
#[derive(Debug)]
pub(crate) struct Post {
    pub(crate) config: WatchdogConfig,
    /// This generation's view.
    pub(crate) store: Store,
    pub(crate) rank: u32,
    pub(crate) world_size: u32,
    pub(crate) host: String,
    pub(crate) pulse: Arc<Pulse>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) events: EventLog,
    pub(crate) run_dir: PathBuf,
    pub(crate) verdict: Verdict,
}

/// Which rank hangs, once that is known.
#[derive(Clone, Debug, Default)]
pub(crate) struct Verdict(Arc<OnceLock<(Hang, PathBuf)>>);

impl Verdict {
    /// An error that came of a hang names the hang.
    pub(crate) fn explain(&self, error: Error) -> Error {
        match self.0.get() {
            None => error,
            Some((hang, stacks)) => Error::Hang {
                hang: Box::new(hang.clone()),
                stacks: stacks.clone(),
            },
        }
    }
}

/// The thread, for as long as the rank takes part; dropping it says good-bye.
#[derive(Debug)]
pub(crate) struct Watchdog {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
    communicator: Leash,
}

/// The communicator to abort, once there is one. Weak: the owner closes it in good order.
type Leash = Arc<Mutex<Option<Weak<dyn Communicator>>>>;

impl Watchdog {
    /// Starts beating and watching; nothing if the recipe switches it off.
    pub(crate) fn start(post: Post) -> Result<Option<Self>, Error> {
        if !post.config.enabled {
            return Ok(None);
        }
        let (stop, stopped) = channel();
        let communicator = Leash::default();
        let leash = Arc::clone(&communicator);
        // Before the training thread goes on: a rank that never beat is left to the join deadline,
        // which ends the launch without a name for who is stuck.
        if let Err(error) = post.beat(false) {
            tracing::warn!(rank = post.rank, %error, "no first beat");
        }
        let thread = std::thread::Builder::new()
            .name("pollen-watch".into())
            .spawn(move || post.keep(&stopped, &leash))
            .map_err(|source| Error::File {
                path: "the watching thread".into(),
                source,
            })?;
        Ok(Some(Self {
            stop: Some(stop),
            thread: Some(thread),
            communicator,
        }))
    }

    /// Gives the watchdog what it has to abort when a rank hangs.
    pub(crate) fn guard(&self, communicator: &Arc<dyn Communicator>) {
        *lock(&self.communicator) = Some(Arc::downgrade(communicator));
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(leash: &Leash) -> std::sync::MutexGuard<'_, Option<Weak<dyn Communicator>>> {
    leash.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Post {
    fn keep(&self, stopped: &Receiver<()>, leash: &Leash) {
        // A ring: each rank costs the store the same, however many there are. Alone, it watches
        // its own training thread.
        let next = (self.rank + 1) % self.world_size.max(1);
        let mut watch = Watch::new(next, self.config.interval);
        let mut in_trouble = false;
        loop {
            match self.look(&mut watch) {
                Ok(None) => in_trouble = false,
                Ok(Some((hang, own))) => {
                    self.act(hang, own, stopped, leash);
                    return;
                }
                // Whoever is dead is the presence's concern; a store that is busy is asked again.
                Err(error) if !in_trouble => {
                    in_trouble = true;
                    tracing::warn!(rank = self.rank, %error, "no beats for now");
                }
                Err(_) => {}
            }
            match stopped.recv_timeout(self.config.interval) {
                Err(RecvTimeoutError::Timeout) => {}
                _ => break,
            }
        }
        if let Err(error) = self.beat(true) {
            tracing::debug!(rank = self.rank, %error, "ended without a last beat");
        }
    }

    /// Tells the others that this rank lives, or, at the `end`, that it has left in good order.
    fn beat(&self, end: bool) -> Result<(), Error> {
        let beat = self.pulse.beat(&self.host, end);
        Ok(self.store.beat(self.rank, &beat)?)
    }

    /// Beats, and returns the hang that this rank or another one found, and whether it was this
    /// one.
    fn look(&self, watch: &mut Watch) -> Result<Option<(Hang, bool)>, Error> {
        self.beat(false)?;
        if let Some(hang) = self.store.declared_hang()? {
            return Ok(Some((hang, false)));
        }
        let newest = self.store.newest_beat(watch.rank())?;
        let Some(hang) = watch.look(self.clock.monotonic(), newest) else {
            return Ok(None);
        };
        if self.store.declare_hang(&hang)? {
            return Ok(Some((hang, true)));
        }
        // Another rank was first, perhaps about another one: its word stands.
        Ok(self.store.declared_hang()?.map(|hang| (hang, false)))
    }

    /// Writes down what can be seen, then ends this rank: by way of its communicator if the
    /// training thread listens, at once if not.
    fn act(&self, hang: Hang, own: bool, stopped: &Receiver<()>, leash: &Leash) {
        tracing::error!(rank = self.rank, %hang, "this rank ends");
        let stacks = self.write_stacks(&hang, own);
        if own {
            let told = self.events.append(Event::Hang {
                who: format!("rank {} on {}", hang.rank, hang.host),
                hung_rank: Some(hang.rank),
                step: hang.step,
                phase: hang.phase.clone(),
                since_s: hang.since.as_secs_f64(),
            });
            if let Err(error) = told {
                tracing::warn!(%error, "the hang could not be recorded");
            }
        }
        let reason = hang.to_string();
        // The first verdict stays.
        let _ = self.verdict.0.set((hang, stacks));
        if let Some(communicator) = lock(leash).as_ref().and_then(Weak::upgrade) {
            communicator.abort();
        }
        if stopped.recv_timeout(LAST_CHANCE) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        let exit = i32::from(ExitCode::Infrastructure.code());
        let end = self.events.append(Event::End {
            exit_code: exit,
            reason: format!("{reason}; this rank's training thread did not end either"),
        });
        if let Err(error) = end {
            tracing::warn!(%error, "the end could not be recorded");
        }
        std::process::exit(exit);
    }

    /// Writes this process's threads and phases, and the hanging process's threads where they can
    /// be seen; returns the file.
    fn write_stacks(&self, hang: &Hang, own: bool) -> PathBuf {
        let name = format!("hang-rank-{}.g{}.txt", self.rank, self.events.generation());
        let path = self.run_dir.join("logs").join(name);
        let mut text = format!("{hang}\n\n");
        if own && hang.rank != self.rank && hang.host == self.host {
            let _ = writeln!(text, "rank {}: {}", hang.rank, threads_of(hang.pid));
        }
        let _ = write!(
            text,
            "rank {}: {}\nlast phases of rank {}:\n{}",
            self.rank,
            threads_of(std::process::id()),
            self.rank,
            self.pulse.history()
        );
        if let Err(error) = write(&path, &text) {
            tracing::error!(path = %path.display(), %error, "cannot write the stacks\n{text}");
        }
        path
    }
}

fn write(path: &Path, text: &str) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, text)
}

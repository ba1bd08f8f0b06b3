//! Starts a run's workers, watches them, and starts them again when one fails.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use pollen_collectives::StoreServer;
use pollen_core::ExitCode;
use pollen_observe::{Event, EventLog, Progress, Record, Tail};
use rustix::process::Signal;

use crate::backoff::{self, Backoff};
use crate::config::{Config, split_address};
use crate::decision::{Decision, RankExit, StopSignal, Verdict, decide, is_orderly};
use crate::error::Error;
use crate::hang::{Hung, Sentinel};
use crate::local::{Ended, Placement, WorkerCommand, WorkerGroup};
use crate::lock::RunLock;
use crate::log_tail::LogTail;
use crate::process::Exit;
use crate::run_dir::{Meeting, RunDir};
use crate::signals::SignalGuard;

/// How often the event file is looked at.
const TICK: Duration = Duration::from_millis(100);
/// Lines of the failing worker's log that are shown.
const LOG_LINES: usize = 20;

/// One run to bring to its end.
#[derive(Debug)]
pub struct Job<'a> {
    /// The run's folder.
    pub run: &'a mut RunDir,
    /// Proof that nobody else works on it.
    pub lock: &'a RunLock,
    /// Section `[launch]`.
    pub config: &'a Config,
    /// What each worker runs.
    pub command: WorkerCommand,
    /// The step at which workers end with code 0.
    pub steps: u64,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The launcher's exit code.
    pub exit: ExitCode,
    /// Why, as a sentence for people.
    pub reason: String,
    /// Restarts in this launch.
    pub restarts: u32,
    /// End of the log of the worker that failed, if one did.
    pub log: Option<LogTail>,
}

/// Somebody who watches the run.
pub trait Observer {
    /// Takes records that were written since the last call.
    fn records(&mut self, records: &[Record]);
    /// Takes a sentence for people.
    fn say(&mut self, text: &str);
}

impl Observer for Progress {
    fn records(&mut self, records: &[Record]) {
        self.update(records);
    }

    fn say(&mut self, text: &str) {
        Progress::say(self, text);
    }
}

/// Brings runs to their end; hears signals and its own stop handle.
#[derive(Debug)]
pub struct Supervisor {
    sender: Sender<Message>,
    receiver: Receiver<Message>,
}

/// Asks a supervisor to stop, as a signal would.
#[derive(Clone, Debug)]
pub struct StopHandle(Sender<Message>);

#[derive(Clone, Copy, Debug)]
enum Message {
    Ended(Ended),
    Stop(StopSignal),
}

impl From<Ended> for Message {
    fn from(ended: Ended) -> Self {
        Self::Ended(ended)
    }
}

impl From<StopSignal> for Message {
    fn from(signal: StopSignal) -> Self {
        Self::Stop(signal)
    }
}

impl StopHandle {
    /// Asks for a stop; the second time workers are killed at once.
    pub fn stop(&self, signal: StopSignal) {
        // A supervisor that is gone has stopped.
        let _ = self.0.send(signal.into());
    }
}

impl Default for Supervisor {
    fn default() -> Self {
        let (sender, receiver) = channel();
        Self { sender, receiver }
    }
}

impl Supervisor {
    /// Returns a handle that asks for a stop from elsewhere.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle(self.sender.clone())
    }

    /// Runs a job to its end while SIGINT, SIGTERM, SIGHUP and SIGUSR1 ask for a stop.
    pub fn run_with_signals(
        &mut self,
        job: Job<'_>,
        observer: &mut dyn Observer,
    ) -> Result<Outcome, Error> {
        let _guard = SignalGuard::install(&self.sender)?;
        self.run(job, observer)
    }

    /// Runs a job to its end. Call it on a thread that lives until the process ends: workers die
    /// with the thread that started them.
    pub fn run(&mut self, job: Job<'_>, observer: &mut dyn Observer) -> Result<Outcome, Error> {
        let mut job = job;
        job.config.check()?;
        let hosted = host_store(job.config)?;
        let (master_addr, master_port) = match (&hosted, &job.config.store) {
            (Some(server), _) => {
                let address = server.address();
                (address.ip().to_string(), address.port())
            }
            (None, Some(store)) => split_address(store).expect("`check` refuses other addresses"),
            (None, None) => unreachable!("without an external store one is hosted"),
        };
        let mut watch = Watch {
            tail: Tail::from_end(&job.run.events())?,
            observer,
            checkpoint_seen: false,
            told_of_fault: false,
            hung: None,
        };
        let backoff = Backoff::of(job.config);
        let mut stop = None;
        let mut restarts = 0;
        let mut restarts_since_checkpoint = 0;
        loop {
            let generation = job.run.next_generation(job.lock)?;
            let log = EventLog::open(&job.run.events(), job.run.id(), generation, None)?;
            job.run.write_meeting(&Meeting {
                store: format!("{master_addr}:{master_port}"),
                generation,
                workers: job.config.workers.get(),
            })?;
            let placement = Placement {
                world_size: job.config.workers.get(),
                master_addr: master_addr.clone(),
                master_port,
                generation,
                die_with_launcher: job.config.die_with_launcher,
            };
            let exits = Generation {
                group: WorkerGroup::start(&job.command, &placement, job.run, &self.sender)?,
                number: generation,
                grace: job.config.grace,
                exits: Vec::new(),
                phase: Phase::Running,
                sentinel: match &hosted {
                    Some(server) => {
                        let workers = job.config.workers.get();
                        let address = server.address();
                        Some(Sentinel::new(address, job.run, generation, workers)?)
                    }
                    None => None,
                },
            }
            .watch(&self.receiver, &mut stop, &mut watch)?;
            watch.poll();
            if std::mem::take(&mut watch.checkpoint_seen) {
                restarts_since_checkpoint = 0;
            }
            // A stop may have come after the last worker's end; its threads have all returned.
            for message in self.receiver.try_iter() {
                if let Message::Stop(signal) = message {
                    stop.get_or_insert(signal);
                }
            }
            let left = job
                .config
                .max_restarts
                .saturating_sub(restarts_since_checkpoint);
            let mut verdict = decide(&exits, stop, left);
            if let Some(hung) = watch.hung.take() {
                verdict.reason = format!("{}; {}", hung.text, verdict.reason);
            }
            if verdict.decision == Decision::Restart {
                restarts += 1;
                restarts_since_checkpoint += 1;
                let pause = backoff.pause(restarts_since_checkpoint, backoff::chance());
                log.append(Event::Restart {
                    reason: verdict.reason,
                    exit_codes: by_rank(&exits),
                    pause_s: pause.as_secs_f64(),
                })?;
                watch.poll();
                stop = self.wait(Instant::now() + pause);
                if stop.is_none() {
                    continue;
                }
                verdict = decide(&exits, stop, left);
            }
            return finish(&mut job, &log, verdict, restarts, &mut watch);
        }
    }
}

impl Supervisor {
    /// Waits out a pause; a stop ends it.
    fn wait(&self, until: Instant) -> Option<StopSignal> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.receiver.recv_timeout(left) {
                Ok(Message::Stop(signal)) => return Some(signal),
                // A thread of a former generation.
                Ok(Message::Ended(_)) => {}
                Err(RecvTimeoutError::Timeout) => return None,
                Err(RecvTimeoutError::Disconnected) => {
                    unreachable!("the supervisor holds a sender")
                }
            }
        }
    }
}

fn host_store(config: &Config) -> Result<Option<StoreServer>, Error> {
    const ADDRESS: &str = "127.0.0.1:0";
    if config.store.is_some() {
        return Ok(None);
    }
    let server = StoreServer::bind(ADDRESS).map_err(|source| Error::Store {
        address: ADDRESS.into(),
        source: Box::new(source),
    })?;
    Ok(Some(server))
}

fn finish(
    job: &mut Job<'_>,
    log: &EventLog,
    verdict: Verdict,
    restarts: u32,
    watch: &mut Watch<'_>,
) -> Result<Outcome, Error> {
    let exit = match verdict.decision {
        Decision::Done => ExitCode::Done,
        Decision::Stop(code) => code,
        Decision::GiveUp | Decision::Restart => ExitCode::RestartsExhausted,
    };
    if exit == ExitCode::Done {
        job.run.finish(job.steps, job.lock)?;
    }
    log.append(Event::End {
        exit_code: i32::from(exit.code()),
        reason: verdict.reason.clone(),
    })?;
    watch.poll();
    let tail = verdict
        .culprit
        .map(|rank| LogTail::read(rank, &job.run.log(rank, log.generation()), LOG_LINES));
    Ok(Outcome {
        exit,
        reason: verdict.reason,
        restarts,
        log: tail,
    })
}

fn by_rank(exits: &[RankExit]) -> Vec<i32> {
    let mut sorted = exits.to_vec();
    sorted.sort_by_key(|one| one.rank);
    sorted.iter().map(|one| one.exit.code()).collect()
}

/// The event file, seen through the observer.
struct Watch<'a> {
    tail: Tail,
    observer: &'a mut dyn Observer,
    checkpoint_seen: bool,
    told_of_fault: bool,
    /// The first worker of this generation that was found to hang.
    hung: Option<Hung>,
}

impl Watch<'_> {
    fn poll(&mut self) {
        match self.tail.poll() {
            Ok(records) if records.is_empty() => {}
            Ok(records) => {
                self.checkpoint_seen |= records
                    .iter()
                    .any(|record| matches!(record.event, Event::Checkpoint { .. }));
                if self.hung.is_none() {
                    self.hung = records.iter().find_map(Hung::of);
                }
                self.observer.records(&records);
            }
            // A view that fails must not end the run; say so once.
            Err(error) if !self.told_of_fault => {
                self.told_of_fault = true;
                self.observer.say(&format!("events: {error}"));
            }
            Err(_) => {}
        }
    }
}

/// How far the end of a generation has got.
#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Nobody has ended, or only workers that are done.
    Running,
    /// A worker has stopped in order; the others get until then to do the same.
    Draining(Instant),
    /// The others were asked to end and get until then.
    Asked(Instant),
    /// The others were killed.
    Killed,
}

struct Generation {
    group: WorkerGroup,
    number: u64,
    grace: Duration,
    exits: Vec<RankExit>,
    phase: Phase,
    sentinel: Option<Sentinel>,
}

impl Generation {
    /// Watches until all workers have ended; returns their exits in the order they ended.
    fn watch(
        mut self,
        messages: &Receiver<Message>,
        stop: &mut Option<StopSignal>,
        watch: &mut Watch<'_>,
    ) -> Result<Vec<RankExit>, Error> {
        while !self.group.running().is_empty() {
            match messages.recv_timeout(TICK) {
                Ok(Message::Ended(ended)) if ended.generation == self.number => {
                    self.ended(ended.rank, watch)?;
                }
                // A thread of a former generation.
                Ok(Message::Ended(_)) | Err(RecvTimeoutError::Timeout) => {}
                Ok(Message::Stop(signal)) => self.stop(signal, stop, watch),
                Err(RecvTimeoutError::Disconnected) => {
                    unreachable!("the supervisor holds a sender")
                }
            }
            if let Some(sentinel) = &mut self.sentinel {
                sentinel.look();
            }
            self.check_deadline(watch);
            watch.poll();
        }
        Ok(self.exits)
    }

    fn ended(&mut self, rank: u32, watch: &mut Watch<'_>) -> Result<(), Error> {
        let exit = self.group.reap(rank)?;
        let hung = watch.hung.as_ref().is_some_and(|hung| hung.is(rank));
        let asked = matches!(self.phase, Phase::Asked(_) | Phase::Killed) && !hung;
        self.exits.push(RankExit { rank, exit, asked });
        if asked || self.group.running().is_empty() {
            return Ok(());
        }
        match exit {
            Exit::Code(0) => {}
            // Others may still be writing their part of the checkpoint.
            Exit::Code(2 | 93) => self.drain(),
            _ if is_orderly(exit) => self.drain(),
            _ => {
                watch
                    .observer
                    .say(&format!("rank {rank} {exit}; ending the other workers"));
                self.ask(Signal::TERM);
            }
        }
        Ok(())
    }

    fn drain(&mut self) {
        if matches!(self.phase, Phase::Running) {
            self.phase = Phase::Draining(Instant::now() + self.grace);
        }
    }

    /// Sends one signal to every worker's group and sets the deadline.
    fn ask(&mut self, signal: Signal) {
        self.group.signal(signal);
        self.phase = Phase::Asked(Instant::now() + self.grace);
    }

    fn kill(&mut self) {
        self.group.signal(Signal::KILL);
        self.phase = Phase::Killed;
    }

    fn stop(&mut self, signal: StopSignal, stop: &mut Option<StopSignal>, watch: &mut Watch<'_>) {
        if stop.is_some() {
            watch
                .observer
                .say("asked a second time: killing the workers");
            self.kill();
            return;
        }
        *stop = Some(signal);
        watch.observer.say(&format!(
            "asked to stop: workers save a checkpoint and end within {}; ask again to kill them",
            humantime::format_duration(self.grace)
        ));
        // Workers that were asked already take a second signal as an order to end at once.
        if !matches!(self.phase, Phase::Asked(_) | Phase::Killed) {
            self.ask(posix(signal));
        }
    }

    fn check_deadline(&mut self, watch: &mut Watch<'_>) {
        let now = Instant::now();
        if let Some(hung) = &watch.hung
            && !matches!(self.phase, Phase::Killed)
            && hung.is_over(now, &self.group.running())
        {
            let text = self.late("did not end: killing it");
            watch.observer.say(&text);
            self.kill();
        }
        match self.phase {
            Phase::Draining(until) if now >= until => {
                watch
                    .observer
                    .say(&self.late("did not end by themselves: asking them to"));
                self.ask(Signal::TERM);
            }
            Phase::Asked(until) if now >= until => {
                watch
                    .observer
                    .say(&self.late("did not end in time: killing them"));
                self.kill();
            }
            _ => {}
        }
    }

    fn late(&self, what: &str) -> String {
        let ranks: Vec<String> = self
            .group
            .running()
            .iter()
            .map(|(rank, _)| rank.to_string())
            .collect();
        format!("rank {} {what}", ranks.join(", "))
    }
}

fn posix(signal: StopSignal) -> Signal {
    match signal {
        StopSignal::Interrupt => Signal::INT,
        StopSignal::Terminate => Signal::TERM,
    }
}

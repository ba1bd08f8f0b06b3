//! The workers of one generation, as processes on this machine.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, waitid};

use crate::contract::WorkerEnv;
use crate::error::Error;
use crate::parent_death;
use crate::process::{Exit, signal_group};
use crate::run_dir::RunDir;

/// What a worker runs.
#[derive(Clone, Debug, Default)]
pub struct WorkerCommand {
    /// The program.
    pub program: PathBuf,
    /// Its arguments, the same for all ranks.
    pub args: Vec<OsString>,
    /// Variables on top of the launcher's own and of the contract.
    pub env: Vec<(String, String)>,
    /// Variables of the launcher that workers must not see.
    pub env_remove: Vec<String>,
}

/// Where the workers of one generation meet, and how they are kept.
#[derive(Clone, Debug)]
pub struct Placement {
    /// Number of workers, all on this machine.
    pub world_size: u32,
    /// Host of the store.
    pub master_addr: String,
    /// Port of the store.
    pub master_port: u16,
    /// Which start of the run this is.
    pub generation: u64,
    /// Whether workers are told to die with this process.
    pub die_with_launcher: bool,
}

/// Said by a waiting thread: this worker has ended and can be reaped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The worker.
    pub rank: u32,
    /// Its generation.
    pub generation: u64,
}

/// Running workers; whoever drops this kills what still runs.
///
/// Start it on a thread that lives as long as the workers: the kernel takes the end of the thread
/// that started a worker for the end of the launcher.
#[derive(Debug)]
pub struct WorkerGroup {
    workers: Vec<Worker>,
}

#[derive(Debug)]
struct Worker {
    rank: u32,
    child: Child,
    waiter: Option<JoinHandle<()>>,
    exit: Option<Exit>,
}

impl WorkerGroup {
    /// Starts all workers, each in a process group of its own and with its own log file. `tell`
    /// hears of every end.
    pub fn start<M: From<Ended> + Send + 'static>(
        command: &WorkerCommand,
        placement: &Placement,
        run: &RunDir,
        tell: &Sender<M>,
    ) -> Result<Self, Error> {
        let mut group = Self {
            workers: Vec::new(),
        };
        for rank in 0..placement.world_size {
            let child = spawn(command, placement, run, rank)?;
            let pid = child.id();
            // In the group before anything can fail, so that it is never left behind.
            group.workers.push(Worker {
                rank,
                child,
                waiter: None,
                exit: None,
            });
            let ended = Ended {
                rank,
                generation: placement.generation,
            };
            let tell = tell.clone();
            let waiter = std::thread::Builder::new()
                .name(format!("wait-rank-{rank}"))
                .spawn(move || {
                    wait_without_reaping(pid);
                    // Nobody listens any more when the launcher is ending.
                    let _ = tell.send(ended.into());
                })
                .map_err(Error::system("start a thread"))?;
            if let Some(worker) = group.workers.last_mut() {
                worker.waiter = Some(waiter);
            }
        }
        Ok(group)
    }

    /// Returns the process ids of workers that were not reaped, by rank.
    pub fn running(&self) -> Vec<(u32, u32)> {
        let running = self.workers.iter().filter(|worker| worker.exit.is_none());
        running
            .map(|worker| (worker.rank, worker.child.id()))
            .collect()
    }

    /// Sends a signal to the group of every worker that was not reaped.
    pub fn signal(&self, signal: Signal) {
        for (_, pid) in self.running() {
            signal_group(pid, signal);
        }
    }

    /// Takes the exit of a worker that has ended, and ends whatever it left running.
    pub fn reap(&mut self, rank: u32) -> Result<Exit, Error> {
        let worker = self
            .workers
            .iter_mut()
            .find(|worker| worker.rank == rank)
            .expect("only ranks of this group are told of");
        if let Some(exit) = worker.exit {
            return Ok(exit);
        }
        // The unreaped worker still holds its number, so the group cannot be somebody else's.
        signal_group(worker.child.id(), Signal::KILL);
        let status = worker
            .child
            .wait()
            .map_err(Error::system("wait for a worker"))?;
        let exit = Exit::from(status);
        worker.exit = Some(exit);
        if let Some(waiter) = worker.waiter.take() {
            // It has nothing left to do but return.
            let _ = waiter.join();
        }
        Ok(exit)
    }
}

impl Drop for WorkerGroup {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        for (rank, _) in self.running() {
            // A killed process ends; there is nobody to tell if the kernel thinks otherwise.
            let _ = self.reap(rank);
        }
    }
}

fn spawn(
    command: &WorkerCommand,
    placement: &Placement,
    run: &RunDir,
    rank: u32,
) -> Result<Child, Error> {
    let worker = WorkerEnv {
        rank,
        local_rank: rank,
        world_size: placement.world_size,
        local_world_size: placement.world_size,
        node_rank: 0,
        master_addr: placement.master_addr.clone(),
        master_port: placement.master_port,
        generation: placement.generation,
        source: String::new(),
    };
    let log_path = run.log(rank, placement.generation);
    let log = open_log(&log_path)?;
    let errors = log.try_clone().map_err(Error::file("open", &log_path))?;
    let mut process = Command::new(&command.program);
    process.args(&command.args);
    for name in &command.env_remove {
        process.env_remove(name);
    }
    process
        .envs(command.env.iter().map(|(name, value)| (name, value)))
        .envs(worker.to_env())
        .env_remove(parent_death::LAUNCHER_PID)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .process_group(0);
    if placement.die_with_launcher {
        process.env(parent_death::LAUNCHER_PID, std::process::id().to_string());
    }
    process.spawn().map_err(|source| Error::Spawn {
        rank,
        program: command.program.clone(),
        source,
    })
}

fn open_log(path: &std::path::Path) -> Result<File, Error> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(Error::file("open", path))
}

/// Waits for the end of a child and leaves it a zombie, so that its number stays taken until the
/// supervisor has ended the rest of its group.
fn wait_without_reaping(pid: u32) {
    let Some(pid) = Pid::from_raw(pid as i32) else {
        return;
    };
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    while let Err(rustix::io::Errno::INTR) = waitid(WaitId::Pid(pid), options) {}
}

//! NCCL for device memory, beside Gloo for host memory: gradients stay on the GPU, the few numbers
//! that ranks agree on travel over TCP as they do without GPUs.
//!
//! Device operations run one after another, in place, on a thread and a stream of their own. The
//! communicator is non-blocking: the thread polls for the end of an operation, for NCCL's own errors,
//! for the deadline and for what Gloo hears from the store of the other ranks. Whichever comes first
//! ends the wait; a failure aborts the communicator, here and, through the store, everywhere.
//!
//! Maximum and minimum of floats are refused on device memory, because NCCL would lose a NaN.

use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::backend::{Communicator, Handle};
use crate::buffer::{Buffer, DType, ReduceOp};
use crate::deadline::Deadline;
use crate::error::{Error, Result};
use crate::ffi::{Comm, DeviceBuffer, ID_BYTES, Launch, Nvidia};
use crate::gloo::Gloo;
use crate::store::Store;

const NAME: &str = "nccl";
/// Submitted operations that may wait; submitting more blocks.
const QUEUE: usize = 1024;
/// How long an operation is watched without sleeping: small ones are over by then.
const SPIN: Duration = Duration::from_micros(200);
/// Between two looks at an operation that takes longer.
const NAP: Duration = Duration::from_micros(100);
/// How long a communicator may take to close in good order.
const CLOSING: Duration = Duration::from_secs(5);
/// Key of the id by which the ranks of one generation find each other.
const ID_KEY: &str = "nccl/id";

/// Where the libraries are looked for.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    pub(crate) nccl: Vec<PathBuf>,
    pub(crate) driver: Vec<PathBuf>,
}

/// A communicator over NCCL and Gloo.
#[derive(Debug)]
pub(crate) struct Nccl {
    gloo: Arc<Gloo>,
    jobs: Option<SyncSender<Job>>,
    worker: Option<JoinHandle<()>>,
    failure: Arc<Mutex<Option<Error>>>,
}

#[derive(Debug)]
struct Job {
    launch: Launch,
    buffer: DeviceBuffer,
    done: SyncSender<Result<Buffer>>,
}

/// What the thread works with.
struct Worker {
    comm: Comm,
    gloo: Arc<Gloo>,
    timeout: Duration,
    failure: Arc<Mutex<Option<Error>>>,
}

impl Nccl {
    /// Connects the ranks that `gloo` has brought together; `view` is the generation's own.
    pub(crate) fn start(
        gloo: Gloo,
        gpu: usize,
        view: &Store,
        places: &Places,
        (timeout, deadline): (Duration, Deadline),
    ) -> Result<Self> {
        let (rank, world) = (gloo.rank(), gloo.world_size());
        let nvidia = Nvidia::open(&places.nccl, &places.driver)?;
        let connecting = || format!("connecting GPU {gpu} over NCCL");
        let id = exchange(|| nvidia.unique_id(), rank, view, deadline)?
            .map_err(|reason| gloo.fail(connecting(), reason))?;
        let comm = Comm::start(nvidia, gpu, (rank, world), id)
            .map_err(|reason| gloo.fail(connecting(), reason))?;
        let gloo = Arc::new(gloo);
        let failure = Arc::new(Mutex::new(None));
        let worker = Worker {
            comm,
            gloo: Arc::clone(&gloo),
            timeout,
            failure: Arc::clone(&failure),
        };
        worker
            .finish(deadline)
            .map_err(|ended| ended.error(&gloo, connecting()))?;
        let (jobs, queue) = mpsc::sync_channel(QUEUE);
        let thread = std::thread::Builder::new()
            .name("nccl".into())
            .spawn(move || worker.work(&queue));
        let thread = thread.map_err(|source| {
            tracing::error!(rank, %source, "cannot start a communication thread");
            Error::ThreadEnded { rank }
        })?;
        tracing::info!(rank, world, gpu, "NCCL is connected");
        Ok(Self {
            gloo,
            jobs: Some(jobs),
            worker: Some(thread),
            failure,
        })
    }

    fn submit(&self, launch: Launch, buffer: DeviceBuffer) -> Result<Handle> {
        let rank = self.rank();
        let parted = matches!(launch, Launch::ReduceScatter(_) | Launch::AllGather);
        if parted && !buffer.len().is_multiple_of(self.world_size() as usize) {
            return Err(Error::Argument {
                rank,
                operation: "device buffer in parts",
                reason: format!(
                    "{} elements do not divide by {} ranks: pad the buffer",
                    buffer.len(),
                    self.world_size()
                ),
            });
        }
        let (Launch::AllReduce(op) | Launch::ReduceScatter(op)) = launch else {
            return self.queue(launch, buffer);
        };
        // NCCL's kernels use fmax and fmin (src/device/reduce_kernel.h), which drop a NaN.
        let float = matches!(buffer.dtype(), DType::F32 | DType::F64 | DType::Bf16);
        if float && op != ReduceOp::Sum {
            return Err(Error::Argument {
                rank,
                operation: "device buffer",
                reason: format!(
                    "NCCL would lose a NaN in a {op} of {}: copy the buffer to the host",
                    buffer.dtype()
                ),
            });
        }
        self.queue(launch, buffer)
    }

    fn queue(&self, launch: Launch, buffer: DeviceBuffer) -> Result<Handle> {
        let rank = self.rank();
        let (handle, done) = Handle::pending(rank);
        let jobs = self.jobs.as_ref().ok_or(Error::ThreadEnded { rank })?;
        let job = Job {
            launch,
            buffer,
            done,
        };
        jobs.send(job).map_err(|_| Error::ThreadEnded { rank })?;
        Ok(handle)
    }
}

/// Gives all ranks the id that rank 0 makes with `make`.
fn exchange(
    make: impl FnOnce() -> Result<[u8; ID_BYTES], String>,
    rank: u32,
    view: &Store,
    deadline: Deadline,
) -> Result<Result<[u8; ID_BYTES], String>> {
    if rank == 0 {
        return match make() {
            Ok(id) => view.set(ID_KEY, &id).map(|()| Ok(id)),
            Err(reason) => Ok(Err(reason)),
        };
    }
    let id = view.get(ID_KEY, deadline)?;
    let len = id.len();
    Ok(id.try_into().map_err(|_| {
        format!("rank 0 left an id of {len} bytes in the store where NCCL's has {ID_BYTES}")
    }))
}

/// Why an operation was not waited for to its end.
enum Ended {
    /// It failed, or took too long.
    Failed(String),
    /// Other ranks' news came first.
    News(Error),
}

impl Ended {
    fn error(self, gloo: &Gloo, what: String) -> Error {
        match self {
            Self::Failed(reason) => gloo.fail(what, reason),
            Self::News(error) => error,
        }
    }
}

impl Worker {
    /// Runs operations until the queue is closed, then says good-bye.
    fn work(self, queue: &Receiver<Job>) {
        let mut broken: Option<Error> = None;
        for (number, job) in queue.iter().enumerate() {
            if broken.is_none() {
                broken = self.run(number, &job).err();
                if let Some(error) = &broken {
                    *self.failure.lock().expect("nobody panics with it") = Some(error.clone());
                }
            }
            let result = match &broken {
                None => Ok(Buffer::Device(result_of(&job, &self.gloo))),
                Some(error) => Err(error.clone()),
            };
            // Whoever dropped the handle does not want the buffer.
            let _ = job.done.send(result);
        }
        let good = broken.is_none() && self.gloo.poll_error().is_none();
        if good && self.comm.finalize().is_ok() && self.finish(Deadline::after(CLOSING)).is_ok() {
            self.comm.destroy();
        }
        // Else dropping the communicator aborts it.
    }

    fn run(&self, number: usize, job: &Job) -> Result<(), Error> {
        let (buffer, launch) = (&job.buffer, job.launch);
        let what = || {
            format!(
                "{launch:?} number {number} of {} x {} on the GPU",
                buffer.len(),
                buffer.dtype()
            )
        };
        if let Some(error) = self.gloo.poll_error() {
            return Err(error);
        }
        if buffer.is_empty() {
            return Ok(());
        }
        let launched = self.comm.launch(launch, buffer).map_err(Ended::Failed);
        launched
            .and_then(|()| self.finish(Deadline::after(self.timeout)))
            .map_err(|ended| ended.error(&self.gloo, what()))
    }

    /// Waits until the communicator has nothing to do.
    fn finish(&self, deadline: Deadline) -> Result<(), Ended> {
        let start = Instant::now();
        loop {
            if self.comm.poll().map_err(Ended::Failed)? {
                return Ok(());
            }
            if let Some(error) = self.gloo.poll_error() {
                return Err(Ended::News(error));
            }
            if deadline.has_passed() {
                let limit = humantime::format_duration(deadline.limit());
                return Err(Ended::Failed(format!(
                    "timed out after {limit}: some rank did not take part, or the network is down"
                )));
            }
            if start.elapsed() > SPIN {
                std::thread::sleep(NAP);
            } else {
                std::thread::yield_now();
            }
        }
    }
}

/// Returns what the caller gets back: of a reduce-scatter the rank's own part.
fn result_of(job: &Job, gloo: &Gloo) -> DeviceBuffer {
    match job.launch {
        Launch::ReduceScatter(_) => job.buffer.part(gloo.rank(), gloo.world_size()),
        _ => job.buffer,
    }
}

impl Communicator for Nccl {
    fn rank(&self) -> u32 {
        self.gloo.rank()
    }

    fn world_size(&self) -> u32 {
        self.gloo.world_size()
    }

    fn name(&self) -> &'static str {
        NAME
    }

    fn takes_device_memory(&self) -> bool {
        true
    }

    fn all_reduce(&self, buffer: Buffer, op: ReduceOp) -> Result<Handle> {
        match buffer {
            Buffer::Host(_) => self.gloo.all_reduce(buffer, op),
            Buffer::Device(device) => self.submit(Launch::AllReduce(op), device),
        }
    }

    fn reduce_scatter(&self, buffer: Buffer, op: ReduceOp) -> Result<Handle> {
        match buffer {
            Buffer::Host(_) => self.gloo.reduce_scatter(buffer, op),
            Buffer::Device(device) => self.submit(Launch::ReduceScatter(op), device),
        }
    }

    /// A device buffer is the whole result, with this rank's part in its place.
    fn all_gather(&self, buffer: Buffer) -> Result<Handle> {
        match buffer {
            Buffer::Host(_) => self.gloo.all_gather(buffer),
            Buffer::Device(device) => self.submit(Launch::AllGather, device),
        }
    }

    fn broadcast(&self, buffer: Buffer, root: u32) -> Result<Handle> {
        match buffer {
            Buffer::Device(device) if root < self.world_size() => {
                self.submit(Launch::Broadcast(root), device)
            }
            // Gloo refuses a root that there is not.
            Buffer::Device(_) => self.gloo.broadcast(Vec::<u8>::new().into(), root),
            Buffer::Host(_) => self.gloo.broadcast(buffer, root),
        }
    }

    fn barrier(&self) -> Result<()> {
        self.gloo.barrier()
    }

    fn abort(&self) {
        // The thread hears of it at its next look and aborts the communicator.
        self.gloo.abort();
    }

    fn poll_error(&self) -> Option<Error> {
        let own = self.failure.lock().expect("nobody panics with it").clone();
        own.or_else(|| self.gloo.poll_error())
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.gloo.abort();
        }
        self.jobs = None;
        if let Some(thread) = self.worker.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests;

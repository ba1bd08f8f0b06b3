//! A safe face for NCCL. It is opened when it is used: nothing is linked, and its absence is an error
//! like any other.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::PathBuf;
use std::ptr::null_mut;

use libloading::Library;

use crate::buffer::{DType, ReduceOp};
use crate::error::{Error, Result};
use crate::ffi::DeviceBuffer;
use crate::ffi::driver::{DeviceMemory, Driver, Stream, open, symbol};

/// The first version with every function and every field of the configuration used here.
const OLDEST: c_int = 21_800;
/// Bytes of the id by which ranks find each other.
pub(crate) const ID_BYTES: usize = 128;

const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
const CONFIG_MAGIC: c_uint = 0xcafe_beef;
/// "Choose yourself" in a field of the configuration.
const UNDEFINED: c_int = c_int::MIN;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Id([c_char; ID_BYTES]);

/// `ncclConfig_t` of version 2.18; newer libraries read its size.
#[repr(C)]
struct CommConfig {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

type CommPointer = *mut c_void;
type Reduce = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    c_int,
    c_int,
    CommPointer,
    Stream,
) -> c_int;
type Gather =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, CommPointer, Stream) -> c_int;

/// The functions of both libraries, which are never closed: their threads may outlive us.
struct Api {
    get_unique_id: unsafe extern "C" fn(*mut Id) -> c_int,
    init: unsafe extern "C" fn(*mut CommPointer, c_int, Id, c_int, *mut CommConfig) -> c_int,
    async_error: unsafe extern "C" fn(CommPointer, *mut c_int) -> c_int,
    abort: unsafe extern "C" fn(CommPointer) -> c_int,
    finalize: unsafe extern "C" fn(CommPointer) -> c_int,
    destroy: unsafe extern "C" fn(CommPointer) -> c_int,
    all_reduce: Reduce,
    reduce_scatter: Reduce,
    all_gather: Gather,
    broadcast: Reduce,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    last_error: unsafe extern "C" fn(CommPointer) -> *const c_char,
    _library: ManuallyDrop<Library>,
}

impl Api {
    fn open(places: &[PathBuf]) -> Result<Self> {
        let nccl = open(places, |tried| Error::NcclMissing { tried })?;
        let get_version: unsafe extern "C" fn(*mut c_int) -> c_int =
            symbol!(nccl, "ncclGetVersion");
        let mut version = 0;
        // SAFETY: writes one number.
        let status = unsafe { get_version(&raw mut version) };
        if status != SUCCESS || version < OLDEST {
            return Err(Error::NcclUnusable {
                reason: format!("version {}; 2.18 or newer is needed", version_text(version)),
            });
        }
        tracing::info!(version = version_text(version), "NCCL is open");
        Ok(Self {
            get_unique_id: symbol!(nccl, "ncclGetUniqueId"),
            init: symbol!(nccl, "ncclCommInitRankConfig"),
            async_error: symbol!(nccl, "ncclCommGetAsyncError"),
            abort: symbol!(nccl, "ncclCommAbort"),
            finalize: symbol!(nccl, "ncclCommFinalize"),
            destroy: symbol!(nccl, "ncclCommDestroy"),
            all_reduce: symbol!(nccl, "ncclAllReduce"),
            reduce_scatter: symbol!(nccl, "ncclReduceScatter"),
            all_gather: symbol!(nccl, "ncclAllGather"),
            broadcast: symbol!(nccl, "ncclBroadcast"),
            error_string: symbol!(nccl, "ncclGetErrorString"),
            last_error: symbol!(nccl, "ncclGetLastError"),
            _library: ManuallyDrop::new(nccl),
        })
    }

    /// Returns what a status means, with NCCL's own account where it has one.
    fn words(&self, status: c_int, comm: CommPointer) -> String {
        let text = |pointer: *const c_char| {
            (!pointer.is_null()).then(|| {
                // SAFETY: NUL-terminated strings that live at least until the next call.
                let text = unsafe { CStr::from_ptr(pointer) };
                text.to_string_lossy().trim().to_owned()
            })
        };
        // SAFETY: a status is a plain number; `comm` is null or alive.
        let (meaning, account) = unsafe {
            (
                text((self.error_string)(status)),
                text((self.last_error)(comm)),
            )
        };
        let meaning = meaning.unwrap_or_else(|| format!("status {status}"));
        match account.filter(|account| !account.is_empty()) {
            Some(account) => format!("{meaning}: {account}"),
            None => meaning,
        }
    }
}

fn version_text(version: c_int) -> String {
    format!(
        "{}.{}.{}",
        version / 10_000,
        version / 100 % 100,
        version % 100
    )
}

/// The opened libraries.
pub(crate) struct Nvidia {
    api: Api,
    driver: Driver,
}

impl fmt::Debug for Nvidia {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Nvidia")
    }
}

impl Nvidia {
    /// Opens NCCL and the driver.
    pub(crate) fn open(nccl: &[PathBuf], driver: &[PathBuf]) -> Result<Self> {
        Ok(Self {
            api: Api::open(nccl)?,
            driver: Driver::open(driver)?,
        })
    }

    /// Returns memory on a GPU with the given bytes in it.
    pub(crate) fn upload(&self, gpu: usize, bytes: &[u8]) -> Result<DeviceMemory, String> {
        DeviceMemory::new(self.driver.clone(), gpu, bytes)
    }

    /// Returns a new id. NCCL needs no GPU for it, but a network interface.
    pub(crate) fn unique_id(&self) -> Result<[u8; ID_BYTES], String> {
        unique_id(&self.api)
    }
}

/// Returns a new id from the library at one of `places`, without a driver.
#[cfg(test)]
pub(crate) fn id_of(places: &[PathBuf]) -> Result<[u8; ID_BYTES]> {
    let api = Api::open(places)?;
    unique_id(&api).map_err(|reason| Error::NcclUnusable { reason })
}

fn unique_id(api: &Api) -> Result<[u8; ID_BYTES], String> {
    let mut id = Id([0; ID_BYTES]);
    // SAFETY: writes the id.
    match unsafe { (api.get_unique_id)(&raw mut id) } {
        SUCCESS => Ok(id.0.map(|byte| byte as u8)),
        status => Err(api.words(status, null_mut())),
    }
}

/// What is done on device memory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Launch {
    AllReduce(ReduceOp),
    /// Part number `rank` of the buffer gets the sums.
    ReduceScatter(ReduceOp),
    /// Part number `rank` of the buffer is this rank's.
    AllGather,
    Broadcast(u32),
}

/// A non-blocking communicator with a stream of its own. Every call returns at once; [`Self::poll`]
/// says when its work is done. Dropping it aborts what runs.
pub(crate) struct Comm {
    nvidia: Nvidia,
    handle: CommPointer,
    stream: Stream,
    context: *mut c_void,
    rank: usize,
    world: usize,
}

// SAFETY: nothing in it is tied to a thread; every call sets the context first.
unsafe impl Send for Comm {}

impl fmt::Debug for Comm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Comm({:p})", self.handle)
    }
}

impl Comm {
    /// Starts to connect with the other ranks that hold the same id.
    pub(crate) fn start(
        nvidia: Nvidia,
        gpu: usize,
        (rank, world): (u32, u32),
        id: [u8; ID_BYTES],
    ) -> Result<Self, String> {
        let context = nvidia.driver.context(gpu)?;
        let mut started = Self {
            nvidia,
            handle: null_mut(),
            stream: null_mut(),
            context,
            rank: rank as usize,
            world: world as usize,
        };
        started.enter()?;
        started.stream = started.nvidia.driver.create_stream()?;
        let mut config = CommConfig {
            size: size_of::<CommConfig>(),
            magic: CONFIG_MAGIC,
            version: OLDEST as c_uint,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        };
        let init = started.nvidia.api.init;
        let id = Id(id.map(|byte| byte as c_char));
        // SAFETY: the configuration has the layout of the version it names, and is read before the
        // call returns.
        let status = unsafe {
            let (world, rank) = (world as c_int, rank as c_int);
            init(&raw mut started.handle, world, id, rank, &raw mut config)
        };
        started.accept(status)?;
        Ok(started)
    }

    fn enter(&self) -> Result<(), String> {
        self.nvidia.driver.enter(self.context)
    }

    fn accept(&self, status: c_int) -> Result<(), String> {
        match status {
            SUCCESS | IN_PROGRESS => Ok(()),
            failed => Err(self.nvidia.api.words(failed, self.handle)),
        }
    }

    /// Queues an operation, in place. Everything that wrote the buffer must be done.
    pub(crate) fn launch(&self, launch: Launch, buffer: &DeviceBuffer) -> Result<(), String> {
        self.enter()?;
        let dtype = nccl_type(buffer.dtype());
        let all = buffer.pointer() as *mut c_void;
        let part = buffer.len() / self.world;
        let own =
            (buffer.pointer() + (part * self.rank * buffer.dtype().size()) as u64) as *mut c_void;
        let (api, comm, stream) = (&self.nvidia.api, self.handle, self.stream);
        // SAFETY: who made the buffer promised that its memory stays allocated and untouched until
        // the operation is done; offsets stay inside of it.
        let status = unsafe {
            match launch {
                Launch::AllReduce(op) => {
                    (api.all_reduce)(all, all, buffer.len(), dtype, nccl_op(op), comm, stream)
                }
                Launch::ReduceScatter(op) => {
                    (api.reduce_scatter)(all, own, part, dtype, nccl_op(op), comm, stream)
                }
                Launch::AllGather => (api.all_gather)(own, all, part, dtype, comm, stream),
                Launch::Broadcast(root) => {
                    let root = root as c_int;
                    (api.broadcast)(all, all, buffer.len(), dtype, root, comm, stream)
                }
            }
        };
        self.accept(status)
    }

    /// Returns whether everything that was asked for is done.
    pub(crate) fn poll(&self) -> Result<bool, String> {
        self.enter()?;
        let mut state = SUCCESS;
        // SAFETY: the communicator is alive.
        let status = unsafe { (self.nvidia.api.async_error)(self.handle, &raw mut state) };
        self.accept(status)?;
        self.accept(state)?;
        if state == IN_PROGRESS {
            return Ok(false);
        }
        self.nvidia.driver.is_idle(self.stream)
    }

    /// Starts to close in good order, once everything is done; [`Self::poll`] says when.
    pub(crate) fn finalize(&self) -> Result<(), String> {
        self.enter()?;
        // SAFETY: the communicator is alive.
        let status = unsafe { (self.nvidia.api.finalize)(self.handle) };
        self.accept(status)
    }

    /// Frees a finalized communicator.
    pub(crate) fn destroy(mut self) {
        self.free(self.nvidia.api.destroy);
    }

    fn free(&mut self, how: unsafe extern "C" fn(CommPointer) -> c_int) {
        if self.enter().is_err() {
            return;
        }
        let comm = std::mem::replace(&mut self.handle, null_mut());
        if !comm.is_null() {
            // SAFETY: it is alive and used by nobody else: `self` is borrowed mutably.
            let status = unsafe { how(comm) };
            if status != SUCCESS && status != IN_PROGRESS {
                let reason = self.nvidia.api.words(status, null_mut());
                tracing::debug!(reason, "a communicator could not be freed");
            }
        }
        let stream = std::mem::replace(&mut self.stream, null_mut());
        if !stream.is_null() {
            // What runs on it was done or aborted.
            self.nvidia.driver.destroy_stream(stream);
        }
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        self.free(self.nvidia.api.abort);
    }
}

fn nccl_type(dtype: DType) -> c_int {
    match dtype {
        DType::U8 => 1,
        DType::I64 => 4,
        DType::F32 => 7,
        DType::F64 => 8,
        DType::Bf16 => 9,
    }
}

fn nccl_op(op: ReduceOp) -> c_int {
    match op {
        ReduceOp::Sum => 0,
        ReduceOp::Max => 2,
        ReduceOp::Min => 3,
    }
}

//! The few functions of the CUDA driver that NCCL needs beside it, opened when they are used.

use std::ffi::{c_int, c_uint, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::PathBuf;
use std::ptr::null_mut;
use std::sync::Arc;

use libloading::Library;

use crate::buffer::DType;
use crate::error::{Error, Result};
use crate::ffi::DeviceBuffer;

const SUCCESS: c_int = 0;
const NOT_READY: c_int = 600;
const STREAM_NON_BLOCKING: c_uint = 1;

/// A stream, or null.
pub(super) type Stream = *mut c_void;

/// The functions. The library is never closed: its threads may outlive us.
struct Functions {
    init: unsafe extern "C" fn(c_uint) -> c_int,
    device_get: unsafe extern "C" fn(*mut c_int, c_int) -> c_int,
    primary_ctx_retain: unsafe extern "C" fn(*mut *mut c_void, c_int) -> c_int,
    ctx_set_current: unsafe extern "C" fn(*mut c_void) -> c_int,
    stream_create: unsafe extern "C" fn(*mut Stream, c_uint) -> c_int,
    stream_query: unsafe extern "C" fn(Stream) -> c_int,
    stream_destroy: unsafe extern "C" fn(Stream) -> c_int,
    mem_alloc: unsafe extern "C" fn(*mut u64, usize) -> c_int,
    mem_free: unsafe extern "C" fn(u64) -> c_int,
    copy_to_device: unsafe extern "C" fn(u64, *const c_void, usize) -> c_int,
    copy_to_host: unsafe extern "C" fn(*mut c_void, u64, usize) -> c_int,
    _library: ManuallyDrop<Library>,
}

/// The opened driver.
#[derive(Clone)]
pub(super) struct Driver(Arc<Functions>);

/// Opens the first of `places` that can be opened.
pub(super) fn open(
    places: &[PathBuf],
    missing: impl FnOnce(Vec<String>) -> Error,
) -> Result<Library> {
    let mut tried = Vec::new();
    for path in places {
        if path.components().count() > 1 && !path.exists() {
            tried.push(format!("{} (no such file)", path.display()));
            continue;
        }
        // SAFETY: the file is NVIDIA's library or what the user put in its place; its static
        // constructors may run on any thread.
        match unsafe { Library::new(path.as_path()) } {
            Ok(library) => return Ok(library),
            Err(error) => tried.push(format!("{} ({error})", path.display())),
        }
    }
    Err(missing(tried))
}

macro_rules! symbol {
    ($library:ident, $name:literal) => {
        // SAFETY: the types are those of NVIDIA's headers, stable in all versions from the oldest
        // on that is let through.
        *unsafe { $library.get(concat!($name, "\0").as_bytes()) }.map_err(|error| {
            Error::NcclUnusable {
                reason: format!("it has no {} ({error})", $name),
            }
        })?
    };
}

pub(super) use symbol;

impl Driver {
    pub(super) fn open(places: &[PathBuf]) -> Result<Self> {
        let cuda = open(places, |tried| Error::NcclUnusable {
            reason: format!("no NVIDIA driver: tried {}", tried.join(", ")),
        })?;
        Ok(Self(Arc::new(Functions {
            init: symbol!(cuda, "cuInit"),
            device_get: symbol!(cuda, "cuDeviceGet"),
            primary_ctx_retain: symbol!(cuda, "cuDevicePrimaryCtxRetain"),
            ctx_set_current: symbol!(cuda, "cuCtxSetCurrent"),
            stream_create: symbol!(cuda, "cuStreamCreate"),
            stream_query: symbol!(cuda, "cuStreamQuery"),
            stream_destroy: symbol!(cuda, "cuStreamDestroy_v2"),
            mem_alloc: symbol!(cuda, "cuMemAlloc_v2"),
            mem_free: symbol!(cuda, "cuMemFree_v2"),
            copy_to_device: symbol!(cuda, "cuMemcpyHtoD_v2"),
            copy_to_host: symbol!(cuda, "cuMemcpyDtoH_v2"),
            _library: ManuallyDrop::new(cuda),
        })))
    }

    /// Returns the primary context of a GPU, the one that the model's tensors live in. It is never
    /// released.
    pub(super) fn context(&self, gpu: usize) -> Result<*mut c_void, String> {
        let (mut device, mut context) = (0, null_mut());
        // SAFETY: each call writes what the next one reads.
        unsafe {
            check((self.0.init)(0), "cuInit")?;
            check(
                (self.0.device_get)(&raw mut device, gpu as c_int),
                "cuDeviceGet",
            )?;
            let retained = (self.0.primary_ctx_retain)(&raw mut context, device);
            check(retained, "cuDevicePrimaryCtxRetain")?;
        }
        Ok(context)
    }

    /// Makes a context of [`Self::context`] this thread's own.
    pub(super) fn enter(&self, context: *mut c_void) -> Result<(), String> {
        // SAFETY: the context was retained and is never released.
        let status = unsafe { (self.0.ctx_set_current)(context) };
        check(status, "cuCtxSetCurrent")
    }

    pub(super) fn create_stream(&self) -> Result<Stream, String> {
        let mut stream = null_mut();
        // SAFETY: writes a stream of the thread's context.
        let status = unsafe { (self.0.stream_create)(&raw mut stream, STREAM_NON_BLOCKING) };
        check(status, "cuStreamCreate").map(|()| stream)
    }

    /// Returns whether everything on a stream is done.
    pub(super) fn is_idle(&self, stream: Stream) -> Result<bool, String> {
        // SAFETY: streams are made by `create_stream` and live until their owner destroys them.
        match unsafe { (self.0.stream_query)(stream) } {
            NOT_READY => Ok(false),
            status => check(status, "cuStreamQuery").map(|()| true),
        }
    }

    /// Destroys a stream that nobody uses any more.
    pub(super) fn destroy_stream(&self, stream: Stream) {
        // SAFETY: it is its owner that gives it up.
        unsafe { (self.0.stream_destroy)(stream) };
    }
}

fn check(status: c_int, call: &str) -> Result<(), String> {
    if status == SUCCESS {
        Ok(())
    } else {
        Err(format!("{call} failed with CUDA error {status}"))
    }
}

/// Memory on a GPU.
pub(crate) struct DeviceMemory {
    driver: Driver,
    context: *mut c_void,
    pointer: u64,
    len: usize,
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceMemory({} bytes at {:#x})", self.len, self.pointer)
    }
}

impl DeviceMemory {
    pub(super) fn new(driver: Driver, gpu: usize, bytes: &[u8]) -> Result<Self, String> {
        let context = driver.context(gpu)?;
        driver.enter(context)?;
        let mut pointer = 0;
        // SAFETY: writes an address.
        let status = unsafe { (driver.0.mem_alloc)(&raw mut pointer, bytes.len().max(1)) };
        check(status, "cuMemAlloc")?;
        let memory = Self {
            driver,
            context,
            pointer,
            len: bytes.len(),
        };
        let copy = memory.driver.0.copy_to_device;
        // SAFETY: the memory was allocated with this length.
        let status = unsafe { copy(pointer, bytes.as_ptr().cast(), bytes.len()) };
        check(status, "cuMemcpyHtoD")?;
        Ok(memory)
    }

    /// Returns its content.
    pub(crate) fn download(&self) -> Result<Vec<u8>, String> {
        self.driver.enter(self.context)?;
        let mut bytes = vec![0; self.len];
        let copy = self.driver.0.copy_to_host;
        // SAFETY: both sides have this length.
        let status = unsafe { copy(bytes.as_mut_ptr().cast(), self.pointer, self.len) };
        check(status, "cuMemcpyDtoH").map(|()| bytes)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.driver.enter(self.context).is_ok() {
            // SAFETY: nobody else frees it; operations on it were waited for.
            unsafe { (self.driver.0.mem_free)(self.pointer) };
        }
    }
}

/// Names device memory as a buffer of f32 for an operation that its holder waits for.
pub(crate) fn device_f32(memory: &DeviceMemory) -> DeviceBuffer {
    // SAFETY: who asks keeps the memory until the operation has been waited for, as
    // `NcclCheck::reduce` does, and touches it only afterwards.
    unsafe { DeviceBuffer::new(memory.pointer, memory.len / 4, DType::F32) }
}

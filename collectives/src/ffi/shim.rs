//! A safe face for `libpollen_gloo.so`: see `gloo_shim/pollen_gloo.cc` for the other side.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::Path;
use std::time::Duration;

use half::bf16;
use libloading::Library;

use crate::buffer::{HostBuffer, ReduceOp};
use crate::deadline::Deadline;
use crate::error::{Error, Result};
use crate::library::Surroundings;
use crate::store::Store;

/// Must equal what `pollen_gloo_version` returns.
const VERSION: u32 = 1;

type Sink = unsafe extern "C" fn(*mut c_void, *const u8, usize);

#[repr(C)]
struct StoreCallbacks {
    user: *mut c_void,
    set: unsafe extern "C" fn(*mut c_void, *const c_char, *const u8, usize) -> c_int,
    get: unsafe extern "C" fn(*mut c_void, *const c_char, *mut c_void, Sink) -> c_int,
    wait: unsafe extern "C" fn(*mut c_void, *const c_char) -> c_int,
}

type Connect = unsafe extern "C" fn(
    c_int,
    c_int,
    *const c_char,
    *const c_char,
    i64,
    *const StoreCallbacks,
) -> *mut c_void;
type AllReduce =
    unsafe extern "C" fn(*mut c_void, *mut c_void, usize, c_int, c_int, u32, i64) -> c_int;
type Broadcast = unsafe extern "C" fn(*mut c_void, *mut c_void, usize, c_int, u32, i64) -> c_int;
type AllGather = unsafe extern "C" fn(*mut c_void, *mut c_void, usize, u32, i64) -> c_int;
type Barrier = unsafe extern "C" fn(*mut c_void, u32, i64) -> c_int;
type Abort = unsafe extern "C" fn(*mut c_void, *const c_char);
type Destroy = unsafe extern "C" fn(*mut c_void);
type LastError = unsafe extern "C" fn() -> *const c_char;

/// The shim's functions. The library is never closed: Gloo's threads may outlive a session.
struct Shim {
    connect: Connect,
    all_reduce: AllReduce,
    broadcast: Broadcast,
    all_gather: AllGather,
    barrier: Barrier,
    abort: Abort,
    destroy: Destroy,
    last_error: LastError,
    _library: ManuallyDrop<Library>,
}

impl Shim {
    /// Opens the first library that can be opened.
    fn open(surroundings: &Surroundings) -> Result<Self> {
        let mut tried = Vec::new();
        for path in surroundings.candidates() {
            if path.components().count() > 1 && !path.exists() {
                tried.push(format!("{} (no such file)", path.display()));
                continue;
            }
            // SAFETY: the file is our shim or whatever the user put in its place; its static
            // constructors are those of libstdc++ and Gloo, which may run on any thread.
            match unsafe { Library::new(path.as_path()) } {
                Ok(library) => return Self::bind(library, &path),
                Err(error) => tried.push(format!("{} ({error})", path.display())),
            }
        }
        Err(Error::LibraryMissing { tried })
    }

    fn bind(library: Library, path: &Path) -> Result<Self> {
        let outdated = |reason: String| Error::LibraryOutdated {
            path: path.to_owned(),
            reason,
        };
        macro_rules! symbol {
            ($name:literal) => {
                // SAFETY: the types are those of the shim's source; its version, which is looked
                // up first, changes with them.
                *unsafe { library.get($name) }.map_err(|error| outdated(error.to_string()))?
            };
        }
        let version: unsafe extern "C" fn() -> u32 = symbol!(b"pollen_gloo_version\0");
        // SAFETY: takes nothing and returns a number.
        let found = unsafe { version() };
        if found != VERSION {
            return Err(outdated(format!("version {found} instead of {VERSION}")));
        }
        Ok(Self {
            connect: symbol!(b"pollen_gloo_connect\0"),
            all_reduce: symbol!(b"pollen_gloo_all_reduce\0"),
            broadcast: symbol!(b"pollen_gloo_broadcast\0"),
            all_gather: symbol!(b"pollen_gloo_all_gather\0"),
            barrier: symbol!(b"pollen_gloo_barrier\0"),
            abort: symbol!(b"pollen_gloo_abort\0"),
            destroy: symbol!(b"pollen_gloo_destroy\0"),
            last_error: symbol!(b"pollen_gloo_last_error\0"),
            _library: ManuallyDrop::new(library),
        })
    }

    /// Returns this thread's last error.
    fn last_error(&self) -> String {
        // SAFETY: the shim returns a NUL-terminated string that lives until this thread's next call.
        let text = unsafe { CStr::from_ptr((self.last_error)()) };
        text.to_string_lossy().into_owned()
    }

    fn check(&self, status: c_int) -> Result<(), String> {
        if status == 0 {
            Ok(())
        } else {
            Err(self.last_error())
        }
    }
}

/// Where the engine's own connections are made from.
#[derive(Clone, Debug)]
pub(crate) struct Bind {
    /// Used unless `interface` is set; may be an address.
    pub(crate) hostname: String,
    pub(crate) interface: String,
}

/// A connected Gloo session. The operations block; they work in place.
pub(crate) struct Engine {
    shim: Shim,
    handle: *mut c_void,
}

// SAFETY: the session is not tied to a thread; see `Sync` for concurrent calls.
unsafe impl Send for Engine {}
// SAFETY: Gloo allows collectives of different tags at once on one context, and `abort` takes locks
// of its own; `destroy` needs `&mut self`, so no other call is running then.
unsafe impl Sync for Engine {}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Engine({:p})", self.handle)
    }
}

impl Engine {
    /// Opens the library and does nothing else.
    pub(crate) fn check(surroundings: &Surroundings) -> Result<()> {
        Shim::open(surroundings).map(|_| ())
    }

    /// Connects every rank with every other; `store` is a view that nobody else uses.
    pub(crate) fn connect(
        surroundings: &Surroundings,
        rank: u32,
        world: u32,
        bind: &Bind,
        store: &Store,
        deadline: Deadline,
    ) -> Result<Result<Self, String>> {
        let shim = Shim::open(surroundings)?;
        let text = |text: &str| CString::new(text).map_err(|_| "a NUL byte in the host name");
        let (hostname, interface) = match (text(&bind.hostname), text(&bind.interface)) {
            (Ok(hostname), Ok(interface)) => (hostname, interface),
            (Err(reason), _) | (_, Err(reason)) => return Ok(Err(reason.to_owned())),
        };
        let bridge = Bridge {
            store,
            deadline,
            failure: RefCell::new(None),
        };
        let callbacks = StoreCallbacks {
            user: (&raw const bridge).cast_mut().cast(),
            set: bridge_set,
            get: bridge_get,
            wait: bridge_wait,
        };
        // SAFETY: all pointers live until the call returns, which is how long the shim uses them;
        // it calls back on this thread only.
        let handle = unsafe {
            (shim.connect)(
                rank as c_int,
                world as c_int,
                hostname.as_ptr(),
                interface.as_ptr(),
                millis(deadline.remaining()),
                &raw const callbacks,
            )
        };
        if handle.is_null() {
            let failure = bridge.failure.into_inner();
            return failure.map_or_else(|| Ok(Err(shim.last_error())), Err);
        }
        Ok(Ok(Self { shim, handle }))
    }

    pub(crate) fn all_reduce(
        &self,
        buffer: &mut HostBuffer,
        op: ReduceOp,
        tag: u32,
        timeout: Duration,
    ) -> Result<(), String> {
        let (data, len, dtype) = match buffer {
            HostBuffer::F32(values) => (values.as_mut_ptr().cast(), values.len(), 0),
            HostBuffer::F64(values) => (values.as_mut_ptr().cast(), values.len(), 1),
            HostBuffer::I64(values) => (values.as_mut_ptr().cast(), values.len(), 2),
            HostBuffer::U8(values) => (values.as_mut_ptr().cast(), values.len(), 3),
            HostBuffer::Bf16(values) => {
                let mut wide = HostBuffer::F32(values.iter().map(|v| v.to_f32()).collect());
                self.all_reduce(&mut wide, op, tag, timeout)?;
                if let HostBuffer::F32(wide) = wide {
                    for (value, sum) in values.iter_mut().zip(wide) {
                        *value = bf16::from_f32(sum);
                    }
                }
                return Ok(());
            }
        };
        let op = match op {
            ReduceOp::Sum => 0,
            ReduceOp::Max => 1,
            ReduceOp::Min => 2,
        };
        // SAFETY: `data` points to `len` elements of type `dtype`, borrowed mutably until the
        // call returns; the shim's buffers over it end with the call, also on failure.
        let status = unsafe {
            let timeout = millis(timeout);
            (self.shim.all_reduce)(self.handle, data, len, dtype, op, tag, timeout)
        };
        self.shim.check(status)
    }

    pub(crate) fn broadcast(
        &self,
        buffer: &mut HostBuffer,
        root: u32,
        tag: u32,
        timeout: Duration,
    ) -> Result<(), String> {
        let (data, bytes) = raw(buffer);
        // SAFETY: as in `all_reduce`; every bit pattern is valid for every element type.
        let status = unsafe {
            let timeout = millis(timeout);
            (self.shim.broadcast)(self.handle, data, bytes, root as c_int, tag, timeout)
        };
        self.shim.check(status)
    }

    /// `buffer` holds the parts of `world` ranks, of which this rank's is filled in.
    pub(crate) fn all_gather(
        &self,
        buffer: &mut HostBuffer,
        world: u32,
        tag: u32,
        timeout: Duration,
    ) -> Result<(), String> {
        let (data, bytes) = raw(buffer);
        // SAFETY: as in `broadcast`; `world` is the session's, so the parts fit exactly.
        let status = unsafe {
            let (part, timeout) = (bytes / world as usize, millis(timeout));
            (self.shim.all_gather)(self.handle, data, part, tag, timeout)
        };
        self.shim.check(status)
    }

    pub(crate) fn barrier(&self, tag: u32, timeout: Duration) -> Result<(), String> {
        // SAFETY: the handle is that of an open session.
        let status = unsafe { (self.shim.barrier)(self.handle, tag, millis(timeout)) };
        self.shim.check(status)
    }

    /// Closes all connections and wakes a running operation, which then fails with `reason`.
    pub(crate) fn abort(&self, reason: &str) {
        let reason = CString::new(reason.replace('\0', " ")).unwrap_or_default();
        // SAFETY: the handle is that of an open session; the text is copied before it returns.
        unsafe { (self.shim.abort)(self.handle, reason.as_ptr()) }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // SAFETY: the handle came from `connect` and is used for the last time.
        unsafe { (self.shim.destroy)(self.handle) }
    }
}

/// Returns the address and the number of bytes.
fn raw(buffer: &mut HostBuffer) -> (*mut c_void, usize) {
    let bytes = buffer.len() * buffer.dtype().size();
    let data = match buffer {
        HostBuffer::F32(values) => values.as_mut_ptr().cast(),
        HostBuffer::F64(values) => values.as_mut_ptr().cast(),
        HostBuffer::Bf16(values) => values.as_mut_ptr().cast(),
        HostBuffer::I64(values) => values.as_mut_ptr().cast(),
        HostBuffer::U8(values) => values.as_mut_ptr().cast(),
    };
    (data, bytes)
}

fn millis(duration: Duration) -> i64 {
    // Gloo adds it to a clock in nanoseconds: keep far away from overflow.
    let longest = Duration::from_hours(365 * 24);
    i64::try_from(duration.min(longest).as_millis().max(1)).unwrap_or(i64::MAX)
}

/// What the callbacks of one `connect` call work with.
struct Bridge<'a> {
    store: &'a Store,
    deadline: Deadline,
    failure: RefCell<Option<Error>>,
}

impl Bridge<'_> {
    /// Runs a callback; an error is kept and reported as 1.
    ///
    /// # Safety
    /// `user` must point to a live bridge and `key` to a NUL-terminated string.
    unsafe fn run(
        user: *mut c_void,
        key: *const c_char,
        body: impl FnOnce(&Bridge<'_>, &str) -> Result<()>,
    ) -> c_int {
        // SAFETY: the caller's duty.
        let (bridge, key) = unsafe { (&*user.cast::<Bridge<'_>>(), CStr::from_ptr(key)) };
        match body(bridge, &key.to_string_lossy()) {
            Ok(()) => 0,
            Err(error) => {
                *bridge.failure.borrow_mut() = Some(error);
                1
            }
        }
    }
}

unsafe extern "C" fn bridge_set(
    user: *mut c_void,
    key: *const c_char,
    data: *const u8,
    len: usize,
) -> c_int {
    let value = if len == 0 {
        &[][..]
    } else {
        // SAFETY: the shim passes `len` bytes that live until this returns.
        unsafe { std::slice::from_raw_parts(data, len) }
    };
    // SAFETY: the shim passes our own pointer and a C string.
    unsafe { Bridge::run(user, key, |bridge, key| bridge.store.set(key, value)) }
}

unsafe extern "C" fn bridge_get(
    user: *mut c_void,
    key: *const c_char,
    sink: *mut c_void,
    write: Sink,
) -> c_int {
    // SAFETY: the shim passes our own pointer and a C string.
    unsafe {
        Bridge::run(user, key, |bridge, key| {
            let value = bridge.store.get(key, bridge.deadline)?;
            // SAFETY: the shim's own function and argument; it copies the bytes.
            write(sink, value.as_ptr(), value.len());
            Ok(())
        })
    }
}

unsafe extern "C" fn bridge_wait(user: *mut c_void, key: *const c_char) -> c_int {
    // SAFETY: the shim passes our own pointer and a C string.
    unsafe {
        Bridge::run(user, key, |bridge, key| {
            bridge.store.get(key, bridge.deadline).map(|_| ())
        })
    }
}

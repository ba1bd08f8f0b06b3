//! Communicators (Gloo on CPU, NCCL for device memory, local for one process) and the store through
//! which ranks meet. Knows nothing of tensors: flat buffers go in and come back out.
//!
//! ```text
//! launcher or rank 0: StoreServer            gradients: Vec<f32>
//!        ^ TCP: set, get, gather, join             | moved in
//!        |                                         v
//! every rank: Store --rendezvous::connect--> Communicator::all_reduce --> Handle --wait--> Vec<f32>
//!        |                                         | one communication thread, in order
//!        +-- Presence: who died, left, failed --> abort, poll_error
//! ```
//!
//! | module | job |
//! |---|---|
//! | [`backend`] | the [`Communicator`] trait and the [`Handle`] of an operation in flight |
//! | [`buffer`] | host and device buffers, element types, reduction operators |
//! | [`config`] | section `[communicator]` of a recipe |
//! | [`deadline`] | a point in time that waits are bounded by |
//! | [`error`] | what can go wrong, and which ranks are missing |
//! | [`gloo`] | Gloo over TCP, the CPU engine |
//! | [`heartbeat`] | signs of life through the store, and who concludes that a rank hangs |
//! | [`local`] | world size 1 |
//! | `nccl` | NCCL for device memory, beside Gloo for the rest |
//! | `nccl_check` | NCCL held against Gloo, for `pollen gpu-check` |
//! | [`rendezvous`] | from a store, a rank and a generation to a communicator |
//! | [`store`] | key-value server and client, gather, barrier, presence |
//!
//! Gloo and NCCL are always compiled in and need no cargo feature, because nothing links against
//! them: the shim `libpollen_gloo.so` (`make setup` builds it), `libnccl.so.2` and the CUDA driver are
//! opened when a communicator is made.
//!
//! ```
//! use pollen_collectives::{Config, Deadline, ReduceOp, Store, StoreServer, rendezvous};
//! use std::time::Duration;
//!
//! # fn main() -> Result<(), pollen_collectives::Error> {
//! let server = StoreServer::bind("127.0.0.1:0")?;
//! let deadline = Deadline::after(Duration::from_secs(10));
//! let store = Store::connect(&server.address().to_string(), deadline)?;
//! let communicator = rendezvous::connect(&Config::default(), &store, 0, 1, 0)?;
//! let handle = communicator.all_reduce(vec![1.0_f32, 2.0].into(), ReduceOp::Sum)?;
//! let sum: Vec<f32> = handle.wait()?.try_into()?;
//! assert_eq!(sum, [1.0, 2.0]);
//! # Ok(())
//! # }
//! ```

#![deny(unsafe_code)]

pub mod backend;
pub mod buffer;
pub mod config;
pub mod deadline;
pub mod error;
#[allow(
    unsafe_code,
    reason = "the one module that calls C and names device memory"
)]
mod ffi;
pub mod gloo;
pub mod heartbeat;
mod library;
pub mod local;
mod nccl;
mod nccl_check;
pub mod rendezvous;
pub mod store;

pub use backend::{Communicator, Handle};
pub use buffer::{Buffer, DType, HostBuffer, ReduceOp};
pub use config::{Backend, Config};
pub use deadline::Deadline;
pub use error::{Absence, Absent, Error, Result};
pub use ffi::DeviceBuffer;
pub use gloo::Gloo;
pub use heartbeat::{Beat, Hang, HangKind, Watch, WatchdogConfig};
pub use local::Local;
pub use nccl_check::{NcclCheck, NcclReport};
pub use rendezvous::host_name;
pub use store::{Event, Member, MemberState, Presence, Store, StoreServer, Swap};

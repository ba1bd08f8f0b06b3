//! The only module with unsafe code: the shim's C functions, and device memory by address.

mod device;
mod shim;

pub use device::DeviceBuffer;
pub(crate) use shim::{Bind, Engine};

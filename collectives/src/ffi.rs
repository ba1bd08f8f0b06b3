//! The only module with unsafe code: the shim's C functions, NCCL and the CUDA driver, and device
//! memory by address.

mod device;
mod driver;
mod nccl;
mod shim;

pub use device::DeviceBuffer;
pub(crate) use driver::{DeviceMemory, device_f32};
#[cfg(test)]
pub(crate) use nccl::id_of;
pub(crate) use nccl::{Comm, ID_BYTES, Launch, Nvidia};
pub(crate) use shim::{Bind, Engine};

//! Tensors lent to the communicator where they lie, by the address of their memory.
//!
//! The one file here that names raw memory. A lease is safe to drop at any time: memory that an
//! operation may still be working on is never given back.

use std::fmt::{self, Debug};
use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use pollen_collectives::{Communicator, DeviceBuffer};

use crate::device::DeviceKind;
use crate::error::Error;

/// Where gradients are summed and the norm is taken.
#[derive(Clone, Debug)]
pub enum Place {
    /// In host memory, the norm in f64: the CPU's way, with the same bits whatever the world size.
    Host,
    /// On the device, which need not wait for the host. What other ranks need goes out from device
    /// memory if the communicator takes that, else through the host.
    Device(Arc<dyn DeviceMemory>),
}

impl Place {
    /// Returns the place of what is computed on a device.
    ///
    /// # Errors
    /// In a build without CUDA, for a GPU.
    pub fn of(device: &Device) -> Result<Self, Error> {
        if DeviceKind::of(device) == DeviceKind::Cpu {
            return Ok(Self::Host);
        }
        #[cfg(feature = "cuda")]
        return Ok(Self::Device(Arc::new(gpu::CudaMemory)));
        #[cfg(not(feature = "cuda"))]
        Err(Error::internal("a build without CUDA computes on a GPU"))
    }

    /// Returns what lends memory to a communicator, if both can.
    pub(crate) fn lender(&self, communicator: &dyn Communicator) -> Option<&dyn DeviceMemory> {
        match self {
            Self::Device(memory) if communicator.takes_device_memory() => Some(memory.as_ref()),
            _ => None,
        }
    }
}

/// Lends the memory of tensors.
pub trait DeviceMemory: Debug + Send + Sync {
    /// Lends a tensor that nothing else shares memory with, once everything that computes it is
    /// done.
    ///
    /// # Errors
    /// When the tensor is not in this memory, or not in one piece.
    fn lease(&self, tensor: Tensor<1>) -> Result<Lease, Error>;
}

/// A tensor whose memory an operation works on.
pub struct Lease {
    buffer: DeviceBuffer,
    /// Holds the memory and returns the tensor with what is in it then.
    tensor: Option<Box<dyn FnOnce() -> Tensor<1>>>,
}

impl Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lease").field(&self.buffer).finish()
    }
}

impl Lease {
    #[cfg(any(feature = "cuda", test))]
    fn new(buffer: DeviceBuffer, tensor: impl FnOnce() -> Tensor<1> + 'static) -> Self {
        Self {
            buffer,
            tensor: Some(Box::new(tensor)),
        }
    }

    /// Returns what to give to one operation.
    pub(crate) fn buffer(&self) -> DeviceBuffer {
        self.buffer
    }

    /// Returns the tensor; call it when the operation has been waited for.
    pub(crate) fn end(mut self) -> Result<Tensor<1>, Error> {
        let tensor = self.tensor.take();
        Ok(tensor
            .ok_or_else(|| Error::internal("a lease ended twice"))?(
        ))
    }
}

impl Drop for Lease {
    /// An operation that failed may not have let go of the memory.
    fn drop(&mut self) {
        std::mem::forget(self.tensor.take());
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use burn::backend::Cube;
    use burn::tensor::{FloatDType, Tensor};
    use burn_cubecl::CubeBackend;
    use cubecl::cuda::CudaRuntime;
    use cubecl_runtime::runtime::Runtime;
    use pollen_collectives::{DType, DeviceBuffer};

    use super::{DeviceMemory, Lease};
    use crate::error::Error;

    /// Memory that Burn's CUDA backend allocates.
    #[derive(Debug)]
    pub(super) struct CudaMemory;

    impl DeviceMemory for CudaMemory {
        fn lease(&self, tensor: Tensor<1>) -> Result<Lease, Error> {
            let tensor = tensor.without_autodiff();
            let (len, device) = (tensor.dims()[0], tensor.device());
            let dtype = match tensor.dtype().into() {
                FloatDType::F32 => DType::F32,
                FloatDType::BF16 => DType::Bf16,
                other => return Err(Error::internal(format!("a lease of {other:?}"))),
            };
            let fused = tensor
                .clone()
                .try_into_primitive::<Cube>()
                .map_err(|error| Error::internal(format!("a lease of host memory: {error:?}")))?;
            // Runs what fusion has put off, for this tensor and for what it is computed from.
            let client = fused.client.clone();
            let whole = client.resolve_tensor_float::<CubeBackend>(fused);
            if !whole.is_contiguous() {
                return Err(Error::internal(
                    "a lease of a tensor that is not in one piece",
                ));
            }
            let resource = whole
                .client
                .get_resource::<<CudaRuntime as Runtime>::Server>(whole.handle.clone())
                .map_err(|error| Error::internal(format!("no address of a tensor: {error:?}")))?;
            device
                .sync()
                .map_err(|error| Error::internal(format!("the GPU failed: {error:?}")))?;
            let (pointer, size) = (resource.resource().ptr, resource.resource().size);
            if size < (len * dtype.size()) as u64 {
                return Err(Error::internal(format!("{len} x {dtype} in {size} bytes")));
            }
            // SAFETY: the kernels that write it are done. `resource` keeps the allocation in place
            // and goes into the lease, which gives nothing back before the operation has been
            // waited for; the caller lends a tensor that it alone has.
            let buffer = unsafe { DeviceBuffer::new(pointer, len, dtype) };
            Ok(Lease::new(buffer, move || {
                drop((resource, whole));
                tensor
            }))
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use burn::tensor::{DType as Element, TensorData, bf16};
    use pollen_collectives::DType;

    /// Host memory that stands for a GPU's, with a library that takes it for such.
    #[derive(Debug)]
    pub(crate) struct Pretended;

    impl DeviceMemory for Pretended {
        fn lease(&self, tensor: Tensor<1>) -> Result<Lease, Error> {
            let device = tensor.device();
            let data = tensor.into_data();
            Ok(if data.dtype() == Element::BF16 {
                lend::<bf16>(data, DType::Bf16, device)
            } else {
                lend::<f32>(data, DType::F32, device)
            })
        }
    }

    fn lend<T: burn::tensor::Element>(data: TensorData, dtype: DType, device: Device) -> Lease {
        let mut values: Vec<T> = data.try_into_vec().expect("of this type");
        let len = values.len();
        // SAFETY: the lease owns the vector, which does not grow.
        let buffer = unsafe { DeviceBuffer::new(values.as_mut_ptr() as u64, len, dtype) };
        Lease::new(buffer, move || {
            Tensor::from_data(TensorData::new(values, [len]), (&device, T::dtype()))
        })
    }
}

//! Gradients in flat buckets, summed over all ranks.

use burn::tensor::{Device, Tensor, TensorData};
use pollen_collectives::{Buffer, Communicator, HostBuffer, ReduceOp};
use sha2::{Digest, Sha256};

use crate::error::Error;
use crate::layout::Layout;
use crate::optim::host;

/// Flat gradients of one step, one tensor a bucket.
#[derive(Debug, Default)]
pub struct Gradients {
    buckets: Vec<Tensor<1>>,
}

impl Gradients {
    /// Adds the gradients of one micro-batch. A parameter without a gradient counts as zero.
    ///
    /// `named` holds canonical names with flat gradients.
    pub fn add(
        &mut self,
        layout: &Layout,
        named: Vec<(String, Option<Tensor<1>>)>,
        device: &Device,
    ) {
        let mut by_name: std::collections::HashMap<String, Tensor<1>> = named
            .into_iter()
            .filter_map(|(name, gradient)| gradient.map(|gradient| (name, gradient)))
            .collect();
        for (index, bucket) in layout.buckets().iter().enumerate() {
            let parts: Vec<Tensor<1>> = layout.entries()[bucket.entries.clone()]
                .iter()
                .map(|entry| {
                    let zero = || Tensor::zeros([entry.len()], device);
                    by_name.remove(&entry.name).unwrap_or_else(zero)
                })
                .collect();
            let flat = Tensor::cat(parts, 0);
            match self.buckets.get_mut(index) {
                Some(sum) => *sum = sum.clone() + flat,
                None => self.buckets.push(flat),
            }
        }
    }

    /// Returns a short hash of this rank's own gradients.
    pub fn hash(&self) -> String {
        let buckets: Vec<Vec<f32>> = self.buckets.iter().cloned().map(host).collect();
        hash(&buckets)
    }

    /// Sums every bucket over all ranks and returns them as host values, in bucket order.
    ///
    /// All buckets are handed over before the first is waited for.
    pub fn all_reduce(self, communicator: &dyn Communicator) -> Result<Vec<Vec<f32>>, Error> {
        let handles = self
            .buckets
            .into_iter()
            .map(|bucket| {
                let buffer = Buffer::Host(HostBuffer::F32(host(bucket)));
                communicator.all_reduce(buffer, ReduceOp::Sum)
            })
            .collect::<Result<Vec<_>, _>>()?;
        handles
            .into_iter()
            .map(|handle| match handle.wait()? {
                Buffer::Host(HostBuffer::F32(values)) => Ok(values),
                other => Err(Error::internal(format!(
                    "all-reduce of f32 returned {other:?}"
                ))),
            })
            .collect()
    }
}

/// Sums a small vector of f64 over all ranks.
pub fn sum_f64(communicator: &dyn Communicator, values: Vec<f64>) -> Result<Vec<f64>, Error> {
    let handle = communicator.all_reduce(Buffer::Host(HostBuffer::F64(values)), ReduceOp::Sum)?;
    match handle.wait()? {
        Buffer::Host(HostBuffer::F64(values)) => Ok(values),
        other => Err(Error::internal(format!(
            "all-reduce of f64 returned {other:?}"
        ))),
    }
}

/// Copies host values to the device.
pub fn to_device(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let len = values.len();
    Tensor::from_data(TensorData::new(values, [len]), device)
}

/// Returns a short hash of gradients, for the proof that ranks exchanged them.
pub fn hash(buckets: &[Vec<f32>]) -> String {
    let mut digest = Sha256::new();
    for bucket in buckets {
        for value in bucket {
            digest.update(value.to_le_bytes());
        }
    }
    digest
        .finalize()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

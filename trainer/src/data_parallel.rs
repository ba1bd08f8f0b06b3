//! Gradients in flat buckets, summed over micro-batches and then over all ranks.
//!
//! ```text
//! backward, segment by segment --names--> bucket complete --last micro-batch--> reduce, meanwhile ...
//! ```

use std::collections::HashMap;
use std::sync::Arc;

use burn::tensor::{Device, FloatDType, Tensor, TensorData, bf16};
use pollen_collectives::{Buffer, Communicator, Handle, HostBuffer, ReduceOp};
use sha2::{Digest, Sha256};

use crate::config::ReduceDtype;
use crate::device_memory::{Lease, Place};
use crate::error::Error;
use crate::layout::{Bucket, Layout, Shard};
use crate::optim::host;

/// How gradients are summed over the ranks.
#[derive(Clone, Debug)]
pub struct Reduction {
    /// The ranks.
    pub communicator: Arc<dyn Communicator>,
    /// What this rank gets of each bucket.
    pub shard: Shard,
    /// Element type on the wire.
    pub dtype: ReduceDtype,
    /// Whether a bucket is sent as soon as it is complete, or all of them at the end.
    pub overlap: bool,
    /// Where it is done.
    pub place: Place,
}

/// A bucket that was sent.
#[derive(Debug)]
enum Flight {
    /// Nobody else has anything to add.
    Here(Tensor<1>),
    /// Through host memory.
    Host(Handle),
    /// In the device memory where it lies.
    Device(Handle, Lease),
}

/// The gradients of one step.
#[derive(Debug)]
pub struct Gradients<'a> {
    layout: &'a Layout,
    reduction: &'a Reduction,
    device: &'a Device,
    /// Gradients that have come of buckets that are not complete.
    arrived: HashMap<String, Option<Tensor<1>>>,
    /// By bucket: sums over micro-batches.
    sums: Vec<Option<Tensor<1>>>,
    /// By bucket: reductions in flight.
    flights: Vec<Option<Flight>>,
    /// Buckets that are complete but wait for the end of the backward pass.
    held: Vec<usize>,
    /// Over this rank's own gradients, if they are to be told from those of other ranks.
    own: Option<Sha256>,
}

impl<'a> Gradients<'a> {
    /// Starts a step; with `prove` the rank's own gradients are hashed before they are sent.
    pub fn new(
        layout: &'a Layout,
        reduction: &'a Reduction,
        device: &'a Device,
        prove: bool,
    ) -> Self {
        let buckets = layout.buckets().len();
        Self {
            layout,
            reduction,
            device,
            arrived: HashMap::new(),
            sums: vec![None; buckets],
            flights: (0..buckets).map(|_| None).collect(),
            held: Vec::new(),
            own: prove.then(Sha256::new),
        }
    }

    /// Adds gradients of one micro-batch: canonical names with flat values, a part of the model at
    /// a time. A parameter without a gradient counts as zero. With `last`, what completes a bucket
    /// has it sent.
    pub fn add(
        &mut self,
        named: Vec<(String, Option<Tensor<1>>)>,
        last: bool,
    ) -> Result<(), Error> {
        self.arrived.extend(named);
        // All ranks go through the same segments and buckets, so they send in the same order.
        let complete: Vec<usize> = (0..self.layout.buckets().len())
            .filter(|&index| self.is_complete(index))
            .collect();
        for index in complete {
            let entries = &self.layout.entries()[self.layout.buckets()[index].entries.clone()];
            let parts = entries.iter().map(|entry| {
                let gradient = self.arrived.remove(&entry.name).flatten();
                gradient.unwrap_or_else(|| Tensor::zeros([entry.len()], self.device))
            });
            let flat = Tensor::cat(parts.collect(), 0);
            self.sums[index] = Some(match self.sums[index].take() {
                Some(sum) => sum + flat,
                None => flat,
            });
            match (last, self.reduction.overlap) {
                (false, _) => {}
                (true, true) => self.send(index)?,
                (true, false) => self.held.push(index),
            }
        }
        Ok(())
    }

    fn is_complete(&self, index: usize) -> bool {
        let entries = &self.layout.entries()[self.layout.buckets()[index].entries.clone()];
        entries
            .iter()
            .all(|entry| self.arrived.contains_key(&entry.name))
    }

    fn send(&mut self, index: usize) -> Result<(), Error> {
        let sum = self.sums[index].take();
        let sum = sum.ok_or_else(|| Error::internal("a bucket is sent twice"))?;
        let sum = sum.without_autodiff();
        if let Some(own) = &mut self.own {
            update(own, &host(sum.clone()));
        }
        let communicator = self.reduction.communicator.as_ref();
        let padded = padded_len(&self.layout.buckets()[index], communicator);
        self.flights[index] = Some(self.reduction.send(sum, padded)?);
        Ok(())
    }

    /// Waits for the sums over all ranks: this rank's share of each bucket, and the hash of its own
    /// gradients if it was asked for.
    pub fn finish(mut self) -> Result<(Vec<Tensor<1>>, Option<String>), Error> {
        for index in std::mem::take(&mut self.held) {
            self.send(index)?;
        }
        let device = self.device.clone().inner();
        let flights = self.flights.into_iter().zip(self.layout.buckets());
        let reduced = flights.map(|(flight, bucket)| {
            let flight = flight.ok_or_else(|| Error::internal("a bucket was not complete"))?;
            let share = bucket.share(self.reduction.shard);
            match flight {
                Flight::Here(sum) => Ok(sum),
                Flight::Host(handle) => {
                    let mut values: Vec<f32> = match handle.wait()? {
                        Buffer::Host(HostBuffer::F32(values)) => values,
                        Buffer::Host(HostBuffer::Bf16(values)) => {
                            values.into_iter().map(bf16::to_f32).collect()
                        }
                        other => {
                            let said = format!("a reduction returned {other:?}");
                            return Err(Error::internal(said));
                        }
                    };
                    values.truncate(share.len());
                    Ok(to_device(values, &device))
                }
                Flight::Device(handle, lease) => {
                    handle.wait()?;
                    // In place: the share lies where it lies in the bucket.
                    Ok(lease.end()?.slice([share]).cast(FloatDType::F32))
                }
            }
        });
        let reduced = reduced.collect::<Result<_, _>>()?;
        Ok((reduced, self.own.map(short_hash)))
    }
}

impl Reduction {
    /// Sends a bucket as `padded` values. The order of a sum depends on the length: it is the same
    /// with and without shards.
    fn send(&self, sum: Tensor<1>, padded: usize) -> Result<Flight, Error> {
        if let Some(memory) = self.place.lender(self.communicator.as_ref()) {
            let own = own_memory(sum, 0, padded);
            let own = if self.narrows() {
                own.cast(FloatDType::BF16)
            } else {
                own
            };
            let lease = memory.lease(own)?;
            let handle = self.submit(Buffer::Device(lease.buffer()))?;
            return Ok(Flight::Device(handle, lease));
        }
        if self.communicator.world_size() == 1 {
            return Ok(Flight::Here(sum));
        }
        let mut values = host(sum);
        values.resize(padded, 0.0);
        let buffer = if self.narrows() {
            HostBuffer::Bf16(values.into_iter().map(bf16::from_f32).collect())
        } else {
            HostBuffer::F32(values)
        };
        Ok(Flight::Host(self.submit(Buffer::Host(buffer))?))
    }

    fn submit(&self, buffer: Buffer) -> Result<Handle, Error> {
        Ok(if self.shard == Shard::WHOLE {
            self.communicator.all_reduce(buffer, ReduceOp::Sum)?
        } else {
            self.communicator.reduce_scatter(buffer, ReduceOp::Sum)?
        })
    }

    /// Returns whether values are rounded on the wire.
    fn narrows(&self) -> bool {
        self.dtype == ReduceDtype::Bf16 && self.communicator.world_size() > 1
    }
}

/// Copies values into memory that nothing else shares, as the part of `len` zeros from `start` on.
pub(crate) fn own_memory(values: Tensor<1>, start: usize, len: usize) -> Tensor<1> {
    let end = start + values.dims()[0];
    Tensor::zeros([len], &values.device()).slice_assign([start..end], values)
}

/// Returns the length of a bucket that divides by the number of ranks.
pub fn padded_len(bucket: &Bucket, communicator: &dyn Communicator) -> usize {
    let world = communicator.world_size() as usize;
    bucket.part_len(world) * world
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

fn update(digest: &mut Sha256, values: &[f32]) {
    for value in values {
        digest.update(value.to_le_bytes());
    }
}

/// Returns a short hash of the sums of squares of the reduced gradient: the same on all ranks.
pub fn hash(square_sums: &[f64]) -> String {
    let mut digest = Sha256::new();
    for sum in square_sums {
        digest.update(sum.to_le_bytes());
    }
    short_hash(digest)
}

fn short_hash(digest: Sha256) -> String {
    let digest = digest.finalize();
    digest
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests;

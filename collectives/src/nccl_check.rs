//! Holds NCCL against Gloo on real device memory: what `pollen gpu-check` runs on every rank.

use std::time::{Duration, Instant};

use pollen_core::Seed;
use serde::{Deserialize, Serialize};

use crate::backend::Communicator;
use crate::buffer::{Buffer, DType, ReduceOp};
use crate::config::{Backend, Config};
use crate::deadline::Deadline;
use crate::error::{Error, Result};
use crate::ffi::{DeviceMemory, Nvidia, device_f32};
use crate::nccl::{Nccl, Places};
use crate::rendezvous::connect_gloo;
use crate::store::Store;

/// Generation of the check's communicator; it has a store of its own.
const GENERATION: u64 = 1;
/// Reductions that are timed.
const REPEATS: u32 = 10;

/// What one rank found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NcclReport {
    /// The rank.
    pub rank: u32,
    /// f32 values of the buffer.
    pub values: usize,
    /// Values that differ from Gloo's sum by more than rounding.
    pub wrong: usize,
    /// Median seconds of an all-reduce of the buffer.
    pub seconds: f64,
}

/// A rank that is connected over NCCL, with a buffer on its GPU.
#[derive(Debug)]
pub struct NcclCheck {
    nccl: Nccl,
    memory: DeviceMemory,
    values: usize,
}

impl NcclCheck {
    /// Connects this rank with the others of the same store.
    ///
    /// # Errors
    /// When a library is missing, the GPU cannot be used or a rank does not come in time.
    pub fn connect(
        store: &Store,
        (rank, world): (u32, u32),
        gpu: usize,
        values: usize,
        timeout: Duration,
    ) -> Result<Self> {
        let places = crate::library::nccl_places(std::path::Path::new(""));
        Self::connect_with(store, (rank, world), gpu, values, timeout, &places)
    }

    pub(crate) fn connect_with(
        store: &Store,
        (rank, world): (u32, u32),
        gpu: usize,
        values: usize,
        timeout: Duration,
        places: &Places,
    ) -> Result<Self> {
        let config = Config {
            backend: Backend::Gloo,
            timeout,
            join_timeout: timeout,
            ..Config::default()
        };
        let unusable = |reason| Error::NcclUnusable { reason };
        let bytes: Vec<u8> = own(rank, values)
            .into_iter()
            .flat_map(f32::to_le_bytes)
            .collect();
        let nvidia = Nvidia::open(&places.nccl, &places.driver)?;
        let memory = nvidia.upload(gpu, &bytes).map_err(unusable)?;
        let gloo = connect_gloo(&config, store, rank, world, GENERATION)?;
        let view = store.prefixed(&format!("g{GENERATION}/communicator/"));
        let limits = (timeout, Deadline::after(timeout));
        Ok(Self {
            nccl: Nccl::start(gloo, gpu, &view, places, limits)?,
            memory,
            values,
        })
    }

    /// Sums the ranks' buffers over NCCL and over Gloo, and times NCCL.
    ///
    /// # Errors
    /// When an operation fails.
    pub fn compare(&self) -> Result<NcclReport> {
        let rank = self.nccl.rank();
        let host = own(rank, self.values);
        let wanted = self.nccl.all_reduce(host.into(), ReduceOp::Sum)?.wait()?;
        let wanted: Vec<f32> = wanted.try_into()?;
        self.reduce()?;
        let unusable = |reason| Error::NcclUnusable { reason };
        let bytes = self.memory.download().map_err(unusable)?;
        let (got, _) = bytes.as_chunks::<4>();
        // Ranks may be added in another order: one rounding for each.
        let bound = self.nccl.world_size() as f32 * f32::EPSILON;
        let differs = |(got, wanted): (&[u8; 4], &f32)| {
            let apart = (f32::from_le_bytes(*got) - wanted).abs();
            // Not a number differs, too.
            !matches!(
                apart.partial_cmp(&(bound * wanted.abs().max(1.0))),
                Some(std::cmp::Ordering::Less | std::cmp::Ordering::Equal)
            )
        };
        let wrong = got
            .iter()
            .zip(&wanted)
            .filter(|pair| differs(*pair))
            .count();
        let mut seconds = Vec::new();
        for _ in 0..REPEATS {
            let start = Instant::now();
            self.reduce()?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        seconds.sort_by(f64::total_cmp);
        Ok(NcclReport {
            rank,
            values: self.values,
            wrong,
            seconds: seconds[seconds.len() / 2],
        })
    }

    /// Reduces the buffer again and again until that fails, as it does when another rank dies.
    pub fn until_failure(&self) -> Error {
        loop {
            if let Err(error) = self.reduce() {
                return error;
            }
        }
    }

    /// Ends the connection here and on the other ranks.
    pub fn abort(&self) {
        self.nccl.abort();
    }

    /// Sums in place. Sums of sums grow without end; only the first is looked at.
    fn reduce(&self) -> Result<()> {
        let buffer = device_f32(&self.memory);
        debug_assert_eq!(buffer.dtype(), DType::F32);
        let sum = self
            .nccl
            .all_reduce(Buffer::Device(buffer), ReduceOp::Sum)?;
        sum.wait()?;
        Ok(())
    }
}

/// Returns a rank's values, each of its own size.
fn own(rank: u32, values: usize) -> Vec<f32> {
    let mut own = vec![0.0; values];
    let seed = Seed::new(7).child("nccl check").index(u64::from(rank));
    seed.draws().fill_normal(&mut own);
    own
}

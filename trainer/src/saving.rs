//! Saving beside the training: the step waits until what is saved is held, a thread does the rest.
//!
//! ```text
//! step:    ... update | copy from GPU to host memory | next step ...
//! thread:              write own part --sizes and hashes--> rank 0: publish, delete old ones
//! ```
//! One save is in flight at a time: the next one waits for it. A thread talks to the other ranks
//! through the store alone, never by a collective, which belongs to the step.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use burn::tensor::Tensor;
use pollen_checkpoints::{
    Checkpoints, Claim, FileRecord, FlatSlice, ManifestHead, Published, Source, TensorSlice, Values,
};
use pollen_collectives::{Deadline, Store, rendezvous};
use pollen_core::Clock;
use pollen_observe::{Event, EventLog};

use crate::device::DeviceKind;
use crate::error::Error;
use crate::optim::host;
use crate::recovery::{from_json, to_json};

/// What all saves of one rank share.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) checkpoints: Checkpoints,
    /// What `checkpoints` runs on: it must outlive a save that a failing step leaves behind.
    pub(crate) _runtime: Arc<tokio::runtime::Runtime>,
    pub(crate) claim: Claim,
    pub(crate) store: Store,
    pub(crate) rank: u32,
    pub(crate) world_size: u32,
    /// How long ranks wait for each other's part.
    pub(crate) deadline: Duration,
    pub(crate) retention: pollen_checkpoints::Config,
    /// Saved as contract.json by rank 0.
    pub(crate) contract: Vec<u8>,
    pub(crate) events: Arc<EventLog>,
    pub(crate) clock: Arc<dyn Clock>,
}

/// Values of a snapshot: the training may go on, they stay.
#[derive(Debug)]
pub(crate) enum Kept {
    /// A copy in host memory of what the GPU had.
    Copied(Arc<Vec<f32>>),
    /// The tensor itself, which lies in host memory: an update makes new tensors, and writes into
    /// none that is held.
    Held(Box<Tensor<1>>),
}

impl Kept {
    /// Keeps the values of a tensor on a device of this kind.
    pub(crate) fn of(values: Tensor<1>, kind: DeviceKind) -> Self {
        match kind {
            DeviceKind::Cpu => Self::Held(Box::new(values)),
            DeviceKind::Cuda => Self::Copied(Arc::new(host(values))),
        }
    }
}

impl Source for Kept {
    fn count(&self) -> usize {
        match self {
            Self::Copied(values) => values.len(),
            Self::Held(values) => values.dims()[0],
        }
    }

    fn values(&self) -> Arc<Vec<f32>> {
        match self {
            Self::Copied(values) => Arc::clone(values),
            Self::Held(values) => Arc::new(host(values.as_ref().clone())),
        }
    }
}

/// Name, shape and values of a whole tensor.
pub(crate) type NamedTensor = (String, Vec<usize>, Kept);

/// One rank's part of a checkpoint.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) head: ManifestHead,
    /// Whole tensors.
    pub(crate) weights: Vec<NamedTensor>,
    /// The averaged weights of the same tensors, if there are any.
    pub(crate) averages: Option<Vec<NamedTensor>>,
    /// Ranges of the optimizer's flat arrays: name, first element, values.
    pub(crate) moments: Vec<(&'static str, usize, Kept)>,
    /// Length of each flat array.
    pub(crate) flat_len: usize,
}

/// The saves of one rank, one at a time.
#[derive(Debug)]
pub(crate) struct Saver {
    place: Arc<Place>,
    flight: Flight,
}

#[derive(Debug)]
enum Flight {
    None,
    Writing(JoinHandle<Result<(), Error>>),
    Failed(Error),
}

impl Saver {
    pub(crate) fn new(place: Place) -> Self {
        Self {
            place: Arc::new(place),
            flight: Flight::None,
        }
    }

    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    /// Returns whether the save in flight has failed; [`Self::settle`] tells how.
    pub(crate) fn has_failed(&mut self) -> bool {
        if matches!(&self.flight, Flight::Writing(thread) if thread.is_finished())
            && let Err(error) = self.settle()
        {
            self.flight = Flight::Failed(error);
        }
        matches!(self.flight, Flight::Failed(_))
    }

    /// Waits for the save in flight, if there is one, and returns its error.
    pub(crate) fn settle(&mut self) -> Result<(), Error> {
        match std::mem::replace(&mut self.flight, Flight::None) {
            Flight::None => Ok(()),
            Flight::Writing(thread) => thread
                .join()
                .unwrap_or_else(|_| Err(Error::internal("the thread that saves panicked"))),
            Flight::Failed(error) => Err(error),
        }
    }

    /// Waits for the save in flight, takes `snapshot` and writes in the background.
    pub(crate) fn save(&mut self, snapshot: impl FnOnce() -> Snapshot) -> Result<(), Error> {
        let began = self.place.clock.monotonic();
        self.settle()?;
        let snapshot = snapshot();
        let since = move |clock: &dyn Clock| clock.monotonic().saturating_sub(began).as_secs_f64();
        let stall_s = since(self.place.clock.as_ref());
        let place = Arc::clone(&self.place);
        let write = move || {
            crate::faults::saving(snapshot.head.step);
            let step = snapshot.head.step;
            if let Some(published) = place.write(snapshot)? {
                place.events.append(Event::Checkpoint {
                    step,
                    url: published.url,
                    bytes: published.bytes,
                    stall_s,
                    seconds: since(place.clock.as_ref()),
                })?;
                place.checkpoints.retain(&place.claim, &place.retention)?;
            }
            Ok(())
        };
        let thread = std::thread::Builder::new()
            .name("pollen-save".into())
            .spawn(write)
            .map_err(|source| Error::File {
                path: "the thread that saves".into(),
                source,
            })?;
        self.flight = Flight::Writing(thread);
        Ok(())
    }
}

impl Place {
    /// Writes this rank's part; rank 0 publishes when all parts are there. Returns what was
    /// published on rank 0, nothing elsewhere.
    fn write(&self, snapshot: Snapshot) -> Result<Option<Published>, Error> {
        let step = snapshot.head.step;
        let own = self.write_part(&snapshot);
        let told = own.as_ref().map_err(ToString::to_string);
        // A rank that died gives nothing any more; what it gave before counts.
        let gone = || rendezvous::gone_ranks(&self.store, self.claim.generation);
        let parts = self.store.gather_from_living(
            &format!("checkpoint/{step}"),
            (self.rank, self.world_size),
            &to_json(&told)?,
            Deadline::after(self.deadline),
            &gone,
        )?;
        // Its own failure says most; the others hear of it.
        own?;
        let done = format!("published/{step}");
        if self.rank != 0 {
            let from = (0, self.world_size);
            let deadline = Deadline::after(self.deadline);
            let verdict = self.store.get_from(&done, from, deadline, &gone)?;
            return match from_json::<Result<(), String>>(&verdict)? {
                Ok(()) => Ok(None),
                Err(reason) => Err(Error::Unpublished { step, reason }),
            };
        }
        let published = join_parts(step, &parts).and_then(|files| {
            Ok(self
                .checkpoints
                .publish(&self.claim, snapshot.head, files)?)
        });
        let verdict = published.as_ref().map(|_| ()).map_err(ToString::to_string);
        self.store.set(&done, &to_json(&verdict)?)?;
        published.map(Some)
    }

    fn write_part(&self, snapshot: &Snapshot) -> Result<Vec<FileRecord>, Error> {
        let writer =
            self.checkpoints
                .writer(&self.claim, snapshot.head.step, self.rank, self.world_size);
        let moments: Vec<FlatSlice<'_>> = snapshot
            .moments
            .iter()
            .map(|(name, offset, values)| FlatSlice {
                name: (*name).to_owned(),
                global_len: snapshot.flat_len as u64,
                offset: *offset as u64,
                values: Values::From(values),
            })
            .collect();
        let averages = snapshot.averages.as_deref().map(slices);
        let weights = slices(&snapshot.weights);
        let step = snapshot.head.step;
        let begin = || crate::faults::saving(step);
        let mut files = writer.write_state(&weights, &moments, averages.as_deref(), begin)?;
        if self.rank == 0 {
            files.push(writer.write_file("contract.json", self.contract.clone().into())?);
        }
        Ok(files)
    }
}

fn slices(tensors: &[NamedTensor]) -> Vec<TensorSlice<'_>> {
    tensors
        .iter()
        .map(|(name, shape, values)| TensorSlice {
            name: name.clone(),
            shape: shape.clone(),
            values: Values::From(values),
        })
        .collect()
}

/// Returns the files of all ranks, or which rank could not write its part and why.
fn join_parts(step: u64, parts: &[Vec<u8>]) -> Result<Vec<FileRecord>, Error> {
    let mut files = Vec::new();
    for (rank, part) in parts.iter().enumerate() {
        let part: Result<Vec<FileRecord>, String> = from_json(part)?;
        files.extend(part.map_err(|reason| Error::Unpublished {
            step,
            reason: format!("rank {rank} could not write its part: {reason}"),
        })?);
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn what_is_kept_outlives_the_update() {
        for kind in [DeviceKind::Cpu, DeviceKind::Cuda] {
            let mut weights = Tensor::<1>::from_floats([1.0, 2.0, 3.0], &Device::flex());
            let kept = Kept::of(weights.clone(), kind);
            let part = Kept::of(weights.clone().slice([1..3]), kind);
            // Arithmetic works in place where a tensor has one owner.
            weights = weights.add_scalar(1.0).mul_scalar(10.0);
            assert_eq!(host(weights), [20.0, 30.0, 40.0]);
            assert_eq!((kept.count(), part.count()), (3, 2));
            assert_eq!(*kept.values(), [1.0, 2.0, 3.0], "{kind:?}");
            assert_eq!(*part.values(), [2.0, 3.0], "{kind:?}");
        }
    }
}

//! Saving beside the training: the step waits for the copy to host memory, a thread does the rest.
//!
//! ```text
//! step:    ... update | copy to host memory | next step ...
//! thread:              write own part --sizes and hashes--> rank 0: publish, delete old ones
//! ```
//! One save is in flight at a time: the next one waits for it. A thread talks to the other ranks
//! through the store alone, never by a collective, which belongs to the step.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use pollen_checkpoints::{
    Checkpoints, Claim, FileRecord, FlatSlice, ManifestHead, Published, TensorSlice, Values,
};
use pollen_collectives::{Deadline, Store, rendezvous};
use pollen_core::Clock;
use pollen_observe::{Event, EventLog};

use crate::error::Error;
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

/// Name, shape and values of a whole tensor.
pub(crate) type NamedTensor = (String, Vec<usize>, Arc<Vec<f32>>);

/// One rank's part of a checkpoint, copied to host memory: the training may go on and change what
/// it was copied from.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) head: ManifestHead,
    /// Whole tensors.
    pub(crate) weights: Vec<NamedTensor>,
    /// The averaged weights of the same tensors, if there are any.
    pub(crate) averages: Option<Vec<NamedTensor>>,
    /// Ranges of the optimizer's flat arrays: name, first element, values.
    pub(crate) moments: Vec<(&'static str, usize, Arc<Vec<f32>>)>,
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

    /// Waits for the save in flight, copies with `snapshot` and writes in the background.
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
                values: Values::Shared(values),
            })
            .collect();
        let mut files = vec![
            writer.write_model(&slices(&snapshot.weights))?,
            writer.write_flat(&moments)?,
        ];
        if let Some(averages) = &snapshot.averages {
            files.push(writer.write_ema(&slices(averages))?);
        }
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
            values: Values::Shared(values),
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

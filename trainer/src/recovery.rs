//! What is saved and restored with all ranks; `saving` writes it beside the training.

use std::sync::Arc;
use std::time::Duration;

use burn::tensor::Tensor;
use pollen_checkpoints::{Checkpoints, Claim, ManifestHead, Restored};
use pollen_collectives::{Deadline, Store, rendezvous};
use pollen_core::Clock;
use pollen_observe::EventLog;
use serde::{Deserialize, Serialize};

use crate::device::DeviceKind;
use crate::error::Error;
use crate::layout::Shard;
use crate::saving::{Kept, NamedTensor, Place, Saver, Snapshot};
use crate::step::Trainer;

/// A run's checkpoints as one rank of one generation uses them.
#[derive(Debug)]
pub struct Recovery {
    saver: Saver,
    identity: Identity,
}

/// What connects a rank with its run's checkpoints.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) checkpoints: Checkpoints,
    pub(crate) runtime: Arc<tokio::runtime::Runtime>,
    pub(crate) store: Store,
    pub(crate) rank: u32,
    pub(crate) world_size: u32,
    pub(crate) generation: u64,
    /// How long ranks wait for each other.
    pub(crate) deadline: Duration,
    pub(crate) config: pollen_checkpoints::Config,
    pub(crate) events: Arc<EventLog>,
    pub(crate) clock: Arc<dyn Clock>,
}

/// What a checkpoint must agree on with the run that restores it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Hash of the recipe without steps, budget and engine.
    pub config_hash: String,
    /// Hash of the flat layout of the trained parameters.
    pub layout_hash: String,
    /// Version of the sample order.
    pub order_version: u32,
    /// Hash of each dataset.
    pub dataset_hashes: std::collections::BTreeMap<String, String>,
    /// What serving needs; saved as contract.json.
    pub contract: Vec<u8>,
}

/// What rank 0 found, told to all ranks.
#[derive(Debug, Serialize, Deserialize)]
struct Start {
    claim: Claim,
    restored: Option<Restored>,
}

impl Recovery {
    /// Claims the generation and finds the newest checkpoint that verifies; all ranks get the same.
    pub(crate) fn start(
        to: Connection,
        identity: Identity,
    ) -> Result<(Self, Option<Restored>), Error> {
        const KEY: &str = "restore";
        if to.rank == 0 {
            let claim = to.checkpoints.claim(to.generation)?;
            let restored = to.checkpoints.newest_by(to.config.verify)?;
            to.store.set(KEY, &to_json(&Start { claim, restored })?)?;
        }
        let gone = || rendezvous::gone_ranks(&to.store, to.generation);
        let from = (0, to.world_size);
        let start = to
            .store
            .get_from(KEY, from, Deadline::after(to.deadline), &gone)?;
        let start: Start = from_json(&start)?;
        let saver = Saver::new(Place {
            checkpoints: to.checkpoints,
            _runtime: to.runtime,
            claim: start.claim,
            store: to.store,
            rank: to.rank,
            world_size: to.world_size,
            deadline: to.deadline,
            retention: to.config,
            contract: identity.contract.clone(),
            events: to.events,
            clock: to.clock,
        });
        Ok((Self { saver, identity }, start.restored))
    }

    /// Refuses a checkpoint that belongs to another model, sample order or data.
    pub fn check(&self, restored: &Restored, accept_new_data: bool) -> Result<(), Error> {
        let head = &restored.manifest.head;
        let mismatch = |reason: String| {
            Err(Error::Mismatch {
                step: head.step,
                reason,
            })
        };
        if head.layout_hash != self.identity.layout_hash {
            return mismatch(
                "the model has other parameters; start a new run or restore the recipe".into(),
            );
        }
        if head.order_version != self.identity.order_version {
            return mismatch(format!(
                "its sample order has version {}, this build makes {}; go on with the build that \
                 wrote it",
                head.order_version, self.identity.order_version
            ));
        }
        for (name, hash) in &self.identity.dataset_hashes {
            if head.dataset_hashes.get(name) != Some(hash) && !accept_new_data {
                return mismatch(format!(
                    "dataset `{name}` changed since; restore it, or give `pollen launch` \
                     --accept-new-data to go on with another sample order"
                ));
            }
        }
        Ok(())
    }

    /// Returns the reader of the run's checkpoints.
    pub fn checkpoints(&self) -> &Checkpoints {
        &self.saver.place().checkpoints
    }

    /// Keeps this rank's part as it is now and has it written beside the training. Waits for the
    /// save in flight first, and returns its error.
    pub(crate) fn save(&mut self, trainer: &Trainer, gpu_hours_spent: f64) -> Result<(), Error> {
        let Self { saver, identity } = self;
        let (rank, world_size) = (saver.place().rank, saver.place().world_size);
        saver.save(|| Snapshot {
            head: head(trainer, identity, world_size, gpu_hours_spent),
            weights: own_tensors(trainer, trainer.model.flat_parameters(), (rank, world_size)),
            averages: trainer.ema.as_ref().map(|ema| {
                let averages = ema.flat_parameters(&trainer.model, &trainer.layout);
                own_tensors(trainer, averages, (rank, world_size))
            }),
            moments: own_moments(trainer, rank, world_size),
            flat_len: trainer.layout.len(),
        })
    }

    /// Returns whether the save in flight has failed; [`Self::settle`] tells how.
    pub(crate) fn has_failed(&mut self) -> bool {
        self.saver.has_failed()
    }

    /// Waits for the save in flight, if there is one, and returns its error.
    pub(crate) fn settle(&mut self) -> Result<(), Error> {
        self.saver.settle()
    }
}

fn head(
    trainer: &Trainer,
    identity: &Identity,
    world_size: u32,
    gpu_hours_spent: f64,
) -> ManifestHead {
    let identity = identity.clone();
    ManifestHead {
        step: trainer.step,
        updates: trainer.optimizer.updates(),
        samples: trainer.step * u64::from(trainer.config.train.global_batch),
        world_size,
        config_hash: identity.config_hash.clone(),
        recipe_hash: identity.config_hash,
        layout_hash: identity.layout_hash,
        order_version: identity.order_version,
        dataset_hashes: identity.dataset_hashes,
        gpu_hours_spent,
        eval_error: trainer.eval_error(),
        extra: serde_json::json!({
            "non_finite": trainer.non_finite,
            "bad_samples": trainer.bad_samples,
        }),
    }
}

/// Returns the tensors that this rank writes of `values`, one a parameter: an even share of the
/// bytes, by name order.
fn own_tensors(
    trainer: &Trainer,
    values: Vec<(String, Tensor<1>)>,
    (rank, world_size): (u32, u32),
) -> Vec<NamedTensor> {
    let infos = trainer.model.parameters();
    let total: usize = infos
        .iter()
        .map(|info| info.shape.iter().product::<usize>())
        .sum();
    let kind = DeviceKind::of(&trainer.device);
    let mut before = 0;
    let mut own = Vec::new();
    for (info, (name, values)) in infos.into_iter().zip(values) {
        let owner = before as u64 * u64::from(world_size) / total.max(1) as u64;
        before += info.shape.iter().product::<usize>();
        if owner == u64::from(rank) {
            own.push((name, info.shape, Kept::of(values, kind)));
        }
    }
    own
}

/// Returns the ranges of the moments that this rank writes: what it has of them in shards, or an
/// even share where every rank has all.
fn own_moments(trainer: &Trainer, rank: u32, world_size: u32) -> Vec<(&'static str, usize, Kept)> {
    let len = trainer.layout.len();
    let range = if trainer.optimizer.shard() == Shard::WHOLE {
        let cut = |rank: u32| (len as u64 * u64::from(rank) / u64::from(world_size)) as usize;
        cut(rank)..cut(rank + 1)
    } else {
        0..len
    };
    let kind = DeviceKind::of(&trainer.device);
    let moments = trainer
        .optimizer
        .moments(&trainer.layout, &range)
        .into_iter();
    moments
        .map(|(name, offset, values)| (name, offset, Kept::of(values, kind)))
        .collect()
}

pub(crate) fn to_json(value: &impl Serialize) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(value).map_err(|error| Error::internal(error.to_string()))
}

pub(crate) fn from_json<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(bytes)
        .map_err(|error| Error::internal(format!("another rank sent a broken message: {error}")))
}

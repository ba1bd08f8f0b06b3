//! Saving and restoring with all ranks: each writes its part, rank 0 commits.

use std::time::Duration;

use pollen_checkpoints::{
    Checkpoints, Claim, FileRecord, FlatSlice, ManifestHead, Published, Restored, TensorSlice,
    Values, Verify,
};
use pollen_collectives::{Deadline, Store};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::optim::host;
use crate::step::Trainer;

/// A run's checkpoints as one rank of one generation uses them.
#[derive(Debug)]
pub struct Recovery {
    checkpoints: Checkpoints,
    claim: Claim,
    store: Store,
    rank: u32,
    world_size: u32,
    deadline: Duration,
    identity: Identity,
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
    pub fn start(
        checkpoints: Checkpoints,
        store: Store,
        (rank, world_size): (u32, u32),
        generation: u64,
        (deadline, verify): (Duration, Verify),
        identity: Identity,
    ) -> Result<(Self, Option<Restored>), Error> {
        const KEY: &str = "restore";
        if rank == 0 {
            let claim = checkpoints.claim(generation)?;
            let restored = checkpoints.newest_by(verify)?;
            store.set(KEY, &to_json(&Start { claim, restored })?)?;
        }
        let start: Start = from_json(&store.get(KEY, Deadline::after(deadline))?)?;
        let claim = start.claim;
        let recovery = Self {
            checkpoints,
            claim,
            store,
            rank,
            world_size,
            deadline,
            identity,
        };
        Ok((recovery, start.restored))
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
                    "dataset `{name}` changed since; restore it, or give workers --accept-new-data to go \
                     on with another sample order"
                ));
            }
        }
        Ok(())
    }

    /// Returns the reader of the run's checkpoints.
    pub fn checkpoints(&self) -> &Checkpoints {
        &self.checkpoints
    }

    /// Writes this rank's part; rank 0 publishes when all parts are there. Returns what was
    /// published on rank 0, nothing elsewhere.
    pub(crate) fn save(
        &self,
        trainer: &Trainer,
        gpu_hours_spent: f64,
    ) -> Result<Option<Published>, Error> {
        let step = trainer.step;
        let writer = self
            .checkpoints
            .writer(&self.claim, step, self.rank, self.world_size);
        let own = self.own_tensors(trainer);
        let tensors: Vec<TensorSlice<'_>> = own
            .iter()
            .map(|(name, shape, values)| TensorSlice {
                name: name.clone(),
                shape: shape.clone(),
                values: Values::F32(values),
            })
            .collect();
        let mut files = vec![writer.write_model(&tensors)?];
        files.push(self.write_moments(trainer, &writer)?);
        if self.rank == 0 {
            files.push(writer.write_file("contract.json", self.identity.contract.clone().into())?);
        }
        let key = format!("checkpoint/{step}");
        let parts = self.store.gather(
            &key,
            self.rank,
            self.world_size,
            &to_json(&files)?,
            Deadline::after(self.deadline),
        )?;
        let done = format!("published/{step}");
        if self.rank != 0 {
            let verdict: Result<(), String> =
                from_json(&self.store.get(&done, Deadline::after(self.deadline))?)?;
            return match verdict {
                Ok(()) => Ok(None),
                Err(reason) => Err(Error::Unpublished { step, reason }),
            };
        }
        let mut all: Vec<FileRecord> = Vec::new();
        for part in &parts {
            all.extend(from_json::<Vec<FileRecord>>(part)?);
        }
        let published =
            self.checkpoints
                .publish(&self.claim, self.head(trainer, gpu_hours_spent), all);
        let verdict = published.as_ref().map(|_| ()).map_err(ToString::to_string);
        self.store.set(&done, &to_json(&verdict)?)?;
        let published = published?;
        self.checkpoints
            .retain(&self.claim, &trainer.config.checkpoint)?;
        Ok(Some(published))
    }

    fn head(&self, trainer: &Trainer, gpu_hours_spent: f64) -> ManifestHead {
        let identity = self.identity.clone();
        ManifestHead {
            step: trainer.step,
            updates: trainer.optimizer.updates(),
            samples: trainer.step * u64::from(trainer.config.train.global_batch),
            world_size: self.world_size,
            config_hash: identity.config_hash.clone(),
            recipe_hash: identity.config_hash,
            layout_hash: identity.layout_hash,
            order_version: identity.order_version,
            dataset_hashes: identity.dataset_hashes,
            gpu_hours_spent,
            extra: serde_json::json!({
                "non_finite": trainer.non_finite,
                "bad_samples": trainer.bad_samples,
            }),
        }
    }

    /// Returns the whole tensors that this rank writes: an even share of the bytes, by name order.
    fn own_tensors(&self, trainer: &Trainer) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let infos = trainer.model.parameters();
        let total: usize = infos
            .iter()
            .map(|info| info.shape.iter().product::<usize>())
            .sum();
        let mut before = 0;
        let mut own = Vec::new();
        for (info, (name, values)) in infos.into_iter().zip(trainer.model.flat_parameters()) {
            let owner = before as u64 * u64::from(self.world_size) / total.max(1) as u64;
            before += info.shape.iter().product::<usize>();
            if owner == u64::from(self.rank) {
                own.push((name, info.shape, host(values)));
            }
        }
        own
    }

    fn write_moments(
        &self,
        trainer: &Trainer,
        writer: &pollen_checkpoints::Writer,
    ) -> Result<FileRecord, Error> {
        let len = trainer.layout.len();
        let cut = |rank: u32| (len as u64 * u64::from(rank) / u64::from(self.world_size)) as usize;
        let range = cut(self.rank)..cut(self.rank + 1);
        let moments = trainer.optimizer.moments(&trainer.layout, range.clone());
        let slices: Vec<FlatSlice<'_>> = moments
            .iter()
            .map(|(name, values)| FlatSlice {
                name: (*name).to_owned(),
                global_len: len as u64,
                offset: range.start as u64,
                values,
            })
            .collect();
        Ok(writer.write_flat(&slices)?)
    }
}

fn to_json(value: &impl Serialize) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(value).map_err(|error| Error::internal(error.to_string()))
}

fn from_json<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(bytes)
        .map_err(|error| Error::internal(format!("another rank sent a broken message: {error}")))
}

//! A run's checkpoints: claims, publishing, retention.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use pollen_storage::Storage;
use tokio::runtime::Handle;

use crate::config::Config;
use crate::digest;
use crate::error::{Error, Result};
use crate::hook::{StageFn, StageHook};
use crate::log::{Claim, Entry, Kind, Log};
use crate::manifest::{CheckpointId, FileRecord, ManifestHead};
use crate::writer::Writer;

/// Look-ups and deletions at once.
pub(crate) const REQUESTS_AT_ONCE: usize = 8;

/// A checkpoint that is committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// URL of its folder.
    pub url: String,
    /// Size of all files.
    pub bytes: u64,
}

/// A run's checkpoints. All methods block; they must not be called from an async task, and the
/// runtime behind the handle must be a multi-threaded one.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) storage: Storage,
    pub(crate) runtime: Handle,
    pub(crate) hook: StageHook,
    pub(crate) log: Log,
    /// Verified in this process, so that it need not be read again to delete an older one.
    verified: Mutex<BTreeSet<CheckpointId>>,
    /// Held-out errors that were read from MANIFESTs; infinite where none was measured.
    eval_errors: Mutex<BTreeMap<CheckpointId, f64>>,
}

impl Checkpoints {
    /// Wraps the folder `<run>/checkpoints`.
    pub fn new(storage: Storage, runtime: Handle) -> Self {
        Self::build(storage, runtime, StageHook::default())
    }

    /// Returns the same with a callback at every stage: `before model-00001-of-00002...`, `after
    /// MANIFEST`, `before log entry`, `before reading model-00001-of-00002...` and so on.
    #[must_use]
    pub fn with_stage_hook(self, hook: StageFn) -> Self {
        let storage = self.inner.storage.clone();
        Self::build(storage, self.inner.runtime.clone(), StageHook::new(hook))
    }

    fn build(storage: Storage, runtime: Handle, hook: StageHook) -> Self {
        let inner = Inner {
            log: Log::new(storage.join("log")),
            storage,
            runtime,
            hook,
            verified: Mutex::default(),
            eval_errors: Mutex::default(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Returns the URL of the folder.
    pub fn url(&self) -> String {
        self.inner.storage.url()
    }

    /// Returns the first generation nobody has used.
    pub fn next_generation(&self) -> Result<u64> {
        self.wait(async { Ok(self.inner.log.read().await?.next_generation()) })
    }

    /// Takes the run over as `generation`: no older one can publish from here on. To be done before
    /// anything is restored.
    pub fn claim(&self, generation: u64) -> Result<Claim> {
        let mut nonce = [0; 16];
        getrandom::fill(&mut nonce).map_err(|error| Error::System {
            source: std::io::Error::other(error.to_string()),
        })?;
        let claim = Claim {
            generation,
            nonce: digest::hex(&nonce),
        };
        let entry = Entry::by(&claim, Kind::Claim);
        self.wait(async {
            let inner = &self.inner;
            inner.log.append(&entry, &inner.hook, "claim").await?;
            Ok(claim)
        })
    }

    /// Returns the writer of one rank's part of a checkpoint.
    pub fn writer(&self, claim: &Claim, step: u64, rank: u32, world_size: u32) -> Writer {
        let id = CheckpointId {
            step,
            generation: claim.generation,
        };
        Writer::new(Arc::clone(&self.inner), id, rank, world_size)
    }

    /// Commits a checkpoint whose files all ranks have written. Checks that every file is there
    /// with its size and that nothing is missing or there twice.
    pub fn publish(
        &self,
        claim: &Claim,
        head: ManifestHead,
        files: Vec<FileRecord>,
    ) -> Result<Published> {
        self.wait(self.inner.publish(claim, head, files))
    }

    /// Deletes what `config` does not keep, and what dead attempts left behind; returns which
    /// checkpoints went. The newest that verifies stays, and so does everything newer.
    pub fn retain(&self, claim: &Claim, config: &Config) -> Result<Vec<CheckpointId>> {
        self.wait(self.inner.retain(claim, config))
    }

    pub(crate) fn wait<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        // Boxed, since the state of a save is large.
        self.inner.runtime.block_on(Box::pin(work))
    }
}

impl Inner {
    pub(crate) fn url_of(&self, id: CheckpointId) -> String {
        format!("{}/{id}", self.storage.url())
    }

    pub(crate) fn mark_verified(&self, id: CheckpointId) {
        let mut verified = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        verified.insert(id);
    }

    pub(crate) fn is_verified(&self, id: CheckpointId) -> bool {
        let verified = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        verified.contains(&id)
    }

    pub(crate) fn known_eval_error(&self, id: CheckpointId) -> Option<f64> {
        let known = self.eval_errors.lock();
        let known = known.unwrap_or_else(PoisonError::into_inner);
        known.get(&id).copied()
    }

    pub(crate) fn note_eval_error(&self, id: CheckpointId, error: f64) {
        let known = self.eval_errors.lock();
        let mut known = known.unwrap_or_else(PoisonError::into_inner);
        known.insert(id, error);
    }
}

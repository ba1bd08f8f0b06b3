//! What people ask about the checkpoints of a run: which there are, and whether they are whole.

use std::collections::BTreeMap;
use std::fmt;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::checkpoints::{Checkpoints, Inner};
use crate::config::Verify;
use crate::error::Result;
use crate::manifest::CheckpointId;
use crate::restore::Restored;

/// What a folder of a checkpoint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Committed: a restart may use it.
    Published,
    /// Committed, but its MANIFEST is gone.
    Damaged,
    /// Committed by a generation that had been replaced: never used, swept by the next retention.
    Late,
    /// Its deletion is committed, some files are left: swept by the next retention.
    Deleted,
    /// Not committed: a save in flight, or what a dead attempt left.
    Unpublished,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Published => "published",
            Self::Damaged => "damaged",
            Self::Late => "late",
            Self::Deleted => "deleted",
            Self::Unpublished => "unpublished",
        })
    }
}

/// One folder of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Which.
    pub id: CheckpointId,
    /// What it is.
    pub state: State,
    /// Size of all its files.
    pub bytes: u64,
    /// Number of files.
    pub files: usize,
    /// When its newest file was written; none without files.
    pub modified: Option<SystemTime>,
}

impl Checkpoints {
    /// Returns every checkpoint that the log or the store knows, in the order of their steps. Looks
    /// at names and sizes only.
    pub fn list(&self) -> Result<Vec<Listed>> {
        self.wait(self.inner.list())
    }

    /// Reads every byte of the published checkpoint `id` and returns what it consists of, or what
    /// is wrong with it.
    pub fn verify(&self, id: CheckpointId) -> Result<Result<Restored, String>> {
        self.wait(self.inner.open(id, Verify::Full))
    }

    /// Opens the published checkpoint `id` for reading, by its sizes; or says what is wrong.
    pub fn open(&self, id: CheckpointId) -> Result<Result<Restored, String>> {
        self.wait(self.inner.open(id, Verify::Sizes))
    }

    /// Deletes a published checkpoint: first in the log, then its files. The newest that verifies is
    /// refused, since a restart needs it; so is everything when none verifies.
    pub fn remove(&self, id: CheckpointId) -> Result<()> {
        self.wait(self.inner.remove(id))
    }
}

impl Inner {
    async fn list(&self) -> Result<Vec<Listed>> {
        let history = self.log.read().await?;
        let mut found: BTreeMap<CheckpointId, (Listed, bool)> = BTreeMap::new();
        let new = |id| {
            let listed = Listed {
                id,
                state: State::Unpublished,
                bytes: 0,
                files: 0,
                modified: None,
            };
            (listed, false)
        };
        for object in self.storage.list("").await? {
            let folder = object.path.rsplit_once('/').map(|(folder, _)| folder);
            let Some(id) = folder.and_then(|folder| folder.parse::<CheckpointId>().ok()) else {
                continue;
            };
            let (listed, has_manifest) = found.entry(id).or_insert_with(|| new(id));
            listed.bytes += object.size;
            listed.files += 1;
            listed.modified = listed.modified.max(Some(object.modified));
            *has_manifest |= object.path == id.manifest();
        }
        for publication in &history.live {
            let id = publication.id;
            let (listed, has_manifest) = found.entry(id).or_insert_with(|| new(id));
            listed.state = if *has_manifest {
                State::Published
            } else {
                State::Damaged
            };
        }
        let late = history.late.iter().map(|late| {
            let id = CheckpointId {
                step: late.step,
                generation: late.generation,
            };
            (id, State::Late)
        });
        let deleted = history.deleted.iter().map(|id| (*id, State::Deleted));
        for (id, state) in late.chain(deleted) {
            // A checkpoint that was saved again after its deletion counts.
            if let Some((listed, _)) = found.get_mut(&id)
                && listed.state == State::Unpublished
            {
                listed.state = state;
            }
        }
        Ok(found.into_values().map(|(listed, _)| listed).collect())
    }

    async fn open(&self, id: CheckpointId, verify: Verify) -> Result<Result<Restored, String>> {
        let history = self.log.read().await?;
        let Some(publication) = history.find(id) else {
            return Ok(Err("it is not published".into()));
        };
        let verified = self.verify(publication, verify).await?;
        Ok(verified.map(|manifest| Restored {
            dir: id.to_string(),
            manifest,
            skipped: Vec::new(),
            unreadable: history.unreadable.clone(),
        }))
    }
}

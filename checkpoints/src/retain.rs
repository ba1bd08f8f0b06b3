//! Deletes what is not kept, and what dead attempts left behind.

use std::collections::BTreeMap;

use futures::stream::{StreamExt, TryStreamExt};

use crate::checkpoints::{Inner, REQUESTS_AT_ONCE};
use crate::config::{Config, Verify};
use crate::error::Result;
use crate::log::{Claim, Entry, History, Kind, Publication};
use crate::manifest::CheckpointId;

impl Inner {
    pub(crate) async fn retain(&self, claim: &Claim, config: &Config) -> Result<Vec<CheckpointId>> {
        let history = self.log.read().await?;
        history.check_owner(claim)?;
        let mut gone = Vec::new();
        for publication in self.deletable(&history, config).await? {
            let kind = Kind::Delete {
                step: publication.id.step,
                manifest: publication.id.manifest(),
            };
            let entry = Entry::by(claim, kind);
            self.log.append(&entry, &self.hook, "delete entry").await?;
            gone.push(publication.id);
        }
        self.sweep(claim).await?;
        Ok(gone)
    }

    /// Returns what may go: older than the newest that verifies, and not to be kept.
    async fn deletable(&self, history: &History, config: &Config) -> Result<Vec<Publication>> {
        let older = history.live.len().saturating_sub(config.keep_last.max(1));
        let kept_for_ever = |id: CheckpointId| {
            config
                .keep_every
                .is_some_and(|every| every > 0 && id.step.is_multiple_of(every))
        };
        let mut candidates = history.live[..older].to_vec();
        candidates.retain(|publication| !kept_for_ever(publication.id));
        if candidates.is_empty() {
            return Ok(candidates);
        }
        let mut anchor = history.live.len();
        while anchor > 0 {
            anchor -= 1;
            let publication = &history.live[anchor];
            if self.is_verified(publication.id) || self.verifies(publication, config.verify).await?
            {
                break;
            }
            if anchor == 0 {
                return Ok(Vec::new());
            }
        }
        let older_than_anchor = &history.live[..anchor];
        candidates.retain(|publication| older_than_anchor.contains(publication));
        Ok(candidates)
    }

    async fn verifies(&self, publication: &Publication, verify: Verify) -> Result<bool> {
        match self.verify(publication, verify).await? {
            Ok(_) => Ok(true),
            Err(reason) => {
                tracing::warn!(checkpoint = %publication.id, reason, "does not verify");
                Ok(false)
            }
        }
    }

    /// Deletes the files of checkpoints whose deletion stands in the log, and of attempts that can
    /// never publish any more.
    async fn sweep(&self, claim: &Claim) -> Result<()> {
        let history = self.log.last_seen();
        let mut doomed: BTreeMap<CheckpointId, Vec<String>> = BTreeMap::new();
        for object in self.storage.list("").await? {
            let folder = object.path.rsplit_once('/').map(|(folder, _)| folder);
            let Some(id) = folder.and_then(|folder| folder.parse::<CheckpointId>().ok()) else {
                continue;
            };
            let dead = id.generation < claim.generation || history.deleted.contains(&id);
            if dead && history.find(id).is_none() {
                doomed.entry(id).or_default().push(object.path);
            }
        }
        for (id, mut paths) in doomed {
            // The MANIFEST first: without it nobody mistakes the rest for a checkpoint.
            paths.sort_by_key(|path| *path != id.manifest());
            let (first, rest) = paths.split_at(1);
            self.storage.delete(&first[0]).await?;
            futures::stream::iter(rest)
                .map(|path| self.storage.delete(path))
                .buffer_unordered(REQUESTS_AT_ONCE)
                .try_collect::<()>()
                .await?;
        }
        Ok(())
    }
}

//! Deletes what is not kept, and what dead attempts left behind.

use std::collections::BTreeMap;

use futures::stream::{StreamExt, TryStreamExt};

use crate::checkpoints::{Inner, REQUESTS_AT_ONCE};
use crate::config::{Config, Verify};
use crate::error::{Error, Result};
use crate::log::{Claim, Entry, History, Kind, Publication};
use crate::manifest::{CheckpointId, Manifest};

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
        let best = self.best(history, config.keep_best).await?;
        candidates.retain(|publication| {
            !kept_for_ever(publication.id) && !best.contains(&publication.id)
        });
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

    /// Returns the `count` checkpoints with the lowest held-out error, as far as it was measured.
    async fn best(&self, history: &History, count: usize) -> Result<Vec<CheckpointId>> {
        let mut scored = Vec::new();
        if count > 0 {
            for publication in &history.live {
                scored.push((self.eval_error(publication.id).await?, publication.id));
            }
        }
        scored.retain(|(error, _)| error.is_finite());
        scored.sort_by(|a, b| a.0.total_cmp(&b.0));
        Ok(scored.into_iter().take(count).map(|(_, id)| id).collect())
    }

    /// Returns the held-out error in a MANIFEST, read once a process; infinite without one.
    async fn eval_error(&self, id: CheckpointId) -> Result<f64> {
        if let Some(known) = self.known_eval_error(id) {
            return Ok(known);
        }
        let error = match self.storage.get(&id.manifest()).await {
            Ok(json) => Manifest::parse(&json)
                .ok()
                .and_then(|manifest| manifest.head.eval_error)
                .unwrap_or(f64::INFINITY),
            Err(error) if error.is_not_found() => f64::INFINITY,
            Err(error) => return Err(error.into()),
        };
        self.note_eval_error(id, error);
        Ok(error)
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
        for (id, paths) in doomed {
            self.delete_files(id, paths).await?;
        }
        Ok(())
    }

    async fn delete_files(&self, id: CheckpointId, mut paths: Vec<String>) -> Result<()> {
        // The MANIFEST first: without it nobody mistakes the rest for a checkpoint.
        paths.sort_by_key(|path| *path != id.manifest());
        let Some((first, rest)) = paths.split_first() else {
            return Ok(());
        };
        self.hook.before("deletion")?;
        self.storage.delete(first).await?;
        self.hook.after("deletion of the first file")?;
        futures::stream::iter(rest)
            .map(|path| self.storage.delete(path))
            .buffer_unordered(REQUESTS_AT_ONCE)
            .try_collect::<()>()
            .await?;
        self.hook.after("deletion")
    }

    /// Deletes one published checkpoint on a person's request: see [`crate::Checkpoints::remove`].
    pub(crate) async fn remove(&self, id: CheckpointId) -> Result<()> {
        let history = self.log.read().await?;
        let (Some(owner), Some(_)) = (history.owner.clone(), history.find(id)) else {
            return Err(Error::Absent {
                url: self.storage.url(),
                what: format!("published checkpoint {id}"),
            });
        };
        for publication in history.live.iter().rev() {
            if self.verifies(publication, Verify::Full).await? {
                if publication.id == id {
                    return Err(Error::Protected {
                        step: id.step,
                        generation: id.generation,
                    });
                }
                let kind = Kind::Delete {
                    step: id.step,
                    manifest: id.manifest(),
                };
                // In the name of the owner, who may be at work: this takes nothing over.
                let entry = Entry::by(&owner, kind);
                self.log.append(&entry, &self.hook, "delete entry").await?;
                let listed = self.storage.list(&id.to_string()).await?;
                let paths = listed.into_iter().map(|object| object.path).collect();
                return self.delete_files(id, paths).await;
            }
        }
        Err(Error::NothingVerifies {
            url: self.storage.url(),
            reasons: vec!["nothing was deleted".into()],
        })
    }
}

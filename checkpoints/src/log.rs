//! The commit log: numbered entries, each written only if its number is free.
//!
//! A claim stops older generations, because an older one that wants to append finds the claim in
//! the way: it has read the log up to some number, its own entry must come next, and whatever else
//! has that number is looked at. Only put-if-absent is needed, which S3, folders and memory have.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{StreamExt, TryStreamExt};
use pollen_storage::{PutIfAbsent, Storage};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, Skipped};
use crate::hook::StageHook;
use crate::manifest::CheckpointId;

/// Entries are some hundred bytes; a larger object is not ours.
const LARGEST_ENTRY: u64 = 64 << 10;
/// Entries read at once.
const READS_AT_ONCE: usize = 8;
/// Conditional writes of one entry whose answers may be lost before it is given up.
const DOUBTS: u32 = 10;

/// The right to publish as one generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The generation.
    pub generation: u64,
    /// Tells this claim from one of another process with the same number.
    pub nonce: String,
}

/// One entry of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) generation: u64,
    pub(crate) nonce: String,
    #[serde(flatten)]
    pub(crate) kind: Kind,
}

/// What an entry says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Kind {
    /// The generation owns the run from here on.
    Claim,
    /// The checkpoint is complete.
    Publish {
        step: u64,
        manifest: String,
        sha256: String,
    },
    /// The checkpoint will be deleted.
    Delete { step: u64, manifest: String },
}

impl Entry {
    pub(crate) fn by(claim: &Claim, kind: Kind) -> Self {
        Self {
            generation: claim.generation,
            nonce: claim.nonce.clone(),
            kind,
        }
    }

    /// Reads an entry; whatever is wrong with it is named.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let entry: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        entry.subject()?;
        Ok(entry)
    }

    /// Returns the checkpoint a publish or delete entry speaks of.
    fn subject(&self) -> Result<Option<CheckpointId>, String> {
        let (Kind::Publish { step, manifest, .. } | Kind::Delete { step, manifest }) = &self.kind
        else {
            return Ok(None);
        };
        let folder = manifest.strip_suffix("/MANIFEST.json").unwrap_or_default();
        let id: CheckpointId = folder.parse()?;
        if id.step != *step {
            return Err(format!("step {step} is not that of `{manifest}`"));
        }
        if matches!(self.kind, Kind::Publish { .. }) && id.generation != self.generation {
            return Err(format!(
                "generation {} cannot publish `{manifest}`",
                self.generation
            ));
        }
        Ok(Some(id))
    }
}

/// A published checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Publication {
    pub(crate) id: CheckpointId,
    /// Of the MANIFEST.
    pub(crate) sha256: String,
}

/// What the log says, taken together.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    /// Highest claim.
    pub(crate) owner: Option<Claim>,
    /// Published and not deleted, oldest first.
    pub(crate) live: Vec<Publication>,
    /// Published, then deleted.
    pub(crate) deleted: Vec<CheckpointId>,
    /// Published by a generation that had been replaced; never used.
    pub(crate) late: Vec<Skipped>,
    /// Entries that cannot be read or are missing, with the reason.
    pub(crate) unreadable: Vec<String>,
    /// Highest number.
    last: u64,
}

type Known = BTreeMap<u64, Result<Entry, String>>;

impl History {
    fn of(entries: &Known) -> Self {
        let mut history = Self::default();
        for (number, entry) in entries {
            // Numbers have no gaps unless somebody deleted an entry.
            if history.last.checked_add(1) != Some(*number) {
                let name = file_name(history.last.saturating_add(1));
                history
                    .unreadable
                    .push(format!("log/{name}: it is missing"));
            }
            history.last = *number;
            let entry = match entry {
                Ok(entry) => entry,
                Err(reason) => {
                    let name = file_name(*number);
                    history.unreadable.push(format!("log/{name}: {reason}"));
                    continue;
                }
            };
            let owner = history.owner.as_ref().map_or(0, |owner| owner.generation);
            let subject = entry.subject().ok().flatten();
            match (&entry.kind, subject) {
                (Kind::Claim, _) if history.owner.is_none() || entry.generation > owner => {
                    history.owner = Some(Claim {
                        generation: entry.generation,
                        nonce: entry.nonce.clone(),
                    });
                }
                (Kind::Publish { .. }, Some(id)) if entry.generation < owner => {
                    history.late.push(Skipped {
                        step: id.step,
                        generation: id.generation,
                        reason: format!("published after generation {owner} had claimed the run"),
                    });
                }
                (Kind::Publish { sha256, .. }, Some(id)) => {
                    history.live.retain(|publication| publication.id != id);
                    history.live.push(Publication {
                        id,
                        sha256: sha256.clone(),
                    });
                }
                (Kind::Delete { .. }, Some(id)) if entry.generation >= owner => {
                    history.live.retain(|publication| publication.id != id);
                    history.deleted.push(id);
                }
                _ => {}
            }
        }
        history
    }

    /// Returns the publication of a checkpoint, unless it was deleted.
    pub(crate) fn find(&self, id: CheckpointId) -> Option<&Publication> {
        self.live.iter().find(|publication| publication.id == id)
    }

    /// Refuses a generation that has been replaced.
    pub(crate) fn check_owner(&self, claim: &Claim) -> Result<()> {
        match &self.owner {
            Some(owner)
                if owner.generation > claim.generation
                    || owner.generation == claim.generation && owner.nonce != claim.nonce =>
            {
                Err(Error::Fenced {
                    generation: claim.generation,
                    by_generation: owner.generation,
                })
            }
            _ => Ok(()),
        }
    }

    /// Returns the first generation nobody has used.
    pub(crate) fn next_generation(&self) -> u64 {
        let used = self.owner.as_ref().map(|owner| owner.generation);
        used.map_or(1, |generation| generation.saturating_add(1))
    }
}

/// The log of one run.
#[derive(Debug)]
pub(crate) struct Log {
    storage: Storage,
    /// Entries never change, so each is read once.
    known: Mutex<Known>,
}

impl Log {
    pub(crate) fn new(storage: Storage) -> Self {
        Self {
            storage,
            known: Mutex::default(),
        }
    }

    fn with_known<T>(&self, act: impl FnOnce(&mut Known) -> T) -> T {
        act(&mut self.known.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns what is known without looking.
    pub(crate) fn last_seen(&self) -> History {
        self.with_known(|known| History::of(known))
    }

    /// Reads the entries that are new.
    pub(crate) async fn read(&self) -> Result<History> {
        let listed = self.storage.list("").await?;
        let new: Vec<(u64, u64)> = self.with_known(|known| {
            listed
                .iter()
                .filter_map(|object| Some((number(&object.path)?, object.size)))
                .filter(|(number, _)| !known.contains_key(number))
                .collect()
        });
        let read: Vec<_> = futures::stream::iter(new)
            .map(|(number, size)| async move {
                if size > LARGEST_ENTRY {
                    return Ok((number, Err(format!("{size} bytes are too many"))));
                }
                Ok((number, self.entry(number).await?))
            })
            .buffer_unordered(READS_AT_ONCE)
            .try_collect()
            .await
            .map_err(|error: Error| error)?;
        Ok(self.with_known(|known| {
            for (number, entry) in read {
                if let Err(reason) = &entry {
                    tracing::warn!(number, reason, "a log entry cannot be read");
                }
                known.insert(number, entry);
            }
            History::of(known)
        }))
    }

    async fn entry(&self, number: u64) -> Result<Result<Entry, String>> {
        let bytes = self.storage.get(&file_name(number)).await?;
        Ok(Entry::parse(&bytes))
    }

    /// Appends an entry unless a newer generation has claimed the run.
    pub(crate) async fn append(&self, entry: &Entry, hook: &StageHook, stage: &str) -> Result<u64> {
        let history = self.read().await?;
        let claim = Claim {
            generation: entry.generation,
            nonce: entry.nonce.clone(),
        };
        if entry.kind == Kind::Claim {
            refuse_taken(&history, &claim)?;
        } else {
            history.check_owner(&claim)?;
        }
        let json = serde_json::to_vec(entry).expect("numbers and strings are JSON");
        let json = Bytes::from(json);
        let mut number = history.last.saturating_add(1);
        let mut doubts = 0;
        loop {
            hook.before(stage)?;
            let written = self
                .storage
                .put_if_absent(&file_name(number), json.clone())
                .await;
            let doubt = match written {
                Ok(PutIfAbsent::Written) => {
                    self.with_known(|known| known.insert(number, Ok(entry.clone())));
                    hook.after(stage)?;
                    return Ok(number);
                }
                Ok(PutIfAbsent::AlreadyExists) => None,
                Err(error @ pollen_storage::Error::Ambiguous { .. }) => Some(error),
                Err(error) => return Err(error.into()),
            };
            let found = match self.entry(number).await {
                Ok(found) => found,
                Err(Error::Storage(error)) if error.is_not_found() => {
                    // Not written, or not yet: the same number again, where a late arrival of ours
                    // would be found.
                    doubts += 1;
                    if doubts > DOUBTS {
                        return Err(doubt.unwrap_or(error).into());
                    }
                    if doubts > 1 {
                        tokio::time::sleep(Duration::from_millis(100) * doubts).await;
                    }
                    continue;
                }
                Err(error) => return Err(error),
            };
            self.with_known(|known| known.insert(number, found.clone()));
            match found {
                Ok(found) if found == *entry => {
                    hook.after(stage)?;
                    return Ok(number);
                }
                Ok(found) if found.kind == Kind::Claim => {
                    if found.generation > claim.generation {
                        return Err(Error::Fenced {
                            generation: claim.generation,
                            by_generation: found.generation,
                        });
                    }
                    if found.generation == claim.generation {
                        return Err(Error::GenerationTaken {
                            generation: claim.generation,
                            next: found.generation.saturating_add(1),
                        });
                    }
                }
                _ => {}
            }
            number = number.saturating_add(1);
        }
    }
}

fn refuse_taken(history: &History, claim: &Claim) -> Result<()> {
    match &history.owner {
        Some(owner) if owner.generation >= claim.generation => Err(Error::GenerationTaken {
            generation: claim.generation,
            next: history.next_generation(),
        }),
        _ => Ok(()),
    }
}

fn file_name(number: u64) -> String {
    format!("{number:08}.json")
}

fn number(name: &str) -> Option<u64> {
    let number = name.strip_suffix(".json")?.parse().ok()?;
    (file_name(number) == name).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn publish(generation: u64, step: u64) -> Entry {
        let id = CheckpointId { step, generation };
        Entry {
            generation,
            nonce: format!("n{generation}"),
            kind: Kind::Publish {
                step,
                manifest: id.manifest(),
                sha256: "00".into(),
            },
        }
    }

    fn claim(generation: u64) -> Entry {
        Entry {
            generation,
            nonce: format!("n{generation}"),
            kind: Kind::Claim,
        }
    }

    #[test]
    fn an_entry_has_the_documented_shape() {
        let json = serde_json::to_value(publish(3, 12_000)).expect("serialises");
        let expected = serde_json::json!({
            "generation": 3,
            "nonce": "n3",
            "kind": "publish",
            "step": 12_000,
            "manifest": "step-00012000/g3/MANIFEST.json",
            "sha256": "00",
        });
        assert_eq!(json, expected);
        assert_eq!(
            Entry::parse(json.to_string().as_bytes()),
            Ok(publish(3, 12_000))
        );
    }

    #[test]
    fn a_publication_after_a_newer_claim_does_not_count() {
        let entries = [
            claim(1),
            publish(1, 10),
            claim(2),
            publish(1, 20),
            publish(2, 15),
        ];
        let known = (1..).zip(entries.map(Ok)).collect();
        let history = History::of(&known);
        let steps: Vec<u64> = history.live.iter().map(|p| p.id.step).collect();
        assert_eq!(steps, [10, 15]);
        assert_eq!((history.late.len(), history.late[0].step), (1, 20));
        assert_eq!(history.next_generation(), 3);
    }

    #[test]
    fn only_our_names_are_entries() {
        assert_eq!(number("00000017.json"), Some(17));
        assert_eq!(number("100000000.json"), Some(100_000_000));
        for other in [
            "17.json",
            "00000017.json~",
            "000000017.json",
            "x.json",
            "+0000001.json",
        ] {
            assert_eq!(number(other), None, "{other}");
        }
    }

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        for manifest in [
            "../../x/MANIFEST.json",
            "step-00000001/g1/../MANIFEST.json",
            "MANIFEST.json",
        ] {
            let json = format!(
                r#"{{"generation":1,"nonce":"n","kind":"delete","step":1,"manifest":"{manifest}"}}"#
            );
            assert!(Entry::parse(json.as_bytes()).is_err(), "{manifest}");
        }
    }

    proptest! {
        #[test]
        fn hostile_entries_never_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..64),
            at in any::<proptest::sample::Index>(),
            to in any::<u8>(),
            generations in proptest::collection::vec(any::<u64>(), 0..6),
        ) {
            let _ = Entry::parse(&bytes);
            let mut json = serde_json::to_vec(&publish(3, 12_000)).expect("serialises");
            let at = at.index(json.len());
            json[at] = to;
            let mut known: Known = [(1, Entry::parse(&json)), (2, Entry::parse(&json[..at]))].into();
            for generation in generations {
                let number = known.len() as u64 + 1;
                known.insert(number, Ok(claim(generation)));
            }
            let _ = History::of(&known).next_generation();
        }
    }
}

//! Finds the newest checkpoint that verifies, and reads from it.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::{Bytes, BytesMut};
use futures::stream::{Stream, StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};

use crate::checkpoints::{Checkpoints, Inner};
use crate::config::Verify;
use crate::digest::{self, Digester};
use crate::error::{Error, Result, Skipped};
use crate::log::Publication;
use crate::manifest::{CheckpointId, FileKind, FileRecord, Manifest};
use crate::tensors::{self, TensorData};

/// Bytes of one read.
const CHUNK: u64 = 16 << 20;
/// Reads of one file at once.
const CHUNKS_AT_ONCE: usize = 4;
/// Files that are verified at once.
const FILES_AT_ONCE: usize = 2;

/// A checkpoint to restore from. Serialises, so that rank 0 finds it and hands it to the others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Restored {
    /// What it consists of.
    pub manifest: Manifest,
    /// Its folder below `checkpoints/`.
    pub dir: String,
    /// Newer ones that cannot be used.
    pub skipped: Vec<Skipped>,
    /// Entries of the log that cannot be read: what they published is not known.
    pub unreadable: Vec<String>,
}

impl Checkpoints {
    /// Returns the newest published checkpoint whose sizes and checksums are right, and which
    /// newer ones are not; `None` for a run that has published none. That all of them are damaged
    /// is an error: a run must not start again from nothing by itself.
    pub fn newest(&self) -> Result<Option<Restored>> {
        self.newest_by(Verify::Full)
    }

    /// Like [`Checkpoints::newest`], comparing what is asked for.
    pub fn newest_by(&self, verify: Verify) -> Result<Option<Restored>> {
        self.wait(self.inner.newest(verify))
    }

    /// Reads all weights, one file at a time; every file's crc32c is checked on the way.
    pub fn read_model(&self, restored: &Restored) -> Result<BTreeMap<String, TensorData>> {
        self.read_tensors(restored, FileKind::Model)
    }

    /// Reads all averaged weights.
    pub fn read_ema(&self, restored: &Restored) -> Result<BTreeMap<String, TensorData>> {
        self.read_tensors(restored, FileKind::Ema)
    }

    fn read_tensors(
        &self,
        restored: &Restored,
        kind: FileKind,
    ) -> Result<BTreeMap<String, TensorData>> {
        let mut all = BTreeMap::new();
        for file in restored.manifest.of_kind(kind) {
            all.append(&mut self.read_tensor_file(restored, file)?);
        }
        Ok(all)
    }

    /// Reads the tensors of one file.
    pub fn read_tensor_file(
        &self,
        restored: &Restored,
        file: &FileRecord,
    ) -> Result<BTreeMap<String, TensorData>> {
        let id = restored.manifest.id();
        let corrupt = |reason| self.inner.corrupt(id, &file.name, reason);
        let bytes = self.wait(self.inner.read_whole(id, file))?;
        let entries = tensors::parse(&bytes).map_err(corrupt)?;
        let told = file.tensors.iter();
        let told: BTreeMap<&str, _> = told.map(|tensor| (&*tensor.name, tensor)).collect();
        let same = entries.len() == told.len()
            && entries.iter().all(|entry| {
                told.get(&*entry.name)
                    .is_some_and(|told| told.dtype == entry.dtype && told.shape == entry.shape)
            });
        if !same {
            return Err(corrupt("its tensors are not those of the MANIFEST".into()));
        }
        let read = entries.into_iter().map(|entry| {
            let range = entry.range.start as usize..entry.range.end as usize;
            let data = TensorData {
                dtype: entry.dtype,
                shape: entry.shape,
                bytes: bytes.slice(range),
            };
            (entry.name, data)
        });
        Ok(read.collect())
    }

    /// Reads a range of a flat array, across the files it was split into: any world size may ask
    /// for its own part.
    pub fn read_flat(
        &self,
        restored: &Restored,
        name: &str,
        range: Range<u64>,
    ) -> Result<Vec<f32>> {
        self.wait(self.inner.read_flat(&restored.manifest, name, range))
    }

    /// Returns the length of a flat array.
    pub fn flat_len(&self, restored: &Restored, name: &str) -> Result<u64> {
        let mut flat = restored.manifest.files.iter().flat_map(|file| &file.flat);
        match flat.find(|flat| flat.name == name) {
            Some(flat) => Ok(flat.global_len),
            None => Err(self
                .inner
                .absent(&restored.manifest, format!("array `{name}`"))),
        }
    }

    /// Reads a whole file, for example `contract.json`; its crc32c is checked.
    pub fn read_file(&self, restored: &Restored, name: &str) -> Result<Bytes> {
        let manifest = &restored.manifest;
        match manifest.files.iter().find(|file| file.name == name) {
            Some(file) => self.wait(self.inner.read_whole(manifest.id(), file)),
            None => Err(self.inner.absent(manifest, format!("file `{name}`"))),
        }
    }
}

impl Inner {
    async fn newest(&self, verify: Verify) -> Result<Option<Restored>> {
        let history = self.log.read().await?;
        let mut skipped = history.late;
        for publication in history.live.iter().rev() {
            match self.verify(publication, verify).await? {
                Ok(manifest) => {
                    return Ok(Some(Restored {
                        dir: publication.id.to_string(),
                        manifest,
                        skipped,
                        unreadable: history.unreadable,
                    }));
                }
                Err(reason) => {
                    tracing::warn!(checkpoint = %publication.id, reason, "skipped");
                    skipped.push(Skipped {
                        step: publication.id.step,
                        generation: publication.id.generation,
                        reason,
                    });
                }
            }
        }
        if history.live.is_empty() && history.unreadable.is_empty() {
            return Ok(None);
        }
        let skipped = skipped.iter().map(Skipped::to_string);
        Err(Error::NothingVerifies {
            url: self.storage.url(),
            reasons: skipped.chain(history.unreadable).collect(),
        })
    }

    /// Returns the MANIFEST of a checkpoint that is as it was written, or what is wrong with it.
    pub(crate) async fn verify(
        &self,
        publication: &Publication,
        verify: Verify,
    ) -> Result<Result<Manifest, String>> {
        self.hook.before("verification")?;
        let verified = self.compare_with_log(publication, verify).await?;
        self.hook.after("verification")?;
        Ok(verified)
    }

    async fn compare_with_log(
        &self,
        publication: &Publication,
        verify: Verify,
    ) -> Result<Result<Manifest, String>> {
        let id = publication.id;
        let json = match self.storage.get(&id.manifest()).await {
            Ok(json) => json,
            Err(error) if error.is_not_found() => {
                return Ok(Err("MANIFEST.json is missing".into()));
            }
            Err(error) => return Err(error.into()),
        };
        if digest::sha256(&json) != publication.sha256 {
            return Ok(Err("MANIFEST.json is not the one in the log".into()));
        }
        let manifest = match Manifest::parse(&json) {
            Ok(manifest) if manifest.id() == id => manifest,
            Ok(other) => return Ok(Err(format!("MANIFEST.json is that of {}", other.id()))),
            Err(reason) => return Ok(Err(format!("MANIFEST.json: {reason}"))),
        };
        let faults = self.size_faults(id, &manifest.files).await?;
        if !faults.is_empty() {
            return Ok(Err(faults.join("; ")));
        }
        if verify == Verify::Full {
            let checks = manifest.files.iter().map(|file| self.compare(id, file));
            let faults: Vec<Option<String>> = futures::stream::iter(checks)
                .buffered(FILES_AT_ONCE)
                .try_collect()
                .await?;
            let faults: Vec<String> = faults.into_iter().flatten().collect();
            if !faults.is_empty() {
                return Ok(Err(faults.join("; ")));
            }
            self.mark_verified(id);
        }
        Ok(Ok(manifest))
    }

    /// Reads a file and compares its checksums.
    async fn compare(&self, id: CheckpointId, file: &FileRecord) -> Result<Option<String>> {
        let mut digester = Digester::start()?;
        let mut chunks = self.chunks(id, &file.name, 0..file.bytes);
        while let Some((_, chunk)) = match chunks.try_next().await {
            Ok(next) => next,
            Err(pollen_storage::Error::Short { .. }) => {
                return Ok(Some(format!("`{}` is cut off", file.name)));
            }
            Err(error) if error.is_not_found() => {
                return Ok(Some(format!("`{}` is missing", file.name)));
            }
            Err(error) => return Err(error.into()),
        } {
            digester.update(&chunk);
        }
        let digest = digester.finish();
        let fault = if digest.crc32c != file.crc32c {
            Some("crc32c")
        } else if digest.sha256 != file.sha256 {
            Some("sha256")
        } else {
            None
        };
        Ok(fault.map(|kind| format!("`{}` has another {kind} than was written", file.name)))
    }

    /// Streams a range of a file in order, each chunk with its offset.
    fn chunks(
        &self,
        id: CheckpointId,
        name: &str,
        range: Range<u64>,
    ) -> impl Stream<Item = Result<(u64, Bytes), pollen_storage::Error>> + Unpin {
        let path = format!("{id}/{name}");
        let starts = range.clone().step_by(CHUNK as usize);
        let reads = starts.map(move |start| {
            let (storage, path) = (self.storage.clone(), path.clone());
            let end = range.end.min(start + CHUNK);
            async move { Ok((start, storage.get_range(&path, start..end).await?)) }
        });
        Box::pin(futures::stream::iter(reads).buffered(CHUNKS_AT_ONCE))
    }

    async fn read_whole(&self, id: CheckpointId, file: &FileRecord) -> Result<Bytes> {
        let stage = format!("reading {}", file.name);
        self.hook.before(&stage)?;
        let mut chunks = self.chunks(id, &file.name, 0..file.bytes);
        let mut bytes = BytesMut::new();
        let mut crc32c = 0;
        while let Some((_, chunk)) = chunks.try_next().await? {
            crc32c = crc32c::crc32c_append(crc32c, &chunk);
            bytes.extend_from_slice(&chunk);
        }
        if crc32c == file.crc32c {
            self.hook.after(&stage)?;
            Ok(bytes.freeze())
        } else {
            let reason = "it has another crc32c than was written".into();
            Err(self.corrupt(id, &file.name, reason))
        }
    }

    async fn read_flat(
        &self,
        manifest: &Manifest,
        name: &str,
        range: Range<u64>,
    ) -> Result<Vec<f32>> {
        let id = manifest.id();
        let absent = || self.absent(manifest, format!("elements {range:?} of array `{name}`"));
        // What is asked for is compared with what is stored before memory is taken for it.
        let mut found = 0;
        let mut wanted = Vec::new();
        for file in &manifest.files {
            for flat in file.flat.iter().filter(|flat| flat.name == name) {
                let from = range.start.max(flat.offset);
                let to = range.end.min(flat.offset.saturating_add(flat.len));
                if from < to {
                    found += to - from;
                    let start = flat.start + 4 * (from - flat.offset);
                    let bytes = start..start + 4 * (to - from);
                    wanted.push((&*file.name, from, bytes));
                }
            }
        }
        if range.start > range.end || found != range.end - range.start {
            return Err(absent());
        }
        let stage = format!("reading array {name}");
        self.hook.before(&stage)?;
        let mut values = vec![0.0; found as usize];
        let reads = wanted.into_iter().map(|(name, from, bytes)| {
            let first = bytes.start;
            let to = 4 * (from - range.start);
            let chunks = self.chunks(id, name, bytes);
            chunks.map_ok(move |(start, chunk)| (to + start - first, chunk))
        });
        let mut reads = futures::stream::iter(reads).flatten();
        while let Some((at, chunk)) = reads.try_next().await? {
            let at = (at / 4) as usize;
            tensors::read_f32(&chunk, &mut values[at..at + chunk.len() / 4]);
        }
        self.hook.after(&stage)?;
        Ok(values)
    }

    fn corrupt(&self, id: CheckpointId, name: &str, reason: String) -> Error {
        Error::Corrupt {
            url: format!("{}/{name}", self.url_of(id)),
            reason,
        }
    }

    fn absent(&self, manifest: &Manifest, what: String) -> Error {
        Error::Absent {
            url: self.url_of(manifest.id()),
            what,
        }
    }
}

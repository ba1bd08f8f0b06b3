//! Commits a checkpoint that all ranks have written.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::stream::{StreamExt, TryStreamExt};
use pollen_storage::PutIfAbsent;

use crate::checkpoints::{Inner, Published, REQUESTS_AT_ONCE};
use crate::digest;
use crate::error::{Error, Result};
use crate::log::{Claim, Entry, Kind};
use crate::manifest::{CheckpointId, FileKind, FileRecord, Manifest, ManifestHead};

const INDEX: &str = "model.safetensors.index.json";

impl Inner {
    pub(crate) async fn publish(
        &self,
        claim: &Claim,
        head: ManifestHead,
        mut files: Vec<FileRecord>,
    ) -> Result<Published> {
        let id = CheckpointId {
            step: head.step,
            generation: claim.generation,
        };
        let history = self.log.read().await?;
        history.check_owner(claim)?;
        files.sort_by(|a, b| a.name.cmp(&b.name));
        let incomplete = |faults: Vec<String>| Error::Incomplete {
            step: id.step,
            faults,
        };
        let mut manifest = Manifest::new(claim.generation, head, files);
        let mut faults = manifest.faults();
        if manifest.files.iter().any(|file| file.name == INDEX) {
            faults.push(format!("`{INDEX}` is written by publishing"));
        }
        if !faults.is_empty() {
            return Err(incomplete(faults));
        }
        let faults = self.size_faults(id, &manifest.files).await?;
        if !faults.is_empty() {
            return Err(incomplete(faults));
        }
        let index = index(&manifest);
        if let Some((record, _)) = &index {
            manifest.files.push(record.clone());
        }
        let json = serde_json::to_vec_pretty(&manifest).expect("all keys are strings");
        let sha256 = digest::sha256(&json);
        let published = Published {
            url: self.url_of(id),
            bytes: manifest.bytes() + json.len() as u64,
        };
        if let Some(before) = history.find(id) {
            return if before.sha256 == sha256 {
                Ok(published)
            } else {
                Err(Error::AlreadyPublished {
                    step: id.step,
                    generation: id.generation,
                })
            };
        }
        if let Some((_, bytes)) = index {
            self.hook.before(INDEX)?;
            self.storage.put(&format!("{id}/{INDEX}"), bytes).await?;
            self.hook.after(INDEX)?;
        }
        self.write_manifest(id, json.into()).await?;
        let kind = Kind::Publish {
            step: id.step,
            manifest: id.manifest(),
            sha256,
        };
        let entry = Entry::by(claim, kind);
        self.log.append(&entry, &self.hook, "log entry").await?;
        self.hook.before("LATEST")?;
        let hint = self.storage.put("LATEST", format!("{id}\n").into()).await;
        if let Err(error) = hint {
            // People read it, programs do not.
            tracing::warn!(%error, "LATEST was not written");
        }
        self.hook.after("LATEST")?;
        Ok(published)
    }

    /// Returns which files are missing or of another size.
    pub(crate) async fn size_faults(
        &self,
        id: CheckpointId,
        files: &[FileRecord],
    ) -> Result<Vec<String>> {
        let checks = files.iter().map(|file| async move {
            let fault = match self.storage.head(&format!("{id}/{}", file.name)).await {
                Ok(size) if size == file.bytes => None,
                Ok(size) => Some(format!(
                    "`{}` has {size} bytes, {} were written",
                    file.name, file.bytes
                )),
                Err(error) if error.is_not_found() => Some(format!("`{}` is missing", file.name)),
                Err(error) => return Err(Error::from(error)),
            };
            Ok(fault)
        });
        let faults: Vec<Option<String>> = futures::stream::iter(checks)
            .buffered(REQUESTS_AT_ONCE)
            .try_collect()
            .await?;
        Ok(faults.into_iter().flatten().collect())
    }

    /// Writes the MANIFEST. One that is there already was never committed, as the log has just
    /// shown, and only this generation writes to its folder: it is replaced.
    async fn write_manifest(&self, id: CheckpointId, json: Bytes) -> Result<()> {
        let path = id.manifest();
        self.hook.before("MANIFEST")?;
        match self.storage.put_if_absent(&path, json.clone()).await {
            Ok(PutIfAbsent::Written) => {}
            Ok(PutIfAbsent::AlreadyExists) | Err(pollen_storage::Error::Ambiguous { .. }) => {
                self.storage.put(&path, json).await?;
            }
            Err(error) => return Err(error.into()),
        }
        self.hook.after("MANIFEST")
    }
}

/// Returns the index by which Hugging Face's readers find a tensor, if there are weights.
fn index(manifest: &Manifest) -> Option<(FileRecord, Bytes)> {
    manifest.of_kind(FileKind::Model).next()?;
    let mut weight_map = BTreeMap::new();
    let mut total_size = 0;
    for file in manifest.of_kind(FileKind::Model) {
        for tensor in &file.tensors {
            weight_map.insert(&tensor.name, &file.name);
            let size = pollen_core::tensor_header::size_of(tensor.dtype, &tensor.shape);
            total_size += size.expect("the faults were looked for before");
        }
    }
    let index = serde_json::json!({
        "metadata": {"total_size": total_size},
        "weight_map": weight_map,
    });
    let bytes = Bytes::from(format!("{index:#}"));
    let record = FileRecord {
        name: INDEX.into(),
        kind: FileKind::Other,
        bytes: bytes.len() as u64,
        crc32c: crc32c::crc32c(&bytes),
        sha256: digest::sha256(&bytes),
        tensors: Vec::new(),
        flat: Vec::new(),
    };
    Some((record, bytes))
}

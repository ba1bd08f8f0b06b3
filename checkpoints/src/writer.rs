//! One rank's part of a checkpoint.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::checkpoints::Inner;
use crate::digest::Digester;
use crate::error::{Error, Result};
use crate::manifest::{CheckpointId, FileKind, FileRecord, FlatRecord, TensorRecord, is_file_name};
use crate::tensors::{self, Dtype, TensorSlice, Values};

/// A range of a flat f32 array.
#[derive(Clone, Debug)]
pub struct FlatSlice<'a> {
    /// Name of the array.
    pub name: String,
    /// Elements of the whole array.
    pub global_len: u64,
    /// First element of the range.
    pub offset: u64,
    /// The range, f32.
    pub values: Values<'a>,
}

/// Writes one rank's files of one checkpoint. Nothing counts until [`crate::Checkpoints::publish`].
///
/// Where a kind of file is written at all, each rank of the world writes one, empty or not; a kind
/// that one rank writes alone is written with `rank` 0 and `world_size` 1.
#[derive(Clone, Debug)]
pub struct Writer {
    inner: Arc<Inner>,
    id: CheckpointId,
    rank: u32,
    world_size: u32,
}

impl Writer {
    pub(crate) fn new(inner: Arc<Inner>, id: CheckpointId, rank: u32, world_size: u32) -> Self {
        debug_assert!(rank < world_size, "a rank lies within its world");
        Self {
            inner,
            id,
            rank,
            world_size,
        }
    }

    /// Returns the URL of the checkpoint's folder.
    pub fn url(&self) -> String {
        self.inner.url_of(self.id)
    }

    /// Writes what the rank's training consists of: its weights, its ranges of the optimizer's
    /// arrays and, where the run averages weights, those. Each tensor is written by one rank, whole.
    /// The optimizer's file, the largest, is written beside the others: sha256 is slower than good
    /// disks, and so two cores compute it. The thread that does it calls `begin` first.
    pub fn write_state(
        &self,
        weights: &[TensorSlice<'_>],
        moments: &[FlatSlice<'_>],
        averages: Option<&[TensorSlice<'_>]>,
        begin: impl FnOnce() + Send,
    ) -> Result<Vec<FileRecord>> {
        let write_moments = || {
            begin();
            self.write_flat(moments)
        };
        std::thread::scope(|scope| {
            let optim = std::thread::Builder::new()
                .name("checkpoint-optim".into())
                .spawn_scoped(scope, write_moments)
                .map_err(|source| Error::System { source })?;
            let model = self.write_tensors(FileKind::Model, weights);
            let ema = averages.map(|averages| self.write_tensors(FileKind::Ema, averages));
            let optim = optim.join();
            let optim = optim.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let mut files = vec![model?, optim?];
            files.extend(ema.transpose()?);
            Ok(files)
        })
    }

    fn write_tensors(&self, kind: FileKind, tensors: &[TensorSlice<'_>]) -> Result<FileRecord> {
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let mut tensors = tensors.to_vec();
        let (head, placed) =
            tensors::head(&mut tensors, &metadata).map_err(|fault| self.incomplete(fault))?;
        let records = tensors
            .iter()
            .zip(placed)
            .map(|(tensor, place)| TensorRecord {
                name: tensor.name.clone(),
                dtype: place.dtype,
                shape: place.shape,
            });
        let records = records.collect();
        let pieces = std::iter::once(head).chain(tensors.iter().flat_map(|t| t.values.pieces()));
        let name = kind.part(self.rank, self.world_size);
        let mut record = self.write(name, kind, pieces)?;
        record.tensors = records;
        Ok(record)
    }

    /// Writes the rank's ranges of flat arrays. An array's ranges must cover it over all ranks.
    pub fn write_flat(&self, arrays: &[FlatSlice<'_>]) -> Result<FileRecord> {
        let mut metadata = BTreeMap::from([("format".to_owned(), "flat".to_owned())]);
        let mut slices: BTreeMap<String, &FlatSlice<'_>> = BTreeMap::new();
        for array in arrays.iter().filter(|array| !array.values.is_empty()) {
            let key = format!("{}@{}", array.name, array.offset);
            metadata.insert(array.name.clone(), array.global_len.to_string());
            let FlatSlice { name, offset, .. } = array;
            if array.values.dtype() != Dtype::F32 {
                return Err(self.incomplete(format!("array `{name}` is not f32")));
            }
            if slices.insert(key, array).is_some() {
                return Err(self.incomplete(format!("array `{name}` has element {offset} twice")));
            }
        }
        let mut tensors: Vec<TensorSlice<'_>> = slices
            .iter()
            .map(|(key, array)| TensorSlice {
                name: key.clone(),
                shape: vec![array.values.len() as usize / 4],
                values: array.values,
            })
            .collect();
        let (head, placed) =
            tensors::head(&mut tensors, &metadata).map_err(|fault| self.incomplete(fault))?;
        let flat = tensors.iter().zip(placed).map(|(tensor, place)| {
            let array = slices[&tensor.name];
            FlatRecord {
                name: array.name.clone(),
                global_len: array.global_len,
                offset: array.offset,
                len: array.values.len() / 4,
                start: place.range.start,
            }
        });
        let flat = flat.collect();
        let pieces = std::iter::once(head).chain(tensors.iter().flat_map(|t| t.values.pieces()));
        let name = FileKind::Optim.part(self.rank, self.world_size);
        let mut record = self.write(name, FileKind::Optim, pieces)?;
        record.flat = flat;
        Ok(record)
    }

    /// Writes a small file, for example `contract.json`.
    pub fn write_file(&self, name: &str, bytes: Bytes) -> Result<FileRecord> {
        if !is_file_name(name) {
            return Err(self.incomplete(format!("`{name}` is not a file name")));
        }
        self.write(name.into(), FileKind::Other, std::iter::once(bytes))
    }

    fn write(
        &self,
        name: String,
        kind: FileKind,
        pieces: impl Iterator<Item = Bytes> + Send,
    ) -> Result<FileRecord> {
        let inner = &self.inner;
        if inner.log.last_seen().find(self.id).is_some() {
            return Err(Error::AlreadyPublished {
                step: self.id.step,
                generation: self.id.generation,
            });
        }
        let mut digester = Digester::start()?;
        inner.hook.before(&name)?;
        let path = format!("{}/{name}", self.id);
        let digested = pieces.map(|piece| {
            digester.update(&piece);
            Ok(piece)
        });
        let stream = futures::stream::iter(digested);
        let upload = Box::pin(inner.storage.put_stream(&path, stream));
        inner.runtime.block_on(upload)?;
        inner.hook.after(&name)?;
        let digest = digester.finish();
        Ok(FileRecord {
            name,
            kind,
            bytes: digest.bytes,
            crc32c: digest.crc32c,
            sha256: digest.sha256,
            tensors: Vec::new(),
            flat: Vec::new(),
        })
    }

    fn incomplete(&self, fault: String) -> Error {
        Error::Incomplete {
            step: self.id.step,
            faults: vec![fault],
        }
    }
}

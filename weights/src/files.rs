//! Safetensors files behind a URL, read by ranges: one file, or shards with an index.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::{StreamExt, TryStreamExt};
use half::{bf16, f16};
use pollen_core::tensor_header;
use pollen_storage::{Observer, Storage, StorageConfig};
use safetensors::Dtype;
use serde::Deserialize;

use crate::error::{Error, Result};
use crate::hub;

/// Index of a sharded model, as Hugging Face's readers expect it.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// A model in one file.
pub(crate) const SINGLE: &str = "model.safetensors";
/// The longest index that is read.
const LONGEST_INDEX: u64 = 100_000_000;
/// Bytes of one read.
const CHUNK: u64 = 16 << 20;
/// Reads of one tensor at once.
const CHUNKS_AT_ONCE: usize = 4;
/// Bytes that are read before the length of a header is known.
const FIRST_READ: u64 = 64 << 10;

/// A tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    file: Arc<str>,
    range: Range<u64>,
}

/// All tensors of a source. Only headers are in memory.
#[derive(Debug)]
pub struct WeightFiles {
    storage: Storage,
    url: String,
    tensors: BTreeMap<String, Stored>,
    notes: serde_json::Value,
}

/// What an index says.
#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    metadata: serde_json::Value,
    weight_map: BTreeMap<String, String>,
}

impl WeightFiles {
    /// Opens a `.safetensors` file, or a folder with one (`model.safetensors`) or with shards and
    /// their index, at any URL that storage knows or on the Hugging Face Hub (`hf://owner/name`).
    /// Reads and checks all headers.
    pub async fn open(
        url: &str,
        config: &StorageConfig,
        observer: Arc<dyn Observer>,
    ) -> Result<Self> {
        if url.starts_with(hub::SCHEME) {
            let local = hub::fetch(url).await?.display().to_string();
            return Self::open_stored(&local, config, observer).await;
        }
        Self::open_stored(url, config, observer).await
    }

    async fn open_stored(
        url: &str,
        config: &StorageConfig,
        observer: Arc<dyn Observer>,
    ) -> Result<Self> {
        let extension = url.rsplit_once('.').map(|(_, extension)| extension);
        match extension {
            Some("safetensors") => {
                let (folder, name) = url.rsplit_once('/').unwrap_or((".", url));
                let storage = Storage::open(folder, config, observer)?;
                Self::of_file(storage, url, name).await
            }
            Some("pt" | "pth" | "ckpt" | "bin") => Err(Error::NoWeights {
                url: url.into(),
                reason: "it is a pickle, which runs code when it is opened; convert it with \
                         scripts/pickle-to-safetensors.py"
                    .into(),
            }),
            _ => Self::of_folder(Storage::open(url, config, observer)?, url).await,
        }
    }

    async fn of_folder(storage: Storage, url: &str) -> Result<Self> {
        match storage.head(INDEX).await {
            Ok(size) => return Self::of_index(storage, url, size).await,
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error.into()),
        }
        match storage.head(SINGLE).await {
            Ok(_) => Self::of_file(storage, url, SINGLE).await,
            Err(error) if error.is_not_found() => Err(Error::NoWeights {
                url: url.into(),
                reason: format!(
                    "neither {INDEX} nor {SINGLE} is there; name the .safetensors file or its folder"
                ),
            }),
            Err(error) => Err(error.into()),
        }
    }

    async fn of_file(storage: Storage, url: &str, name: &str) -> Result<Self> {
        let mut files = Self {
            storage,
            url: url.into(),
            tensors: BTreeMap::new(),
            notes: serde_json::Value::Null,
        };
        files.add(name).await?;
        Ok(files)
    }

    async fn of_index(storage: Storage, url: &str, size: u64) -> Result<Self> {
        let corrupt = |reason: String| Error::Corrupt {
            file: format!("{}/{INDEX}", storage.url()),
            reason,
        };
        if size > LONGEST_INDEX {
            return Err(corrupt(format!(
                "it has {size} bytes, above {LONGEST_INDEX}"
            )));
        }
        let json = storage.get(INDEX).await?;
        let index: Index = serde_json::from_slice(&json)
            .map_err(|error| corrupt(format!("it is no index of shards: {error}")))?;
        let mut shards: Vec<&String> = index.weight_map.values().collect();
        shards.sort_unstable();
        shards.dedup();
        if let Some(bad) = shards.iter().find(|name| name.contains(['/', '\\'])) {
            return Err(corrupt(format!(
                "shard `{bad}` lies in another folder, which is not read"
            )));
        }
        let mut files = Self {
            storage: storage.clone(),
            url: url.into(),
            tensors: BTreeMap::new(),
            notes: index.metadata,
        };
        for shard in &shards {
            files.add(shard).await?;
        }
        for (name, shard) in &index.weight_map {
            match files.tensors.get(name) {
                Some(stored) if *stored.file == **shard => {}
                Some(stored) => {
                    return Err(corrupt(format!(
                        "it says that tensor `{name}` is in {shard}, but it is in {}",
                        stored.file
                    )));
                }
                None => {
                    return Err(corrupt(format!(
                        "tensor `{name}` is not in {shard}, where it says"
                    )));
                }
            }
        }
        if let Some((name, stored)) = files
            .tensors
            .iter()
            .find(|(name, _)| !index.weight_map.contains_key(*name))
        {
            return Err(corrupt(format!(
                "it does not name tensor `{name}`, which is in {}",
                stored.file
            )));
        }
        Ok(files)
    }

    /// Takes the tensors of other files of the same folder in place of those of the same name,
    /// which must be there: averaged weights of a checkpoint.
    pub async fn overlay(mut self, files: &[String]) -> Result<Self> {
        for file in files {
            let mut other = Self {
                storage: self.storage.clone(),
                url: self.url.clone(),
                tensors: BTreeMap::new(),
                notes: serde_json::Value::Null,
            };
            other.add(file).await?;
            for (name, stored) in other.tensors {
                if !self.tensors.contains_key(&name) {
                    return Err(Error::Corrupt {
                        file: self.file_of(&stored),
                        reason: format!("tensor `{name}` is no weight of the model"),
                    });
                }
                self.tensors.insert(name, stored);
            }
        }
        Ok(self)
    }

    /// Reads the header of a file and adds its tensors.
    async fn add(&mut self, file: &str) -> Result<()> {
        let size = self.storage.head(file).await?;
        let corrupt = |reason: String| Error::Corrupt {
            file: format!("{}/{file}", self.storage.url()),
            reason,
        };
        let first = size.min(FIRST_READ);
        let mut bytes = self.storage.get_range(file, 0..first).await?;
        let length = tensor_header::length(&bytes, size).map_err(&corrupt)?;
        let end = tensor_header::PREFIX + length;
        if end > first {
            bytes = self.storage.get_range(file, 0..end).await?;
        }
        let json = &bytes[tensor_header::PREFIX as usize..end as usize];
        let entries = tensor_header::parse(json, size).map_err(corrupt)?;
        let shard: Arc<str> = file.into();
        for entry in entries {
            let stored = Stored {
                dtype: entry.dtype,
                shape: entry.shape,
                file: Arc::clone(&shard),
                range: entry.range,
            };
            if let Some(other) = self.tensors.insert(entry.name.clone(), stored) {
                return Err(Error::Corrupt {
                    file: format!("{}/{file}", self.storage.url()),
                    reason: format!("tensor `{}` is also in {}", entry.name, other.file),
                });
            }
        }
        Ok(())
    }

    /// Returns the URL that was opened.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Returns all tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, Stored> {
        &self.tensors
    }

    /// Returns what the index says beside the places, or null.
    pub(crate) fn notes(&self) -> &serde_json::Value {
        &self.notes
    }

    /// Returns the URL of the file that holds a tensor.
    pub fn file_of(&self, stored: &Stored) -> String {
        format!("{}/{}", self.storage.url(), stored.file)
    }

    /// Reads a tensor of f32, bf16 or f16 as f32. A value that is no finite number is an error.
    pub async fn read(&self, name: &str) -> Result<Vec<f32>> {
        let stored = self.stored(name)?;
        let convert = converter(stored.dtype).ok_or_else(|| Error::Corrupt {
            file: self.file_of(stored),
            reason: wrong_dtype(name, stored.dtype),
        })?;
        let mut values = Vec::with_capacity(stored.shape.iter().product());
        let mut chunks = self.chunks(stored);
        while let Some(chunk) = chunks.try_next().await? {
            convert(&chunk, &mut values);
        }
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(at) => Err(Error::Corrupt {
                file: self.file_of(stored),
                reason: format!("tensor `{name}` is {} at element {at}", values[at]),
            }),
        }
    }

    /// Returns whether two tensors have the same type, shape and bytes.
    pub(crate) async fn same(&self, a: &str, b: &str) -> Result<bool> {
        let (a, b) = (self.stored(a)?, self.stored(b)?);
        if (a.dtype, &a.shape) != (b.dtype, &b.shape) {
            return Ok(false);
        }
        let mut pairs = self.chunks(a).zip(self.chunks(b));
        while let Some((a, b)) = pairs.next().await {
            if a? != b? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn stored(&self, name: &str) -> Result<&Stored> {
        self.tensors.get(name).ok_or_else(|| Error::Corrupt {
            file: self.url.clone(),
            reason: format!("tensor `{name}` is missing"),
        })
    }

    /// Streams the bytes of a tensor in order, in pieces of whole elements.
    fn chunks<'a>(
        &'a self,
        stored: &'a Stored,
    ) -> impl futures::Stream<Item = Result<Bytes>> + Unpin + 'a {
        let Range { start, end } = stored.range;
        let reads = (start..end).step_by(CHUNK as usize).map(move |from| {
            let to = end.min(from + CHUNK);
            async move { Ok(self.storage.get_range(&stored.file, from..to).await?) }
        });
        Box::pin(futures::stream::iter(reads).buffered(CHUNKS_AT_ONCE))
    }
}

/// Says which element types are read.
pub(crate) fn wrong_dtype(name: &str, dtype: Dtype) -> String {
    format!("tensor `{name}` is of type {dtype}; weights are F32, BF16 or F16")
}

/// Appends little-endian elements as f32.
pub(crate) type Convert = fn(&[u8], &mut Vec<f32>);

/// Returns what converts elements of a type, if that is what weights can be.
pub(crate) fn converter(dtype: Dtype) -> Option<Convert> {
    match dtype {
        Dtype::F32 => Some(|bytes, values| {
            values.extend(
                bytes
                    .as_chunks::<4>()
                    .0
                    .iter()
                    .map(|x| f32::from_le_bytes(*x)),
            );
        }),
        Dtype::BF16 => Some(|bytes, values| {
            let (chunks, _) = bytes.as_chunks::<2>();
            values.extend(chunks.iter().map(|x| bf16::from_le_bytes(*x).to_f32()));
        }),
        Dtype::F16 => Some(|bytes, values| {
            let (chunks, _) = bytes.as_chunks::<2>();
            values.extend(chunks.iter().map(|x| f16::from_le_bytes(*x).to_f32()));
        }),
        _ => None,
    }
}

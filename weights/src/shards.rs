//! Writes tensors as Hugging Face lays out a model: shards of safetensors, then their index.
//!
//! A folder without the index is no model to any reader, so the index is the commit. Tensors are
//! asked for one at a time while the file is written.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};
use half::bf16;
use pollen_core::tensor_header;
use pollen_storage::Storage;
use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::files::INDEX;

/// Values of one piece of an upload.
const PIECE: usize = 2 << 20;

/// A tensor to be written.
#[derive(Clone, Debug)]
pub(crate) struct Planned {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    /// F32 or BF16.
    pub(crate) dtype: Dtype,
}

impl Planned {
    fn bytes(&self) -> u64 {
        tensor_header::size_of(self.dtype, &self.shape).expect("a model's tensors have a size")
    }
}

/// Where the values of the tensors come from.
pub(crate) trait Values: Sync {
    /// Returns the values of a tensor, row-major.
    fn values(&self, name: &str) -> impl Future<Output = Result<Vec<f32>>> + Send;
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Number of tensors.
    pub tensors: usize,
    /// Number of shards.
    pub shards: usize,
    /// Bytes of the tensors.
    pub bytes: u64,
}

/// Fails when the folder holds a model.
pub(crate) async fn check_free(storage: &Storage) -> Result<()> {
    match storage.head(INDEX).await {
        Ok(_) => Err(Error::Exists { url: storage.url() }),
        Err(error) if error.is_not_found() => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Writes a model into a folder that holds none; `notes` go into the index. When this fails, the
/// folder holds no model.
pub(crate) async fn write(
    storage: &Storage,
    mut tensors: Vec<Planned>,
    shard_bytes: u64,
    notes: &serde_json::Value,
    source: &impl Values,
) -> Result<Written> {
    check_free(storage).await?;
    // Wide elements first, so that every tensor is aligned.
    tensors.sort_by(|a, b| (b.dtype, &a.name).cmp(&(a.dtype, &b.name)));
    let shards = cut(tensors, shard_bytes);
    let names: Vec<String> = (1..=shards.len())
        .map(|i| format!("model-{i:05}-of-{:05}.safetensors", shards.len()))
        .collect();
    let mut written = Written {
        tensors: 0,
        shards: shards.len(),
        bytes: 0,
    };
    let mut map = BTreeMap::new();
    for (name, shard) in names.iter().zip(&shards) {
        if let Err(error) = write_shard(storage, name, shard, source).await {
            // Nothing refers to these; that they cannot be deleted is not the error to report.
            for name in &names {
                let _ = storage.delete(name).await;
            }
            return Err(error);
        }
        written.tensors += shard.len();
        written.bytes += shard.iter().map(Planned::bytes).sum::<u64>();
        map.extend(shard.iter().map(|tensor| (&tensor.name, name)));
    }
    let index = serde_json::json!({
        "metadata": { "total_size": written.bytes, "pollen": notes },
        "weight_map": map,
    });
    storage.put(INDEX, format!("{index:#}\n").into()).await?;
    Ok(written)
}

/// Cuts tensors into shards of at most `limit` bytes, or of one tensor.
fn cut(tensors: Vec<Planned>, limit: u64) -> Vec<Vec<Planned>> {
    let mut shards: Vec<Vec<Planned>> = Vec::new();
    let mut bytes = 0;
    for tensor in tensors {
        let size = tensor.bytes();
        match shards.last_mut() {
            Some(shard) if bytes + size <= limit => {
                shard.push(tensor);
                bytes += size;
            }
            _ => {
                shards.push(vec![tensor]);
                bytes = size;
            }
        }
    }
    shards
}

async fn write_shard(
    storage: &Storage,
    name: &str,
    tensors: &[Planned],
    source: &impl Values,
) -> Result<()> {
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let entries = tensors
        .iter()
        .map(|tensor| (&*tensor.name, tensor.dtype, &*tensor.shape));
    let (head, _) = tensor_header::head(entries, &metadata);
    // The upload knows I/O errors only; ours is kept beside it.
    let fault: Arc<Mutex<Option<Error>>> = Arc::default();
    let pieces = stream::iter(tensors).then(|tensor| async {
        let values = source.values(&tensor.name).await.map_err(|error| {
            let text = std::io::Error::other(error.to_string());
            *fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            text
        })?;
        debug_assert_eq!(values.len(), tensor.shape.iter().product::<usize>());
        let dtype = tensor.dtype;
        let count = values.len().div_ceil(PIECE);
        let pieces = (0..count).map(move |i| {
            let end = values.len().min((i + 1) * PIECE);
            Ok(encode(&values[i * PIECE..end], dtype))
        });
        Ok::<_, std::io::Error>(stream::iter(pieces))
    });
    let pieces = stream::iter([Ok(Bytes::from(head))]).chain(pieces.try_flatten());
    let outcome = storage.put_stream(name, Box::pin(pieces)).await;
    let fault = fault.lock().unwrap_or_else(PoisonError::into_inner).take();
    match (outcome, fault) {
        (_, Some(fault)) => Err(fault),
        (Err(error), None) => Err(error.into()),
        (Ok(_), None) => Ok(()),
    }
}

/// Returns values as little-endian bytes, rounded to nearest even where they are cut.
fn encode(values: &[f32], dtype: Dtype) -> Bytes {
    if dtype == Dtype::BF16 {
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|&value| bf16::from_f32(value).to_le_bytes())
            .collect();
        return bytes.into();
    }
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    bytes.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_hold_what_fits() {
        let tensor = |name: &str, len: usize| Planned {
            name: name.into(),
            shape: vec![len],
            dtype: Dtype::F32,
        };
        let shards = cut(
            vec![
                tensor("a", 10),
                tensor("b", 10),
                tensor("c", 50),
                tensor("d", 1),
            ],
            80,
        );
        let names: Vec<Vec<&str>> = shards
            .iter()
            .map(|shard| shard.iter().map(|tensor| &*tensor.name).collect())
            .collect();
        assert_eq!(names, [vec!["a", "b"], vec!["c"], vec!["d"]]);
    }
}

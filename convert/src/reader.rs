//! Storage for threads that may block: parsers are synchronous, storage is not.

use std::ops::Range;

use bytes::Bytes;
use pollen_storage::{ObjectInfo, Storage};
use tokio::runtime::Handle;

use crate::error::{Error, Result};

/// A folder that blocking threads read.
#[derive(Clone, Debug)]
pub(crate) struct Reader {
    storage: Storage,
    runtime: Handle,
}

impl Reader {
    /// Wraps a folder; must be called inside a tokio runtime.
    pub(crate) fn new(storage: Storage) -> Self {
        Self {
            storage,
            runtime: Handle::current(),
        }
    }

    /// Returns the name of a file for messages.
    pub(crate) fn name(&self, path: &str) -> String {
        format!("{}/{path}", self.storage.url().trim_end_matches('/'))
    }

    pub(crate) fn get(&self, path: &str) -> Result<Bytes> {
        Ok(self.runtime.block_on(self.storage.get(path))?)
    }

    pub(crate) fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes> {
        Ok(self.runtime.block_on(self.storage.get_range(path, range))?)
    }

    pub(crate) fn head(&self, path: &str) -> Result<u64> {
        Ok(self.runtime.block_on(self.storage.head(path))?)
    }

    pub(crate) fn list(&self, folder: &str) -> Result<Vec<ObjectInfo>> {
        Ok(self.runtime.block_on(self.storage.list(folder))?)
    }

    pub(crate) fn put(&self, path: &str, bytes: Vec<u8>) -> Result<()> {
        Ok(self
            .runtime
            .block_on(self.storage.put(path, bytes.into()))?)
    }
}

/// Runs work that blocks on a thread of its own.
pub(crate) async fn blocking<T, F>(work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    let joined = tokio::task::spawn_blocking(work).await;
    joined.map_err(|error| Error::Panicked {
        reason: error.to_string(),
    })?
}

/// Reads an object that may be absent.
pub(crate) async fn get_if_present(storage: &Storage, path: &str) -> Result<Option<Bytes>> {
    match storage.get(path).await {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

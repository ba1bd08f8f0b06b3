//! The handle.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::{Stream, TryStreamExt};
use object_store::path::Path;
use object_store::{
    GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
};
use tokio::sync::Semaphore;

use crate::backend::{Backend, Kind};
use crate::config::StorageConfig;
use crate::error::{Error, Result};
use crate::location::Location;
use crate::observer::Observer;
use crate::retry::{self, Counters, Operation, Outcome, Resend, Tallies};
use crate::upload::{self, PART};
use crate::verdict::{Failure, Verdict, within};

/// How a conditional write ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutIfAbsent {
    /// The object is ours.
    Written,
    /// Another object has the name.
    AlreadyExists,
}

/// An object in a listing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectInfo {
    /// Path relative to the handle that listed it.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
    /// When it was last written, by the store's clock.
    pub modified: SystemTime,
}

/// A folder of objects. Clones and joins share the connection, the limits and the counters.
#[derive(Clone, Debug)]
pub struct Storage {
    shared: Arc<Shared>,
    prefix: Path,
}

#[derive(Debug)]
struct Shared {
    backend: Backend,
    config: StorageConfig,
    observer: Arc<dyn Observer>,
    permits: Semaphore,
    tallies: Tallies,
}

impl Storage {
    /// Opens a URL; S3 endpoint and credentials come from the `AWS_*` variables. Touches no network.
    pub fn open(url: &str, config: &StorageConfig, observer: Arc<dyn Observer>) -> Result<Self> {
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        Self::open_with(url, config, observer, &variables)
    }

    /// Opens a URL with the given variables in place of the environment's.
    pub fn open_with(
        url: &str,
        config: &StorageConfig,
        observer: Arc<dyn Observer>,
        variables: &HashMap<String, String>,
    ) -> Result<Self> {
        if let Some(fault) = config.faults().into_iter().next() {
            return Err(Error::InvalidUrl {
                url: url.into(),
                reason: fault,
            });
        }
        let (backend, prefix) = Backend::open(Location::parse(url)?, config, variables)?;
        Ok(Self::new(backend, prefix, config, observer))
    }

    /// Wraps a store that is open already; `url` names its root in messages.
    pub fn from_store(
        store: Arc<dyn ObjectStore>,
        url: &str,
        config: &StorageConfig,
        observer: Arc<dyn Observer>,
    ) -> Self {
        let backend = Backend {
            store,
            parts: None,
            base: url.trim_end_matches('/').into(),
            kind: Kind::Other,
        };
        Self::new(backend, Path::default(), config, observer)
    }

    fn new(
        backend: Backend,
        prefix: Path,
        config: &StorageConfig,
        observer: Arc<dyn Observer>,
    ) -> Self {
        let shared = Shared {
            backend,
            config: config.clone(),
            observer,
            permits: Semaphore::new(config.max_concurrent_requests.max(1)),
            tallies: Tallies::default(),
        };
        Self {
            shared: Arc::new(shared),
            prefix,
        }
    }

    /// Returns the URL of the folder.
    pub fn url(&self) -> String {
        self.url_of(&self.prefix)
    }

    /// Returns the folder `relative` below this one; characters that no key can have are escaped.
    #[must_use]
    pub fn join(&self, relative: &str) -> Self {
        let full = format!("{}/{}", self.prefix, relative.trim_matches('/'));
        let prefix = Path::parse(full.trim_matches('/')).unwrap_or_else(|_| Path::from(full));
        Self {
            shared: Arc::clone(&self.shared),
            prefix,
        }
    }

    /// Returns what this handle, its clones and its joins have done so far.
    pub fn counters(&self) -> Counters {
        self.shared.tallies.snapshot()
    }

    /// Reads an object.
    pub async fn get(&self, path: &str) -> Result<Bytes> {
        let key = self.key(path)?;
        let mut operation = self.operation("get", &key);
        // The size is known with the head of the answer, so the body gets a limit of its own.
        let head_limit = operation.limit;
        operation.limit = Duration::MAX;
        let bytes = self
            .run(&operation, || async {
                let answer = within(head_limit, self.store().get(&key)).await?;
                let body_limit = self.config().attempt_limit(answer.meta.size);
                within(body_limit, answer.bytes()).await
            })
            .await?;
        self.tallies().read(bytes.len() as u64);
        Ok(bytes)
    }

    /// Reads a range of an object; an object that ends before the range is [`Error::Short`].
    pub async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes> {
        let key = self.key(path)?;
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let wanted = range.end - range.start;
        let mut operation = self.operation("get", &key);
        operation.limit = self.shared.config.attempt_limit(wanted);
        let bytes = self
            .run(&operation, || async {
                let options = GetOptions {
                    range: Some(GetRange::Bounded(range.clone())),
                    ..GetOptions::default()
                };
                let bytes = self.store().get_opts(&key, options).await?.bytes().await?;
                if bytes.len() as u64 == wanted {
                    Ok(bytes)
                } else {
                    Err(Failure::Short)
                }
            })
            .await
            .map_err(|error| match error {
                Error::Short { url, .. } => Error::Short {
                    url,
                    end: range.end,
                },
                other => other,
            })?;
        self.shared.tallies.read(wanted);
        Ok(bytes)
    }

    /// Returns the size of an object.
    pub async fn head(&self, path: &str) -> Result<u64> {
        self.head_key(&self.key(path)?).await
    }

    /// Returns whether objects can be listed: not on web servers.
    pub fn can_list(&self) -> bool {
        !matches!(self.shared.backend.kind, Kind::Web)
    }

    fn refuse_to_write(&self, operation: &'static str, path: &str) -> Result<()> {
        if self.can_list() {
            return Ok(());
        }
        Err(Error::PermissionDenied {
            operation,
            url: format!("{}/{path}", self.url()),
            hint: "http:// and https:// are for reading: write to a bucket or a folder",
            source: "read-only".into(),
        })
    }

    /// Writes an object, in place of one of the same name if there is one. Readers see the old
    /// bytes or the new ones; in a folder the new ones are on disk when this returns.
    pub async fn put(&self, path: &str, bytes: Bytes) -> Result<()> {
        self.refuse_to_write("put", path)?;
        if bytes.len() > PART {
            let pieces = futures::stream::iter([Ok(bytes)]);
            return self.put_stream(path, pieces).await.map(drop);
        }
        self.put_payload(&self.key(path)?, bytes.into()).await
    }

    /// Writes an object from a stream of pieces of any size and returns its length. Large objects
    /// go in parts that are sent again one by one; on an error the upload is aborted and nothing
    /// appears under the name.
    pub async fn put_stream<S>(&self, path: &str, pieces: S) -> Result<u64>
    where
        S: Stream<Item = std::io::Result<Bytes>> + Send + Unpin,
    {
        self.refuse_to_write("put", path)?;
        Box::pin(upload::put_stream(self, path, pieces)).await
    }

    /// Writes an object unless there is one of that name, atomically. Sent again only when the
    /// request surely was not carried out; when that is unknown, [`Error::Ambiguous`].
    pub async fn put_if_absent(&self, path: &str, bytes: Bytes) -> Result<PutIfAbsent> {
        self.refuse_to_write("put-if-absent", path)?;
        let key = self.key(path)?;
        let size = bytes.len() as u64;
        let mut operation = self.writing("put-if-absent", &key);
        operation.limit = self.shared.config.attempt_limit(size);
        operation.resend = Resend::IfNotSent;
        let outcome = self
            .attempts(&operation, || async {
                let options = PutOptions::from(PutMode::Create);
                let payload = PutPayload::from(bytes.clone());
                self.store().put_opts(&key, payload, options).await?;
                Ok(())
            })
            .await;
        match outcome {
            Ok(()) => {
                self.shared.tallies.wrote(size);
                Ok(PutIfAbsent::Written)
            }
            Err(Outcome::Final(Verdict::Exists, _)) => Ok(PutIfAbsent::AlreadyExists),
            Err(outcome) => Err(self.error(&operation, outcome)),
        }
    }

    /// Lists the objects below the folder `prefix`, in order of their paths; a web server has none
    /// to list.
    pub async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        if !self.can_list() {
            return Err(Error::Rejected {
                operation: "list",
                url: format!("{}/{prefix}", self.url()),
                source: "web servers have no listings; name a bucket or a folder".into(),
            });
        }
        let key = match prefix.trim_matches('/') {
            "" => self.prefix.clone(),
            prefix => self.key(prefix)?,
        };
        let mut operation = self.operation("list", &key);
        // A listing takes many requests; the limit is for each page.
        let page = operation.limit;
        operation.limit = Duration::MAX;
        let under = self.prefix.as_ref();
        self.run(&operation, || async {
            let mut found = Vec::new();
            let mut pages = self.store().list(Some(&key));
            loop {
                match within(page, pages.try_next()).await? {
                    None => break,
                    Some(object) => {
                        let full = object.location.as_ref();
                        let path = full.strip_prefix(under).unwrap_or(full);
                        found.push(ObjectInfo {
                            path: path.trim_start_matches('/').into(),
                            size: object.size,
                            modified: object.last_modified.into(),
                        });
                    }
                }
            }
            found.sort_unstable();
            Ok(found)
        })
        .await
    }

    /// Deletes an object; that it does not exist is no error.
    pub async fn delete(&self, path: &str) -> Result<()> {
        self.refuse_to_write("delete", path)?;
        let key = self.key(path)?;
        let operation = self.writing("delete", &key);
        let outcome = self
            .attempts(&operation, || async {
                Ok(self.store().delete(&key).await?)
            })
            .await;
        match outcome {
            Ok(()) | Err(Outcome::Final(Verdict::NotFound, _)) => {}
            Err(outcome) => return Err(self.error(&operation, outcome)),
        }
        if matches!(self.shared.backend.kind, Kind::File) {
            self.remove_empty_folders(&key).await;
        }
        Ok(())
    }

    /// Checks that the bucket exists and the credentials work, or that the folder can exist.
    pub async fn check(&self) -> Result<()> {
        match self.shared.backend.kind {
            Kind::File => return self.check_folder(),
            // Nothing can be asked of it without the name of an object.
            Kind::Web => return Ok(()),
            Kind::Bucket { .. } | Kind::Other => {}
        }
        let mut operation = self.operation("check", &self.prefix);
        operation.retry_for = operation.retry_for.min(Duration::from_secs(30));
        let outcome = self
            .attempts(&operation, || async {
                self.store().list(Some(&self.prefix)).try_next().await?;
                Ok(())
            })
            .await;
        match outcome {
            Ok(()) => Ok(()),
            Err(Outcome::Final(Verdict::NotFound, failure)) => {
                Err(self.error(&operation, Outcome::Final(Verdict::NoBucket, failure)))
            }
            Err(outcome) => Err(self.error(&operation, outcome)),
        }
    }

    fn check_folder(&self) -> Result<()> {
        let path = std::path::PathBuf::from(format!("/{}", self.prefix));
        let mut nearest = path.as_path();
        while let Some(parent) = nearest.parent().filter(|_| !nearest.exists()) {
            nearest = parent;
        }
        if nearest.is_dir() {
            return Ok(());
        }
        Err(Error::InvalidUrl {
            url: self.url(),
            reason: format!("{} is not a folder", nearest.display()),
        })
    }

    /// Removes the folders that a deletion left empty, up to this handle's own.
    async fn remove_empty_folders(&self, key: &Path) {
        let own = std::path::PathBuf::from(format!("/{}", self.prefix));
        let mut folder = std::path::PathBuf::from(format!("/{key}"));
        while folder.pop() && folder.starts_with(&own) && folder != own {
            // Fails on a folder that is not empty, which ends the climb.
            if tokio::fs::remove_dir(&folder).await.is_err() {
                break;
            }
        }
    }

    pub(crate) fn key(&self, path: &str) -> Result<Path> {
        let invalid = |reason: String| Error::InvalidUrl {
            url: format!("{}/{path}", self.url()),
            reason,
        };
        let path = path.trim_matches('/');
        if path.is_empty() {
            return Err(invalid("an object needs a name".into()));
        }
        let full = format!("{}/{path}", self.prefix);
        Path::parse(full.trim_start_matches('/')).map_err(|error| invalid(error.to_string()))
    }

    pub(crate) fn store(&self) -> &dyn ObjectStore {
        self.shared.backend.store.as_ref()
    }

    pub(crate) fn backend(&self) -> &Backend {
        &self.shared.backend
    }

    pub(crate) fn config(&self) -> &StorageConfig {
        &self.shared.config
    }

    pub(crate) fn tallies(&self) -> &Tallies {
        &self.shared.tallies
    }

    pub(crate) fn url_of(&self, key: &Path) -> String {
        let base = &self.shared.backend.base;
        if key.as_ref().is_empty() {
            base.clone()
        } else {
            format!("{base}/{key}")
        }
    }

    pub(crate) fn operation(&self, name: &'static str, key: &Path) -> Operation {
        Operation {
            name,
            url: self.url_of(key),
            writes: false,
            limit: self.shared.config.request_timeout,
            retry_for: self.shared.config.retry_for,
            resend: Resend::Always,
        }
    }

    pub(crate) fn writing(&self, name: &'static str, key: &Path) -> Operation {
        Operation {
            writes: true,
            ..self.operation(name, key)
        }
    }

    pub(crate) async fn head_key(&self, key: &Path) -> Result<u64> {
        let operation = self.operation("head", key);
        self.run(&operation, || async {
            Ok(self.store().head(key).await?.size)
        })
        .await
    }

    pub(crate) async fn put_payload(&self, key: &Path, payload: PutPayload) -> Result<()> {
        let size = payload.content_length() as u64;
        let mut operation = self.writing("put", key);
        operation.limit = self.config().attempt_limit(size);
        self.run(&operation, || async {
            self.store().put(key, payload.clone()).await?;
            Ok(())
        })
        .await?;
        self.tallies().wrote(size);
        Ok(())
    }

    pub(crate) fn error(&self, operation: &Operation, outcome: Outcome) -> Error {
        outcome.into_error(operation, &self.shared.backend.kind)
    }

    pub(crate) async fn attempts<T, F>(
        &self,
        operation: &Operation,
        attempt: impl Fn() -> F,
    ) -> Result<T, Outcome>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let shared = &self.shared;
        retry::attempts(operation, &*shared.observer, &shared.tallies, || async {
            let _permit = shared.permits.acquire().await;
            let outcome = tokio::time::timeout(operation.limit, attempt()).await;
            outcome.unwrap_or_else(|_| Err(Failure::no_answer(operation.limit)))
        })
        .await
    }

    pub(crate) async fn run<T, F>(
        &self,
        operation: &Operation,
        attempt: impl Fn() -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        self.attempts(operation, attempt)
            .await
            .map_err(|outcome| self.error(operation, outcome))
    }
}

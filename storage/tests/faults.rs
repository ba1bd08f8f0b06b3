//! Retries, lost answers and limits, against a store that fails on cue. Time is paused: waits pass
//! at once, and a store that never answers costs nothing.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result as StoreResult,
};
use pollen_core::ErrorClass;
use pollen_storage::{Error, Observer, PutIfAbsent, Recovered, Retry, Storage, StorageConfig};

/// What happens to a request.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// An I/O error instead of the request.
    Before(io::ErrorKind),
    /// The request is carried out, then its answer is lost.
    After(io::ErrorKind),
    /// Nothing, for ever.
    Freeze,
    /// An answer with this status.
    Status(&'static str),
}

#[derive(Debug, Default)]
struct Faulty {
    inner: InMemory,
    faults: Mutex<VecDeque<Fault>>,
}

impl Faulty {
    fn next(&self) -> Option<Fault> {
        self.faults.lock().unwrap().pop_front()
    }

    async fn through<T>(&self, request: impl Future<Output = StoreResult<T>>) -> StoreResult<T> {
        let generic =
            |source: Box<dyn std::error::Error + Send + Sync>| object_store::Error::Generic {
                store: "faulty",
                source,
            };
        match self.next() {
            None => request.await,
            Some(Fault::Before(kind)) => Err(generic(io::Error::from(kind).into())),
            Some(Fault::After(kind)) => {
                request.await?;
                Err(generic(io::Error::from(kind).into()))
            }
            Some(Fault::Freeze) => std::future::pending().await,
            Some(Fault::Status(status)) => Err(generic(
                format!("Server returned non-2xx status code: {status}: ").into(),
            )),
        }
    }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty")
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(
        &self,
        at: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> StoreResult<PutResult> {
        self.through(self.inner.put_opts(at, payload, options))
            .await
    }
    async fn put_multipart_opts(
        &self,
        at: &Path,
        options: PutMultipartOptions,
    ) -> StoreResult<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(at, options).await
    }
    async fn get_opts(&self, at: &Path, options: GetOptions) -> StoreResult<GetResult> {
        self.through(self.inner.get_opts(at, options)).await
    }
    fn delete_stream(
        &self,
        paths: BoxStream<'static, StoreResult<Path>>,
    ) -> BoxStream<'static, StoreResult<Path>> {
        self.inner.delete_stream(paths)
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, StoreResult<ObjectMeta>> {
        match self.next() {
            None => self.inner.list(prefix),
            Some(_) => futures::stream::pending().boxed(),
        }
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> StoreResult<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> StoreResult<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[derive(Debug, Default)]
struct Recorder {
    retries: Mutex<Vec<Retry>>,
    recovered: Mutex<Vec<Recovered>>,
}

impl Observer for Recorder {
    fn retry(&self, retry: &Retry) {
        self.retries.lock().unwrap().push(retry.clone());
    }
    fn recovered(&self, recovered: &Recovered) {
        self.recovered.lock().unwrap().push(recovered.clone());
    }
}

fn faulty(faults: &[Fault]) -> (Storage, Arc<Faulty>, Arc<Recorder>) {
    let store = Arc::new(Faulty::default());
    store.faults.lock().unwrap().extend(faults);
    let recorder = Arc::new(Recorder::default());
    let storage = Storage::from_store(
        Arc::clone(&store) as Arc<dyn ObjectStore>,
        "faulty://",
        &StorageConfig::default(),
        Arc::clone(&recorder) as Arc<dyn Observer>,
    );
    (storage, store, recorder)
}

#[tokio::test(start_paused = true)]
async fn a_write_survives_everything_that_passes() {
    let (storage, _, recorder) = faulty(&[
        Fault::Before(io::ErrorKind::ConnectionRefused),
        Fault::After(io::ErrorKind::ConnectionReset),
        Fault::Freeze,
        Fault::Status("503 Slow Down"),
        Fault::Status("429 Too Many Requests"),
    ]);
    storage.put("a", "x".into()).await.unwrap();
    assert_eq!(storage.get("a").await.unwrap(), "x");
    let retries = recorder.retries.lock().unwrap();
    let attempts: Vec<u32> = retries.iter().map(|retry| retry.attempt).collect();
    assert_eq!(attempts, [1, 2, 3, 4, 5]);
    assert!(retries.iter().all(|retry| retry.operation == "put"));
    assert_eq!(retries[2].error, "no answer within 10.0s");
    let recovered = recorder.recovered.lock().unwrap();
    assert_eq!((recovered.len(), recovered[0].attempts), (1, 6));
    assert!(recovered[0].waited >= Duration::from_secs(10), "the freeze");
    let counters = storage.counters();
    assert_eq!((counters.retried_puts, counters.retried_gets), (5, 0));
    assert_eq!((counters.puts, counters.bytes_written), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn reads_and_listings_are_tried_again() {
    let (storage, store, _) = faulty(&[]);
    storage.put("a", "xyz".into()).await.unwrap();
    let cue = |fault| store.faults.lock().unwrap().push_back(fault);
    cue(Fault::Freeze);
    assert_eq!(storage.get("a").await.unwrap(), "xyz");
    cue(Fault::Before(io::ErrorKind::ConnectionReset));
    assert_eq!(storage.get_range("a", 1..2).await.unwrap(), "y");
    cue(Fault::Freeze);
    assert_eq!(storage.list("").await.unwrap().len(), 1);
    cue(Fault::Freeze);
    assert_eq!(storage.head("a").await.unwrap(), 3);
    assert_eq!(storage.counters().retried_gets, 4);
}

#[tokio::test(start_paused = true)]
async fn a_dead_server_is_given_up_in_time() {
    let (storage, _, recorder) = faulty(&[Fault::Freeze; 100]);
    let start = tokio::time::Instant::now();
    let error = storage.get("a").await.unwrap_err();
    let Error::Exhausted {
        attempts, after, ..
    } = &error
    else {
        panic!("{error}");
    };
    assert_eq!(
        *attempts as usize,
        recorder.retries.lock().unwrap().len() + 1
    );
    assert!(*after <= Duration::from_secs(310) && *after >= Duration::from_secs(290));
    assert_eq!(start.elapsed(), *after, "no wait after the last attempt");
    assert_eq!(error.class(), ErrorClass::Retryable);
    assert!(error.to_string().contains("faulty:/"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn what_will_not_pass_is_not_tried_again() {
    for (fault, class) in [
        (Fault::Status("403 Forbidden"), ErrorClass::User),
        (Fault::Status("400 Bad Request"), ErrorClass::Fatal),
        (
            Fault::Before(io::ErrorKind::StorageFull),
            ErrorClass::Retryable,
        ),
        (
            Fault::Before(io::ErrorKind::PermissionDenied),
            ErrorClass::User,
        ),
    ] {
        let (storage, _, recorder) = faulty(&[fault]);
        let error = storage.put("a", Bytes::new()).await.unwrap_err();
        assert_eq!(error.class(), class, "{fault:?}: {error}");
        assert!(recorder.retries.lock().unwrap().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_of_a_conditional_write_is_ambiguous() {
    for fault in [
        Fault::After(io::ErrorKind::ConnectionReset),
        Fault::Freeze,
        Fault::Status("500 Internal Server Error"),
    ] {
        let (storage, store, _) = faulty(&[fault]);
        let error = storage.put_if_absent("a", "x".into()).await.unwrap_err();
        assert!(
            matches!(error, Error::Ambiguous { .. }),
            "{fault:?}: {error}"
        );
        assert!(store.faults.lock().unwrap().is_empty());
        let written = matches!(fault, Fault::After(_));
        assert_eq!(
            storage.get("a").await.is_ok(),
            written,
            "sent once, not again"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_conditional_write_that_was_not_sent_is_tried_again() {
    let (storage, _, recorder) = faulty(&[
        Fault::Before(io::ErrorKind::ConnectionRefused),
        Fault::Status("409 Conflict"),
        Fault::Status("429 Too Many Requests"),
    ]);
    let outcome = storage.put_if_absent("a", "x".into()).await.unwrap();
    assert_eq!(outcome, PutIfAbsent::Written);
    assert_eq!(recorder.recovered.lock().unwrap()[0].attempts, 4);
}

#[tokio::test(start_paused = true)]
async fn requests_at_once_are_limited() {
    let store = Arc::new(Faulty::default());
    store.faults.lock().unwrap().extend([Fault::Freeze; 3]);
    let config = StorageConfig {
        max_concurrent_requests: 2,
        ..StorageConfig::default()
    };
    let storage = Storage::from_store(
        Arc::clone(&store) as Arc<dyn ObjectStore>,
        "faulty://",
        &config,
        Arc::new(pollen_storage::Silent),
    );
    let reads = futures::future::join_all((0..3).map(|_| storage.get("a")));
    // Well within the time limit of the first two: the third waits for its turn.
    let early = tokio::time::timeout(Duration::from_secs(5), reads).await;
    assert!(early.is_err());
    assert_eq!(store.faults.lock().unwrap().len(), 1);
}

//! Conditional writes whose answers are lost: the log decides what happened.
#![allow(clippy::unwrap_used, reason = "tests")]

mod places;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult,
    Result as StoreResult,
};
use places::{Place, save};
use pollen_checkpoints::Error;
use pollen_storage::{Silent, Storage, StorageConfig};

/// What happens to a conditional write.
#[derive(Clone, Debug)]
enum Fault {
    /// It passes.
    None,
    /// It happens, and the connection breaks before the answer.
    AnswerLost,
    /// The connection breaks before it happens.
    RequestLost,
    /// The connection breaks, and somebody else writes this object first.
    Overtaken(String),
}

#[derive(Debug, Default)]
struct Flaky {
    inner: InMemory,
    faults: Mutex<VecDeque<Fault>>,
}

impl fmt::Display for Flaky {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("flaky")
    }
}

#[async_trait]
impl ObjectStore for Flaky {
    async fn put_opts(
        &self,
        at: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> StoreResult<PutResult> {
        let conditional = options.mode == PutMode::Create;
        let fault = conditional
            .then(|| self.faults.lock().unwrap().pop_front())
            .flatten();
        match fault {
            None | Some(Fault::None) => return self.inner.put_opts(at, payload, options).await,
            Some(Fault::AnswerLost) => {
                self.inner.put_opts(at, payload, options).await?;
            }
            Some(Fault::RequestLost) => {}
            Some(Fault::Overtaken(other)) => {
                self.inner.put(at, other.into()).await?;
            }
        }
        Err(object_store::Error::Generic {
            store: "flaky",
            source: io::Error::from(io::ErrorKind::ConnectionReset).into(),
        })
    }
    async fn put_multipart_opts(
        &self,
        at: &Path,
        options: PutMultipartOptions,
    ) -> StoreResult<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(at, options).await
    }
    async fn get_opts(&self, at: &Path, options: GetOptions) -> StoreResult<GetResult> {
        self.inner.get_opts(at, options).await
    }
    fn delete_stream(
        &self,
        paths: BoxStream<'static, StoreResult<Path>>,
    ) -> BoxStream<'static, StoreResult<Path>> {
        self.inner.delete_stream(paths)
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, StoreResult<ObjectMeta>> {
        self.inner.list(prefix)
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> StoreResult<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> StoreResult<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// Faults hit the conditional writes in order: claim, MANIFEST, log entry.
fn flaky(faults: &[Fault]) -> Place {
    let store = Flaky::default();
    store.faults.lock().unwrap().extend(faults.iter().cloned());
    let config = StorageConfig::default();
    let storage = Storage::from_store(Arc::new(store), "flaky:///run", &config, Arc::new(Silent));
    Place::new(storage)
}

fn log_len(place: &Place) -> usize {
    let paths = place.paths();
    paths.iter().filter(|path| path.starts_with("log/")).count()
}

#[test]
fn a_write_that_happened_counts_once() {
    for lost in [Fault::AnswerLost, Fault::RequestLost] {
        for at in 0..3 {
            let mut faults = vec![Fault::None; 3];
            faults[at] = lost.clone();
            let place = flaky(&faults);
            let process = place.process();
            let claim = process.claim(1).unwrap();
            save(&process, &claim, 10).unwrap();
            assert_eq!(log_len(&place), 2, "{lost:?} at {at}");
            let restored = place.process().newest().unwrap().unwrap();
            assert_eq!(restored.manifest.head.step, 10);
        }
    }
}

#[test]
fn a_newer_claim_in_place_of_ours_fences() {
    let claim = r#"{"generation":2,"nonce":"other","kind":"claim"}"#;
    let overtaken = Fault::Overtaken(claim.into());
    let place = flaky(&[Fault::None, Fault::None, overtaken.clone()]);
    let process = place.process();
    let mine = process.claim(1).unwrap();
    let error = save(&process, &mine, 10).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Fenced {
                by_generation: 2,
                ..
            }
        ),
        "{error}"
    );
    assert!(place.process().newest().unwrap().is_none());

    let place = flaky(&[overtaken]);
    let error = place.process().claim(1).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Fenced {
                by_generation: 2,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn anybody_else_in_our_place_moves_us_on() {
    let publish = r#"{"generation":1,"nonce":"other","kind":"publish","step":5,
        "manifest":"step-00000005/g1/MANIFEST.json","sha256":"00"}"#;
    for other in [publish, "not an entry"] {
        // The old generation's last entry comes before our claim.
        let place = flaky(&[Fault::Overtaken(other.into())]);
        let process = place.process();
        let claim = process.claim(2).unwrap();
        save(&process, &claim, 10).unwrap();
        assert_eq!(log_len(&place), 3);
        let restored = place.process().newest().unwrap().unwrap();
        assert_eq!(restored.manifest.head.step, 10);
    }
}

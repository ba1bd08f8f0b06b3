//! One suite of expectations, run against process memory, a folder, an S3 server and an Azure server.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::Write as _;
use std::sync::Arc;

use bytes::Bytes;
use pollen_core::ErrorClass;
use pollen_storage::{Error, PutIfAbsent, Silent, Storage, StorageConfig};

fn open(url: &str) -> Storage {
    Storage::open(url, &StorageConfig::default(), Arc::new(Silent)).unwrap()
}

fn paths(listing: Vec<pollen_storage::ObjectInfo>) -> Vec<String> {
    listing.into_iter().map(|object| object.path).collect()
}

async fn suite(storage: &Storage) {
    storage.check().await.unwrap();
    objects(storage).await;
    ranges(storage).await;
    conditional_writes(storage).await;
    large_objects(storage).await;
}

async fn objects(storage: &Storage) {
    assert!(storage.get("none").await.unwrap_err().is_not_found());
    assert!(storage.head("none").await.unwrap_err().is_not_found());
    assert!(storage.list("none").await.unwrap().is_empty());
    storage.delete("none").await.unwrap();

    storage.put("a/one", "old".into()).await.unwrap();
    storage.put("a/one", "1".into()).await.unwrap();
    storage.put("a/b/two", "22".into()).await.unwrap();
    storage.put("ab/three", Bytes::new()).await.unwrap();
    assert_eq!(storage.get("a/one").await.unwrap(), "1");
    assert_eq!(storage.head("a/b/two").await.unwrap(), 2);
    assert_eq!(storage.get("ab/three").await.unwrap(), "");
    let all = storage.list("").await.unwrap();
    assert_eq!(paths(all), ["a/b/two", "a/one", "ab/three"]);
    let some = storage.list("a").await.unwrap();
    assert_eq!(
        paths(some),
        ["a/b/two", "a/one"],
        "a folder, not a prefix of names"
    );
    let joined = storage.join("a").join("b");
    assert_eq!(paths(joined.list("").await.unwrap()), ["two"]);
    assert_eq!(joined.url(), format!("{}/a/b", storage.url()));

    storage.delete("a/b/two").await.unwrap();
    storage.delete("a/one").await.unwrap();
    storage.delete("ab/three").await.unwrap();
    assert!(storage.list("").await.unwrap().is_empty());
    for bad in ["", "/", "a/../b", "a//b"] {
        let error = storage.put(bad, Bytes::new()).await.unwrap_err();
        assert_eq!(error.class(), ErrorClass::User, "{bad}: {error}");
    }
}

async fn ranges(storage: &Storage) {
    storage.put("ten", "0123456789".into()).await.unwrap();
    assert_eq!(storage.get_range("ten", 2..5).await.unwrap(), "234");
    assert_eq!(storage.get_range("ten", 0..10).await.unwrap(), "0123456789");
    assert_eq!(storage.get_range("ten", 4..4).await.unwrap(), "");
    for beyond in [5..11, 10..11, 20..30] {
        let error = storage.get_range("ten", beyond.clone()).await.unwrap_err();
        assert!(
            matches!(error, Error::Short { end, .. } if end == beyond.end),
            "{error}"
        );
    }
    let error = storage.get_range("none", 0..1).await.unwrap_err();
    assert!(error.is_not_found(), "{error}");
}

async fn conditional_writes(storage: &Storage) {
    let first = storage.put_if_absent("log/1", "a".into()).await.unwrap();
    let second = storage.put_if_absent("log/1", "b".into()).await.unwrap();
    assert_eq!(
        (first, second),
        (PutIfAbsent::Written, PutIfAbsent::AlreadyExists)
    );
    assert_eq!(storage.get("log/1").await.unwrap(), "a");
    let writers = (0..12).map(|writer| {
        let storage = storage.clone();
        async move {
            let bytes = Bytes::from(format!("writer {writer}"));
            storage.put_if_absent("log/2", bytes).await.unwrap()
        }
    });
    let outcomes = futures::future::join_all(writers).await;
    let winners = outcomes.iter().filter(|o| **o == PutIfAbsent::Written);
    assert_eq!(winners.count(), 1);
}

async fn large_objects(storage: &Storage) {
    let piece = Bytes::from((0..3_000_001_u32).map(|i| i as u8).collect::<Vec<u8>>());
    let pieces = futures::stream::iter((0..24).map(|_| Ok(piece.clone())));
    let written = storage.put_stream("large", pieces).await.unwrap();
    assert_eq!(written, 24 * 3_000_001);
    assert_eq!(storage.head("large").await.unwrap(), written);
    for index in [0, 11, 12, 23] {
        let start = index * 3_000_001;
        let read = storage.get_range("large", start..start + 3_000_001).await;
        assert!(read.unwrap() == piece, "piece {index} differs");
    }
    let small = futures::stream::iter([Ok(Bytes::from("a")), Ok(Bytes::from("b"))]);
    storage.put_stream("small", small).await.unwrap();
    assert_eq!(storage.get("small").await.unwrap(), "ab");

    let broken = std::io::Error::other("the source broke");
    let pieces = vec![Ok(Bytes::from(vec![0; 70_000_000])), Err(broken)];
    let error = storage
        .put_stream("broken", futures::stream::iter(pieces))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("the source broke"), "{error}");
    assert!(storage.head("broken").await.unwrap_err().is_not_found());
}

#[tokio::test]
async fn memory() {
    suite(&open("memory:///conformance")).await;
    let again = open("memory:///conformance");
    assert_eq!(again.get("log/1").await.unwrap(), "a", "one store per name");
    assert!(open("memory:///other").get("log/1").await.is_err());
}

#[tokio::test]
async fn folder() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a folder");
    suite(&open(path.to_str().unwrap())).await;
    let url = url::Url::from_directory_path(&path).unwrap();
    assert_eq!(open(url.as_str()).get("log/1").await.unwrap(), "a");
    let mut left: Vec<_> = std::fs::read_dir(&path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(
        left,
        ["large", "log", "small", "ten"],
        "no temporary files, no empty folders"
    );
}

/// On the S3 server that `POLLEN_TEST_S3_URL` (for example `s3://bucket/tests`) names.
#[tokio::test]
async fn s3() {
    on_server("POLLEN_TEST_S3_URL", "s3://no-such-bucket-here").await;
}

/// On the Azure server that `POLLEN_TEST_AZURE_URL` (for example `az://container/tests`) names.
#[tokio::test]
async fn azure() {
    on_server("POLLEN_TEST_AZURE_URL", "az://no-such-container-here").await;
}

async fn on_server(variable: &str, nowhere: &str) {
    let Ok(url) = std::env::var(variable) else {
        let _ = writeln!(std::io::stderr(), "SKIPPED: {variable} is not set");
        return;
    };
    let storage = open(&url).join(&format!("storage-{}", std::process::id()));
    suite(&storage).await;
    for object in storage.list("").await.unwrap() {
        storage.delete(&object.path).await.unwrap();
    }
    let error = open(nowhere).check().await.unwrap_err();
    assert!(matches!(error, Error::NoBucket { .. }), "{error}");
}

#[tokio::test]
async fn a_file_is_no_folder() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let storage = open(file.path().join("run").to_str().unwrap());
    let error = storage.check().await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::User);
    assert!(error.to_string().contains("is not a folder"), "{error}");
}

#[tokio::test]
async fn counters_are_shared() {
    let storage = open("memory:///counters");
    storage.join("a").put("x", "123".into()).await.unwrap();
    storage.clone().get("a/x").await.unwrap();
    let counters = storage.counters();
    assert_eq!((counters.puts, counters.bytes_written), (1, 3));
    assert_eq!((counters.gets, counters.bytes_read), (1, 3));
    assert_eq!((counters.retried_gets, counters.retried_puts), (0, 0));
}

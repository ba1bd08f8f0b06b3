//! The S3 client against a socket that answers from a script: what `object_store` says in its
//! errors decides what is tried again, so its wording is tested here.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use pollen_core::ErrorClass;
use pollen_storage::{Error, PutIfAbsent, Silent, Storage, StorageConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const OK: &str = "HTTP/1.1 200 OK\r\nETag: \"e\"\r\nLast-Modified: Mon, 02 Nov 2026 00:00:00 GMT\r\n\
    Content-Length: 3\r\nConnection: close\r\n\r\nxyz";
const FREEZE: &str = "";
const HANG_UP: &str = "hang up";

fn status(line: &str, code: &str) -> String {
    let body = format!("<Error><Code>{code}</Code></Error>");
    format!(
        "HTTP/1.1 {line}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

/// Reads one request with its body, as long as its head says.
async fn request(socket: &mut TcpStream) {
    let mut seen = Vec::new();
    loop {
        let read = socket.read_buf(&mut seen).await.unwrap();
        let text = String::from_utf8_lossy(&seen);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| {
                line.to_lowercase()
                    .strip_prefix("content-length: ")?
                    .parse()
                    .ok()
            });
            if body.len() >= length.unwrap_or(0) {
                return;
            }
        }
        assert!(read > 0, "the client hung up");
    }
}

/// Starts a server that gives each connection the next answer, and a handle that talks to it.
async fn server(answers: Vec<String>) -> Storage {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut frozen = Vec::new();
        for answer in answers {
            let (mut socket, _) = listener.accept().await.unwrap();
            request(&mut socket).await;
            match answer.as_str() {
                FREEZE => frozen.push(socket),
                HANG_UP => drop(socket),
                answer => socket.write_all(answer.as_bytes()).await.unwrap(),
            }
        }
    });
    let variables = HashMap::from([
        ("AWS_ENDPOINT_URL".into(), format!("http://{address}")),
        ("AWS_ACCESS_KEY_ID".into(), "id".into()),
        ("AWS_SECRET_ACCESS_KEY".into(), "secret".into()),
    ]);
    let config = StorageConfig {
        request_timeout: Duration::from_millis(500),
        ..StorageConfig::default()
    };
    Storage::open_with("s3://bucket/run", &config, Arc::new(Silent), &variables).unwrap()
}

#[tokio::test]
async fn frozen_broken_and_busy_servers_are_outlived() {
    let script = [FREEZE, HANG_UP, &status("503 Busy", "SlowDown"), OK];
    let storage = server(script.map(str::to_owned).into()).await;
    assert_eq!(storage.get("a").await.unwrap(), "xyz");
    assert_eq!(storage.counters().retried_gets, 3);

    let script = [HANG_UP, &status("500 No", "InternalError"), FREEZE, OK];
    let storage = server(script.map(str::to_owned).into()).await;
    storage.put("a", "body".into()).await.unwrap();
    assert_eq!(storage.counters().retried_puts, 3);
}

#[tokio::test]
async fn a_body_that_breaks_off_is_read_again() {
    let broken = OK.replace("Content-Length: 3", "Content-Length: 5");
    let storage = server(vec![broken, OK.into()]).await;
    assert_eq!(storage.get("a").await.unwrap(), "xyz");
}

#[tokio::test]
async fn a_missing_bucket_is_named_with_its_server() {
    for _ in 0..2 {
        let storage = server(vec![status("404 Not Found", "NoSuchBucket")]).await;
        let error = storage.check().await.unwrap_err();
        assert_eq!(error.class(), ErrorClass::User);
        let text = error.to_string();
        let start = "bucket `bucket` does not exist at http://127.0.0.1:";
        assert!(text.starts_with(start), "{text}");
    }
    let storage = server(vec![status("404 Not Found", "NoSuchBucket")]).await;
    let error = storage.put("a", "x".into()).await.unwrap_err();
    assert!(matches!(error, Error::NoBucket { .. }), "{error}");
}

#[tokio::test]
async fn refusals_are_final() {
    let storage = server(vec![status("403 Forbidden", "SignatureDoesNotMatch")]).await;
    let error = storage.get("a").await.unwrap_err();
    assert!(matches!(error, Error::PermissionDenied { .. }), "{error}");
    assert!(
        error.to_string().contains("AWS_SECRET_ACCESS_KEY"),
        "{error}"
    );
    let storage = server(vec![status("403 Forbidden", "AccessDenied")]).await;
    let error = storage.list("").await.unwrap_err();
    assert!(matches!(error, Error::PermissionDenied { .. }), "{error}");
    let storage = server(vec![status("404 Not Found", "NoSuchKey")]).await;
    assert!(storage.get("a").await.unwrap_err().is_not_found());
    let storage = server(vec![status("416 No", "InvalidRange")]).await;
    let error = storage.get_range("a", 5..6).await.unwrap_err();
    assert!(matches!(error, Error::Short { end: 6, .. }), "{error}");
}

#[tokio::test]
async fn conditional_writes_tell_conflict_from_doubt() {
    let storage = server(vec![OK.into()]).await;
    let outcome = storage.put_if_absent("a", "x".into()).await.unwrap();
    assert_eq!(outcome, PutIfAbsent::Written);
    let storage = server(vec![status("412 No", "PreconditionFailed")]).await;
    let outcome = storage.put_if_absent("a", "x".into()).await.unwrap();
    assert_eq!(outcome, PutIfAbsent::AlreadyExists);
    let busy = status("409 Conflict", "ConditionalRequestConflict");
    let storage = server(vec![busy, OK.into()]).await;
    let outcome = storage.put_if_absent("a", "x".into()).await.unwrap();
    assert_eq!(outcome, PutIfAbsent::Written);
    for lost in [
        FREEZE.to_owned(),
        HANG_UP.to_owned(),
        status("500 No", "InternalError"),
        status("503 No", "SlowDown"),
    ] {
        let storage = server(vec![lost]).await;
        let error = storage.put_if_absent("a", "x".into()).await.unwrap_err();
        assert!(matches!(error, Error::Ambiguous { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_was_not_sent_anything() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let variables = HashMap::from([
        ("AWS_ENDPOINT_URL".into(), format!("http://{address}")),
        ("AWS_ACCESS_KEY_ID".into(), "id".into()),
        ("AWS_SECRET_ACCESS_KEY".into(), "secret".into()),
    ]);
    let config = StorageConfig {
        retry_for: Duration::from_millis(1),
        ..StorageConfig::default()
    };
    let storage = Storage::open_with("s3://bucket", &config, Arc::new(Silent), &variables).unwrap();
    let error = storage.put_if_absent("a", "x".into()).await.unwrap_err();
    assert!(matches!(error, Error::Exhausted { .. }), "{error}");
}

#[test]
fn missing_credentials_are_named() {
    let mut variables = HashMap::from([("AWS_ENDPOINT_URL".into(), "http://127.0.0.1:1".into())]);
    let config = StorageConfig::default();
    let mut open = |name: Option<&str>| {
        if let Some(name) = name {
            variables.insert(name.into(), "x".into());
        }
        Storage::open_with("s3://bucket", &config, Arc::new(Silent), &variables)
    };
    let error = open(None).unwrap_err();
    assert!(error.to_string().contains("AWS_ACCESS_KEY_ID"), "{error}");
    let error = open(Some("AWS_ACCESS_KEY_ID")).unwrap_err();
    assert!(error.to_string().contains("set both"), "{error}");
    assert!(open(Some("AWS_SECRET_ACCESS_KEY")).is_ok());
}

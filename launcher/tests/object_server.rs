//! The object server with the real SeaweedFS binary. Run `scripts/install-seaweedfs.sh` first; the
//! tests fail with that advice when it is missing.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pollen_launcher::{Error, ObjectServer, ProcessId, find_weed};

const LIMIT: Duration = Duration::from_mins(2);

fn weed() -> PathBuf {
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    find_weed(|name| std::env::var(name).ok(), &checkout).unwrap()
}

fn start(root: &Path) -> ObjectServer {
    ObjectServer::start(&weed(), root, "pollen").unwrap()
}

fn process(server: &ObjectServer) -> ProcessId {
    ProcessId::of(server.pid()).unwrap()
}

/// Asks for the bucket without a signature.
fn status(server: &ObjectServer) -> String {
    let address = server.endpoint().replace("http://", "");
    let mut stream = TcpStream::connect(&address).unwrap();
    write!(stream, "GET /pollen/ HTTP/1.0\r\nHost: {address}\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.lines().next().unwrap().to_owned()
}

/// Addresses on which a process listens, from /proc.
fn listening(pid: u32) -> BTreeSet<(String, u16)> {
    let mut sockets = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        if let Ok(target) = fs::read_link(entry.path()) {
            sockets.insert(target.display().to_string());
        }
    }
    let mut found = BTreeSet::new();
    for table in ["tcp", "tcp6"] {
        for line in fs::read_to_string(format!("/proc/net/{table}"))
            .unwrap()
            .lines()
            .skip(1)
        {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            // State 0A is LISTEN.
            if fields[3] == "0A" && sockets.contains(&format!("socket:[{}]", fields[9])) {
                let (host, port) = fields[1].split_once(':').unwrap();
                found.insert((host.to_owned(), u16::from_str_radix(port, 16).unwrap()));
            }
        }
    }
    found
}

#[test]
fn a_server_starts_serves_only_loopback_and_ends() {
    let root = tempfile::tempdir().unwrap();
    let server = start(root.path());
    let id = process(&server);
    assert!(!server.is_adopted());
    // Alive, and closed to those without the keys.
    assert!(status(&server).contains("403"), "{}", status(&server));
    let listeners = listening(server.pid());
    assert!(listeners.len() >= 8, "{listeners:?}");
    // 127.0.0.1 as the kernel writes it.
    assert!(
        listeners.iter().all(|(host, _)| host == "0100007F"),
        "{listeners:?}"
    );
    // None of SeaweedFS's own default ports.
    for port in [8333, 8888, 9333, 9340, 23646, 7333, 8181, 9101] {
        assert!(
            !listeners.iter().any(|(_, used)| *used == port),
            "{port} {listeners:?}"
        );
    }
    let mode = fs::metadata(root.path().join("credentials.json"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(server.stop().unwrap());
    assert!(!id.is_alive());
}

#[test]
fn a_server_left_by_a_killed_launcher_is_adopted_and_then_ended() {
    let root = tempfile::tempdir().unwrap();
    let mut left = start(root.path());
    let id = process(&left);
    let keys = left.variables();
    // As after a kill: nobody ends it, and the kernel frees the lock.
    left.keep();
    drop(left);
    assert!(id.is_alive());

    let adopted = start(root.path());
    assert!(adopted.is_adopted());
    assert_eq!(process(&adopted), id);
    assert_eq!(adopted.variables(), keys);
    assert!(adopted.stop().unwrap());
    assert!(!id.is_alive());
}

#[test]
fn a_left_server_that_does_not_answer_is_replaced() {
    let root = tempfile::tempdir().unwrap();
    let mut left = start(root.path());
    let id = process(&left);
    left.keep();
    drop(left);
    // It lives, but its record names ports at which nobody answers.
    let path = root.path().join("server.json");
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let nobody = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    record["ports"]["filer"] = nobody.into();
    fs::write(&path, record.to_string()).unwrap();

    let server = start(root.path());
    assert!(!server.is_adopted());
    assert!(!id.is_alive());
    assert!(status(&server).contains("403"));
}

#[test]
fn a_server_without_any_record_is_found_and_replaced() {
    let root = tempfile::tempdir().unwrap();
    let mut left = start(root.path());
    let id = process(&left);
    left.keep();
    drop(left);
    fs::remove_file(root.path().join("server.json")).unwrap();
    let server = start(root.path());
    assert!(!id.is_alive());
    assert_ne!(process(&server), id);
}

#[test]
fn the_last_of_two_users_ends_the_server() {
    let root = tempfile::tempdir().unwrap();
    let first = start(root.path());
    let id = process(&first);
    let second = start(root.path());
    assert!(second.is_adopted());
    assert!(!first.stop().unwrap());
    assert!(id.is_alive());
    let error = ObjectServer::start(&weed(), root.path(), "elsewhere").unwrap_err();
    assert!(matches!(error, Error::ServerBusy { .. }), "{error}");
    assert!(second.stop().unwrap());
    assert!(id.wait_gone(LIMIT));
}

#[test]
fn objects_survive_a_kill_of_the_server_and_ports_are_kept() {
    let root = tempfile::tempdir().unwrap();
    let server = start(root.path());
    let endpoint = server.endpoint();
    upload(root.path(), "kept");
    let pid = server.pid().to_string();
    assert!(
        Command::new("kill")
            .args(["-KILL", &pid])
            .status()
            .unwrap()
            .success()
    );
    assert!(process_gone(&pid));
    drop(server);
    let server = start(root.path());
    assert_eq!(server.endpoint(), endpoint);
    assert_eq!(download(root.path()), "kept");
    drop(server);
}

fn process_gone(pid: &str) -> bool {
    ProcessId::of(pid.parse().unwrap()).is_none_or(|process| process.wait_gone(LIMIT))
}

/// Writes an object past the S3 API, through SeaweedFS's filer, which needs no signature.
fn upload(root: &Path, text: &str) {
    let body = format!(
        "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"x\"\r\n\r\n{text}\r\n--b--\r\n"
    );
    let head = format!(
        "POST /buckets/pollen/x HTTP/1.0\r\nContent-Type: multipart/form-data; boundary=b\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    let answer = filer(root, &format!("{head}{body}"));
    assert!(answer.contains("201"), "{answer}");
}

fn download(root: &Path) -> String {
    let answer = filer(root, "GET /buckets/pollen/x HTTP/1.0\r\n\r\n");
    answer
        .split("\r\n\r\n")
        .nth(1)
        .unwrap_or(&answer)
        .to_owned()
}

fn filer(root: &Path, request: &str) -> String {
    let record: serde_json::Value =
        serde_json::from_slice(&fs::read(root.join("server.json")).unwrap()).unwrap();
    let port = record["ports"]["filer"].as_u64().unwrap() as u16;
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

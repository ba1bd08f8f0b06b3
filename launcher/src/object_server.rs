//! The demo's S3 server: SeaweedFS on this machine, on free loopback ports, one per data folder.
//!
//! ```text
//! <root>/                 such as runs/.store
//!   data/                 SeaweedFS's own files
//!   credentials.json      made once, mode 0600
//!   server.json           the latest server: process, ports, bucket
//!   server.log
//!   start.lock            held for moments, while a launcher starts or stops the server
//!   users.lock            shared by all launchers that use the server
//! ```
//!
//! A server left by a killed launcher is adopted if it answers, else ended. The last launcher to
//! leave ends it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use crate::atomic_file;
use crate::credentials::Credentials;
use crate::error::{Error, waited};
use crate::http;
use crate::lock;
use crate::log_tail::last_bytes;
use crate::ports::Ports;
use crate::process::{ProcessId, poll_until, signal_group};

/// Variable that names a `weed` binary to use instead of the installed one.
pub const WEED: &str = "POLLEN_WEED";
/// Where `scripts/install-seaweedfs.sh` puts the binary, below the checkout.
pub const INSTALLED: &str = ".pollen/seaweedfs/bin/weed";

/// Time for a server to become ready; it takes about a second.
const READY: Duration = Duration::from_mins(1);
/// Time for a server left by somebody else to answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Time between SIGTERM and SIGKILL.
const STOP: Duration = Duration::from_secs(5);
/// Tries with other ports, if somebody takes one between the search and the start.
const TRIES: u32 = 3;

/// A running object server; whoever drops this ends it, unless it is kept or others use it.
#[derive(Debug)]
pub struct ObjectServer {
    root: PathBuf,
    server: Server,
    credentials: Credentials,
    child: Option<Child>,
    /// Shared with the other users; none until the start is complete.
    users: Option<File>,
    keep: bool,
    has_left: bool,
}

/// What `server.json` holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Server {
    version: u32,
    process: ProcessId,
    ports: Ports,
    bucket: String,
}

/// Returns the `weed` binary: the one of [`WEED`], else the one installed in the checkout.
pub fn find_weed(
    lookup: impl Fn(&str) -> Option<String>,
    checkout: &Path,
) -> Result<PathBuf, Error> {
    let path = match lookup(WEED).filter(|path| !path.is_empty()) {
        Some(path) => PathBuf::from(path),
        None => checkout.join(INSTALLED),
    };
    if path.is_file() {
        Ok(path)
    } else {
        Err(Error::NoServerBinary { looked_at: path })
    }
}

impl ObjectServer {
    /// Starts or adopts the server of the folder `root`; `bucket` exists when this returns.
    pub fn start(weed: &Path, root: &Path, bucket: &str) -> Result<Self, Error> {
        let data = root.join("data");
        fs::create_dir_all(&data).map_err(Error::file("create", &data))?;
        let root = root.canonicalize().map_err(Error::file("find", root))?;
        let _start = lock::wait_for(&root.join("start.lock"))?;
        let users = lock::open(&root.join("users.lock"))?;
        let credentials = Credentials::of_folder(&root)?;

        let left = read_server(&root)?;
        let problem = match &left {
            Some(server) if server.process.is_alive() => {
                if server.bucket != bucket {
                    format!("serves bucket {}", server.bucket)
                } else if poll_until(ANSWER, || server.answers()) {
                    share(&users, &root)?;
                    return Ok(Self {
                        root,
                        server: server.clone(),
                        credentials,
                        child: None,
                        users: Some(users),
                        keep: false,
                        has_left: false,
                    });
                } else {
                    "does not answer".to_owned()
                }
            }
            _ => "was not found in server.json".to_owned(),
        };
        // Nobody may be using what is replaced now.
        if flock(&users, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(Error::ServerBusy { root, problem });
        }
        for pid in servers_of(&data_dir(&root)) {
            end(pid);
        }
        let (server, child) = launch(weed, &root, bucket, &credentials, left.as_ref())?;
        let mut started = Self {
            root,
            server,
            credentials,
            child: Some(child),
            users: None,
            keep: false,
            has_left: false,
        };
        share(&users, &started.root)?;
        started.users = Some(users);
        Ok(started)
    }

    /// Returns the URL of the S3 API.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.server.ports.s3)
    }

    /// Returns the bucket.
    pub fn bucket(&self) -> &str {
        &self.server.bucket
    }

    /// Returns the server's process id.
    pub fn pid(&self) -> u32 {
        self.server.process.pid
    }

    /// Returns whether another launcher started it.
    pub fn is_adopted(&self) -> bool {
        self.child.is_none()
    }

    /// Returns the AWS variables with which any S3 client reaches the server.
    pub fn variables(&self) -> Vec<(String, String)> {
        [
            ("AWS_ACCESS_KEY_ID", self.credentials.access_key_id.as_str()),
            (
                "AWS_SECRET_ACCESS_KEY",
                self.credentials.secret_access_key.as_str(),
            ),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ENDPOINT_URL", &self.endpoint()),
            ("AWS_ALLOW_HTTP", "true"),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
    }

    /// Returns the variables that would lead a client elsewhere.
    pub fn foreign_variables() -> Vec<String> {
        [
            "AWS_PROFILE",
            "AWS_SESSION_TOKEN",
            "AWS_SECURITY_TOKEN",
            "AWS_ENDPOINT",
            "AWS_ENDPOINT_URL_S3",
            "AWS_DEFAULT_REGION",
            "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
        ]
        .map(str::to_owned)
        .to_vec()
    }

    /// Leaves the server running when this is dropped.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// Ends the server now, unless it is kept or others use it; returns whether it has ended.
    pub fn stop(mut self) -> Result<bool, Error> {
        self.leave()
    }

    fn leave(&mut self) -> Result<bool, Error> {
        self.has_left = true;
        if self.keep {
            return Ok(false);
        }
        if let Some(users) = &self.users {
            let _start = lock::wait_for(&self.root.join("start.lock"))?;
            if flock(users, FlockOperation::NonBlockingLockExclusive).is_err() {
                return Ok(false);
            }
            self.end();
        } else {
            // The start failed half-way, and still holds the start lock.
            self.end();
        }
        Ok(true)
    }

    fn end(&mut self) {
        end(self.server.process);
        if let Some(mut child) = self.child.take() {
            // It is a zombie by now.
            let _ = child.wait();
        }
    }
}

impl Drop for ObjectServer {
    fn drop(&mut self) {
        if !self.has_left && self.leave().is_err() {
            // The folder is gone or unreadable: nobody else can be using the server either.
            self.end();
        }
    }
}

impl Server {
    fn answers(&self) -> bool {
        let bucket = format!("/buckets/{}/", self.bucket);
        http::answers_ok(self.ports.s3, "/healthz") && http::answers_ok(self.ports.filer, &bucket)
    }
}

fn share(users: &File, root: &Path) -> Result<(), Error> {
    flock(users, FlockOperation::NonBlockingLockShared)
        .map_err(|errno| Error::file("lock", &root.join("users.lock"))(errno.into()))
}

fn data_dir(root: &Path) -> PathBuf {
    root.join("data")
}

fn read_server(root: &Path) -> Result<Option<Server>, Error> {
    let path = root.join("server.json");
    match fs::read(&path) {
        // A file that cannot be understood describes no server that could be adopted.
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::file("read", &path)(error)),
    }
}

fn launch(
    weed: &Path,
    root: &Path,
    bucket: &str,
    credentials: &Credentials,
    left: Option<&Server>,
) -> Result<(Server, Child), Error> {
    // The same ports as before if they are free: URLs in people's shells stay right.
    let mut ports = left.map(|server| server.ports).filter(Ports::are_free);
    let mut attempt = 1;
    loop {
        let chosen = match ports.take() {
            Some(ports) => ports,
            None => Ports::find()?,
        };
        match launch_on(weed, root, bucket, credentials, chosen) {
            Ok(started) => return Ok(started),
            Err(error) if attempt == TRIES => return Err(error),
            Err(Error::Server { problem, .. }) => {
                attempt += 1;
                tracing::warn!(%problem, attempt, "the object server is started again");
            }
            Err(error) => return Err(error),
        }
    }
}

fn launch_on(
    weed: &Path,
    root: &Path,
    bucket: &str,
    credentials: &Credentials,
    ports: Ports,
) -> Result<(Server, Child), Error> {
    let log_path = root.join("server.log");
    let log = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(&log_path)
        .map_err(Error::file("open", &log_path))?;
    let errors = log.try_clone().map_err(Error::file("open", &log_path))?;
    let data = data_dir(root);
    let mut child = Command::new(weed)
        .args(arguments(&data, bucket, &ports))
        .current_dir(&data)
        // Only what it needs: no proxy, no settings of somebody's home folder.
        .env_clear()
        .env("HOME", &data)
        .env("AWS_ACCESS_KEY_ID", &credentials.access_key_id)
        .env("AWS_SECRET_ACCESS_KEY", &credentials.secret_access_key)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .process_group(0)
        .spawn()
        .map_err(Error::file("start", weed))?;
    let failed = |problem: String| Error::Server {
        problem,
        tail: tail_of(&log_path),
        log: log_path.clone(),
    };
    let Some(process) = ProcessId::of(child.id()) else {
        let status = child
            .wait()
            .map_err(Error::system("wait for the object server"))?;
        return Err(failed(format!("ended at once: {status}")));
    };
    let server = Server {
        version: 1,
        process,
        ports,
        bucket: bucket.to_owned(),
    };
    // Written before it is ready: if this launcher is killed now, the next one knows it.
    let text = serde_json::to_vec_pretty(&server).expect("numbers and strings have a JSON form");
    if let Err(error) = atomic_file::replace(&root.join("server.json"), &text, 0o600) {
        end(process);
        let _ = child.wait();
        return Err(error);
    }
    let ready = poll_until(READY, || !process.is_alive() || server.answers());
    if ready && process.is_alive() {
        return Ok((server, child));
    }
    let problem = if ready {
        "ended before it was ready".to_owned()
    } else {
        format!("was not ready after {}", waited(READY))
    };
    end(process);
    let _ = child.wait();
    Err(failed(problem))
}

fn arguments(data: &Path, bucket: &str, ports: &Ports) -> Vec<String> {
    let mut arguments = vec![
        "mini".to_owned(),
        format!("-dir={}", data.display()),
        format!("-bucket={bucket}"),
    ];
    for (flag, port) in ports.flags() {
        arguments.push(format!("-{flag}={port}"));
    }
    let fixed = [
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-master.telemetry=false",
        "-admin.ui=false",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        // Relative to the data folder: a socket's path must be short.
        "-filer.localSocket=filer.sock",
        "-s3.localSocket=s3.sock",
    ];
    arguments.extend(fixed.map(str::to_owned));
    arguments
}

/// Ends a server and its group: SIGTERM, then SIGKILL.
fn end(process: ProcessId) {
    if !process.is_alive() {
        return;
    }
    signal_group(process.pid, Signal::TERM);
    if !process.wait_gone(STOP) && process.is_alive() {
        signal_group(process.pid, Signal::KILL);
        process.wait_gone(STOP);
    }
}

/// Returns SeaweedFS processes that work on this very data folder, whoever started them.
fn servers_of(data: &Path) -> Vec<ProcessId> {
    let wanted = format!("-dir={}", data.display());
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = line.split(|byte| *byte == 0).skip(1);
            words.next() == Some(b"mini") && words.any(|word| word == wanted.as_bytes())
        })
        .filter_map(ProcessId::of)
        .collect()
}

fn tail_of(log: &Path) -> String {
    let text = last_bytes(log).unwrap_or_default();
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}

//! Weights from the Hugging Face Hub, here a server of this test.

#![allow(clippy::unwrap_used, reason = "tests")]

mod lab;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use lab::{Lab, root};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "not-a-secret";

/// A hub with one repository, `robots/flower`, that asks for a token. Its thread ends with the test
/// process.
struct Hub {
    endpoint: String,
    /// Paths that were asked for.
    asked: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn start(files: BTreeMap<String, Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let log = Arc::clone(&asked);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // A client that goes away fails its own request only.
                let _ = answer(stream.unwrap(), &files, &log);
            }
        });
        Self { endpoint, asked }
    }

    fn num_downloads(&self) -> usize {
        let asked = self.asked.lock().unwrap();
        asked
            .iter()
            .filter(|path| path.contains("/resolve/"))
            .count()
    }

    fn import(&self, lab: &Lab, source: &str, destination: &str, token: &str) -> Output {
        let run = lab.path("config.toml");
        Command::new(env!("CARGO_BIN_EXE_pollen"))
            .current_dir(root())
            .args(["weights", "import", source])
            .arg(lab.path(destination))
            .arg("--recipe")
            .arg(run)
            .env("HF_ENDPOINT", &self.endpoint)
            .env("HF_HOME", lab.path("hub-cache"))
            .env("HF_TOKEN", token)
            .env("NO_PROXY", "127.0.0.1")
            .output()
            .unwrap()
    }
}

fn answer(
    stream: TcpStream,
    files: &BTreeMap<String, Vec<u8>>,
    asked: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        head.push(line.trim().to_owned());
    }
    let path = head
        .first()
        .and_then(|line| line.split(' ').nth(1))
        .unwrap_or_default();
    asked.lock().unwrap().push(path.to_owned());
    let header = |name: &str| {
        head.iter().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name)
                .then(|| value.trim().to_owned())
        })
    };
    let mut stream = stream;
    let mut reply = |status: &str, headers: &str, body: &[u8]| {
        let length = body.len();
        write!(
            stream,
            "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
        )?;
        stream.write_all(body)
    };
    if header("authorization") != Some(format!("Bearer {TOKEN}")) {
        return reply("401 Unauthorized", "", b"");
    }
    if path == "/api/models/robots/flower/revision/v1" {
        let siblings: Vec<_> = files
            .keys()
            .map(|name| serde_json::json!({ "rfilename": name }))
            .collect();
        let info = serde_json::json!({ "sha": COMMIT, "siblings": siblings }).to_string();
        return reply("200 OK", "", info.as_bytes());
    }
    let name = path.strip_prefix(&*format!("/robots/flower/resolve/{COMMIT}/"));
    let Some((name, bytes)) = name.and_then(|name| files.get_key_value(name)) else {
        return reply("404 Not Found", "", b"");
    };
    let range = header("range").unwrap_or_default();
    let (from, to) = range
        .strip_prefix("bytes=")
        .and_then(|range| range.split_once('-'))
        .unwrap_or(("0", ""));
    let from: usize = from.parse().unwrap();
    let to = to.parse().unwrap_or(bytes.len() - 1);
    let headers = format!(
        "ETag: \"{name}-v1\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {from}-{to}/{}\r\n",
        bytes.len()
    );
    reply("206 Partial Content", &headers, &bytes[from..=to])
}

/// Exports a short run's weights into `folder`, in several shards.
fn export(lab: &Lab, folder: &str) {
    let run = lab
        .launch("first", 1)
        .set(&["train.steps=2"])
        .run()
        .expect(0);
    std::fs::copy(run.run_dir().join("config.toml"), lab.path("config.toml")).unwrap();
    let checkpoints = format!("bucket/runs-first/demo/{}/checkpoints", run.run_id());
    let status = Command::new(env!("CARGO_BIN_EXE_pollen"))
        .current_dir(root())
        .arg("export")
        .arg(lab.path(&checkpoints))
        .arg(lab.path(folder))
        .args(["--shard-size", "100 KB", "--recipe"])
        .arg(lab.path("config.toml"))
        .status()
        .unwrap();
    assert!(status.success());
}

/// Reads all files of a folder.
fn files(lab: &Lab, folder: &str) -> BTreeMap<String, Vec<u8>> {
    std::fs::read_dir(lab.path(folder))
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, std::fs::read(path).unwrap())
        })
        .collect()
}

#[track_caller]
fn assert_refused(output: &Output, parts: &[&str]) {
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr);
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

#[test]
fn a_repository_is_downloaded_once_and_imported() {
    let lab = Lab::folder();
    export(&lab, "exported");
    let exported = files(&lab, "exported");
    assert!(exported.len() > 3, "an index and several shards");
    let shards = exported.len();
    let hub = Hub::start(exported.clone());

    let output = hub.import(&lab, "hf://robots/flower@v1", "imported", TOKEN);
    assert!(output.status.success(), "{output:?}");
    let downloads = hub.num_downloads();
    assert_eq!(downloads, 2 * shards, "of each its size, then its bytes");
    let imported = files(&lab, "imported");
    let again = hub.import(&lab, "hf://robots/flower@v1", "again", TOKEN);
    assert!(again.status.success(), "{again:?}");
    assert_eq!(hub.num_downloads(), downloads, "all is in the cache");
    assert_eq!(files(&lab, "again"), imported);
    let config = lab.path("config.toml");
    let status = Command::new(env!("CARGO_BIN_EXE_pollen"))
        .current_dir(root())
        .args(["weights", "import"])
        .args([lab.path("exported"), lab.path("from-folder")])
        .arg("--recipe")
        .arg(config)
        .status()
        .unwrap();
    assert!(status.success());
    let name = "model-00001-of-00001.safetensors";
    assert_eq!(files(&lab, "from-folder")[name], imported[name]);

    let url = "hf://robots/flower@v1/nothing.safetensors";
    let absent = hub.import(&lab, url, "never", TOKEN);
    assert_refused(
        &absent,
        &["nothing.safetensors is not there", "model-00001-of-"],
    );
    let unknown = hub.import(&lab, "hf://robots/flour@v1", "never", TOKEN);
    assert_refused(&unknown, &["hf://robots/flour@v1", "404", "check the name"]);
    let closed = hub.import(&lab, "hf://robots/flower@v1", "never", "wrong");
    assert_refused(&closed, &["401", "HF_TOKEN"]);
    assert!(!lab.path("never").exists());
}

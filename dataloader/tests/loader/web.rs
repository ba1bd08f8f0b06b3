//! A dataset on a web server that knows byte ranges and nothing else.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pollen_core::ErrorClass;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

use crate::support::{Spec, config, demo_jpegs, loader, open, open_storage, runtime, take};

/// Serves a folder; returns its URL.
fn serve(runtime: &Runtime, folder: &Path) -> String {
    let folder = folder.to_owned();
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    runtime.spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let folder = folder.clone();
            tokio::spawn(async move {
                let mut socket = BufReader::new(socket);
                while answer(&mut socket, &folder).await.is_some() {}
            });
        }
    });
    url
}

/// Answers one request; nothing when the client has gone.
async fn answer(socket: &mut BufReader<TcpStream>, folder: &Path) -> Option<()> {
    let mut first = String::new();
    socket.read_line(&mut first).await.ok().filter(|&n| n > 0)?;
    let mut range = None;
    loop {
        let mut line = String::new();
        socket.read_line(&mut line).await.ok().filter(|&n| n > 0)?;
        let line = line.trim().to_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(bytes) = line.strip_prefix("range: bytes=") {
            let (start, end) = bytes.split_once('-')?;
            range = Some((start.parse::<usize>().ok()?, end.parse::<usize>().ok()?));
        }
    }
    let mut words = first.split(' ');
    let (method, path) = (words.next()?, words.next()?);
    let path: PathBuf = folder.join(path.trim_start_matches('/'));
    let (status, headers, body) = match (method, std::fs::read(path)) {
        ("GET" | "HEAD", Ok(file)) => match range {
            Some((start, end)) if start < file.len() => {
                let end = (end + 1).min(file.len());
                let headers = format!(
                    "Content-Range: bytes {start}-{}/{}\r\n",
                    end - 1,
                    file.len()
                );
                ("206 Partial Content", headers, file[start..end].to_vec())
            }
            Some(_) => ("416 Range Not Satisfiable", String::new(), Vec::new()),
            None => ("200 OK", String::new(), file),
        },
        ("GET" | "HEAD", Err(_)) => ("404 Not Found", String::new(), Vec::new()),
        _ => ("405 Method Not Allowed", String::new(), Vec::new()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all(head.as_bytes()).await.ok()?;
    if method == "GET" {
        socket.write_all(&body).await.ok()?;
    }
    Some(())
}

#[test]
fn a_dataset_is_read_from_a_web_server() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let spec = Spec::new("alpha", &Arc::new(demo_jpegs()));
    spec.write(dir.path());
    let mut web = config(dir.path(), std::slice::from_ref(&spec));
    web.root = serve(&runtime, dir.path());
    // Indexed over the wire; the index is kept on this machine.
    let data = open(&runtime, &web).unwrap();
    assert_eq!(data.datasets()[0].num_row_groups(), 21);
    let kept = std::fs::read_dir(dir.path().join("index")).unwrap().count();
    assert_eq!(kept, 1);
    let from_web = take(&mut loader(&runtime, &data, (0, 1), 0), 4);
    let folder = config(dir.path(), std::slice::from_ref(&spec));
    let local = open(&runtime, &folder).unwrap();
    assert_eq!(from_web, take(&mut loader(&runtime, &local, (0, 1), 0), 4));
    assert_eq!(data.hashes(), local.hashes());
    // With the sidecar beside the data, nothing is made anew.
    assert!(dir.path().join("alpha/meta/pollen.json").exists());
    assert_eq!(open(&runtime, &web).unwrap().hashes(), local.hashes());
    // It is for reading.
    let storage = open_storage(&web.root).unwrap();
    let error = runtime.block_on(storage.put("x", "y".into())).unwrap_err();
    assert_eq!(error.class(), ErrorClass::User);
    assert!(error.to_string().contains("are for reading"), "{error}");
    let error = open(&runtime, &{
        let mut nowhere = web.clone();
        nowhere.root += "/nowhere";
        nowhere
    });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("meta/info.json: is missing"), "{error}");
}

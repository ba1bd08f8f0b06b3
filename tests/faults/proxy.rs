//! Stands between the workers and the store, notes every request, and spoils the one it is told to.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How the store fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Spoil {
    /// 500, and nothing is done.
    Refused,
    /// No answer, and nothing is done.
    Silent,
    /// The answer comes late.
    Slow,
    /// The answer breaks off in its body.
    Truncated,
    /// It is done, and the connection breaks before the answer.
    AnswerLost,
    /// 409: another conditional write is under way.
    Conflict,
    /// From this request on every connection breaks at once, for a while.
    Down,
}

/// What a request is about: its method, and its object without run, step and number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Asked {
    pub method: String,
    pub object: String,
    /// Whether it writes only what is not there yet.
    pub conditional: bool,
}

/// Which request is spoilt, and how.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    pub asked: Asked,
    /// Counted from 1.
    pub occurrence: usize,
    pub spoil: Spoil,
    /// How long [`Spoil::Down`] and [`Spoil::Slow`] last.
    pub pause: Duration,
}

#[derive(Debug)]
struct Shared {
    server: SocketAddr,
    order: Option<Order>,
    state: Mutex<State>,
    closing: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    seen: Vec<Asked>,
    struck: bool,
    down_until: Option<Instant>,
    /// Connections whose client waits for an answer that never comes.
    silent: Vec<TcpStream>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A proxy at work, until it is dropped.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Listens on a free port in front of the server at `endpoint`.
    pub(crate) fn start(endpoint: &str, order: Option<Order>) -> Self {
        let server = endpoint.strip_prefix("http://").unwrap().parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            server,
            order,
            state: Mutex::default(),
            closing: AtomicBool::new(false),
        });
        let of_thread = Arc::clone(&shared);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if of_thread.closing.load(Ordering::Relaxed) {
                    return;
                }
                let shared = Arc::clone(&of_thread);
                // A client that hangs up ends its thread and nothing else.
                std::thread::spawn(move || drop(serve(client, &shared)));
            }
        });
        Self { address, shared }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// All requests so far.
    pub(crate) fn seen(&self) -> Vec<Asked> {
        self.shared.state().seen.clone()
    }

    /// Whether the request that was ordered came and was spoilt.
    pub(crate) fn struck(&self) -> bool {
        self.shared.state().struck
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Relaxed);
        self.shared.state().silent.clear();
        // Wakes the listening thread.
        let _ = TcpStream::connect(self.address);
    }
}

/// One request and its answer; the next one comes on another connection.
fn serve(mut client: TcpStream, shared: &Shared) -> io::Result<()> {
    if let Some(until) = shared.state().down_until
        && Instant::now() < until
    {
        return client.shutdown(Shutdown::Both);
    }
    let (head, body) = read_request(&mut client)?;
    let asked = describe(&head);
    let spoil = {
        let mut state = shared.state();
        state.seen.push(asked.clone());
        let times = state.seen.iter().filter(|seen| **seen == asked).count();
        let order = shared.order.as_ref();
        let order = order.filter(|order| order.asked == asked && order.occurrence == times);
        state.struck |= order.is_some();
        order.map(|order| (order.spoil, order.pause))
    };
    match spoil {
        None => client.write_all(&forward(shared, &head, &body)?)?,
        Some((Spoil::Refused, _)) => {
            client.write_all(&refusal("500 Internal Server Error", "InternalError"))?;
        }
        Some((Spoil::Conflict, _)) => {
            client.write_all(&refusal("409 Conflict", "ConditionalRequestConflict"))?;
        }
        Some((Spoil::Silent, _)) => shared.state().silent.push(client.try_clone()?),
        Some((Spoil::Slow, pause)) => {
            let answer = forward(shared, &head, &body)?;
            std::thread::sleep(pause);
            client.write_all(&answer)?;
        }
        Some((Spoil::Truncated, _)) => {
            let answer = forward(shared, &head, &body)?;
            let start = end_of_head(&answer).unwrap_or(answer.len());
            client.write_all(&answer[..start + (answer.len() - start) / 2])?;
        }
        Some((Spoil::AnswerLost, _)) => {
            forward(shared, &head, &body)?;
        }
        Some((Spoil::Down, pause)) => {
            shared.state().down_until = Some(Instant::now() + pause);
        }
    }
    if !matches!(spoil, Some((Spoil::Silent, _))) {
        client.shutdown(Shutdown::Both)?;
    }
    Ok(())
}

fn end_of_head(bytes: &[u8]) -> Option<usize> {
    let found = bytes.windows(4).position(|four| four == b"\r\n\r\n");
    found.map(|at| at + 4)
}

/// Reads a head, as text, and a body of the length it gives.
fn read_request(client: &mut TcpStream) -> io::Result<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 16 << 10];
    loop {
        if let Some(end) = end_of_head(&bytes) {
            let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
            let length = header(&head, "content-length").and_then(|text| text.parse().ok());
            assert!(
                header(&head, "transfer-encoding").is_none(),
                "the proxy knows bodies of a known length only: {head}"
            );
            if bytes.len() - end >= length.unwrap_or(0) {
                return Ok((head, bytes.split_off(end)));
            }
        }
        match client.read(&mut chunk)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => bytes.extend_from_slice(&chunk[..read]),
        }
    }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// Asks the server and returns its whole answer. Signatures do not cover `Connection`.
fn forward(shared: &Shared, head: &str, body: &[u8]) -> io::Result<Vec<u8>> {
    let mut server = TcpStream::connect(shared.server)?;
    server.write_all(with_close(head).as_bytes())?;
    server.write_all(body)?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    let end = end_of_head(&answer).ok_or(io::ErrorKind::UnexpectedEof)?;
    let head = String::from_utf8_lossy(&answer[..end]).into_owned();
    Ok([with_close(&head).as_bytes(), &answer[end..]].concat())
}

fn with_close(head: &str) -> String {
    let lines = head.trim_end().lines();
    let kept = lines.filter(|line| !line.to_lowercase().starts_with("connection:"));
    let kept: Vec<&str> = kept.collect();
    format!("{}\r\nConnection: close\r\n\r\n", kept.join("\r\n"))
}

fn refusal(status: &str, code: &str) -> Vec<u8> {
    let body = format!("<Error><Code>{code}</Code></Error>");
    let length = body.len();
    format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
        .into_bytes()
}

/// Reduces a request to what is the same in all runs.
fn describe(head: &str) -> Asked {
    let mut words = head.split(' ');
    let method = words.next().unwrap_or_default();
    let target = words.next().unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let prefix = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("prefix="));
    let listing = query.contains("list-type=");
    let path = if listing {
        prefix.unwrap_or_default()
    } else {
        path
    };
    let path = path.replace("%2F", "/");
    let method = match (listing, method) {
        (true, _) => "LIST",
        (false, "POST") if query.contains("delete") => "DELETE",
        (false, method) => method,
    };
    Asked {
        method: method.to_owned(),
        object: object(&path),
        conditional: header(head, "if-none-match").is_some(),
    }
}

fn object(path: &str) -> String {
    if let Some((_, below)) = path.split_once("/checkpoints") {
        let below = below.trim_matches('/');
        return match below.split('/').collect::<Vec<_>>()[..] {
            [""] => "checkpoints".to_owned(),
            ["log"] => "log".to_owned(),
            ["log", _] => "log entry".to_owned(),
            [_, _, file] => file.to_owned(),
            _ => below.to_owned(),
        };
    }
    if path.contains("datasets") {
        let file = path.rsplit('/').next().unwrap_or_default();
        return match file.rsplit_once('.') {
            Some((_, ending)) => format!("data *.{ending}"),
            None => "data".to_owned(),
        };
    }
    "bucket".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_apart_without_run_step_and_number() {
        let asked = |line: &str| {
            let asked = describe(&format!("{line} HTTP/1.1\r\nHost: x\r\n\r\n"));
            format!("{} {}", asked.method, asked.object)
        };
        let run = "/b/runs-x/demo/2026-1/checkpoints";
        assert_eq!(
            asked(&format!("PUT {run}/log/00000003.json")),
            "PUT log entry"
        );
        let manifest = format!("GET {run}/step-00000004/g2/MANIFEST.json");
        assert_eq!(asked(&manifest), "GET MANIFEST.json");
        let list = "GET /b?list-type=2&prefix=runs-x%2Fdemo%2F1%2Fcheckpoints%2Flog%2F";
        assert_eq!(asked(list), "LIST log");
        let data = "GET /b/datasets/lift/data/chunk-000/file-000.parquet";
        assert_eq!(asked(data), "GET data *.parquet");
    }
}

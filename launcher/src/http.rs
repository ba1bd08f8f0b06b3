//! Just enough HTTP to ask a server on this machine whether it is ready.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

/// Longest wait for any part of an answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Returns whether a GET is answered with 200.
pub(crate) fn answers_ok(port: u16, path: &str) -> bool {
    status(port, path).is_ok_and(|status| status == 200)
}

fn status(port: u16, path: &str) -> std::io::Result<u16> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    // In one piece: a server may answer and close as soon as it has seen enough.
    let request = format!("GET {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    // "HTTP/1.1 200" is all that is asked for.
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    std::str::from_utf8(&head)
        .ok()
        .and_then(|head| head.strip_prefix("HTTP/1."))
        .and_then(|rest| rest.get(2..)?.parse().ok())
        .ok_or_else(|| std::io::Error::other("not an HTTP answer"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;

    use super::*;

    fn answer(text: &'static str) -> bool {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let request: Vec<String> = BufReader::new(&stream)
                .lines()
                .map(Result::unwrap)
                .take_while(|line| !line.is_empty())
                .collect();
            stream.write_all(text.as_bytes()).unwrap();
            request[0].clone()
        });
        let ok = answers_ok(port, "/healthz");
        assert_eq!(server.join().unwrap(), "GET /healthz HTTP/1.0");
        ok
    }

    #[test]
    fn only_200_is_ready() {
        assert!(answer("HTTP/1.1 200 OK\r\n\r\n"));
        assert!(!answer("HTTP/1.1 503 Service Unavailable\r\n\r\n"));
        assert!(!answer("SSH-2.0-whatever\r\n"));
    }

    #[test]
    fn nobody_there_is_not_ready() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        assert!(!answers_ok(port, "/"));
    }
}

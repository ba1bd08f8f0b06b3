//! The server: one thread accepts, one thread per connection.

use std::collections::HashMap;
use std::io::BufReader;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::sockopt;

use super::frame::{self, FrameError, Reply, Request};
use super::roster::{self, Line, Name, Roster};
use super::table::Table;
use crate::error::{Error, Result};

/// The most connections at a time.
const MAX_CONNECTIONS: usize = 1 << 14;
/// A peer that takes no bytes for so long is cut off.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// Connection threads only shuffle small frames.
const STACK_BYTES: usize = 256 << 10;

/// A running key-value server. Dropping it closes all connections and joins its threads.
#[derive(Debug)]
pub struct StoreServer {
    address: SocketAddr,
    listener: Arc<TcpListener>,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    table: Table,
    roster: Roster,
    connections: Mutex<Connections>,
    /// Notified when a connection has gone.
    gone: Condvar,
}

#[derive(Debug, Default)]
struct Connections {
    open: HashMap<u64, TcpStream>,
    next: u64,
    closing: bool,
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections
            .lock()
            .expect("no code panics while it holds the connections")
    }
}

impl StoreServer {
    /// Starts a server at `host:port`; port 0 takes any free one.
    pub fn bind(address: &str) -> Result<Self> {
        let failed = |source| Error::Bind {
            address: address.to_owned(),
            source: Arc::new(source),
        };
        let listener = TcpListener::bind(address).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let listener = Arc::new(listener);
        let shared = Arc::new(Shared::default());
        let accepting = {
            let (listener, shared) = (Arc::clone(&listener), Arc::clone(&shared));
            std::thread::Builder::new()
                .name("store-accept".into())
                .spawn(move || accept(&listener, &shared))
                .map_err(failed)?
        };
        Ok(Self {
            address: bound,
            listener,
            shared,
            accepting: Some(accepting),
        })
    }

    /// Returns the address it listens on, with the real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for StoreServer {
    fn drop(&mut self) {
        {
            let mut connections = self.shared.connections();
            connections.closing = true;
            for stream in connections.open.values() {
                // It may have been closed by the peer already.
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        self.shared.table.close();
        // Wakes `accept`, which then sees that we are closing.
        if let Err(error) = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both) {
            tracing::warn!(address = %self.address, %error, "cannot stop the store's listener");
            return;
        }
        if let Some(thread) = self.accepting.take() {
            // A panic there has been reported by the runtime.
            let _ = thread.join();
        }
        let mut connections = self.shared.connections();
        while !connections.open.is_empty() {
            connections = self
                .shared
                .gone
                .wait(connections)
                .expect("no code panics while it holds the connections");
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    loop {
        let accepted = listener.accept();
        if shared.connections().closing {
            return;
        }
        match accepted {
            Ok((stream, peer)) => {
                if let Err(error) = start(stream, shared) {
                    tracing::warn!(%peer, %error, "the store turned a connection away");
                }
            }
            Err(error) => {
                tracing::warn!(%error, "the store cannot accept a connection");
                // Out of file descriptors, for example: wait for some to be freed.
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

fn start(stream: TcpStream, shared: &Arc<Shared>) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
    watch_for_dead_hosts(&stream)?;
    let id = {
        let mut connections = shared.connections();
        if connections.closing || connections.open.len() >= MAX_CONNECTIONS {
            return Err(std::io::Error::other("closing, or too many connections"));
        }
        let id = connections.next;
        connections.next += 1;
        connections.open.insert(id, stream.try_clone()?);
        id
    };
    let served = Arc::clone(shared);
    let started = std::thread::Builder::new()
        .name("store-connection".into())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            let _entry = Entry {
                shared: &served,
                id,
            };
            serve(stream, &served);
        });
    if let Err(error) = started {
        shared.connections().open.remove(&id);
        return Err(error);
    }
    Ok(())
}

/// Takes the connection off the list when its thread ends, however it ends.
struct Entry<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.shared.connections().open.remove(&self.id);
        self.shared.gone.notify_all();
    }
}

/// Answers one connection until it ends.
fn serve(stream: TcpStream, shared: &Shared) {
    let Ok(reading) = stream.try_clone() else {
        return;
    };
    let mut reader = BufReader::new(reading);
    let line: Line = Arc::new(Mutex::new(stream));
    let mut seat: Option<Name> = None;
    loop {
        let reply = match frame::read::<Request>(&mut reader) {
            Ok(Some(Request::Leave)) => {
                // Taken, so that the seat is not lost below: it may have a new owner by then.
                if let Some(name) = seat.take() {
                    shared.roster.leave(&name);
                }
                let _ = frame::write(&mut *roster::lock(&line), &Reply::Done);
                break;
            }
            Ok(Some(Request::Join { group, rank, host })) => {
                let name = Name { group, rank };
                if seat.is_some() {
                    Some(Reply::Refused(
                        "this connection has joined a group".to_owned(),
                    ))
                } else {
                    match shared.roster.join(&name, host, &line) {
                        Ok(()) => {
                            seat = Some(name);
                            None
                        }
                        Err(reason) => Some(Reply::Refused(reason)),
                    }
                }
            }
            Ok(Some(Request::Report { text })) => match &seat {
                Some(name) => {
                    shared.roster.report(name, text);
                    None
                }
                None => Some(Reply::Refused(
                    "join a group before reporting to it".to_owned(),
                )),
            },
            Ok(Some(request)) => Some(answer(request, shared)),
            Ok(None) | Err(FrameError::Io(_)) => break,
            Err(FrameError::Malformed(reason)) => {
                let refusal = Reply::Refused(format!("malformed request: {reason}"));
                let _ = frame::write(&mut *roster::lock(&line), &refusal);
                break;
            }
        };
        if let Some(reply) = reply
            && frame::write(&mut *roster::lock(&line), &reply).is_err()
        {
            break;
        }
    }
    if let Some(name) = seat {
        shared.roster.lose(&name);
    }
    // The list holds a copy of the socket: say good-bye before it goes.
    let _ = roster::lock(&line).shutdown(Shutdown::Both);
}

fn answer(request: Request, shared: &Shared) -> Reply {
    let table = &shared.table;
    match request {
        Request::Set { key, value } => table.set(key, value),
        Request::Get { key, wait } => table.get(&key, wait),
        Request::Add { key, by } => table.add(key, by),
        Request::CompareAndSet {
            key,
            expected,
            value,
        } => table.compare_and_set(key, expected.as_deref(), value),
        Request::DeletePrefix { prefix } => {
            shared.roster.forget_prefix(&prefix);
            Reply::Number(table.delete_prefix(&prefix))
        }
        Request::Collect {
            prefix,
            world,
            wait,
        } => table.collect(&prefix, world, wait),
        Request::Members { group } => Reply::Members(shared.roster.members(&group)),
        Request::Join { .. } | Request::Report { .. } | Request::Leave => {
            Reply::Refused("out of place".to_owned())
        }
    }
}

/// Makes the kernel notice a peer whose host is gone, in about half a minute.
pub(super) fn watch_for_dead_hosts(stream: &TcpStream) -> std::io::Result<()> {
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(10))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(5))?;
    sockopt::set_tcp_keepcnt(stream, 4)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::{Deadline, Store};

    #[test]
    fn hostile_bytes_cost_their_sender_the_connection_and_nobody_else_anything() {
        let server = StoreServer::bind("127.0.0.1:0").expect("binds");
        let huge = [frame::VERSION, 1, 0xff, 0xff, 0xff, 0xff];
        let unknown = [frame::VERSION, 99, 0, 0, 0, 0];
        let out_of_place = [frame::VERSION, 8, 4, 0, 0, 0, 0, 0, 0, 0];
        let cases: [&[u8]; 4] = [b"GET / HTTP/1.1\r\n\r\n", &huge, &unknown, &out_of_place];
        for bytes in cases {
            let mut stream = TcpStream::connect(server.address()).expect("connects");
            stream.write_all(bytes).expect("writes");
            stream.shutdown(Shutdown::Write).expect("shuts down");
            let mut answer = Vec::new();
            // The server may reset the connection after its answer: bytes of ours are unread.
            let _ = stream.read_to_end(&mut answer);
            let reply: Reply = frame::read(&mut answer.as_slice())
                .expect("a frame")
                .expect("one");
            assert!(matches!(reply, Reply::Refused(_)), "{reply:?}");
        }
        // Cut off in the middle of a frame: no answer, no harm.
        let mut stream = TcpStream::connect(server.address()).expect("connects");
        stream
            .write_all(&[frame::VERSION, 1, 100, 0, 0, 0, 7])
            .expect("writes");
        drop(stream);

        let deadline = Deadline::after(Duration::from_secs(10));
        let store = Store::connect(&server.address().to_string(), deadline).expect("connects");
        store.set("still", b"here").expect("sets");
        assert_eq!(
            store.try_get("still").expect("gets"),
            Some(b"here".to_vec())
        );
    }

    #[test]
    fn dropping_the_server_ends_waiting_requests_and_frees_the_port() {
        let server = StoreServer::bind("127.0.0.1:0").expect("binds");
        let address = server.address().to_string();
        let long = Deadline::after(Duration::from_mins(10));
        let store = Store::connect(&address, long).expect("connects");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| store.get("never", long));
            drop(server);
            let error = waiting
                .join()
                .expect("no panic")
                .expect_err("the server has gone");
            assert!(error.to_string().contains(&address), "{error}");
            assert_eq!(error.class(), pollen_core::ErrorClass::Retryable);
        });
        StoreServer::bind(&address).expect("the port is free again");
    }
}

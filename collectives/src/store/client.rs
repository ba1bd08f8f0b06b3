//! The client: a pool of connections, so that one thread's wait holds up no other thread.

use std::fmt;
use std::io;
use std::net::{IpAddr, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::frame::{self, FrameError, MAX_KEY, MAX_VALUE, Member, Reply, Request};
use super::server::watch_for_dead_hosts;
use crate::deadline::Deadline;
use crate::error::{Error, Result};

/// How much longer than a request's own wait its answer may take.
const GRACE: Duration = Duration::from_secs(10);
/// The longest single attempt to connect.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Idle connections that are kept.
const MAX_IDLE: usize = 8;

/// What came of [`Store::compare_and_set`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Swap {
    /// The new value is stored.
    Done,
    /// Something else, or nothing, was there.
    Conflict(Option<Vec<u8>>),
}

/// A view of a [`StoreServer`](super::StoreServer)'s entries below a prefix. Cheap to clone; all
/// clones may be used at once.
#[derive(Clone)]
pub struct Store {
    link: Arc<Link>,
    prefix: String,
}

struct Link {
    address: String,
    local_ip: IpAddr,
    idle: Mutex<Vec<TcpStream>>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Store({} {:?})", self.link.address, self.prefix)
    }
}

impl Store {
    /// Connects to the server at `host:port`, trying again until the deadline.
    pub fn connect(address: &str, deadline: Deadline) -> Result<Self> {
        let mut pause = Duration::from_millis(10);
        loop {
            match open(address, deadline.remaining()) {
                Ok((stream, local_ip)) => {
                    let link = Link {
                        address: address.to_owned(),
                        local_ip,
                        idle: Mutex::new(vec![stream]),
                    };
                    return Ok(Self {
                        link: Arc::new(link),
                        prefix: String::new(),
                    });
                }
                Err(_) if deadline.remaining() > pause => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(500));
                }
                Err(source) => {
                    return Err(Error::StoreUnreachable {
                        address: address.to_owned(),
                        waited: deadline.limit(),
                        source: Arc::new(source),
                    });
                }
            }
        }
    }

    /// Returns the server's address as it was given.
    pub fn address(&self) -> &str {
        &self.link.address
    }

    /// Returns the address that this process reaches the server from.
    pub fn local_ip(&self) -> IpAddr {
        self.link.local_ip
    }

    /// Returns the view below `prefix`, for example `g3/`, of this view.
    #[must_use]
    pub fn prefixed(&self, prefix: &str) -> Self {
        Self {
            link: Arc::clone(&self.link),
            prefix: format!("{}{prefix}", self.prefix),
        }
    }

    /// Stores a value.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        let key = self.key(key)?;
        let value = self.value(value)?;
        self.expect_done(&Request::Set { key, value })
    }

    /// Waits until the key is present and returns its value.
    pub fn get(&self, key: &str, deadline: Deadline) -> Result<Vec<u8>> {
        let key = self.key(key)?;
        let wait = deadline.remaining();
        match self.ask(&Request::Get {
            key: key.clone(),
            wait,
        })? {
            Reply::Value(value) => Ok(value),
            Reply::Absent => Err(Error::KeyTimeout {
                key,
                address: self.link.address.clone(),
                waited: deadline.limit(),
            }),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Returns the key's value, if it is present.
    pub fn try_get(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let key = self.key(key)?;
        match self.ask(&Request::Get {
            key,
            wait: Duration::ZERO,
        })? {
            Reply::Value(value) => Ok(Some(value)),
            Reply::Absent => Ok(None),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Adds to a counter, which starts at zero, and returns the sum. It is stored in decimal.
    pub fn add(&self, key: &str, by: i64) -> Result<i64> {
        let key = self.key(key)?;
        self.expect_number(&Request::Add { key, by })
    }

    /// Stores a value if the present one is as expected (`None`: absent).
    pub fn compare_and_set(
        &self,
        key: &str,
        expected: Option<&[u8]>,
        value: &[u8],
    ) -> Result<Swap> {
        let request = Request::CompareAndSet {
            key: self.key(key)?,
            expected: expected.map(|bytes| self.value(bytes)).transpose()?,
            value: self.value(value)?,
        };
        match self.ask(&request)? {
            Reply::Done => Ok(Swap::Done),
            Reply::Value(value) => Ok(Swap::Conflict(Some(value))),
            Reply::Absent => Ok(Swap::Conflict(None)),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Deletes all entries below `prefix` of this view, and its groups in which nobody is present;
    /// returns the number of entries.
    pub fn delete_prefix(&self, prefix: &str) -> Result<u64> {
        let prefix = self.key(prefix)?;
        let count = self.expect_number(&Request::DeletePrefix { prefix })?;
        Ok(count.unsigned_abs())
    }

    /// Returns who joined the group, in rank order.
    pub fn members(&self, group: &str) -> Result<Vec<Member>> {
        let group = self.key(group)?;
        match self.ask(&Request::Members { group })? {
            Reply::Members(members) => Ok(members),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Returns the values of all ranks, or who is missing.
    pub(super) fn collect(
        &self,
        prefix: &str,
        world: u32,
        deadline: Deadline,
    ) -> Result<std::result::Result<Vec<Vec<u8>>, Vec<u32>>> {
        let request = Request::Collect {
            prefix: self.key(prefix)?,
            world,
            wait: deadline.remaining(),
        };
        match self.ask(&request)? {
            Reply::Values(values) => Ok(Ok(values)),
            Reply::MissingRanks(ranks) => Ok(Err(ranks)),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Returns the prefix of this view.
    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Returns the view of the same server below another full prefix.
    pub(super) fn with_prefix(&self, prefix: &str) -> Self {
        Self {
            link: Arc::clone(&self.link),
            prefix: prefix.to_owned(),
        }
    }

    /// Returns the full key, checked.
    pub(super) fn key(&self, key: &str) -> Result<String> {
        let key = format!("{}{key}", self.prefix);
        if key.len() > MAX_KEY {
            return Err(self.refused(format!("a key of {} bytes, above {MAX_KEY}", key.len())));
        }
        Ok(key)
    }

    /// Opens a connection of its own.
    pub(super) fn dial(&self) -> Result<TcpStream> {
        let opened = open(&self.link.address, ATTEMPT);
        opened.map(|(stream, _)| stream).map_err(|e| self.lost(e))
    }

    pub(super) fn frame_error(&self, error: FrameError) -> Error {
        match error {
            FrameError::Io(source) => self.lost(source),
            FrameError::Malformed(reason) => Error::Protocol {
                address: self.link.address.clone(),
                reason,
            },
        }
    }

    pub(super) fn lost(&self, source: io::Error) -> Error {
        Error::StoreLost {
            address: self.link.address.clone(),
            source: Arc::new(source),
        }
    }

    pub(super) fn unexpected(&self, reply: &Reply) -> Error {
        match reply {
            Reply::Refused(reason) => self.refused(reason.clone()),
            other => Error::Protocol {
                address: self.link.address.clone(),
                reason: format!("unexpected answer {other:?}"),
            },
        }
    }

    fn refused(&self, reason: String) -> Error {
        Error::StoreRefused {
            address: self.link.address.clone(),
            reason,
        }
    }

    fn value(&self, value: &[u8]) -> Result<Vec<u8>> {
        if value.len() > MAX_VALUE {
            let length = value.len();
            return Err(self.refused(format!("a value of {length} bytes, above {MAX_VALUE}")));
        }
        Ok(value.to_vec())
    }

    fn expect_done(&self, request: &Request) -> Result<()> {
        match self.ask(request)? {
            Reply::Done => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    fn expect_number(&self, request: &Request) -> Result<i64> {
        match self.ask(request)? {
            Reply::Number(number) => Ok(number),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Sends a request on an idle connection, or on a new one, and returns the answer.
    fn ask(&self, request: &Request) -> Result<Reply> {
        let idle = self.idle().pop();
        let mut stream = match idle {
            Some(stream) => stream,
            None => self.dial()?,
        };
        let wait = match request {
            Request::Get { wait, .. } | Request::Collect { wait, .. } => *wait,
            _ => Duration::ZERO,
        };
        let limit = stream.set_read_timeout(Some(wait + GRACE));
        limit.map_err(|e| self.lost(e))?;
        frame::write(&mut stream, request).map_err(|e| self.lost(e))?;
        let reply = match frame::read(&mut stream) {
            Ok(Some(reply)) => reply,
            Ok(None) => return Err(self.lost(io::ErrorKind::UnexpectedEof.into())),
            Err(error) => return Err(self.frame_error(error)),
        };
        let mut pool = self.idle();
        if pool.len() < MAX_IDLE {
            pool.push(stream);
        }
        Ok(reply)
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<TcpStream>> {
        self.link
            .idle
            .lock()
            .expect("no code panics while it holds the pool")
    }
}

fn open(address: &str, limit: Duration) -> io::Result<(TcpStream, IpAddr)> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for target in address.to_socket_addrs()? {
        let limit = limit.clamp(Duration::from_millis(1), ATTEMPT);
        match TcpStream::connect_timeout(&target, limit) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                stream.set_write_timeout(Some(GRACE))?;
                watch_for_dead_hosts(&stream)?;
                let local = stream.local_addr()?;
                return Ok((stream, local.ip()));
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

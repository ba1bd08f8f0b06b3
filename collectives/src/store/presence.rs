//! A seat in a group: while it is held the others count this rank as present, when the process
//! dies they are told at once.

use std::net::{Shutdown, TcpStream};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::client::Store;
use super::frame::{self, Event, Reply, Request};
use crate::error::{Error, Result};

/// How long the server may take to acknowledge a good-bye.
const FAREWELL: Duration = Duration::from_secs(2);

/// This rank's seat in a group. Dropping it without [`leave`](Self::leave) looks to the others
/// like a crash.
#[derive(Debug)]
pub struct Presence {
    store: Store,
    writing: Mutex<TcpStream>,
    reading: Mutex<TcpStream>,
    ended: Mutex<bool>,
    ending: Condvar,
}

impl Store {
    /// Takes the seat of `rank` in a group. A seat is taken once: use a new generation after that.
    pub fn join(&self, group: &str, rank: u32, host: &str) -> Result<Presence> {
        let mut stream = self.dial()?;
        let request = Request::Join {
            group: self.key(group)?,
            rank,
            host: host.to_owned(),
        };
        let limit = stream.set_read_timeout(Some(Duration::from_secs(10)));
        limit.map_err(|e| self.lost(e))?;
        frame::write(&mut stream, &request).map_err(|e| self.lost(e))?;
        match frame::read(&mut stream).map_err(|e| self.frame_error(e))? {
            Some(Reply::Done) => {}
            Some(other) => return Err(self.unexpected(&other)),
            None => return Err(self.lost(std::io::ErrorKind::UnexpectedEof.into())),
        }
        stream.set_read_timeout(None).map_err(|e| self.lost(e))?;
        Ok(Presence {
            writing: Mutex::new(stream.try_clone().map_err(|e| self.lost(e))?),
            reading: Mutex::new(stream),
            store: self.clone(),
            ended: Mutex::new(false),
            ending: Condvar::new(),
        })
    }
}

impl Presence {
    /// Waits for the next event of another member, including those before we joined; `None` once
    /// this rank has left.
    pub fn next_event(&self) -> Result<Option<Event>> {
        let mut stream = self
            .reading
            .lock()
            .expect("no code panics while it reads an event");
        let answer = frame::read(&mut *stream);
        let left = *self.ended();
        let outcome = match answer {
            Ok(Some(Reply::Event(event))) => return Ok(Some(event)),
            Ok(Some(Reply::Done)) => Ok(None),
            _ if left => Ok(None),
            Ok(Some(other)) => Err(self.store.unexpected(&other)),
            Ok(None) => Err(self.store.lost(std::io::ErrorKind::UnexpectedEof.into())),
            Err(error) => Err(self.store.frame_error(error)),
        };
        *self.ended() = true;
        self.ending.notify_all();
        outcome
    }

    /// Tells the other members something, usually why this one failed.
    pub fn report(&self, text: &str) -> Result<()> {
        let text = text.to_owned();
        self.send(&Request::Report { text })
    }

    /// Gives the seat up in good order. [`next_event`](Self::next_event), on whatever thread,
    /// returns `None` from then on.
    pub fn leave(&self) -> Result<()> {
        self.send(&Request::Leave)?;
        if self
            .reading
            .try_lock()
            .is_ok_and(|stream| stream.set_read_timeout(Some(FAREWELL)).is_ok())
        {
            // Nobody is reading: fetch the acknowledgement here.
            while let Ok(Some(_)) = self.next_event() {}
            return Ok(());
        }
        let mut ended = self.ended();
        if !*ended {
            let waited = self.ending.wait_timeout(ended, FAREWELL);
            ended = waited.expect("no code panics while it holds the flag").0;
        }
        if !*ended {
            *ended = true;
            drop(ended);
            let stream = self.writing();
            let closed = stream.shutdown(Shutdown::Both);
            closed.map_err(|e| self.store.lost(e))?;
        }
        Ok(())
    }

    fn send(&self, request: &Request) -> Result<(), Error> {
        let sent = frame::write(&mut *self.writing(), request);
        sent.map_err(|e| self.store.lost(e))
    }

    fn writing(&self) -> MutexGuard<'_, TcpStream> {
        self.writing
            .lock()
            .expect("no code panics while it writes a frame")
    }

    fn ended(&self) -> MutexGuard<'_, bool> {
        self.ended
            .lock()
            .expect("no code panics while it holds the flag")
    }
}

//! Checksums of a stream of pieces: crc32c inline, sha256 on a thread of its own.

use std::fmt::Write as _;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

/// Pieces that sha256 may be behind: it goes on while the disk makes sure of what it has. Weights
/// and moments are in memory anyhow; a piece of them is no copy.
const BEHIND: usize = 32;

/// Size and checksums of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Digest {
    pub(crate) bytes: u64,
    pub(crate) crc32c: u32,
    pub(crate) sha256: String,
}

/// Computes a [`Digest`] piece by piece.
#[derive(Debug)]
pub(crate) struct Digester {
    bytes: u64,
    crc32c: u32,
    pieces: SyncSender<Bytes>,
    thread: JoinHandle<String>,
}

impl Digester {
    pub(crate) fn start() -> Result<Self> {
        let (pieces, received) = sync_channel::<Bytes>(BEHIND);
        let thread = std::thread::Builder::new()
            .name("checkpoint-sha256".into())
            .spawn(move || {
                let mut sha256 = Sha256::new();
                for piece in received {
                    sha256.update(&piece);
                }
                hex(&sha256.finalize())
            })
            .map_err(|source| Error::System { source })?;
        Ok(Self {
            bytes: 0,
            crc32c: 0,
            pieces,
            thread,
        })
    }

    pub(crate) fn update(&mut self, piece: &Bytes) {
        self.bytes += piece.len() as u64;
        self.crc32c = crc32c::crc32c_append(self.crc32c, piece);
        // Fails only when the thread has panicked, which `finish` passes on.
        let _ = self.pieces.send(piece.clone());
    }

    pub(crate) fn finish(self) -> Digest {
        drop(self.pieces);
        let sha256 = self.thread.join();
        Digest {
            bytes: self.bytes,
            crc32c: self.crc32c,
            sha256: sha256.unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        }
    }
}

/// Returns the sha256 of a small file.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Returns bytes as lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        write!(text, "{byte:02x}").expect("a String takes all that is written");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers_in_pieces() {
        let mut digester = Digester::start().expect("a thread");
        for piece in ["1234", "", "56789"] {
            digester.update(&Bytes::from(piece));
        }
        let digest = digester.finish();
        assert_eq!((digest.bytes, digest.crc32c), (9, 0xe306_9283));
        let known = "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225";
        assert_eq!(digest.sha256, known);
        assert_eq!(sha256(b"123456789"), known);
    }
}

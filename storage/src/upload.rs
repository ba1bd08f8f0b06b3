//! Large objects in parts.
//!
//! Each part is an operation of its own, so a failed one is sent again without the others. Where
//! the store keeps its parts to itself (folders), the upload is one attempt.

use std::collections::VecDeque;
use std::io;

use bytes::Bytes;
use futures::stream::{FuturesUnordered, Stream, StreamExt, TryStreamExt};
use object_store::multipart::PartId;
use object_store::path::Path;
use object_store::{MultipartId, ObjectStoreExt, PutPayload};
use tokio::task::JoinSet;

use crate::backend::Parts;
use crate::error::{Error, Result};
use crate::retry::Outcome;
use crate::storage::Storage;
use crate::verdict::{Failure, Verdict};

/// Bytes of a part; what is not larger goes in one request.
pub(crate) const PART: usize = 32 << 20;
/// Parts of one object under way at once.
const PARTS_AT_ONCE: usize = 4;
/// Parts that are made or written at once where they are written one after the other.
const PARTS_IN_MEMORY: usize = 2;

/// Writes the pieces and returns how many bytes they were.
pub(crate) async fn put_stream<S>(storage: &Storage, path: &str, pieces: S) -> Result<u64>
where
    S: Stream<Item = io::Result<Bytes>> + Send + Unpin,
{
    let key = storage.key(path)?;
    let mut cutter = Cutter {
        pieces,
        held: VecDeque::new(),
        held_bytes: 0,
        ended: false,
    };
    let broken = |source: io::Error| Error::Rejected {
        operation: "put",
        url: storage.url_of(&key),
        source: source.into(),
    };
    let first = cutter.next().await.map_err(broken)?.unwrap_or_default();
    let second = cutter.next().await.map_err(broken)?;
    let Some(second) = second else {
        let bytes = first.content_length() as u64;
        storage.put_payload(&key, first).await?;
        return Ok(bytes);
    };
    cutter.give_back(second);
    cutter.give_back(first);
    let bytes = match &storage.backend().parts {
        Some(parts) => in_parts(storage, parts.as_ref(), &key, cutter).await,
        None => in_one_go(storage, &key, cutter).await,
    }?;
    storage.tallies().wrote(bytes);
    Ok(bytes)
}

/// Uploads parts that can be sent again.
async fn in_parts<S>(
    storage: &Storage,
    store: &dyn Parts,
    key: &Path,
    cutter: Cutter<S>,
) -> Result<u64>
where
    S: Stream<Item = io::Result<Bytes>> + Send + Unpin,
{
    let operation = storage.writing("put", key);
    let id = storage
        .run(&operation, || async {
            Ok(store.create_multipart(key).await?)
        })
        .await?;
    let outcome = match send_all(storage, store, key, &id, cutter).await {
        Ok((parts, bytes)) => complete(storage, store, key, &id, parts, bytes)
            .await
            .map(|()| bytes),
        Err(error) => Err(error),
    };
    if outcome.is_err() {
        // Parts that stay behind cost money; a failure here changes nothing for the caller.
        let limit = storage.config().request_timeout;
        let _ = tokio::time::timeout(limit, store.abort_multipart(key, &id)).await;
    }
    outcome
}

async fn send_all<S>(
    storage: &Storage,
    store: &dyn Parts,
    key: &Path,
    id: &MultipartId,
    mut cutter: Cutter<S>,
) -> Result<(Vec<PartId>, u64)>
where
    S: Stream<Item = io::Result<Bytes>> + Send + Unpin,
{
    let (mut index, mut bytes) = (0, 0);
    let mut running = FuturesUnordered::new();
    let mut done = Vec::new();
    loop {
        while running.len() < PARTS_AT_ONCE {
            let next = cutter.next().await.map_err(|source| Error::Rejected {
                operation: "put",
                url: storage.url_of(key),
                source: source.into(),
            })?;
            let Some(payload) = next else { break };
            bytes += payload.content_length() as u64;
            running.push(send(storage, store, key, id, index, payload));
            index += 1;
        }
        match running.next().await {
            Some(part) => done.push(part?),
            None => break,
        }
    }
    done.sort_unstable_by_key(|(index, _)| *index);
    Ok((done.into_iter().map(|(_, part)| part).collect(), bytes))
}

async fn send(
    storage: &Storage,
    store: &dyn Parts,
    key: &Path,
    id: &MultipartId,
    index: usize,
    payload: PutPayload,
) -> Result<(usize, PartId)> {
    let mut operation = storage.writing("put", key);
    operation.limit = storage
        .config()
        .attempt_limit(payload.content_length() as u64);
    let part = storage
        .run(&operation, || async {
            Ok(store.put_part(key, id, index, payload.clone()).await?)
        })
        .await?;
    Ok((index, part))
}

async fn complete(
    storage: &Storage,
    store: &dyn Parts,
    key: &Path,
    id: &MultipartId,
    parts: Vec<PartId>,
    bytes: u64,
) -> Result<()> {
    let mut operation = storage.writing("put", key);
    // Servers put the parts together before they answer.
    operation.limit = storage.config().attempt_limit(bytes);
    let outcome = storage
        .attempts(&operation, || {
            let parts = parts
                .iter()
                .map(|part| PartId {
                    content_id: part.content_id.clone(),
                })
                .collect();
            async move {
                store.complete_multipart(key, id, parts).await?;
                Ok(())
            }
        })
        .await;
    match outcome {
        Ok(()) => Ok(()),
        // The upload is gone: an attempt whose answer was lost has completed it, or nobody has.
        Err(Outcome::Final(Verdict::NotFound, failure)) => match storage.head_key(key).await {
            Ok(size) if size == bytes => Ok(()),
            _ => Err(storage.error(&operation, Outcome::Final(Verdict::Permanent, failure))),
        },
        Err(outcome) => Err(storage.error(&operation, outcome)),
    }
}

/// Uploads through the plain interface; nothing is sent again. A part is made while the ones before
/// it are written.
async fn in_one_go<S>(storage: &Storage, key: &Path, mut cutter: Cutter<S>) -> Result<u64>
where
    S: Stream<Item = io::Result<Bytes>> + Send + Unpin,
{
    let operation = storage.writing("put", key);
    let fail =
        |failure: Failure| storage.error(&operation, Outcome::Final(failure.verdict(), failure));
    let started = storage.store().put_multipart(key).await;
    let mut upload = started.map_err(|error| fail(error.into()))?;
    let mut bytes = 0;
    let mut writing = JoinSet::new();
    let sent = loop {
        match cutter.next().await {
            Err(source) => {
                break Err(Error::Rejected {
                    operation: "put",
                    url: operation.url.clone(),
                    source: source.into(),
                });
            }
            Ok(None) => break finish(&mut writing, 0).await.map_err(&fail),
            Ok(Some(payload)) => {
                bytes += payload.content_length() as u64;
                writing.spawn(upload.put_part(payload));
                if let Err(failure) = finish(&mut writing, PARTS_IN_MEMORY - 1).await {
                    break Err(fail(failure));
                }
            }
        }
    };
    let outcome = match sent {
        Ok(()) => upload.complete().await.map_err(|error| fail(error.into())),
        Err(error) => Err(error),
    };
    if outcome.is_err() {
        // What still writes must not find the upload gone.
        while writing.join_next().await.is_some() {}
        let _ = upload.abort().await;
    }
    outcome.map(|_| bytes)
}

/// Waits until at most `left` parts are being written.
async fn finish(
    writing: &mut JoinSet<object_store::Result<()>>,
    left: usize,
) -> std::result::Result<(), Failure> {
    while writing.len() > left {
        match writing.join_next().await {
            Some(Ok(written)) => written?,
            // A part is ended from outside only when the runtime ends, and this task with it.
            Some(Err(error)) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => std::future::pending().await,
            },
            None => break,
        }
    }
    Ok(())
}

/// Cuts pieces of any size into parts of one size, without copying.
struct Cutter<S> {
    pieces: S,
    held: VecDeque<Bytes>,
    held_bytes: usize,
    ended: bool,
}

impl<S: Stream<Item = io::Result<Bytes>> + Unpin> Cutter<S> {
    async fn next(&mut self) -> io::Result<Option<PutPayload>> {
        while self.held_bytes < PART && !self.ended {
            match self.pieces.try_next().await? {
                None => self.ended = true,
                Some(piece) => {
                    self.held_bytes += piece.len();
                    self.held.push_back(piece);
                }
            }
        }
        let mut part = Vec::new();
        let mut missing = PART.min(self.held_bytes);
        self.held_bytes -= missing;
        while missing > 0 {
            let mut piece = self.held.pop_front().expect("held_bytes counts these");
            let rest = piece.split_off(missing.min(piece.len()));
            if !rest.is_empty() {
                self.held.push_front(rest);
            }
            missing -= piece.len();
            part.push(piece);
        }
        Ok((!part.is_empty()).then(|| PutPayload::from_iter(part)))
    }

    /// Puts a part back in front.
    fn give_back(&mut self, part: PutPayload) {
        self.held_bytes += part.content_length();
        let pieces: Vec<Bytes> = part.into_iter().collect();
        for piece in pieces.into_iter().rev() {
            self.held.push_front(piece);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn pieces_are_cut_into_parts() {
        let sizes = [0, 5, PART, 0, PART / 2, 2 * PART];
        let pieces = sizes.map(|size| Ok(Bytes::from(vec![1; size])));
        let mut cutter = Cutter {
            pieces: futures::stream::iter(pieces),
            held: VecDeque::new(),
            held_bytes: 0,
            ended: false,
        };
        let mut lengths = Vec::new();
        while let Some(part) = cutter.next().await.expect("no source fails") {
            lengths.push(part.content_length());
        }
        assert_eq!(lengths, [PART, PART, PART, 5 + PART / 2]);
    }
}

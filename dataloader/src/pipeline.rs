//! Plans -> fetched row groups -> decoded micro-batches, all bounded and in order.
//!
//! ```text
//! plans --pin: room for their row groups--fetch task (tokio, `prefetch` at a time)--> row groups
//!       --assemble thread: actions, text--> jobs --decode threads: images--> batch --> next()
//! ```

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use bytes::BytesMut;
use futures::StreamExt;
use futures::future::try_join_all;
use pollen_core::{ErrorClass, Seed};
use tokio::runtime::Handle;

use crate::batch::HostBatch;
use crate::byte_cache::{Owner, Pinned};
use crate::data::{Data, Key};
use crate::decode::{DecodePool, default_threads};
use crate::error::{Error, Result};
use crate::pixels::PixelPool;
use crate::row_group::OpenRowGroup;
use crate::sampler::SampleRef;

/// The samples of one micro-batch, each with its number in the run.
pub(crate) type Plan = Vec<(u64, SampleRef)>;

/// A running pipeline. Dropping it stops the tasks and joins the threads.
#[derive(Debug)]
pub(crate) struct Pipeline {
    batches: Option<Receiver<Pending>>,
    fetch: tokio::task::JoinHandle<()>,
    assemble: Option<JoinHandle<()>>,
}

/// A micro-batch whose images are being decoded.
type Pending = Receiver<Result<HostBatch>>;

/// A fetch that goes on while nobody waits for it.
///
/// Loads are shared: whoever needs a row group first loads it for all. If a fetch stood still while
/// the stream of fetches is full, everybody else who needs the same row group or column would wait
/// for it, and with them the caller who is to empty the stream.
struct Fetching(tokio::task::JoinHandle<Result<Fetched>>);

impl Fetching {
    fn start(fetch: impl Future<Output = Result<Fetched>> + Send + 'static) -> Self {
        Self(tokio::spawn(fetch))
    }

    async fn finish(mut self) -> Result<Fetched> {
        (&mut self.0)
            .await
            .unwrap_or(Err(Error::Ended { part: "fetch task" }))
    }
}

impl Drop for Fetching {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Fetched {
    plan: Plan,
    opened: HashMap<Key, Opened>,
    pinned: Pinned<Key, OpenRowGroup>,
}

/// A row group, or why its samples cannot be used.
type Opened = std::result::Result<Arc<OpenRowGroup>, String>;

impl Pipeline {
    /// Starts on `runtime`; with `augment`, images are augmented by (seed, sample, camera).
    pub(crate) fn start(
        data: Arc<Data>,
        plans: impl Iterator<Item = Plan> + Send + 'static,
        augment: Option<Seed>,
        runtime: &Handle,
    ) -> Self {
        let prefetch = data.config().prefetch_batches;
        let threads = match data.config().decode_threads {
            0 => default_threads(),
            threads => threads,
        };
        let (to_assemble, mut fetched) = tokio::sync::mpsc::channel::<Result<Fetched>>(1);
        let (to_caller, batches) = sync_channel::<Pending>(prefetch);
        let (for_pins, for_fetch) = (Arc::clone(&data), Arc::clone(&data));
        let fetch = runtime.spawn(async move {
            let owner = Owner::default();
            // One after the other: a micro-batch never waits for room that a later one has.
            let pinned = futures::stream::iter(plans).then(move |plan| {
                let (data, owner) = (Arc::clone(&for_pins), Arc::clone(&owner));
                async move {
                    let keys = row_groups_of(&plan);
                    let pinned = data.pin(&keys, &owner).await;
                    (plan, keys, pinned)
                }
            });
            let start = move |(plan, keys, pinned)| {
                Fetching::start(fetch(Arc::clone(&for_fetch), plan, keys, pinned)).finish()
            };
            let mut pinned = std::pin::pin!(pinned);
            // The first one has store and processor for itself: everybody waits for it.
            let Some(first) = pinned.next().await else {
                return;
            };
            if to_assemble.send(start(first).await).await.is_err() {
                return;
            }
            let mut fetches = pinned.map(start).buffered(prefetch);
            while let Some(next) = fetches.next().await {
                if to_assemble.send(next).await.is_err() {
                    break;
                }
            }
        });
        let assemble = std::thread::Builder::new()
            .name("pollen-assemble".into())
            .spawn(move || {
                let pool = DecodePool::start(threads);
                let pixels = Arc::<PixelPool>::default();
                while let Some(next) = fetched.blocking_recv() {
                    let pending =
                        next.map_or_else(failed, |it| assemble(&data, it, augment, &pool, &pixels));
                    if to_caller.send(pending).is_err() {
                        break;
                    }
                }
            })
            .expect("the process may start a thread");
        Self {
            batches: Some(batches),
            fetch,
            assemble: Some(assemble),
        }
    }

    /// Waits for the next micro-batch; `None` after the last.
    ///
    /// An error takes the place of the micro-batch it struck; the next call goes on behind it.
    pub(crate) fn next(&mut self) -> Result<Option<HostBatch>> {
        let batches = self.batches.as_ref().expect("present until the drop");
        match batches.recv() {
            Ok(pending) => match pending.recv() {
                Ok(batch) => batch.map(Some),
                Err(_) => Err(Error::Ended {
                    part: "decode thread",
                }),
            },
            // The assemble thread ends with the plans, or with the task that fetched them.
            Err(_) => Ok(None),
        }
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        self.fetch.abort();
        self.batches = None;
        if let Some(thread) = self.assemble.take() {
            // A panic was reported by its own thread.
            drop(thread.join());
        }
    }
}

fn failed(error: Error) -> Pending {
    let (reply, pending) = sync_channel(1);
    drop(reply.send(Err(error)));
    pending
}

fn row_groups_of(plan: &Plan) -> Vec<Key> {
    let mut keys: Vec<Key> = plan.iter().map(|(_, s)| (s.dataset, s.row_group)).collect();
    keys.sort_unstable();
    keys.dedup();
    keys
}

/// Opens what a micro-batch needs, each row group once.
async fn fetch(
    data: Arc<Data>,
    plan: Plan,
    keys: Vec<Key>,
    pinned: Pinned<Key, OpenRowGroup>,
) -> Result<Fetched> {
    let opened = try_join_all(keys.into_iter().map(|key| {
        let (data, pinned) = (&data, &pinned);
        async move {
            let bad = data.bad_row_groups();
            if let Some(reason) = bad.refuse(key) {
                return Ok((key, Err(reason)));
            }
            match data.row_group(key, pinned).await {
                Ok(opened) => {
                    bad.read(key);
                    Ok((key, Ok(opened)))
                }
                Err(error) if error.class() == ErrorClass::Corrupt => {
                    let reason = error.to_string();
                    bad.failed(key, &reason);
                    Ok((key, Err(reason)))
                }
                Err(error) => Err(error),
            }
        }
    }))
    .await?;
    Ok(Fetched {
        plan,
        opened: opened.into_iter().collect(),
        pinned,
    })
}

/// A batch that the decode threads fill.
struct Assembly {
    batch: Mutex<HostBatch>,
    /// The images by slot, each put here when it is written.
    images: Mutex<Vec<BytesMut>>,
    pixels: Arc<PixelPool>,
    /// The failure of the sample that comes first in the batch.
    failure: Mutex<Option<(usize, Error)>>,
    left: AtomicUsize,
    reply: SyncSender<Result<HostBatch>>,
    /// Dropped when the last image is decoded.
    _pinned: Pinned<Key, OpenRowGroup>,
}

impl Assembly {
    fn finish_one(&self, slot: usize, images: BytesMut, outcome: Result<()>) {
        lock(&self.images)[slot] = images;
        if let Err(error) = outcome {
            let mut failure = lock(&self.failure);
            if failure.as_ref().is_none_or(|(first, _)| slot < *first) {
                *failure = Some((slot, error));
            }
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            let result = match lock(&self.failure).take() {
                Some((_, error)) => Err(error),
                None => Ok(self.take_batch()),
            };
            // Nobody waits any more when the loader is being dropped.
            drop(self.reply.send(result));
        }
    }

    fn take_batch(&self) -> HostBatch {
        let images = std::mem::take(&mut *lock(&self.images));
        HostBatch {
            images: self.pixels.join(images),
            ..std::mem::take(&mut *lock(&self.batch))
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // After a panic in another sample's job the batch is never handed out.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn assemble(
    data: &Arc<Data>,
    fetched: Fetched,
    augment: Option<Seed>,
    pool: &DecodePool,
    pixels: &Arc<PixelPool>,
) -> Pending {
    let Fetched {
        plan,
        opened,
        pinned,
    } = fetched;
    let mut batch = data.empty_batch(&plan);
    let mut images = pixels.pieces(plan.len(), batch.dims.cameras * batch.dims.image_bytes());
    let mut to_decode = Vec::new();
    for (slot, (index, sample)) in plan.into_iter().enumerate() {
        let usable = match &opened[&(sample.dataset, sample.row_group)] {
            Ok(group) => data
                .fill_low_dim(&mut batch, slot, sample, group)
                .map(|()| Arc::clone(group)),
            Err(reason) => {
                Err(data.datasets()[sample.dataset as usize].bad_frame(sample, reason.as_str()))
            }
        };
        match usable {
            Ok(group) => {
                // Comes back when it is written.
                let images = std::mem::take(&mut images[slot]);
                to_decode.push((slot, index, sample, group, images));
            }
            Err(error) => {
                if let Err(error) = data.quarantine(&mut batch, slot, sample, error) {
                    return failed(error);
                }
                images[slot].fill(0);
            }
        }
    }
    let (reply, pending) = sync_channel(1);
    if to_decode.is_empty() {
        batch.images = pixels.join(images);
        drop(reply.send(Ok(batch)));
        return pending;
    }
    let assembly = Arc::new(Assembly {
        batch: Mutex::new(batch),
        images: Mutex::new(images),
        pixels: Arc::clone(pixels),
        failure: Mutex::new(None),
        left: AtomicUsize::new(to_decode.len()),
        reply,
        _pinned: pinned,
    });
    // The jobs hold what they need.
    drop(opened);
    for (slot, index, sample, group, mut images) in to_decode {
        let seed = augment.map(|seed| seed.index(index));
        let (data, assembly) = (Arc::clone(data), Arc::clone(&assembly));
        pool.run(Box::new(move || {
            let decoded = data.decode_images(sample, &group, seed, &mut images);
            drop(group);
            let mut batch = lock(&assembly.batch);
            let outcome = match decoded {
                Ok(present) => {
                    let cameras = present.len();
                    batch.camera_present[slot * cameras..][..cameras].copy_from_slice(&present);
                    Ok(())
                }
                Err(error) => {
                    images.fill(0);
                    data.quarantine(&mut batch, slot, sample, error)
                }
            };
            drop(batch);
            assembly.finish_one(slot, images, outcome);
        }));
    }
    pending
}

//! The trait that every engine implements, and the handle of an operation in flight.

use std::fmt::Debug;
use std::sync::mpsc;

use crate::buffer::{Buffer, ReduceOp};
use crate::error::{Error, Result};

/// A fixed group of ranks that exchange buffers.
///
/// All ranks submit the same operations in the same order, with the same element type and length
/// (checked: a mismatch is a timeout whose error shows what each rank was doing). Operations run
/// one after another in that order; submitting returns at once and the [`Handle`] gives the buffer
/// back. After the first failure the communicator is of no further use: every operation fails, and
/// [`poll_error`](Self::poll_error) says why. Recovery is a new process.
///
/// For a given world size, length and element type a reduction adds in a fixed order: the result
/// has the same bits on every rank and in every run.
pub trait Communicator: Send + Sync + Debug {
    /// Returns this process's number, below the world size.
    fn rank(&self) -> u32;

    /// Returns the number of ranks.
    fn world_size(&self) -> u32;

    /// Returns the engine's name.
    fn name(&self) -> &'static str;

    /// Returns whether operations work on device memory, where it lies.
    fn takes_device_memory(&self) -> bool;

    /// Combines the ranks' buffers element by element; every rank gets all of the result.
    ///
    /// # Shapes
    /// `[n]` -> `[n]`
    fn all_reduce(&self, buffer: Buffer, op: ReduceOp) -> Result<Handle>;

    /// Combines the ranks' buffers element by element; rank r of w gets part r of the result, with
    /// the bits that [`all_reduce`](Self::all_reduce) would give. `n` must divide by `w`.
    ///
    /// # Shapes
    /// `[n]` -> `[n / w]`
    fn reduce_scatter(&self, buffer: Buffer, op: ReduceOp) -> Result<Handle>;

    /// Joins the ranks' buffers in rank order.
    ///
    /// # Shapes
    /// `[n]` -> `[n * w]`
    fn all_gather(&self, buffer: Buffer) -> Result<Handle>;

    /// Copies the buffer of rank `root` to all ranks; the others give a buffer of the same length.
    ///
    /// # Shapes
    /// `[n]` -> `[n]`
    fn broadcast(&self, buffer: Buffer, root: u32) -> Result<Handle>;

    /// Returns once all ranks have called it and everything submitted before is done.
    fn barrier(&self) -> Result<()>;

    /// Closes all connections. Operations in flight fail at once, here and on the other ranks.
    fn abort(&self);

    /// Returns why the communicator is of no further use, if it is.
    fn poll_error(&self) -> Option<Error>;
}

/// An operation in flight. Dropping it does not cancel the operation.
#[derive(Debug)]
#[must_use = "the buffer comes back through `wait`"]
pub struct Handle {
    rank: u32,
    result: mpsc::Receiver<Result<Buffer>>,
}

impl Handle {
    /// Returns a handle and the sender that completes it.
    pub(crate) fn pending(rank: u32) -> (Self, mpsc::SyncSender<Result<Buffer>>) {
        let (sender, result) = mpsc::sync_channel(1);
        (Self { rank, result }, sender)
    }

    /// Returns the handle of an operation that is done.
    pub(crate) fn ready(rank: u32, buffer: Buffer) -> Self {
        let (handle, sender) = Self::pending(rank);
        sender
            .send(Ok(buffer))
            .expect("the receiver is in `handle`, two lines up");
        handle
    }

    /// Waits for the operation and returns its buffer.
    pub fn wait(self) -> Result<Buffer> {
        self.result
            .recv()
            .unwrap_or(Err(Error::ThreadEnded { rank: self.rank }))
    }
}

//! World size 1: every operation is the identity and is done when it returns.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::backend::{Communicator, Handle};
use crate::buffer::{Buffer, ReduceOp};
use crate::error::{Error, Result};

/// The communicator of a single process.
#[derive(Debug, Default)]
pub struct Local {
    aborted: AtomicBool,
}

impl Local {
    const NAME: &str = "local";

    fn identity(&self, buffer: Buffer) -> Result<Handle> {
        match self.poll_error() {
            Some(error) => Err(error),
            None => Ok(Handle::ready(0, buffer.into_host(Self::NAME)?.into())),
        }
    }
}

impl Communicator for Local {
    fn rank(&self) -> u32 {
        0
    }

    fn world_size(&self) -> u32 {
        1
    }

    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn takes_device_memory(&self) -> bool {
        false
    }

    fn all_reduce(&self, buffer: Buffer, _op: ReduceOp) -> Result<Handle> {
        self.identity(buffer)
    }

    fn reduce_scatter(&self, buffer: Buffer, _op: ReduceOp) -> Result<Handle> {
        self.identity(buffer)
    }

    fn all_gather(&self, buffer: Buffer) -> Result<Handle> {
        self.identity(buffer)
    }

    fn broadcast(&self, buffer: Buffer, root: u32) -> Result<Handle> {
        if root == 0 {
            self.identity(buffer)
        } else {
            Err(Error::Argument {
                rank: 0,
                operation: "broadcast",
                reason: format!("root {root} is not below the world size 1"),
            })
        }
    }

    fn barrier(&self) -> Result<()> {
        self.poll_error().map_or(Ok(()), Err)
    }

    fn abort(&self) {
        self.aborted.store(true, Ordering::Release);
    }

    fn poll_error(&self) -> Option<Error> {
        self.aborted
            .load(Ordering::Acquire)
            .then_some(Error::Aborted { rank: 0 })
    }
}

//! Memory of images, used again batch after batch.
//!
//! A batch of images is megabytes, and memory fresh from the system costs a page fault for every four
//! kilobytes. What a caller drops goes back to the pool it came from. The decode threads write straight
//! into it: `PixelPool::pieces` hands out one piece a sample, `PixelPool::join` puts them together
//! without a copy.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::BytesMut;

/// The bytes of a batch's images; its memory goes back to the loader on drop.
#[derive(Default)]
pub struct Pixels {
    bytes: BytesMut,
    home: Option<Arc<PixelPool>>,
}

impl Deref for Pixels {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl From<Vec<u8>> for Pixels {
    fn from(bytes: Vec<u8>) -> Self {
        let bytes = BytesMut::from(bytes::Bytes::from(bytes));
        Self { bytes, home: None }
    }
}

impl Clone for Pixels {
    fn clone(&self) -> Self {
        Self {
            bytes: BytesMut::from(&**self),
            home: None,
        }
    }
}

impl PartialEq for Pixels {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl fmt::Debug for Pixels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pixels({} bytes)", self.len())
    }
}

impl Drop for Pixels {
    fn drop(&mut self) {
        if let Some(home) = self.home.take() {
            home.take_back(std::mem::take(&mut self.bytes));
        }
    }
}

/// Buffers that no batch uses at the moment: never more than were in use at once.
#[derive(Default)]
pub(crate) struct PixelPool {
    free: Mutex<Vec<BytesMut>>,
}

impl fmt::Debug for PixelPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PixelPool").finish_non_exhaustive()
    }
}

impl PixelPool {
    /// Returns `count` pieces of `bytes` each that lie one behind the other. What is in them is
    /// undetermined: whoever takes a piece writes all of it.
    pub(crate) fn pieces(&self, count: usize, bytes: usize) -> Vec<BytesMut> {
        let mut whole = {
            let mut free = self.lock();
            let fits = free.iter().position(|buffer| buffer.len() == count * bytes);
            fits.map(|at| free.swap_remove(at))
        }
        .unwrap_or_else(|| BytesMut::zeroed(count * bytes));
        (0..count).map(|_| whole.split_to(bytes)).collect()
    }

    /// Puts the pieces of one call of [`Self::pieces`] together, in that order.
    pub(crate) fn join(self: &Arc<Self>, pieces: impl IntoIterator<Item = BytesMut>) -> Pixels {
        let joined = pieces.into_iter().reduce(|mut whole, piece| {
            whole.unsplit(piece);
            whole
        });
        Pixels {
            bytes: joined.unwrap_or_default(),
            home: Some(Arc::clone(self)),
        }
    }

    fn take_back(&self, buffer: BytesMut) {
        let mut free = self.lock();
        // Batches of another size came between: theirs are not needed again soon.
        free.retain(|other| other.len() == buffer.len());
        free.push(buffer);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<BytesMut>> {
        // Nothing panics while it is held.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(pool: &Arc<PixelPool>, count: usize, bytes: usize) -> Pixels {
        let mut pieces = pool.pieces(count, bytes);
        for (i, piece) in pieces.iter_mut().enumerate() {
            piece.fill(i as u8);
        }
        pool.join(pieces)
    }

    #[test]
    fn pieces_are_joined_without_a_copy() {
        let pool = Arc::<PixelPool>::default();
        let mut pieces = pool.pieces(3, 1000);
        let starts: Vec<*const u8> = pieces.iter().map(|piece| piece.as_ptr()).collect();
        pieces[1].fill(7);
        let pixels = pool.join(pieces);
        assert_eq!(pixels.len(), 3000);
        assert_eq!(pixels.as_ptr(), starts[0]);
        assert_eq!(pixels[1000..].as_ptr(), starts[1]);
        assert!(pixels[1000..2000].iter().all(|&byte| byte == 7));
        assert!(pixels[2000..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn memory_is_used_again_and_only_by_one_batch() {
        let pool = Arc::<PixelPool>::default();
        let first = filled(&pool, 4, 500);
        let second = filled(&pool, 4, 500);
        let copy = first.clone();
        let addresses = [first.as_ptr(), second.as_ptr()];
        assert_ne!(addresses[0], addresses[1]);
        drop(first);
        let third = filled(&pool, 4, 500);
        assert_eq!(third.as_ptr(), addresses[0]);
        assert_eq!(third, copy);
        drop((copy, second, third));
        assert_eq!(pool.lock().len(), 2, "a copy is none of the pool's");
    }

    #[test]
    fn buffers_of_another_size_are_let_go() {
        let pool = Arc::<PixelPool>::default();
        drop((filled(&pool, 4, 500), filled(&pool, 4, 500)));
        drop(filled(&pool, 1, 500));
        let sizes: Vec<usize> = pool.lock().iter().map(BytesMut::len).collect();
        assert_eq!(sizes, [500]);
    }

    #[test]
    fn no_pieces_are_an_empty_batch() {
        let pool = Arc::<PixelPool>::default();
        let pieces = pool.pieces(0, 500);
        assert!(pool.join(pieces).is_empty());
    }
}

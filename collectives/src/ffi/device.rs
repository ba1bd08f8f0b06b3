//! Device memory, known by its address.

use crate::buffer::DType;

/// A flat buffer in device memory that somebody else owns; NCCL works on it in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceBuffer {
    pointer: u64,
    len: usize,
    dtype: DType,
}

impl DeviceBuffer {
    /// Names `len` elements at a device address.
    ///
    /// # Safety
    /// From when it is given to an operation until that operation's handle has been waited for,
    /// the memory must stay allocated on the communicator's device and nobody else may access it.
    pub unsafe fn new(pointer: u64, len: usize, dtype: DType) -> Self {
        Self {
            pointer,
            len,
            dtype,
        }
    }

    /// Returns part number `part` of `parts` equal ones.
    pub(crate) fn part(&self, part: u32, parts: u32) -> Self {
        let len = self.len / parts as usize;
        let offset = part as usize * len * self.dtype.size();
        Self {
            pointer: self.pointer + offset as u64,
            len,
            dtype: self.dtype,
        }
    }

    /// Returns the device address.
    pub fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Returns the number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
}

//! What is moved into an operation and handed back by it, so that nothing is shared in flight.

use std::fmt;
use std::ops::Range;

use half::bf16;

use crate::error::{Error, Result};
use crate::ffi::DeviceBuffer;

/// How the ranks' values are combined. Integer sums wrap. A NaN on any rank makes [`Self::Max`]
/// and [`Self::Min`] NaN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceOp {
    /// Adds.
    Sum,
    /// Keeps the largest.
    Max,
    /// Keeps the smallest.
    Min,
}

impl fmt::Display for ReduceOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sum => "sum",
            Self::Max => "max",
            Self::Min => "min",
        })
    }
}

/// Element type of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// 64-bit float.
    F64,
    /// 16-bit brain float. Reduced in f32 in rank order and rounded once, to nearest even.
    Bf16,
    /// 64-bit signed integer.
    I64,
    /// 8-bit unsigned integer.
    U8,
}

impl DType {
    /// Returns the bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::Bf16 => 2,
            Self::F32 => 4,
            Self::F64 | Self::I64 => 8,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::Bf16 => "bf16",
            Self::I64 => "i64",
            Self::U8 => "u8",
        })
    }
}

/// A flat buffer in host memory.
#[derive(Clone, PartialEq)]
pub enum HostBuffer {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// 64-bit floats.
    F64(Vec<f64>),
    /// 16-bit brain floats.
    Bf16(Vec<bf16>),
    /// 64-bit signed integers.
    I64(Vec<i64>),
    /// 8-bit unsigned integers.
    U8(Vec<u8>),
}

macro_rules! each_type {
    ($buffer:expr, $values:ident => $body:expr) => {
        match $buffer {
            HostBuffer::F32($values) => $body,
            HostBuffer::F64($values) => $body,
            HostBuffer::Bf16($values) => $body,
            HostBuffer::I64($values) => $body,
            HostBuffer::U8($values) => $body,
        }
    };
}

impl HostBuffer {
    /// Returns the number of elements.
    pub fn len(&self) -> usize {
        each_type!(self, values => values.len())
    }

    /// Returns whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the element type.
    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::F64(_) => DType::F64,
            Self::Bf16(_) => DType::Bf16,
            Self::I64(_) => DType::I64,
            Self::U8(_) => DType::U8,
        }
    }

    /// Keeps only the elements in `range`.
    pub(crate) fn keep(&mut self, range: Range<usize>) {
        each_type!(self, values => {
            values.truncate(range.end);
            values.drain(..range.start);
        });
    }

    /// Returns a buffer `times` as long, with these elements as part number `part`.
    pub(crate) fn spread(&self, part: usize, times: usize) -> Self {
        macro_rules! spread {
            ($variant:ident, $values:expr, $zero:expr) => {{
                let mut all = vec![$zero; $values.len() * times];
                all[part * $values.len()..][..$values.len()].copy_from_slice($values);
                Self::$variant(all)
            }};
        }
        match self {
            Self::F32(values) => spread!(F32, values, 0.0),
            Self::F64(values) => spread!(F64, values, 0.0),
            Self::Bf16(values) => spread!(Bf16, values, bf16::ZERO),
            Self::I64(values) => spread!(I64, values, 0),
            Self::U8(values) => spread!(U8, values, 0),
        }
    }
}

impl fmt::Debug for HostBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x {}", self.dtype(), self.len())
    }
}

/// What an operation works on.
#[derive(Debug)]
pub enum Buffer {
    /// Host memory, owned.
    Host(HostBuffer),
    /// Device memory, owned by somebody else: see [`DeviceBuffer::new`].
    Device(DeviceBuffer),
}

impl Buffer {
    /// Returns the host buffer, or an error naming the back end that cannot use anything else.
    pub fn into_host(self, backend: &'static str) -> Result<HostBuffer> {
        match self {
            Self::Host(host) => Ok(host),
            Self::Device(_) => Err(Error::DeviceBuffer { backend }),
        }
    }
}

impl From<HostBuffer> for Buffer {
    fn from(host: HostBuffer) -> Self {
        Self::Host(host)
    }
}

macro_rules! conversions {
    ($($variant:ident $element:ty),*) => {$(
        impl From<Vec<$element>> for HostBuffer {
            fn from(values: Vec<$element>) -> Self {
                Self::$variant(values)
            }
        }

        impl From<Vec<$element>> for Buffer {
            fn from(values: Vec<$element>) -> Self {
                Self::Host(HostBuffer::$variant(values))
            }
        }

        impl TryFrom<Buffer> for Vec<$element> {
            type Error = Error;

            fn try_from(buffer: Buffer) -> Result<Self> {
                match buffer {
                    Buffer::Host(HostBuffer::$variant(values)) => Ok(values),
                    other => Err(Error::WrongType {
                        expected: DType::$variant,
                        found: format!("{other:?}"),
                    }),
                }
            }
        }
    )*};
}

conversions!(F32 f32, F64 f64, Bf16 bf16, I64 i64, U8 u8);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_cut_out_and_put_in_their_place() {
        let mut buffer = HostBuffer::I64(vec![1, 2, 3, 4, 5, 6]);
        buffer.keep(2..4);
        assert_eq!(buffer, HostBuffer::I64(vec![3, 4]));
        assert_eq!(buffer.spread(1, 3), HostBuffer::I64(vec![0, 0, 3, 4, 0, 0]));
    }

    #[test]
    fn taking_the_wrong_type_out_is_an_error_that_names_both() {
        let error = Vec::<f32>::try_from(Buffer::from(vec![1_u8, 2])).expect_err("u8 is not f32");
        assert_eq!(
            error.to_string(),
            "expected a host buffer of f32, found Host(u8 x 2)"
        );
    }
}

//! Tensors to be written and tensors that were read, in safetensors files.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
pub use pollen_core::tensor_header::Dtype;
use pollen_core::tensor_header::{self, Entry};

/// Numbers that are there when their turn comes to be written.
pub trait Source: std::fmt::Debug + Sync {
    /// Returns how many there are.
    fn count(&self) -> usize;

    /// Returns them; what this makes is kept only until it is written.
    fn values(&self) -> Arc<Vec<f32>>;
}

impl Source for Arc<Vec<f32>> {
    fn count(&self) -> usize {
        self.len()
    }

    fn values(&self) -> Self {
        Self::clone(self)
    }
}

/// Values of a tensor to be written.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// As numbers, copied on the way.
    F32(&'a [f32]),
    /// As numbers, asked for once, when they are written, and written from where they are.
    From(&'a dyn Source),
    /// As little-endian bytes.
    Bytes(Dtype, &'a [u8]),
}

impl<'a> Values<'a> {
    /// Returns the element type.
    pub fn dtype(self) -> Dtype {
        match self {
            Self::F32(_) | Self::From(_) => Dtype::F32,
            Self::Bytes(dtype, _) => dtype,
        }
    }

    /// Returns the size in bytes.
    pub fn len(self) -> u64 {
        match self {
            Self::F32(values) => 4 * values.len() as u64,
            Self::From(source) => 4 * source.count() as u64,
            Self::Bytes(_, bytes) => bytes.len() as u64,
        }
    }

    /// Returns whether there are none.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Returns the bytes in pieces that are small enough to be held one by one.
    pub(crate) fn pieces(self) -> Box<dyn Iterator<Item = Bytes> + Send + 'a> {
        const PIECE: usize = 8 << 20;
        match self {
            Self::F32(values) => Box::new(values.chunks(PIECE / 4).map(to_bytes)),
            Self::From(source) => Box::new(std::iter::once(source).flat_map(|source| {
                let bytes = shared_bytes(source.values());
                let starts = (0..bytes.len()).step_by(PIECE);
                starts.map(move |start| bytes.slice(start..bytes.len().min(start + PIECE)))
            })),
            Self::Bytes(_, bytes) => Box::new(bytes.chunks(PIECE).map(Bytes::copy_from_slice)),
        }
    }
}

/// A named tensor to be written.
#[derive(Clone, Debug)]
pub struct TensorSlice<'a> {
    /// Canonical name.
    pub name: String,
    /// Shape; its product is the number of values.
    pub shape: Vec<usize>,
    /// The values, row-major.
    pub values: Values<'a>,
}

/// A tensor that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorData {
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// Little-endian bytes, row-major.
    pub bytes: Bytes,
}

impl TensorData {
    /// Returns the values of an f32 tensor.
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        (self.dtype == Dtype::F32).then(|| {
            let mut values = vec![0.0; self.bytes.len() / 4];
            read_f32(&self.bytes, &mut values);
            values
        })
    }
}

/// Copies little-endian bytes into values.
pub(crate) fn read_f32(bytes: &[u8], values: &mut [f32]) {
    let (chunks, _) = bytes.as_chunks::<4>();
    for (value, chunk) in values.iter_mut().zip(chunks) {
        *value = f32::from_le_bytes(*chunk);
    }
}

/// Returns the values' little-endian bytes without a copy, where numbers lie in memory like that.
fn shared_bytes(values: Arc<Vec<f32>>) -> Bytes {
    struct Owner(Arc<Vec<f32>>);
    impl AsRef<[u8]> for Owner {
        fn as_ref(&self) -> &[u8] {
            bytemuck::cast_slice(&self.0)
        }
    }
    if cfg!(target_endian = "little") {
        Bytes::from_owner(Owner(values))
    } else {
        to_bytes(&values)
    }
}

fn to_bytes(values: &[f32]) -> Bytes {
    let mut bytes = vec![0; 4 * values.len()];
    let (chunks, _) = bytes.as_chunks_mut::<4>();
    for (chunk, value) in chunks.iter_mut().zip(values) {
        *chunk = value.to_le_bytes();
    }
    bytes.into()
}

/// Sorts tensors into the order of the file and returns its head and their places. Wide elements
/// come first, so that every tensor is aligned.
pub(crate) fn head(
    tensors: &mut [TensorSlice<'_>],
    metadata: &BTreeMap<String, String>,
) -> Result<(Bytes, Vec<Entry>), String> {
    tensors.sort_by(|a, b| {
        let width = |tensor: &TensorSlice<'_>| tensor.values.dtype().bitsize();
        (width(b), &a.name).cmp(&(width(a), &b.name))
    });
    let mut names = BTreeSet::new();
    for TensorSlice {
        name,
        shape,
        values,
    } in &*tensors
    {
        let (dtype, bytes) = (values.dtype(), values.len());
        if tensor_header::size_of(dtype, shape) != Some(bytes) {
            return Err(format!(
                "tensor `{name}` has shape {shape:?} of {dtype} but {bytes} bytes"
            ));
        }
        if name == tensor_header::METADATA || !names.insert(name) {
            return Err(format!("tensor `{name}` is there twice"));
        }
    }
    let listed = tensors.iter();
    let listed = listed.map(|tensor| (&*tensor.name, tensor.values.dtype(), &*tensor.shape));
    let (head, _) = tensor_header::head(listed, metadata);
    let mut at = head.len() as u64;
    let entries = tensors.iter().map(|tensor| {
        let start = at;
        at += tensor.values.len();
        Entry {
            name: tensor.name.clone(),
            dtype: tensor.values.dtype(),
            shape: tensor.shape.clone(),
            range: start..at,
        }
    });
    let entries = entries.collect();
    Ok((head.into(), entries))
}

/// Reads the head of a file and returns the tensors' places; every fault is an error.
pub(crate) fn parse(file: &[u8]) -> Result<Vec<Entry>, String> {
    let size = file.len() as u64;
    let start = tensor_header::PREFIX as usize;
    let length = tensor_header::length(file, size)? as usize;
    tensor_header::parse(&file[start..start + length], size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(tensors: &mut [TensorSlice<'_>]) -> Vec<u8> {
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let (head, _) = head(tensors, &metadata).expect("valid");
        let mut bytes = head.to_vec();
        for tensor in tensors {
            tensor.values.pieces().for_each(|piece| bytes.extend(piece));
        }
        bytes
    }

    fn example() -> Vec<u8> {
        file(&mut [
            TensorSlice {
                name: "flags".into(),
                shape: vec![3],
                values: Values::Bytes(Dtype::U8, &[1, 2, 3]),
            },
            TensorSlice {
                name: "weight".into(),
                shape: vec![2, 1],
                values: Values::F32(&[1.5, -2.0]),
            },
            TensorSlice {
                name: "scalar".into(),
                shape: vec![],
                values: Values::F32(&[7.0]),
            },
        ])
    }

    #[test]
    fn the_public_reader_opens_it() {
        let bytes = example();
        let read = safetensors::SafeTensors::deserialize(&bytes).expect("opens");
        let weight = read.tensor("weight").expect("there");
        assert_eq!(weight.shape(), [2, 1]);
        assert_eq!(weight.data(), [0, 0, 192, 63, 0, 0, 0, 192]);
        assert_eq!(read.tensor("flags").expect("there").data(), [1, 2, 3]);
        let ours = parse(&bytes).expect("parses");
        let names: Vec<&str> = ours.iter().map(|entry| &*entry.name).collect();
        assert_eq!(names, ["scalar", "weight", "flags"], "wide elements first");
        assert_eq!(ours[0].shape, Vec::<usize>::new());
        let range = ours[2].range.clone();
        assert_eq!(bytes[range.start as usize..range.end as usize], [1, 2, 3]);
    }

    #[test]
    fn a_name_that_comes_twice_is_refused() {
        let weight = |values| TensorSlice {
            name: "weight".into(),
            shape: vec![1],
            values: Values::F32(values),
        };
        let mut twice = [weight(&[1.0]), weight(&[2.0])];
        let error = head(&mut twice, &BTreeMap::new()).expect_err("one would be lost");
        assert!(error.contains("`weight` is there twice"), "{error}");
    }

    #[test]
    fn a_source_is_asked_when_its_turn_comes() {
        use std::sync::atomic::{AtomicUsize, Ordering};

        #[derive(Debug)]
        struct Asked<'a>(f32, &'a AtomicUsize);
        impl Source for Asked<'_> {
            fn count(&self) -> usize {
                3 << 20
            }
            fn values(&self) -> Arc<Vec<f32>> {
                self.1.fetch_add(1, Ordering::Relaxed);
                Arc::new(vec![self.0; self.count()])
            }
        }
        let asked = AtomicUsize::new(0);
        let sources = [Asked(1.0, &asked), Asked(2.0, &asked)];
        let values = sources.iter().map(|source| Values::From(source));
        let mut seen = Vec::new();
        for piece in values.flat_map(Values::pieces) {
            let first = f32::from_le_bytes([piece[0], piece[1], piece[2], piece[3]]);
            seen.push((first, piece.len() >> 20, asked.load(Ordering::Relaxed)));
        }
        assert_eq!(seen, [(1.0, 8, 1), (1.0, 4, 1), (2.0, 8, 2), (2.0, 4, 2)]);
    }

    #[test]
    fn shapes_must_fit() {
        let mut wrong = [TensorSlice {
            name: "weight".into(),
            shape: vec![3],
            values: Values::F32(&[0.0; 2]),
        }];
        let error = head(&mut wrong, &BTreeMap::new()).expect_err("3 is not 2");
        assert!(error.contains("`weight`"), "{error}");
    }
}

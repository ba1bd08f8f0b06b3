//! The safetensors container: header length, JSON header, bytes.
//!
//! Written so that any reader opens it: entries without holes, the header padded to 8 bytes. Read
//! with every number checked, since a header may be cut off or forged.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// The longest header that is read, as in other readers.
const LONGEST_HEADER: u64 = 100_000_000;

/// Element type of a tensor, by its safetensors name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Dtype {
    BOOL,
    U8,
    I8,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    F64,
    I64,
    U64,
}

impl Dtype {
    /// Returns the bytes of one element.
    pub fn bytes(self) -> u64 {
        match self {
            Self::BOOL | Self::U8 | Self::I8 => 1,
            Self::I16 | Self::U16 | Self::F16 | Self::BF16 => 2,
            Self::I32 | Self::U32 | Self::F32 => 4,
            Self::F64 | Self::I64 | Self::U64 => 8,
        }
    }
}

/// Values of a tensor to be written.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// As numbers.
    F32(&'a [f32]),
    /// As little-endian bytes.
    Bytes(Dtype, &'a [u8]),
}

impl<'a> Values<'a> {
    /// Returns the element type.
    pub fn dtype(self) -> Dtype {
        match self {
            Self::F32(_) => Dtype::F32,
            Self::Bytes(dtype, _) => dtype,
        }
    }

    /// Returns the size in bytes.
    pub fn len(self) -> u64 {
        match self {
            Self::F32(values) => 4 * values.len() as u64,
            Self::Bytes(_, bytes) => bytes.len() as u64,
        }
    }

    /// Returns whether there are none.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Returns the bytes in pieces that are small enough to be copied one by one.
    pub(crate) fn pieces(self) -> Box<dyn Iterator<Item = Bytes> + Send + 'a> {
        const PIECE: usize = 8 << 20;
        match self {
            Self::F32(values) => Box::new(values.chunks(PIECE / 4).map(to_bytes)),
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

fn to_bytes(values: &[f32]) -> Bytes {
    let mut bytes = vec![0; 4 * values.len()];
    let (chunks, _) = bytes.as_chunks_mut::<4>();
    for (chunk, value) in chunks.iter_mut().zip(values) {
        *chunk = value.to_le_bytes();
    }
    bytes.into()
}

/// One entry of a header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct HeaderEntry {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// A tensor's place in its file, counted from the file's start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) range: Range<u64>,
}

/// Sorts tensors into the order of the file and returns its head and their places. Wide elements
/// come first, so that every tensor is aligned.
pub(crate) fn head(
    tensors: &mut [TensorSlice<'_>],
    metadata: &BTreeMap<String, String>,
) -> Result<(Bytes, Vec<Placed>), String> {
    tensors.sort_by(|a, b| {
        let width = |tensor: &TensorSlice<'_>| tensor.values.dtype().bytes();
        (width(b), &a.name).cmp(&(width(a), &b.name))
    });
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), serde_json::json!(metadata));
    }
    let mut end = 0;
    let mut placed = Vec::new();
    for tensor in &*tensors {
        let TensorSlice {
            name,
            shape,
            values,
        } = tensor;
        let dtype = values.dtype();
        if size(dtype, shape) != Some(values.len()) {
            return Err(format!(
                "tensor `{name}` has shape {shape:?} of {dtype:?} but {} bytes",
                values.len()
            ));
        }
        let start = end;
        end += values.len();
        let entry = HeaderEntry {
            dtype,
            shape: shape.clone(),
            data_offsets: (start, end),
        };
        if name == "__metadata__" || header.contains_key(name) {
            return Err(format!("tensor `{name}` is there twice"));
        }
        header.insert(name.clone(), serde_json::json!(entry));
        placed.push(Placed {
            dtype,
            shape: shape.clone(),
            range: start..end,
        });
    }
    let mut json = serde_json::Value::Object(header).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    let data = bytes.len() as u64;
    for place in &mut placed {
        place.range = place.range.start + data..place.range.end + data;
    }
    Ok((bytes.into(), placed))
}

/// Reads the head of a file and returns the tensors' places; every fault is an error.
pub(crate) fn parse(file: &[u8]) -> Result<BTreeMap<String, Placed>, String> {
    let (length, rest) = file
        .split_first_chunk::<8>()
        .ok_or("it is shorter than the length of its header")?;
    let length = u64::from_le_bytes(*length);
    if length > LONGEST_HEADER || length > rest.len() as u64 {
        return Err(format!("its header claims {length} bytes"));
    }
    let (json, data) = rest.split_at(length as usize);
    let header: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(json).map_err(|error| format!("its header is no JSON: {error}"))?;
    let mut placed = BTreeMap::new();
    for (name, value) in header {
        if name == "__metadata__" {
            continue;
        }
        let entry: HeaderEntry = serde_json::from_value(value)
            .map_err(|error| format!("its header's entry `{name}` is bad: {error}"))?;
        let (start, end) = entry.data_offsets;
        if start > end
            || end > data.len() as u64
            || size(entry.dtype, &entry.shape) != Some(end - start)
        {
            return Err(format!(
                "tensor `{name}` {:?} of {:?} does not fit bytes {start}..{end} of {}",
                entry.shape,
                entry.dtype,
                data.len()
            ));
        }
        let offset = 8 + length;
        let place = Placed {
            dtype: entry.dtype,
            shape: entry.shape,
            range: offset + start..offset + end,
        };
        placed.insert(name, place);
    }
    Ok(placed)
}

/// Returns the bytes of a tensor, unless they overflow.
pub(crate) fn size(dtype: Dtype, shape: &[usize]) -> Option<u64> {
    shape
        .iter()
        .try_fold(dtype.bytes(), |size, &dim| size.checked_mul(dim as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
        assert_eq!(ours["scalar"].shape, Vec::<usize>::new());
        let range = ours["flags"].range.clone();
        assert_eq!(bytes[range.start as usize..range.end as usize], [1, 2, 3]);
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

    proptest! {
        #[test]
        fn cut_files_are_refused(cut in 0_usize..200) {
            let bytes = example();
            let cut = cut.min(bytes.len() - 1);
            prop_assert!(parse(&bytes[..cut]).is_err());
        }

        #[test]
        fn changed_files_never_panic(at in 0_usize..200, to in any::<u8>()) {
            let mut bytes = example();
            let at = at % bytes.len();
            bytes[at] = to;
            if let Ok(placed) = parse(&bytes) {
                for place in placed.values() {
                    prop_assert!(place.range.end <= bytes.len() as u64);
                }
            }
        }

        #[test]
        fn forged_headers_never_panic(
            dims in proptest::collection::vec(any::<u64>(), 0..4),
            start in any::<u64>(),
            end in any::<u64>(),
        ) {
            let json = format!(
                r#"{{"x":{{"dtype":"F32","shape":{dims:?},"data_offsets":[{start},{end}]}}}}"#
            );
            let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
            bytes.extend(json.as_bytes());
            bytes.extend([0; 64]);
            if let Ok(placed) = parse(&bytes) {
                prop_assert!(placed["x"].range.end <= bytes.len() as u64);
            }
        }
    }
}

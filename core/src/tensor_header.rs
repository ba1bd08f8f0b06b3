//! The head of a safetensors file, for checkpoints and for weights that are exchanged: read with every
//! number checked, since it may be cut off or forged, and written so that any reader opens it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;

pub use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

/// The longest header that is read, as in other readers.
pub const LONGEST_HEADER: u64 = 100_000_000;
/// Bytes before the header: its length.
pub const PREFIX: u64 = 8;
/// Name of the header's entry that is no tensor.
pub const METADATA: &str = "__metadata__";

/// A tensor's type, shape and place, counted from the file's start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// Bytes.
    pub range: Range<u64>,
}

/// Returns the length of the header from the first bytes of a file of `size` bytes.
///
/// # Errors
/// When it cannot be that of a safetensors file.
pub fn length(first: &[u8], size: u64) -> Result<u64, String> {
    let (length, _) = first.split_first_chunk::<8>().ok_or_else(|| {
        format!("it has {size} bytes, less than the length of a safetensors header")
    })?;
    let length = u64::from_le_bytes(*length);
    if length > LONGEST_HEADER {
        return Err(format!(
            "its header claims {length} bytes, above the limit of {LONGEST_HEADER}: it is not a \
             safetensors file"
        ));
    }
    if length > size.saturating_sub(PREFIX) {
        return Err(format!(
            "its header claims {length} bytes, but the file has {size}: it is cut off"
        ));
    }
    Ok(length)
}

/// Reads the header's JSON; `size` is that of the whole file. Tensors must follow each other
/// without holes and overlaps and end with the file; they are returned in that order.
///
/// # Errors
/// What is wrong, with the tensor's name.
pub fn parse(json: &[u8], size: u64) -> Result<Vec<Entry>, String> {
    let Listed(mut listed) = serde_json::from_slice(json)
        .map_err(|error| format!("its header is no safetensors header: {error}"))?;
    listed.sort_by_key(|(_, info)| info.data_offsets);
    let data = PREFIX + json.len() as u64;
    let mut at = 0;
    let mut entries = Vec::with_capacity(listed.len());
    for (name, info) in listed {
        let (start, end) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
        let TensorInfo { dtype, shape, .. } = info;
        let fault = |what: String| Err(format!("tensor `{name}` {what}"));
        if start > end {
            return fault(format!("ends at byte {end}, before its start at {start}"));
        }
        if start < at {
            return fault(format!(
                "starts at byte {start}, inside the one before, which ends at {at}"
            ));
        }
        if start > at {
            return fault(format!(
                "starts at byte {start}, after a hole from {at} that belongs to none"
            ));
        }
        match size_of(dtype, &shape) {
            Some(bytes) if bytes == end - start => {}
            Some(bytes) => {
                return fault(format!(
                    "of shape {shape:?} and type {dtype} needs {bytes} bytes, but has {}",
                    end - start
                ));
            }
            None => {
                return fault(format!(
                    "of shape {shape:?} and type {dtype} has no size in whole bytes"
                ));
            }
        }
        if end > size.saturating_sub(data) {
            return fault(format!(
                "ends at byte {end} of the data, but the file has only {}: it is cut off",
                size.saturating_sub(data)
            ));
        }
        at = end;
        entries.push(Entry {
            name,
            dtype,
            shape,
            range: data + start..data + end,
        });
    }
    if data + at != size {
        return Err(format!(
            "its tensors end at byte {}, but the file has {size} bytes",
            data + at
        ));
    }
    Ok(entries)
}

/// Returns the head of a file and the length of the data behind it; the tensors follow each other
/// in the order given.
///
/// # Panics
/// When a tensor's size overflows or is no whole number of bytes: see [`size_of`].
pub fn head<'a>(
    tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize])>,
    metadata: &BTreeMap<String, String>,
) -> (Vec<u8>, u64) {
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert(METADATA.into(), serde_json::json!(metadata));
    }
    let mut end = 0;
    for (name, dtype, shape) in tensors {
        let start = end;
        end += size_of(dtype, shape).expect("the caller's tensors have a size") as usize;
        let info = TensorInfo {
            dtype,
            shape: shape.into(),
            data_offsets: (start, end),
        };
        header.insert(name.into(), serde_json::json!(info));
    }
    let mut json = serde_json::Value::Object(header).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    (bytes, end as u64)
}

/// Returns the bytes of a tensor, unless they overflow or are no whole number.
pub fn size_of(dtype: Dtype, shape: &[usize]) -> Option<u64> {
    let bits = shape
        .iter()
        .try_fold(dtype.bitsize() as u64, |size, &dim| {
            size.checked_mul(dim as u64)
        })?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// The entries of a header; a name that comes twice is an error, which a map would hide.
struct Listed(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Listed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ListedVisitor)
    }
}

struct ListedVisitor;

impl<'de> Visitor<'de> for ListedVisitor {
    type Value = Listed;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Listed, A::Error> {
        let mut names = BTreeSet::new();
        let mut listed = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                map.next_value::<Option<BTreeMap<String, String>>>()?;
            } else {
                let info = map.next_value::<TensorInfo>().map_err(|error| {
                    A::Error::custom(format!("entry of tensor `{name}` is bad: {error}"))
                })?;
                listed.push((name.clone(), info));
            }
            if !names.insert(name.clone()) {
                return Err(A::Error::custom(format!("tensor `{name}` is there twice")));
            }
        }
        Ok(Listed(listed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Reads a whole file as the ranged reader does.
    fn read(file: &[u8]) -> Result<Vec<Entry>, String> {
        let size = file.len() as u64;
        let length = length(file, size)?;
        parse(&file[8..8 + length as usize], size)
    }

    fn example() -> Vec<u8> {
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let tensors: [(&str, Dtype, &[usize]); 4] = [
            ("weight", Dtype::F32, &[2, 3]),
            ("scalar", Dtype::F32, &[]),
            ("half", Dtype::BF16, &[3]),
            ("empty", Dtype::U8, &[0, 7]),
        ];
        let (mut file, data) = head(tensors.into_iter(), &metadata);
        file.extend((0..data).map(|i| i as u8));
        file
    }

    fn forged(json: &str, data: usize) -> Vec<u8> {
        let mut file = (json.len() as u64).to_le_bytes().to_vec();
        file.extend(json.as_bytes());
        file.resize(file.len() + data, 0);
        file
    }

    #[test]
    fn the_public_reader_agrees() {
        let file = example();
        let theirs = safetensors::SafeTensors::deserialize(&file).expect("opens");
        let ours = read(&file).expect("opens");
        assert_eq!(ours.len(), 4);
        for entry in ours {
            let tensor = theirs.tensor(&entry.name).expect("there");
            assert_eq!(tensor.shape(), entry.shape);
            let range = entry.range.start as usize..entry.range.end as usize;
            assert_eq!(tensor.data(), &file[range], "{}", entry.name);
        }
    }

    #[test]
    fn hostile_headers_are_named() {
        let f32s = |name: &str, start: usize, end: usize, shape: &str| {
            format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}"#)
        };
        for (entries, data, part) in [
            (
                vec![f32s("a", 0, 8, "[2]"), f32s("b", 4, 12, "[2]")],
                12,
                "`b` starts at byte 4, inside",
            ),
            (
                vec![f32s("a", 0, 8, "[2]"), f32s("b", 12, 16, "[1]")],
                16,
                "`b` starts at byte 12, after a hole",
            ),
            (
                vec![f32s("a", 0, 8, "[2]")],
                4,
                "`a` ends at byte 8 of the data, but the file has only 4",
            ),
            (vec![f32s("a", 0, 8, "[2]")], 9, "but the file has"),
            (
                vec![f32s("a", 8, 0, "[2]")],
                8,
                "`a` ends at byte 0, before",
            ),
            (
                vec![f32s("a", 0, 8, "[3]")],
                8,
                "`a` of shape [3] and type F32 needs 12 bytes, but has 8",
            ),
            (
                vec![f32s("a", 0, 8, "[4294967296, 4294967296, 4]")],
                8,
                "`a` of shape",
            ),
            (vec![f32s("a", 0, 8, "[-2]")], 8, "tensor `a` is bad"),
            (
                vec![f32s("a", 0, 4, "[1]"), f32s("a", 4, 8, "[1]")],
                8,
                "`a` is there twice",
            ),
            (
                vec![r#""a":{"dtype":"F99","shape":[],"data_offsets":[0,0]}"#.into()],
                0,
                "tensor `a` is bad",
            ),
            (vec![r#""a":3"#.into()], 0, "tensor `a` is bad"),
        ] {
            let file = forged(&format!("{{{}}}", entries.join(",")), data);
            let error = read(&file).expect_err(part);
            assert!(error.contains(part), "{error}");
        }
        let mut endless = u64::MAX.to_le_bytes().to_vec();
        endless.extend([0; 32]);
        assert!(read(&endless).expect_err("endless").contains("claims"));
        let deep = "[".repeat(100_000);
        assert!(read(&forged(&deep, 0)).is_err());
        let deep = format!(r#"{{"a":{}"#, "[".repeat(100_000));
        assert!(read(&forged(&deep, 0)).is_err());
    }

    /// What is accepted has its tensors inside the file, one after the other.
    fn check(file: &[u8]) -> Result<(), TestCaseError> {
        let ours = read(file);
        let theirs = safetensors::SafeTensors::deserialize(file);
        if let Ok(entries) = &ours {
            prop_assert!(theirs.is_ok(), "accepted, but {:?}", theirs.err());
            for entry in entries {
                prop_assert!(entry.range.end <= file.len() as u64);
                prop_assert_eq!(
                    size_of(entry.dtype, &entry.shape),
                    Some(entry.range.end - entry.range.start)
                );
            }
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn mutated_files_never_panic(
            changes in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..6),
            cut in proptest::option::of(any::<usize>()),
        ) {
            let mut file = example();
            for (at, to) in changes {
                let at = at % file.len();
                file[at] = to;
            }
            if let Some(cut) = cut {
                let keep = cut % (file.len() + 1);
                file.truncate(keep);
            }
            check(&file)?;
        }

        #[test]
        fn cut_files_are_refused(cut in any::<usize>()) {
            let file = example();
            let keep = cut % file.len();
            prop_assert!(read(&file[..keep]).is_err());
        }

        #[test]
        fn forged_entries_never_panic(
            dims in proptest::collection::vec(any::<u64>(), 0..4),
            start in any::<u64>(),
            end in any::<u64>(),
            data in 0_usize..64,
        ) {
            let json = format!(
                r#"{{"x":{{"dtype":"F32","shape":{dims:?},"data_offsets":[{start},{end}]}}}}"#
            );
            check(&forged(&json, data))?;
        }

        #[test]
        fn small_forged_files_are_read_like_the_public_reader_does(
            sizes in proptest::collection::vec((0_usize..5, 0_usize..3), 1..4),
            shift in 0_usize..3,
        ) {
            let mut at = 0;
            let entries: Vec<String> = sizes
                .iter()
                .enumerate()
                .map(|(i, &(n, gap))| {
                    let start = at + if gap == 2 { shift } else { 0 };
                    at = start + 4 * n;
                    format!(r#""t{i}":{{"dtype":"F32","shape":[{n}],"data_offsets":[{start},{at}]}}"#)
                })
                .collect();
            let file = forged(&format!("{{{}}}", entries.join(",")), at);
            check(&file)?;
            let theirs = safetensors::SafeTensors::deserialize(&file).is_ok();
            prop_assert_eq!(read(&file).is_ok(), theirs);
        }
    }
}

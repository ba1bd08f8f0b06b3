//! NumPy's `.npy` arrays and `.npz` archives, as far as CALVIN uses them: numbers, C order.

use std::io::Read;

use flate2::read::DeflateDecoder;

use crate::rlds::number;

/// Bytes that one array may take; a broken header can announce any number.
const MAX_BYTES: u64 = 1 << 30;

/// What is wrong with a file, and where in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Malformed {
    pub(crate) offset: u64,
    pub(crate) reason: String,
}

type Result<T> = std::result::Result<T, Malformed>;

fn malformed(offset: usize, reason: impl Into<String>) -> Malformed {
    Malformed {
        offset: offset as u64,
        reason: reason.into(),
    }
}

/// An array.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Array {
    pub(crate) shape: Vec<usize>,
    /// NumPy's name of the element type, `float32`.
    pub(crate) dtype: &'static str,
    /// Elements, little-endian, in C order.
    pub(crate) bytes: Vec<u8>,
}

impl Array {
    /// Reads a `.npy` file.
    pub(crate) fn parse(file: &[u8]) -> Result<Self> {
        let Some([0x93, b'N', b'U', b'M', b'P', b'Y', major, _]) = file.first_chunk::<8>() else {
            return Err(malformed(0, "it is no .npy file"));
        };
        let short = || malformed(8, "its header ends early");
        let (length, start) = if *major == 1 {
            let length = file[8..].first_chunk::<2>().ok_or_else(short)?;
            (usize::from(u16::from_le_bytes(*length)), 10)
        } else {
            let length = file[8..].first_chunk::<4>().ok_or_else(short)?;
            (u32::from_le_bytes(*length) as usize, 12)
        };
        let header = file.get(start..start + length).ok_or_else(short)?;
        let header =
            std::str::from_utf8(header).map_err(|_| malformed(start, "its header is no text"))?;
        let value = |key: &str| {
            let rest = header.split_once(&format!("'{key}'")).map(|(_, rest)| rest);
            let rest = rest.and_then(|rest| rest.trim_start().strip_prefix(':'));
            rest.map(str::trim_start)
                .ok_or_else(|| malformed(start, format!("its header has no {key}")))
        };
        let descr = value("descr")?;
        let descr = descr.trim_start_matches(['\'', '"']);
        let descr = descr.split(['\'', '"']).next().unwrap_or_default();
        let (dtype, size) = match descr {
            "|u1" => ("uint8", 1),
            "|i1" => ("int8", 1),
            "|b1" => ("bool", 1),
            "<i2" => ("int16", 2),
            "<i4" => ("int32", 4),
            "<i8" => ("int64", 8),
            "<f4" => ("float32", 4),
            "<f8" => ("float64", 8),
            other => {
                return Err(malformed(
                    start,
                    format!("arrays of type {other} are not read"),
                ));
            }
        };
        if value("fortran_order")?.starts_with("True") {
            return Err(malformed(
                start,
                "it is in Fortran order; save it in C order",
            ));
        }
        let shape = value("shape")?
            .trim_start_matches('(')
            .split(')')
            .next()
            .unwrap_or_default();
        let shape = shape.split(',').map(str::trim).filter(|n| !n.is_empty());
        let shape: Option<Vec<usize>> = shape.map(|n| n.parse().ok()).collect();
        let shape = shape.ok_or_else(|| malformed(start, "its shape is not made of numbers"))?;
        let bytes = shape
            .iter()
            .try_fold(size, |bytes: usize, n| bytes.checked_mul(*n));
        let data = &file[start + length..];
        match bytes {
            Some(bytes) if bytes == data.len() => Ok(Self {
                shape,
                dtype,
                bytes: data.to_vec(),
            }),
            _ => Err(malformed(
                start + length,
                format!("{} bytes are not an array {shape:?} of {dtype}", data.len()),
            )),
        }
    }

    /// Returns all elements.
    pub(crate) fn numbers(&self) -> Vec<f32> {
        let size = self.element_bytes();
        self.bytes
            .chunks_exact(size)
            .map(|bytes| number(self.dtype, bytes))
            .collect()
    }

    /// Returns all elements of an array of whole numbers.
    pub(crate) fn integers(&self) -> Option<Vec<i64>> {
        let size = self.element_bytes();
        let signed = |bytes: &[u8]| {
            let mut buffer = [if bytes.last()? & 0x80 == 0 { 0 } else { 0xff }; 8];
            buffer[..size].copy_from_slice(bytes);
            Some(i64::from_le_bytes(buffer))
        };
        match self.dtype {
            "int8" | "int16" | "int32" | "int64" => {
                self.bytes.chunks_exact(size).map(signed).collect()
            }
            _ => None,
        }
    }

    fn element_bytes(&self) -> usize {
        match self.dtype {
            "int16" => 2,
            "int32" | "float32" => 4,
            "int64" | "float64" => 8,
            _ => 1,
        }
    }
}

/// The members of a `.npz` file.
#[derive(Debug)]
pub(crate) struct Archive<'a> {
    file: &'a [u8],
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    name: String,
    deflated: bool,
    crc32: u32,
    compressed: usize,
    size: u64,
    /// Where its local header is.
    offset: usize,
}

impl<'a> Archive<'a> {
    /// Reads the directory at the end of the file.
    pub(crate) fn parse(file: &'a [u8]) -> Result<Self> {
        const END: [u8; 4] = [b'P', b'K', 5, 6];
        let cut = || malformed(file.len(), "it is no .npz file or it was cut off");
        let from = file.len().saturating_sub(65_557);
        let end = file[from..].windows(4).rposition(|bytes| bytes == END);
        let end = from + end.ok_or_else(cut)?;
        let comment = u16_at(file, end + 20).ok_or_else(cut)?;
        if end + 22 + usize::from(comment) > file.len() {
            return Err(cut());
        }
        let count = u16_at(file, end + 10).ok_or_else(cut)?;
        let mut at = u32_at(file, end + 16).ok_or_else(cut)? as usize;
        let mut members = Vec::new();
        for _ in 0..count {
            let broken = || malformed(at, "its directory is broken");
            if file.get(at..at + 4) != Some(b"PK\x01\x02") {
                return Err(broken());
            }
            let field = |offset| {
                u16_at(file, at + offset)
                    .map(usize::from)
                    .ok_or_else(broken)
            };
            let long = |offset| u32_at(file, at + offset).ok_or_else(broken);
            let (name, extra, comment) = (field(28)?, field(30)?, field(32)?);
            let method = field(10)?;
            if !matches!(method, 0 | 8) {
                return Err(malformed(
                    at,
                    format!("it uses the compression method {method}"),
                ));
            }
            let text = file.get(at + 46..at + 46 + name).ok_or_else(broken)?;
            members.push(Member {
                name: String::from_utf8_lossy(text)
                    .trim_end_matches(".npy")
                    .into(),
                deflated: method == 8,
                crc32: long(16)?,
                compressed: long(20)? as usize,
                size: u64::from(long(24)?),
                offset: long(42)? as usize,
            });
            at += 46 + name + extra + comment;
        }
        Ok(Self { file, members })
    }

    /// Returns the names of the arrays.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.members.iter().map(|member| member.name.as_str())
    }

    /// Reads an array; none when there is none of that name.
    pub(crate) fn array(&self, name: &str) -> Result<Option<Array>> {
        let Some(member) = self.members.iter().find(|member| member.name == name) else {
            return Ok(None);
        };
        let broken = |reason: &str| malformed(member.offset, format!("{name}: {reason}"));
        let lengths = u16_at(self.file, member.offset.saturating_add(26))
            .zip(u16_at(self.file, member.offset.saturating_add(28)));
        let (text, extra) = lengths.ok_or_else(|| broken("its header lies outside the file"))?;
        let start = member.offset + 30 + usize::from(text) + usize::from(extra);
        let stored = self
            .file
            .get(start..start.saturating_add(member.compressed));
        let stored = stored.ok_or_else(|| broken("its data lies outside the file"))?;
        if member.size > MAX_BYTES {
            return Err(broken("it is too large to be right"));
        }
        let mut bytes = Vec::new();
        if member.deflated {
            let mut decoder = DeflateDecoder::new(stored).take(member.size + 1);
            decoder
                .read_to_end(&mut bytes)
                .map_err(|e| broken(&e.to_string()))?;
        } else {
            bytes.extend_from_slice(stored);
        }
        let mut crc = flate2::Crc::new();
        crc.update(&bytes);
        if bytes.len() as u64 != member.size || crc.sum() != member.crc32 {
            return Err(broken("its checksum does not match"));
        }
        let array = Array::parse(&bytes);
        array.map(Some).map_err(|e| broken(&e.reason))
    }
}

fn u16_at(file: &[u8], at: usize) -> Option<u16> {
    file.get(at..)?
        .first_chunk()
        .map(|bytes| u16::from_le_bytes(*bytes))
}

fn u32_at(file: &[u8], at: usize) -> Option<u32> {
    file.get(at..)?
        .first_chunk()
        .map(|bytes| u32::from_le_bytes(*bytes))
}

/// Writes files for tests.
#[cfg(test)]
pub(crate) mod writing {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::DeflateEncoder;

    pub(crate) fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let header =
            format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
        let mut file = b"\x93NUMPY\x01\x00".to_vec();
        file.extend((header.len() as u16).to_le_bytes());
        file.extend(header.as_bytes());
        file.extend(data);
        file
    }

    pub(crate) fn npz(arrays: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let (mut file, mut directory) = (Vec::new(), Vec::new());
        for (name, array) in arrays {
            let name = format!("{name}.npy");
            let mut encoder = DeflateEncoder::new(Vec::new(), Compression::fast());
            encoder.write_all(array).expect("memory");
            let packed = encoder.finish().expect("memory");
            let mut crc = flate2::Crc::new();
            crc.update(array);
            let offset = file.len() as u32;
            let mut common = vec![20, 0, 0, 0, 8, 0, 0, 0, 0, 0];
            common.extend(crc.sum().to_le_bytes());
            common.extend((packed.len() as u32).to_le_bytes());
            common.extend((array.len() as u32).to_le_bytes());
            common.extend((name.len() as u16).to_le_bytes());
            common.extend([0, 0]);
            file.extend(b"PK\x03\x04");
            file.extend(&common);
            file.extend(name.as_bytes());
            file.extend(&packed);
            directory.extend(b"PK\x01\x02\x14\x00");
            directory.extend(&common);
            directory.extend([0; 10]);
            directory.extend(offset.to_le_bytes());
            directory.extend(name.as_bytes());
        }
        let start = file.len() as u32;
        let count = (arrays.len() as u16).to_le_bytes();
        file.extend(&directory);
        file.extend(b"PK\x05\x06\x00\x00\x00\x00");
        file.extend(count);
        file.extend(count);
        file.extend((directory.len() as u32).to_le_bytes());
        file.extend(start.to_le_bytes());
        file.extend([0, 0]);
        file
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::damage::{damage, damaged};
    use proptest::prelude::*;

    #[test]
    fn arrays_and_archives() {
        let data: Vec<u8> = [1.5_f64, -2.0]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        let floats = writing::npy("<f8", "(2,)", &data);
        let array = Array::parse(&floats).unwrap();
        assert_eq!(
            (array.shape.clone(), array.numbers()),
            (vec![2], vec![1.5, -2.0])
        );
        let pixels = writing::npy("|u1", "(1, 2, 3)", &[1, 2, 3, 4, 5, 6]);
        let npz = writing::npz(&[("a", floats), ("rgb", pixels)]);
        let archive = Archive::parse(&npz).unwrap();
        assert_eq!(archive.names().collect::<Vec<_>>(), ["a", "rgb"]);
        assert_eq!(archive.array("rgb").unwrap().unwrap().shape, [1, 2, 3]);
        assert_eq!(archive.array("a").unwrap().unwrap(), array);
        assert_eq!(archive.array("b").unwrap(), None);
        let ids: Vec<u8> = [3_i64, -1].iter().flat_map(|v| v.to_le_bytes()).collect();
        let ids = Array::parse(&writing::npy("<i8", "(1, 2)", &ids)).unwrap();
        assert_eq!(ids.integers().unwrap(), [3, -1]);
    }

    #[test]
    fn objects_and_foreign_orders_are_refused() {
        let error = Array::parse(&writing::npy("|O", "()", &[])).unwrap_err();
        assert!(error.reason.contains("|O"), "{}", error.reason);
        let mut file = writing::npy("|u1", "(2, 2)", &[1, 2, 3, 4]);
        file.truncate(file.len() - 1);
        assert!(Array::parse(&file).unwrap_err().reason.contains("3 bytes"));
    }

    #[test]
    fn every_cut_and_flip_of_an_archive_is_noticed_or_harmless() {
        let npz = writing::npz(&[("a", writing::npy("|u1", "(64,)", &[9; 64]))]);
        let read = |file: &[u8]| Archive::parse(file).and_then(|archive| archive.array("a"));
        let whole = read(&npz).unwrap();
        for end in 0..npz.len() {
            assert!(read(&npz[..end]).is_err(), "{end}");
        }
        for at in 0..npz.len() {
            let mut bad = npz.clone();
            bad[at] ^= 0x41;
            if let Ok(Some(array)) = read(&bad) {
                assert_eq!(Some(array), whole, "byte {at}");
            }
        }
    }

    /// Reads every array; none is larger than what is left of the archive can hold.
    fn read_all(file: &[u8]) {
        let Ok(archive) = Archive::parse(file) else {
            return;
        };
        let names: Vec<String> = archive.names().map(String::from).collect();
        for name in names {
            if let Ok(Some(array)) = archive.array(&name) {
                // Deflate makes at most 1,032 bytes of one.
                assert!(array.bytes.len() <= 1032 * file.len());
                assert_eq!(
                    array.numbers().len() * array.element_bytes(),
                    array.bytes.len()
                );
                let _ = array.integers();
            }
        }
    }

    proptest! {
        #[test]
        fn damaged_arrays(damage in damage()) {
            let file = writing::npy("<i4", "(2, 3)", &[7; 24]);
            if let Ok(array) = Array::parse(&damaged(&file, &damage)) {
                let _ = (array.numbers(), array.integers());
            }
        }

        /// Damage below the archive's checksums: the archive itself is whole.
        #[test]
        fn archives_of_damaged_arrays(damage in damage()) {
            let file = damaged(&writing::npy("<f8", "(4,)", &[3; 32]), &damage);
            read_all(&writing::npz(&[("a", file)]));
        }

        #[test]
        fn damaged_archives(damage in damage()) {
            let arrays = [
                ("a", writing::npy("|u1", "(2, 2)", &[1; 4])),
                ("b", writing::npy("<i8", "(1,)", &[2; 8])),
            ];
            read_all(&damaged(&writing::npz(&arrays), &damage));
        }

        #[test]
        fn any_bytes(bytes: Vec<u8>) {
            let _ = Array::parse(&bytes);
            let _ = Archive::parse(&bytes);
            let mut file = b"\x93NUMPY\x01\x00".to_vec();
            file.extend(bytes);
            let _ = Array::parse(&file);
        }
    }
}

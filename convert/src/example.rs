//! `tf.train.Example`, a protobuf message, read in place.
//!
//! ```text
//! Example { 1: Features { 1: repeated entry { 1: key, 2: Feature } } }
//! Feature { 1: BytesList | 2: FloatList | 3: Int64List }, each { 1: repeated value }
//! ```
//! Only the keys are looked at when a message is opened; lists are parsed when they are asked for,
//! and byte strings are slices of the message.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;

/// What is wrong with a message, and where in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Malformed {
    pub(crate) offset: usize,
    pub(crate) reason: String,
}

type Result<T> = std::result::Result<T, Malformed>;

/// A message whose keys are known.
#[derive(Clone, Debug)]
pub(crate) struct Example {
    message: Bytes,
    /// By key: where its `Feature` lies.
    features: BTreeMap<String, Range<usize>>,
}

/// The values of a key.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Values {
    /// The key is absent or its list is.
    None,
    Bytes(Vec<Bytes>),
    Floats(Vec<f32>),
    Integers(Vec<i64>),
}

impl Values {
    /// Returns the number of values.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Bytes(values) => values.len(),
            Self::Floats(values) => values.len(),
            Self::Integers(values) => values.len(),
        }
    }
}

const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const LENGTH: u64 = 2;
const FIXED32: u64 = 5;

impl Example {
    pub(crate) fn parse(message: Bytes) -> Result<Self> {
        let mut features = BTreeMap::new();
        let mut example = Fields::new(&message, 0..message.len());
        while let Some((number, body)) = example.next_message()? {
            if number != 1 {
                continue;
            }
            let mut entries = Fields::new(&message, body);
            while let Some((number, entry)) = entries.next_message()? {
                if number != 1 {
                    continue;
                }
                let (mut key, mut value) = (0..0, entry.start..entry.start);
                let mut parts = Fields::new(&message, entry);
                while let Some((number, part)) = parts.next_message()? {
                    match number {
                        1 => key = part,
                        2 => value = part,
                        _ => {}
                    }
                }
                let text = std::str::from_utf8(&message[key.clone()]).map_err(|_| Malformed {
                    offset: key.start,
                    reason: "a feature's name is not UTF-8".into(),
                })?;
                features.insert(text.to_string(), value);
            }
        }
        Ok(Self { message, features })
    }

    /// Returns the keys in order.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        self.features.keys().map(String::as_str)
    }

    /// Returns where a key's values start in the message.
    pub(crate) fn offset(&self, key: &str) -> usize {
        self.features.get(key).map_or(0, |range| range.start)
    }

    pub(crate) fn values(&self, key: &str) -> Result<Values> {
        let Some(range) = self.features.get(key) else {
            return Ok(Values::None);
        };
        let mut values = Values::None;
        let mut feature = Fields::new(&self.message, range.clone());
        while let Some((number, list)) = feature.next_message()? {
            let list = Fields::new(&self.message, list);
            // Of a oneof, the last one counts.
            values = match number {
                1 => Values::Bytes(self.byte_strings(list)?),
                2 => Values::Floats(floats(list)?),
                3 => Values::Integers(integers(list)?),
                _ => values,
            };
        }
        Ok(values)
    }

    fn byte_strings(&self, mut list: Fields) -> Result<Vec<Bytes>> {
        let mut values = Vec::new();
        while let Some((number, value)) = list.next_message()? {
            if number == 1 {
                values.push(self.message.slice(value));
            }
        }
        Ok(values)
    }
}

fn floats(mut list: Fields) -> Result<Vec<f32>> {
    let mut values = Vec::new();
    while let Some(field) = list.next()? {
        match (field.number, field.value) {
            (1, Value::Fixed32(bits)) => values.push(f32::from_bits(bits)),
            (1, Value::Message(packed)) => {
                let (numbers, rest) = list.bytes[packed.clone()].as_chunks::<4>();
                if !rest.is_empty() {
                    return Err(Malformed {
                        offset: packed.start,
                        reason: format!("{} bytes are not a list of floats", packed.len()),
                    });
                }
                values.extend(numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)));
            }
            _ => {}
        }
    }
    Ok(values)
}

fn integers(mut list: Fields) -> Result<Vec<i64>> {
    let mut values = Vec::new();
    while let Some(field) = list.next()? {
        match (field.number, field.value) {
            (1, Value::Varint(value)) => values.push(value.cast_signed()),
            (1, Value::Message(packed)) => {
                let mut packed = Fields::new(list.bytes, packed);
                while packed.at < packed.end {
                    values.push(packed.varint()?.cast_signed());
                }
            }
            _ => {}
        }
    }
    Ok(values)
}

enum Value {
    Varint(u64),
    Fixed32(u32),
    Fixed64,
    Message(Range<usize>),
}

struct Field {
    number: u64,
    value: Value,
}

/// The fields of a part of a message.
struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
    end: usize,
}

impl<'a> Fields<'a> {
    /// `range` lies inside `bytes`.
    fn new(bytes: &'a [u8], range: Range<usize>) -> Self {
        Self {
            bytes,
            at: range.start,
            end: range.end,
        }
    }

    /// Returns the next field that has a length, and steps over others.
    fn next_message(&mut self) -> Result<Option<(u64, Range<usize>)>> {
        while let Some(field) = self.next()? {
            if let Value::Message(range) = field.value {
                return Ok(Some((field.number, range)));
            }
        }
        Ok(None)
    }

    fn next(&mut self) -> Result<Option<Field>> {
        if self.at >= self.end {
            return Ok(None);
        }
        let start = self.at;
        let tag = self.varint()?;
        let value = match tag & 7 {
            VARINT => Value::Varint(self.varint()?),
            FIXED32 => {
                let bytes = self.take(4)?;
                let bytes = self.bytes[bytes].first_chunk();
                Value::Fixed32(u32::from_le_bytes(*bytes.expect("four were taken")))
            }
            FIXED64 => {
                self.take(8)?;
                Value::Fixed64
            }
            LENGTH => {
                let length = self.varint()?;
                Value::Message(self.take(length)?)
            }
            kind => return Err(malformed(start, format!("no field has the type {kind}"))),
        };
        let number = tag >> 3;
        Ok(Some(Field { number, value }))
    }

    fn varint(&mut self) -> Result<u64> {
        let start = self.at;
        let mut value = 0;
        for shift in (0..70).step_by(7) {
            let Some(byte) = self.bytes[..self.end].get(self.at) else {
                return Err(malformed(start, "a number ends early"));
            };
            self.at += 1;
            if shift < 64 {
                value |= u64::from(byte & 0x7f) << shift;
            }
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(malformed(start, "a number is longer than ten bytes"))
    }

    fn take(&mut self, length: u64) -> Result<Range<usize>> {
        let left = (self.end - self.at) as u64;
        if length > left {
            let reason = format!("{length} bytes are announced and {left} are left");
            return Err(malformed(self.at, reason));
        }
        let start = self.at;
        self.at += length as usize;
        Ok(start..self.at)
    }
}

fn malformed(offset: usize, reason: impl Into<String>) -> Malformed {
    Malformed {
        offset,
        reason: reason.into(),
    }
}

/// Writes messages for tests.
#[cfg(test)]
pub(crate) mod writing {
    fn varint(mut value: u64, out: &mut Vec<u8>) {
        while value >= 0x80 {
            out.push(value as u8 | 0x80);
            value >>= 7;
        }
        out.push(value as u8);
    }

    pub(crate) fn message(number: u64, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        varint(number << 3 | 2, &mut out);
        varint(body.len() as u64, &mut out);
        out.extend(body);
        out
    }

    pub(crate) fn byte_strings(values: &[&[u8]]) -> Vec<u8> {
        message(
            1,
            &values
                .iter()
                .flat_map(|value| message(1, value))
                .collect::<Vec<_>>(),
        )
    }

    pub(crate) fn floats(values: &[f32], packed: bool) -> Vec<u8> {
        let list = if packed {
            message(
                1,
                &values
                    .iter()
                    .flat_map(|v| v.to_le_bytes())
                    .collect::<Vec<_>>(),
            )
        } else {
            let one = |v: &f32| [vec![1 << 3 | 5], v.to_le_bytes().to_vec()].concat();
            values.iter().flat_map(one).collect()
        };
        message(2, &list)
    }

    pub(crate) fn integers(values: &[i64], packed: bool) -> Vec<u8> {
        let mut list = Vec::new();
        for value in values {
            if !packed {
                list.push(1 << 3);
            }
            varint(value.cast_unsigned(), &mut list);
        }
        message(3, &if packed { message(1, &list) } else { list })
    }

    pub(crate) fn example(features: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let entries = features.iter().flat_map(|(key, feature)| {
            message(
                1,
                &[message(1, key.as_bytes()), message(2, feature)].concat(),
            )
        });
        message(1, &entries.collect::<Vec<_>>())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::damage::{damage, damaged};

    #[test]
    fn a_message_written_by_hand() {
        // {"a": int64_list [-1]}: ten bytes of varint.
        let message = [
            0x0a, 0x16, 0x0a, 0x14, 0x0a, 1, b'a', 0x12, 0x0f, 0x1a, 0x0d, 0x0a, 0x0b, 0xff, 0xff,
            0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01, 0x05,
        ];
        let example = Example::parse(message.to_vec().into()).unwrap();
        assert_eq!(example.values("a").unwrap(), Values::Integers(vec![-1, 5]));
        assert_eq!(example.values("b").unwrap(), Values::None);
    }

    #[test]
    fn faults_name_their_place() {
        let error = Example::parse(vec![0x0a, 0x05, 0x0a].into()).unwrap_err();
        assert_eq!(error.offset, 2);
        assert!(
            error.reason.contains("5 bytes are announced and 1"),
            "{}",
            error.reason
        );
        let error = Example::parse(vec![0x0f].into()).unwrap_err();
        assert!(error.reason.contains("type 7"), "{}", error.reason);
    }

    proptest! {
        #[test]
        fn values_round_trip(
            packed: bool,
            floats: Vec<f32>,
            integers: Vec<i64>,
            strings: Vec<Vec<u8>>,
        ) {
            let slices: Vec<&[u8]> = strings.iter().map(Vec::as_slice).collect();
            let message = writing::example(&[
                ("f", writing::floats(&floats, packed)),
                ("i/nested", writing::integers(&integers, packed)),
                ("s", writing::byte_strings(&slices)),
                ("none", vec![]),
            ]);
            let example = Example::parse(message.into()).unwrap();
            let Values::Floats(found) = example.values("f").unwrap() else { panic!() };
            let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&found), bits(&floats));
            prop_assert_eq!(example.values("i/nested").unwrap(), Values::Integers(integers));
            let strings = strings.into_iter().map(Bytes::from).collect();
            prop_assert_eq!(example.values("s").unwrap(), Values::Bytes(strings));
            prop_assert_eq!(example.values("none").unwrap(), Values::None);
        }

        #[test]
        fn any_bytes_are_an_error_or_a_message(bytes: Vec<u8>) {
            if let Ok(example) = Example::parse(bytes.into()) {
                let keys: Vec<String> = example.keys().map(String::from).collect();
                for key in keys {
                    let _ = example.values(&key);
                }
            }
        }

        #[test]
        fn damaged_messages_give_no_more_than_they_hold(damage in damage()) {
            let message = damaged(&writing::example(&[
                ("f", writing::floats(&[1.0, 2.0], true)),
                ("i", writing::integers(&[-4, 1 << 40], false)),
                ("p", writing::integers(&[7, -1, 300], true)),
                ("s", writing::byte_strings(&[b"abc", b""])),
            ]), &damage);
            let bytes = message.len();
            if let Ok(example) = Example::parse(message.into()) {
                let keys: Vec<String> = example.keys().map(String::from).collect();
                for key in keys {
                    if let Ok(values) = example.values(&key) {
                        prop_assert!(values.len() <= bytes, "{} values of {bytes}", values.len());
                    }
                }
            }
        }
    }
}

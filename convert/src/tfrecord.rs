//! TFRecord files: records back to back, each with its length and two masked CRC-32C checksums.
//!
//! ```text
//! u64 length | u32 masked crc of the length | payload | u32 masked crc of the payload
//! ```

use bytes::Bytes;
use pollen_storage::Storage;

use crate::error::{Error, Result};

/// Bytes fetched at once; records inside are slices of them.
const WINDOW: u64 = 8 << 20;
const HEADER: u64 = 12;
const FOOTER: u64 = 4;

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// Where its payload starts in the file.
    pub(crate) offset: u64,
    pub(crate) payload: Bytes,
}

/// Reads a file record by record.
#[derive(Debug)]
pub(crate) struct RecordFile {
    storage: Storage,
    path: String,
    size: u64,
    /// Start of the next record.
    next: u64,
    window_start: u64,
    window: Bytes,
}

impl RecordFile {
    pub(crate) async fn open(storage: &Storage, path: &str) -> Result<Self> {
        Ok(Self {
            storage: storage.clone(),
            path: path.into(),
            size: storage.head(path).await?,
            next: 0,
            window_start: 0,
            window: Bytes::new(),
        })
    }

    /// Returns the name for messages.
    pub(crate) fn name(&self) -> String {
        format!("{}/{}", self.storage.url().trim_end_matches('/'), self.path)
    }

    /// Returns the next record, or nothing at the end of the file.
    pub(crate) async fn read(&mut self) -> Result<Option<Record>> {
        let Some(length) = self.length().await? else {
            return Ok(None);
        };
        let offset = self.next + HEADER;
        let bytes = self.take(offset, length + FOOTER).await?;
        let (payload, footer) = bytes.split_at(length as usize);
        if masked(crc32c::crc32c(payload)).to_le_bytes() != *footer {
            return Err(self.broken(offset, "the checksum of the record does not match"));
        }
        self.next = offset + length + FOOTER;
        Ok(Some(Record {
            offset,
            payload: bytes.slice(..length as usize),
        }))
    }

    /// Steps over a record; returns whether there was one.
    pub(crate) async fn skip(&mut self) -> Result<bool> {
        match self.length().await? {
            None => Ok(false),
            Some(length) => {
                self.next += HEADER + length + FOOTER;
                Ok(true)
            }
        }
    }

    async fn length(&mut self) -> Result<Option<u64>> {
        let left = self.size - self.next;
        if left == 0 {
            return Ok(None);
        }
        let truncated = |record: u64| {
            format!("the last record needs {record} bytes and the file has {left}; it was cut off")
        };
        if left < HEADER + FOOTER {
            return Err(self.broken(self.next, truncated(HEADER + FOOTER)));
        }
        let header = self.take(self.next, HEADER).await?;
        let (length, crc) = header.split_at(8);
        if masked(crc32c::crc32c(length)).to_le_bytes() != *crc {
            let hint = if header.starts_with(&[0x1f, 0x8b]) {
                "the file is compressed; decompress it with gzip"
            } else {
                "the checksum of the record's length does not match"
            };
            return Err(self.broken(self.next, hint));
        }
        let length = u64::from_le_bytes(*length.first_chunk().expect("it has 8 bytes"));
        if length > left - HEADER - FOOTER {
            let record = length.saturating_add(HEADER + FOOTER);
            return Err(self.broken(self.next, truncated(record)));
        }
        Ok(Some(length))
    }

    /// Returns bytes of the file, which has them.
    async fn take(&mut self, start: u64, length: u64) -> Result<Bytes> {
        let inside = start.checked_sub(self.window_start);
        let inside = inside.filter(|at| at + length <= self.window.len() as u64);
        let at = if let Some(at) = inside {
            at as usize
        } else {
            let end = self.size.min(start + length.max(WINDOW));
            self.window = self.storage.get_range(&self.path, start..end).await?;
            self.window_start = start;
            0
        };
        Ok(self.window.slice(at..at + length as usize))
    }

    fn broken(&self, offset: u64, reason: impl std::fmt::Display) -> Error {
        Error::corrupt(self.name(), offset, reason)
    }
}

/// Returns TensorFlow's masked form of a checksum.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Returns a record as a file holds it.
#[cfg(test)]
pub(crate) fn frame(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut file = length.to_vec();
    file.extend(masked(crc32c::crc32c(&length)).to_le_bytes());
    file.extend(payload);
    file.extend(masked(crc32c::crc32c(payload)).to_le_bytes());
    file
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::sync::Arc;

    use pollen_storage::{Silent, StorageConfig};
    use proptest::prelude::*;

    use super::*;
    use crate::damage::{damage, damaged};

    fn read_all(name: &str, file: &[u8]) -> (Vec<Record>, Option<Error>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let url = format!("memory:///tfrecord-{name}");
            let storage = Storage::open(&url, &StorageConfig::default(), Arc::new(Silent)).unwrap();
            storage
                .put("a.tfrecord", file.to_vec().into())
                .await
                .unwrap();
            let mut records = RecordFile::open(&storage, "a.tfrecord").await.unwrap();
            let mut found = Vec::new();
            loop {
                match records.read().await {
                    Ok(Some(record)) => found.push(record),
                    Ok(None) => return (found, None),
                    Err(error) => return (found, Some(error)),
                }
            }
        })
    }

    #[test]
    fn known_record() {
        // Checksums computed bit by bit from the polynomial, by another program.
        let file = [
            3, 0, 0, 0, 0, 0, 0, 0, 0xb0, 0x99, 0x49, 0x0e, b'a', b'b', b'c', 0x6e, 0x57, 0xf1,
            0x21,
        ];
        assert_eq!(frame(b"abc"), file);
        let (records, error) = read_all("known", &file);
        assert!(error.is_none());
        assert_eq!(records[0].payload, "abc");
        assert_eq!(records[0].offset, 12);
    }

    #[test]
    fn truncation_and_damage_are_found_with_their_offset() {
        let mut file = frame(b"first");
        let second = file.len() as u64;
        file.extend(frame(&[7; 300]));
        let whole = file.len();
        for end in second as usize + 1..whole {
            let (records, error) = read_all("cut", &file[..end]);
            assert_eq!(records.len(), 1);
            match error {
                Some(Error::Corrupt {
                    file,
                    offset,
                    reason,
                }) => {
                    assert!(file.ends_with("a.tfrecord"), "{file}");
                    assert_eq!(offset, second);
                    assert!(reason.contains("cut off"), "{reason}");
                }
                other => panic!("{other:?}"),
            }
        }
        for at in 0..whole {
            let mut bad = file.clone();
            bad[at] ^= 0x10;
            let (_, error) = read_all("bad", &bad);
            assert!(matches!(error, Some(Error::Corrupt { .. })), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn damaged_files_give_whole_records_and_one_error(damage in damage()) {
            let whole = [frame(b"first"), frame(&[7; 300]), frame(b"")].concat();
            let bad = damaged(&whole, &damage);
            let (records, error) = read_all("damaged", &bad);
            prop_assert!(matches!(error, None | Some(Error::Corrupt { .. })), "{error:?}");
            let read: u64 = records.iter().map(|r| HEADER + r.payload.len() as u64 + FOOTER).sum();
            prop_assert!(read <= bad.len() as u64);
            prop_assert_eq!(error.is_none(), read == bad.len() as u64);
        }

        /// A length whose own checksum is right is not believed either.
        #[test]
        fn any_length_with_a_right_checksum(length: u64, rest: Vec<u8>) {
            let mut file = length.to_le_bytes().to_vec();
            file.extend(masked(crc32c::crc32c(&length.to_le_bytes())).to_le_bytes());
            file.extend(rest);
            let (records, error) = read_all("length", &file);
            prop_assert!(records.is_empty());
            prop_assert!(matches!(error, Some(Error::Corrupt { .. })), "{error:?}");
        }

        #[test]
        fn any_bytes(bytes: Vec<u8>) {
            let (_, error) = read_all("any", &bytes);
            prop_assert!(matches!(error, None | Some(Error::Corrupt { .. })), "{error:?}");
        }
    }
}

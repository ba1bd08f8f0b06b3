//! Reads an event file back, whole or as it grows.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::events::Record;

/// Returns all records of a file.
///
/// A torn line (the beginning of a record, left by a kill or a full disk) is passed over; any
/// other line that is no record is an error with its number.
pub fn read_events(path: &Path) -> Result<Vec<Record>, Error> {
    let mut tail = Tail::new(path);
    let mut file = File::open(path).map_err(|source| tail.read_error(source))?;
    let mut records = tail.take(&mut file)?;
    // The writer may have been killed between the record's last byte and its line break.
    if let Some(last) = tail.parse(&tail.partial)? {
        records.push(last);
    }
    Ok(records)
}

/// Follows an event file: each [`Tail::poll`] returns the records that are new since the last one.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    offset: u64,
    line: u64,
    partial: Vec<u8>,
}

impl Tail {
    /// Follows the file at `path` from its beginning; it need not exist yet.
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_path_buf(),
            offset: 0,
            line: 1,
            partial: Vec::new(),
        }
    }

    /// Follows the file at `path` from its present end.
    pub fn from_end(path: &Path) -> Result<Self, Error> {
        let mut tail = Self::new(path);
        tail.poll()?;
        Ok(tail)
    }

    /// Returns the records written since the last call; a line still being written waits.
    pub fn poll(&mut self) -> Result<Vec<Record>, Error> {
        match File::open(&self.path) {
            Ok(mut file) => self.take(&mut file),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            Err(source) => Err(self.read_error(source)),
        }
    }

    fn take(&mut self, file: &mut File) -> Result<Vec<Record>, Error> {
        let start = self.partial.len();
        file.seek(SeekFrom::Start(self.offset))
            .and_then(|_| file.read_to_end(&mut self.partial))
            .map_err(|source| self.read_error(source))?;
        self.offset += (self.partial.len() - start) as u64;

        let mut records = Vec::new();
        let bytes = std::mem::take(&mut self.partial);
        let mut rest = bytes.as_slice();
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            records.extend(self.parse(&rest[..end])?);
            self.line += 1;
            rest = &rest[end + 1..];
        }
        self.partial = rest.to_vec();
        Ok(records)
    }

    fn parse(&self, line: &[u8]) -> Result<Option<Record>, Error> {
        if line.iter().all(u8::is_ascii_whitespace) {
            return Ok(None);
        }
        match serde_json::from_slice(line) {
            Ok(record) => Ok(Some(record)),
            Err(error) if error.is_eof() => Ok(None),
            Err(source) => Err(Error::Line {
                path: self.path.clone(),
                line: self.line,
                source,
            }),
        }
    }

    fn read_error(&self, source: std::io::Error) -> Error {
        Error::Read {
            path: self.path.clone(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::fs;
    use std::io::Write;

    use super::*;

    const END: &str = r#"{"time":"2026-01-02T03:04:05.006Z","run":"r","generation":1,"rank":null,"event":"end","exit_code":0,"reason":"done"}"#;

    #[test]
    fn a_tail_sees_each_record_once_and_waits_for_whole_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        let mut tail = Tail::new(&path);
        assert!(tail.poll().unwrap().is_empty());
        let mut file = File::create(&path).unwrap();
        writeln!(file, "{END}").unwrap();
        write!(file, "{}", &END[..40]).unwrap();
        assert_eq!(tail.poll().unwrap().len(), 1);
        assert!(tail.poll().unwrap().is_empty());
        writeln!(file, "{}", &END[40..]).unwrap();
        assert_eq!(tail.poll().unwrap().len(), 1);
        assert!(tail.poll().unwrap().is_empty());
    }

    #[test]
    fn from_end_skips_what_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        fs::write(&path, format!("{END}\n")).unwrap();
        let mut tail = Tail::from_end(&path).unwrap();
        assert!(tail.poll().unwrap().is_empty());
    }

    #[test]
    fn every_cut_of_a_file_reads_as_its_whole_records() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        let text = format!("{END}\n{END}\n");
        for cut in 0..=text.len() {
            fs::write(&path, &text[..cut]).unwrap();
            // A record without its line break is whole too.
            let whole = (cut + 1) / (END.len() + 1);
            assert_eq!(read_events(&path).unwrap().len(), whole, "cut at {cut}");
        }
    }

    #[test]
    fn a_wrong_line_is_named_by_number() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        for wrong in ["{\"time\":3}", "hello", "{} {}"] {
            fs::write(&path, format!("{END}\n\n{wrong}\n{END}\n")).unwrap();
            let error = read_events(&path).unwrap_err();
            assert!(error.to_string().contains("line 3"), "{error}");
            assert_eq!(error.class(), pollen_core::ErrorClass::Corrupt);
        }
    }
}

//! Appends records to a file that several processes share.
//!
//! Each record is one line and one `write` on a descriptor opened for appending, so lines of
//! different processes never mix. A kill or a full disk may leave a torn last line; whoever opens
//! the file next starts a new line, and readers pass over the torn one.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use pollen_core::{Clock, SystemClock};

use crate::error::Error;
use crate::events::{Event, Record};

/// The writing end of one process; share it between threads by reference or [`Arc`].
#[derive(Debug)]
pub struct EventLog {
    path: PathBuf,
    run: String,
    generation: u64,
    rank: Option<u32>,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    file: File,
    /// The file does not end with a line break.
    torn: bool,
}

impl EventLog {
    /// Opens or creates the file at `path`; every record will carry `run`, `generation`, `rank`.
    pub fn open(path: &Path, run: &str, generation: u64, rank: Option<u32>) -> Result<Self, Error> {
        let open_error = |source| Error::Open {
            path: path.to_path_buf(),
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(open_error)?;
        let torn = ends_torn(&mut file).map_err(open_error)?;
        Ok(Self {
            path: path.to_path_buf(),
            run: run.to_owned(),
            generation,
            rank,
            clock: Arc::new(SystemClock::default()),
            state: Mutex::new(State { file, torn }),
        })
    }

    /// Takes the time of records from `clock`.
    #[must_use]
    pub fn with_clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// Returns the file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the run's id.
    pub fn run(&self) -> &str {
        &self.run
    }

    /// Returns the generation that records carry.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Appends one record; a checkpoint or an end is on disk when this returns.
    pub fn append(&self, event: Event) -> Result<(), Error> {
        let durable = event.is_durable();
        let kind = event.kind();
        let record = Record {
            time: self.clock.wall(),
            run: self.run.clone(),
            generation: self.generation,
            rank: self.rank,
            event,
        };
        let mut line = Vec::with_capacity(256);
        // A writer that panicked held the lock for one `write` at most: the file is as good as
        // after a kill, and `torn` is only ever too careful.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.torn {
            line.push(b'\n');
        }
        serde_json::to_writer(&mut line, &record)
            .map_err(|source| Error::Encode { kind, source })?;
        line.push(b'\n');
        self.write_once(&mut state, &line)?;
        if durable {
            state.file.sync_data().map_err(|source| Error::Write {
                path: self.path.clone(),
                source,
            })?;
        }
        Ok(())
    }

    fn write_once(&self, state: &mut State, line: &[u8]) -> Result<(), Error> {
        let written = loop {
            match state.file.write(line) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        let written = written.map_err(|source| Error::Write {
            path: self.path.clone(),
            source,
        })?;
        if written < line.len() {
            state.torn = true;
            return Err(Error::Short {
                path: self.path.clone(),
                written,
                expected: line.len(),
            });
        }
        state.torn = false;
        Ok(())
    }
}

fn ends_torn(file: &mut File) -> std::io::Result<bool> {
    if file.seek(SeekFrom::End(0))? == 0 {
        return Ok(false);
    }
    file.seek(SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    Ok(last != *b"\n")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::fs;

    use pollen_core::ManualClock;

    use super::*;
    use crate::reader::read_events;

    fn budget(gpu_hours: f64) -> Event {
        Event::Budget {
            gpu_hours,
            max_gpu_hours: None,
        }
    }

    #[test]
    fn lines_of_many_writers_stay_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        std::thread::scope(|scope| {
            for rank in 0..4 {
                // One descriptor each, as separate processes have.
                let log = EventLog::open(&path, "r", 1, Some(rank)).unwrap();
                scope.spawn(move || {
                    for index in 0..250 {
                        log.append(Event::BadSample {
                            dataset: "d".repeat(1 + index as usize * 7),
                            episode: index,
                            frame: u64::from(rank),
                            reason: "test".into(),
                        })
                        .unwrap();
                    }
                });
            }
        });
        let records = read_events(&path).unwrap();
        assert_eq!(records.len(), 1000);
        for rank in 0..4 {
            let episodes: Vec<u64> = records
                .iter()
                .filter(|record| record.rank == Some(rank))
                .map(|record| match &record.event {
                    Event::BadSample { episode, .. } => *episode,
                    other => panic!("{other:?}"),
                })
                .collect();
            assert_eq!(episodes, (0..250).collect::<Vec<u64>>());
        }
    }

    #[test]
    fn a_torn_last_line_is_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        let log = EventLog::open(&path, "r", 1, None).unwrap();
        log.append(budget(1.0)).unwrap();
        log.append(budget(2.0)).unwrap();
        drop(log);
        // Cut the last record in the middle, as a kill or a power loss does.
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 20]).unwrap();

        let log = EventLog::open(&path, "r", 2, None).unwrap();
        log.append(budget(3.0)).unwrap();
        log.append(budget(4.0)).unwrap();
        let hours: Vec<Event> = read_events(&path)
            .unwrap()
            .into_iter()
            .map(|record| record.event)
            .collect();
        assert_eq!(hours, vec![budget(1.0), budget(3.0), budget(4.0)]);
    }

    #[test]
    fn records_carry_the_injected_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        let clock = Arc::new(ManualClock::default());
        clock.advance(std::time::Duration::from_millis(1500));
        EventLog::open(&path, "r", 1, Some(3))
            .unwrap()
            .with_clock(clock)
            .append(budget(1.0))
            .unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(
            text.starts_with("{\"time\":\"1970-01-01T00:00:01.500Z\""),
            "{text}"
        );
    }

    #[test]
    fn a_missing_folder_is_named() {
        let error = EventLog::open(Path::new("/nonexistent/x/events.jsonl"), "r", 1, None)
            .unwrap_err()
            .to_string();
        assert!(error.contains("/nonexistent/x/events.jsonl"), "{error}");
    }

    #[test]
    fn a_full_disk_is_an_error() {
        let error = EventLog::open(Path::new("/dev/full"), "r", 1, None)
            .unwrap()
            .append(budget(1.0))
            .unwrap_err();
        assert_eq!(error.class(), pollen_core::ErrorClass::Retryable);
    }
}

//! One launcher per run.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::Error;

/// Held while a launcher works on a run; the kernel frees it when the launcher ends, however.
#[derive(Debug)]
pub struct RunLock {
    // Closing the file frees the lock.
    _file: File,
    path: PathBuf,
}

impl RunLock {
    /// Takes the lock at `path` for run `run`, or says who has it and how to stop them.
    pub fn take(path: &Path, run: &str) -> Result<Self, Error> {
        let mut file = open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(held_by(&mut file, run)),
            Err(errno) => return Err(Error::file("lock", path)(errno.into())),
        }
        let command = std::env::args().collect::<Vec<_>>().join(" ");
        let text = format!("{}\n{command}\n", std::process::id());
        file.set_len(0)
            .and_then(|()| file.seek(SeekFrom::Start(0)))
            .and_then(|_| file.write_all(text.as_bytes()))
            .map_err(Error::file("write", path))?;
        Ok(Self {
            _file: file,
            path: path.to_path_buf(),
        })
    }

    /// Returns the lock's file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn held_by(file: &mut File, run: &str) -> Error {
    let mut text = String::new();
    // An unreadable lock file is still a held lock.
    let _ = file.read_to_string(&mut text);
    let mut lines = text.lines();
    Error::Locked {
        run: run.to_owned(),
        pid: lines.next().unwrap_or("unknown").to_owned(),
        command: lines.next().unwrap_or("unknown").to_owned(),
    }
}

/// Opens a lock file without truncating what its holder wrote.
pub(crate) fn open(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(Error::file("open", path))
}

/// Waits for the exclusive lock on a file that is held for moments only.
pub(crate) fn wait_for(path: &Path) -> Result<File, Error> {
    let file = open(path)?;
    loop {
        match flock(&file, FlockOperation::LockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::file("lock", path)(errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn the_second_launcher_is_told_who_the_first_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let held = RunLock::take(&path, "r1").unwrap();
        let text = RunLock::take(&path, "r1").unwrap_err().to_string();
        let pid = std::process::id();
        assert!(text.contains("run r1"), "{text}");
        assert!(text.contains(&format!("kill {pid}")), "{text}");
        drop(held);
        RunLock::take(&path, "r1").unwrap();
    }

    #[test]
    fn a_lock_left_by_a_dead_process_is_free() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        std::fs::write(
            &path,
            "1\nsomebody else, long gone, with a long command line\n",
        )
        .unwrap();
        let _held = RunLock::take(&path, "r1").unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with(&std::process::id().to_string()), "{text}");
        assert!(!text.contains("somebody"), "{text}");
    }
}

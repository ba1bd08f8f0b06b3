//! One launcher per run.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use crate::error::Error;
use crate::process::ProcessId;

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

/// The launcher that holds a run's lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    process: ProcessId,
    /// Its command line.
    pub command: String,
}

impl Holder {
    /// Returns who holds the lock at `path`, without touching the lock: the process named in the
    /// file, if it still has the file open.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(path).ok()?;
        let mut lines = text.lines();
        let process = ProcessId::of(lines.next()?.parse().ok()?)?;
        let path = std::fs::canonicalize(path).ok()?;
        let files = std::fs::read_dir(format!("/proc/{}/fd", process.pid)).ok()?;
        let holds = |entry: std::fs::DirEntry| {
            std::fs::read_link(entry.path()).is_ok_and(|target| target == path)
        };
        files.flatten().any(holds).then(|| Self {
            process,
            command: lines.next().unwrap_or("unknown").to_owned(),
        })
    }

    /// Returns its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid
    }

    /// Asks it to save and end, as `kill PID` does.
    pub fn terminate(&self) -> Result<(), Error> {
        let Some(pid) = Pid::from_raw(self.process.pid as i32) else {
            return Ok(());
        };
        match kill_process(pid, Signal::TERM) {
            // It has ended meanwhile.
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(errno) => Err(Error::system("signal the launcher")(errno.into())),
        }
    }

    /// Waits until it has ended; false means that it still lives after `limit`.
    pub fn wait_gone(&self, limit: Duration) -> bool {
        self.process.wait_gone(limit)
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
        let holder = Holder::of(&path).unwrap();
        assert_eq!(holder.pid(), pid);
        drop(held);
        assert_eq!(
            Holder::of(&path),
            None,
            "the process lives, its lock is free"
        );
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

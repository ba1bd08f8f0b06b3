//! Row groups on this machine's disk, shared by all processes of the node.
//!
//! ```text
//! dir/lock            8 bytes: what all files may hold together; whoever changes files locks it
//! dir/<key>.rowgroup  the bytes as storage gave them; time of change = last use
//! dir/<n>.part        being written, locked by its writer: unlocked ones are left by the dead
//! ```
//!
//! Nothing in the folder is believed: what is read is checked against the index, what does not fit
//! is deleted. Whatever goes wrong here, the row group comes from storage.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::config::DiskCacheConfig;
use crate::sidecar::{DataFile, RowGroup, hex};

/// Longest wait for another process that holds the lock; it holds it for milliseconds.
const LOCK_TRIES: u32 = 200;
const LOCK_WAIT: Duration = Duration::from_millis(5);
/// An eviction frees this part of the cap on top, so that not every write has to evict.
const SLACK: u64 = 32;

const ENTRY: &str = "rowgroup";
const PART: &str = "part";

/// Names the bytes of a row group, wherever they are stored.
#[derive(Clone, Debug)]
pub(crate) struct DiskKey {
    name: String,
    bytes: u64,
    crc32c: u32,
}

impl DiskKey {
    pub(crate) fn new(file: &DataFile, group: &RowGroup) -> Self {
        let text = format!("{} {} {}", file.sha256, group.offset, group.bytes);
        let hash = hex(&Sha256::digest(text));
        Self {
            name: format!("{}-{:08x}.{ENTRY}", &hash[..32], group.crc32c),
            bytes: group.bytes,
            crc32c: group.crc32c,
        }
    }
}

/// A folder of row groups that holds a number of bytes at most.
#[derive(Debug)]
pub(crate) struct DiskCache {
    dir: PathBuf,
    capacity: u64,
    parts: AtomicU64,
    /// Set by the first failure to write: this process writes no more.
    stopped: AtomicBool,
}

impl DiskCache {
    /// Opens the folder, made if it is not there, and brings it below its cap. A folder that cannot
    /// be used is a warning, and no cache.
    pub(crate) fn open(config: &DiskCacheConfig) -> Option<Self> {
        let cache = Self {
            dir: config.dir.clone(),
            capacity: config.bytes.as_u64(),
            parts: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
        };
        let opened = fs::create_dir_all(&cache.dir).and_then(|()| {
            if let Some(mut lock) = cache.lock()? {
                let total = cache.evict(cache.capacity)?;
                set_total(&mut lock, total)?;
            }
            Ok(())
        });
        match opened {
            Ok(()) => Some(cache),
            Err(error) => {
                cache.stop(&error);
                None
            }
        }
    }

    /// Returns a row group if it is here and whole.
    pub(crate) fn get(&self, key: &DiskKey) -> Option<Bytes> {
        let path = self.dir.join(&key.name);
        let mut file = File::open(&path).ok()?;
        let mut bytes = Vec::with_capacity(key.bytes as usize + 1);
        let read = (&mut file).take(key.bytes + 1).read_to_end(&mut bytes);
        let whole = bytes.len() as u64 == key.bytes && crc32c::crc32c(&bytes) == key.crc32c;
        if read.is_err() || !whole {
            tracing::warn!(path = %path.display(), "a cached row group is damaged: deleted");
            drop(fs::remove_file(&path));
            return None;
        }
        // Without the time of use it is forgotten earlier; that is all.
        drop(file.set_modified(SystemTime::now()));
        Some(Bytes::from(bytes))
    }

    /// Keeps a row group. A failure is reported once and ends the writing, not the reading.
    pub(crate) fn put(&self, key: &DiskKey, bytes: &[u8]) {
        if self.stopped.load(Ordering::Relaxed) || bytes.len() as u64 > self.capacity {
            return;
        }
        if let Err(error) = self.write(key, bytes) {
            self.stop(&error);
        }
    }

    fn stop(&self, error: &io::Error) {
        if !self.stopped.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                dir = %self.dir.display(),
                %error,
                "the disk cache cannot be written to: row groups come from storage; free some \
                 space, lower `data.disk_cache.bytes` or name another `data.disk_cache.dir`"
            );
        }
    }

    fn write(&self, key: &DiskKey, bytes: &[u8]) -> io::Result<()> {
        let Some((path, mut part)) = self.reserve(key, bytes.len() as u64)? else {
            return Ok(());
        };
        let written = (|| {
            reach("reserved");
            let (first, second) = bytes.split_at(bytes.len() / 2);
            part.write_all(first)?;
            reach("half written");
            part.write_all(second)?;
            reach("written");
            let Some(_lock) = self.lock()? else {
                return fs::remove_file(&path);
            };
            fs::rename(&path, self.dir.join(&key.name))
        })();
        reach("renamed");
        if written.is_err() {
            drop(fs::remove_file(&path));
        }
        written
    }

    /// Makes room and a file of the final length, so that a count of the folder sees it; nothing if
    /// another process has the row group or keeps the lock.
    fn reserve(&self, key: &DiskKey, bytes: u64) -> io::Result<Option<(PathBuf, File)>> {
        let Some(mut lock) = self.lock()? else {
            return Ok(None);
        };
        if self.dir.join(&key.name).exists() {
            return Ok(None);
        }
        let mut total = match total(&mut lock)? {
            Some(total) => total,
            None => self.evict(self.capacity)?,
        };
        if total.saturating_add(bytes) > self.capacity {
            total = self.evict(self.capacity - bytes)?;
            if total.saturating_add(bytes) > self.capacity {
                // What others are writing just now takes the room.
                return Ok(None);
            }
        }
        // Counted before it is there: who dies in between leaves the count too high, and the next
        // eviction puts it right.
        set_total(&mut lock, total + bytes)?;
        reach("counted");
        let number = self.parts.fetch_add(1, Ordering::Relaxed);
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let nanos = since.unwrap_or_default().as_nanos();
        // Process numbers may repeat between containers; the time hardly does, and `create_new`
        // refuses what is left.
        let name = format!("{}-{nanos}-{number}.{PART}", std::process::id());
        let path = self.dir.join(name);
        let part = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)?;
        let reserved = part.lock().and_then(|()| part.set_len(bytes));
        if let Err(error) = reserved {
            drop(fs::remove_file(&path));
            return Err(error);
        }
        Ok(Some((path, part)))
    }

    /// Locks the folder until the file is dropped; nothing while another process keeps it.
    fn lock(&self) -> io::Result<Option<File>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(self.dir.join("lock"))?;
        for _ in 0..LOCK_TRIES {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_WAIT),
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Counts the folder, and deletes what was used longest ago until `room` bytes are left, as far
    /// as nobody is writing them; the caller holds the lock. Returns the bytes that are left.
    fn evict(&self, room: u64) -> io::Result<u64> {
        let mut entries = Vec::new();
        let mut total = 0;
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let kind = path.extension().and_then(|kind| kind.to_str());
            if !matches!(kind, Some(ENTRY | PART)) {
                continue;
            }
            // Gone: a damaged entry that its reader deleted.
            let Ok(metadata) = fs::metadata(&path) else {
                continue;
            };
            if kind == Some(PART) {
                if is_abandoned(&path) {
                    fs::remove_file(&path)?;
                    continue;
                }
            } else {
                entries.push((metadata.modified()?, path, metadata.len()));
            }
            total += metadata.len();
        }
        if total > room {
            entries.sort_unstable();
            let goal = room - (self.capacity / SLACK).min(room);
            for (_, path, bytes) in entries {
                if total <= goal {
                    break;
                }
                match fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => total -= bytes,
                }
            }
        }
        Ok(total)
    }
}

/// A writer locks its part as long as it lives.
fn is_abandoned(part: &Path) -> bool {
    File::open(part).is_ok_and(|file| file.try_lock().is_ok())
}

fn total(lock: &mut File) -> io::Result<Option<u64>> {
    let mut text = Vec::new();
    lock.rewind()?;
    lock.take(9).read_to_end(&mut text)?;
    Ok(text.try_into().ok().map(u64::from_le_bytes))
}

fn set_total(lock: &mut File, total: u64) -> io::Result<()> {
    lock.rewind()?;
    lock.write_all(&total.to_le_bytes())
}

#[cfg(not(test))]
fn reach(_place: &str) {}
#[cfg(test)]
use tests::reach;

#[cfg(test)]
mod tests {
    use super::*;
    use bytesize::ByteSize;
    use std::process::{Child, Command};

    /// Kills this process where its test wants it to die.
    pub(super) fn reach(place: &str) {
        if std::env::var("POLLEN_TEST_DIE_AT").is_ok_and(|wanted| wanted == place) {
            use rustix::process::{Signal, getpid, kill_process};
            kill_process(getpid(), Signal::KILL).expect("a process may kill itself");
        }
    }

    fn open(dir: &Path, bytes: u64) -> DiskCache {
        let config = DiskCacheConfig {
            dir: dir.into(),
            bytes: ByteSize(bytes),
        };
        DiskCache::open(&config).expect("a folder")
    }

    fn contents(number: u64, len: usize) -> Vec<u8> {
        (0..len as u64)
            .map(|i| (i.wrapping_mul(number + 3) >> 3) as u8)
            .collect()
    }

    fn key(number: u64, bytes: &[u8]) -> DiskKey {
        let group = RowGroup {
            offset: number,
            bytes: bytes.len() as u64,
            rows: 1,
            crc32c: crc32c::crc32c(bytes),
            episodes: vec![(0, 0, 1)],
        };
        let file = DataFile {
            path: "data/file.parquet".into(),
            bytes: 1 << 40,
            sha256: "ab".into(),
            row_groups: Vec::new(),
        };
        DiskKey::new(&file, &group)
    }

    /// Bytes of all files but the lock.
    fn on_disk(dir: &Path) -> u64 {
        let entries = fs::read_dir(dir).expect("a folder").flatten();
        entries
            .filter(|entry| entry.file_name() != "lock")
            .filter_map(|entry| entry.metadata().ok())
            .map(|metadata| metadata.len())
            .sum()
    }

    fn parts(dir: &Path) -> usize {
        let entries = fs::read_dir(dir).expect("a folder").flatten();
        entries
            .filter(|entry| entry.path().extension().is_some_and(|kind| kind == PART))
            .count()
    }

    /// This test program again, as the process that test `name` is about.
    fn child(name: &str, dir: &Path, die_at: &str, before: &str) -> Child {
        let program = std::env::current_exe().expect("a test program");
        Command::new("sh")
            .arg("-c")
            .arg(format!("{before} exec \"$0\" \"$@\""))
            .arg(program)
            .args([
                "--exact",
                &format!("disk_cache::tests::{name}"),
                "--ignored",
            ])
            .env("POLLEN_TEST_DISK_CACHE", dir)
            .env("POLLEN_TEST_DIE_AT", die_at)
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("a shell")
    }

    fn folder_of_child() -> PathBuf {
        std::env::var_os("POLLEN_TEST_DISK_CACHE")
            .expect("set by the test that starts it")
            .into()
    }

    #[test]
    fn keeps_what_fits_and_forgets_what_was_used_longest_ago() {
        let dir = tempfile::tempdir().expect("a folder");
        let cache = open(dir.path(), 1000);
        let bytes: Vec<Vec<u8>> = (0..4).map(|n| contents(n, 300)).collect();
        let at = |n: usize| key(n as u64, &bytes[n]);
        for (n, bytes) in bytes[..3].iter().enumerate() {
            cache.put(&at(n), bytes);
        }
        let old = SystemTime::now() - Duration::from_hours(1);
        for n in 0..3 {
            let file = File::open(dir.path().join(at(n).name)).expect("kept");
            file.set_modified(old + Duration::from_mins(n as u64))
                .expect("own");
        }
        assert_eq!(cache.get(&at(0)).expect("kept"), bytes[0]);
        cache.put(&at(3), &bytes[3]);
        assert!(cache.get(&at(1)).is_none(), "used longest ago");
        for n in [0, 2, 3] {
            assert_eq!(cache.get(&at(n)).expect("kept"), bytes[n]);
        }
        let large = contents(9, 1001);
        cache.put(&key(9, &large), &large);
        assert_eq!(on_disk(dir.path()), 900);
        // A smaller cap holds from the start.
        let smaller = open(dir.path(), 400);
        assert!(on_disk(dir.path()) <= 400);
        drop(smaller);
    }

    #[test]
    fn damaged_entries_are_deleted() {
        let dir = tempfile::tempdir().expect("a folder");
        let cache = open(dir.path(), 10_000);
        let bytes = contents(1, 500);
        let key = key(1, &bytes);
        let path = dir.path().join(&key.name);
        let longer = [&bytes[..], b"x"].concat();
        let mut flipped = bytes.clone();
        flipped[77] ^= 4;
        for damaged in [&bytes[..499], &longer, &flipped, b""] {
            cache.put(&key, &bytes);
            assert_eq!(cache.get(&key).expect("whole"), bytes);
            fs::write(&path, damaged).expect("own");
            assert!(cache.get(&key).is_none());
            assert!(!path.exists());
        }
        // The count of a broken lock is made anew.
        fs::write(dir.path().join("lock"), "x").expect("own");
        cache.put(&key, &bytes);
        assert_eq!(cache.get(&key).expect("whole"), bytes);
    }

    #[test]
    #[ignore = "a process of `who_dies_while_writing_harms_nobody`"]
    fn writes_one() {
        let bytes = contents(1, 600);
        open(&folder_of_child(), 1000).put(&key(1, &bytes), &bytes);
    }

    #[test]
    fn who_dies_while_writing_harms_nobody() {
        use std::os::unix::process::ExitStatusExt;
        for place in ["counted", "reserved", "half written", "written", "renamed"] {
            let dir = tempfile::tempdir().expect("a folder");
            let cache = open(dir.path(), 1000);
            let status = child("writes_one", dir.path(), place, "").wait();
            assert_eq!(status.expect("ended").signal(), Some(9), "{place}");
            let (one, two) = (contents(1, 600), contents(2, 700));
            let found = cache.get(&key(1, &one));
            assert_eq!(found.is_some(), place == "renamed", "{place}");
            let expected = usize::from(!matches!(place, "counted" | "renamed"));
            assert_eq!(parts(dir.path()), expected, "{place}");
            // There is no room for both: what the dead one left goes.
            cache.put(&key(2, &two), &two);
            assert_eq!(cache.get(&key(2, &two)).expect("kept"), two, "{place}");
            assert_eq!(on_disk(dir.path()), 700, "{place}");
        }
    }

    const SHARED: u64 = 20_000;

    #[test]
    #[ignore = "a process of `many_processes_share_it`"]
    fn shares() {
        let dir = folder_of_child();
        let cache = open(&dir, SHARED);
        for round in 0..300_u64 {
            let number = (round * 7 + u64::from(std::process::id())) % 40;
            let bytes = contents(number, 500 + 50 * number as usize);
            let key = key(number, &bytes);
            if let Some(found) = cache.get(&key) {
                assert_eq!(found, bytes);
            } else {
                cache.put(&key, &bytes);
            }
            // Locked, so that no file changes its name while it is counted.
            let lock = cache.lock().expect("a folder").expect("free soon");
            let held = on_disk(&dir);
            drop(lock);
            assert!(held <= SHARED, "{held} bytes");
        }
        assert!(!cache.stopped.load(Ordering::Relaxed));
    }

    #[test]
    fn many_processes_share_it() {
        let dir = tempfile::tempdir().expect("a folder");
        let start = || child("shares", dir.path(), "", "");
        let children: Vec<Child> = (0..4).map(|_| start()).collect();
        for mut child in children {
            assert!(child.wait().expect("ended").success());
        }
        assert!(on_disk(dir.path()) > SHARED / 2);
        assert_eq!(parts(dir.path()), 0);
    }

    #[test]
    #[ignore = "a process of `a_full_disk_is_no_error`"]
    fn finds_the_disk_full() {
        let dir = folder_of_child();
        let cache = open(&dir, 1 << 20);
        let (small, large) = (contents(1, 400), contents(2, 100_000));
        cache.put(&key(1, &small), &small);
        assert!(!cache.stopped.load(Ordering::Relaxed));
        cache.put(&key(2, &large), &large);
        assert!(cache.stopped.load(Ordering::Relaxed));
        // From now on it only reads, and says nothing more.
        assert_eq!(cache.get(&key(1, &small)).expect("kept"), small);
        assert!(cache.get(&key(2, &large)).is_none());
        let other = contents(3, 400);
        cache.put(&key(3, &other), &other);
        assert!(cache.get(&key(3, &other)).is_none());
        assert_eq!(on_disk(&dir), 400);
    }

    /// A limit of file size in place of a full disk: the same failure at the same place.
    #[test]
    fn a_full_disk_is_no_error() {
        let dir = tempfile::tempdir().expect("a folder");
        let limit = "trap '' XFSZ; ulimit -f 8;";
        let mut child = child("finds_the_disk_full", dir.path(), "", limit);
        assert!(child.wait().expect("ended").success());
        let file = dir.path().join("file");
        fs::write(&file, "in the folder's place").expect("own");
        let config = DiskCacheConfig {
            dir: file,
            bytes: ByteSize(1000),
        };
        assert!(DiskCache::open(&config).is_none());
    }
}

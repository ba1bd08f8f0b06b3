//! The last lines of a worker's log.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Longest end of a log that is read.
const MAX_BYTES: u64 = 16 << 10;

/// The end of the log of the worker that failed first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogTail {
    /// The worker.
    pub rank: u32,
    /// Its log.
    pub path: PathBuf,
    /// The last lines.
    pub lines: Vec<String>,
}

impl LogTail {
    /// Reads up to `max_lines` lines; a log that cannot be read has none.
    pub fn read(rank: u32, path: &Path, max_lines: usize) -> Self {
        let text = last_bytes(path).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        let lines = all[all.len().saturating_sub(max_lines)..]
            .iter()
            .map(|line| (*line).to_owned())
            .collect();
        Self {
            rank,
            path: path.to_path_buf(),
            lines,
        }
    }
}

impl fmt::Display for LogTail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "last lines of rank {} ({}):",
            self.rank,
            self.path.display()
        )?;
        for line in &self.lines {
            write!(f, "\n  {line}")?;
        }
        if self.lines.is_empty() {
            write!(f, "\n  (empty)")?;
        }
        Ok(())
    }
}

/// Returns the end of a file as text; a character cut in two is replaced.
pub(crate) fn last_bytes(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(length.saturating_sub(MAX_BYTES)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn only_the_end_is_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rank-1.g2.log");
        let lines: Vec<String> = (0..100_000).map(|line| format!("line {line}")).collect();
        std::fs::write(&path, lines.join("\n")).unwrap();
        let tail = LogTail::read(1, &path, 2);
        assert_eq!(tail.lines, ["line 99998", "line 99999"]);
        assert!(tail.to_string().contains("rank 1"), "{tail}");
    }

    #[test]
    fn a_missing_log_is_empty() {
        let tail = LogTail::read(0, Path::new("/nonexistent"), 5);
        assert!(tail.to_string().ends_with("(empty)"), "{tail}");
    }
}

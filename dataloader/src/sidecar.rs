//! `meta/pollen.json`, version 1: what Pollen knows of a dataset beyond the LeRobot metadata.
//!
//! Other programs ignore the file. It is made by [`index_dataset`](crate::index_dataset) from the
//! data alone, so that making it again gives the same bytes.

use pollen_processing::ActionStats;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::parquet_file::MAX_ROWS;
use crate::statistics::Statistics;
use crate::transform::ColumnTransform;

/// Version of the file that this build reads and writes.
pub const SIDECAR_VERSION: u32 = 1;

/// Path inside a dataset.
pub const SIDECAR_PATH: &str = "meta/pollen.json";

/// The contents of `meta/pollen.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sidecar {
    /// Version of the file.
    pub version: u32,
    /// Hash of everything that determines samples: data files, tasks, frames a second.
    pub dataset_hash: String,
    /// Frames a second.
    pub fps: f64,
    /// What was done to actions and states before the statistics were taken.
    pub transform: ColumnTransform,
    /// Statistics of the transformed actions over all episodes.
    pub action: ActionStats,
    /// Statistics of the proprioception over all episodes; absent when the transform names none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proprio: Option<ActionStats>,
    /// Rows that the transform's filter leaves out: (first global row, number of rows).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<(u64, u64)>,
    /// Data files in the order of their paths.
    pub files: Vec<DataFile>,
}

/// One data file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataFile {
    /// Path inside the dataset.
    pub path: String,
    /// Size.
    pub bytes: u64,
    /// Checksum of the whole file.
    pub sha256: String,
    /// Row groups in order.
    pub row_groups: Vec<RowGroup>,
}

impl DataFile {
    /// Returns whether row groups lie inside the file, and whether its episodes are whole: each
    /// goes on from one row group to the next without a gap.
    fn is_consistent(&self) -> bool {
        let mut open = None;
        self.row_groups.iter().all(|group| {
            let end = group.offset.checked_add(group.bytes);
            let mut left = group.rows;
            let spans = group.episodes.iter().all(|&(episode, first, rows)| {
                let goes_on = first == 0 || open == Some((episode, first));
                open = first.checked_add(rows).map(|next| (episode, next));
                let fits = left.checked_sub(rows);
                left = fits.unwrap_or_default();
                goes_on && rows > 0 && fits.is_some() && open.is_some()
            });
            spans && left == 0 && group.rows <= MAX_ROWS && end.is_some_and(|end| end <= self.bytes)
        })
    }
}

/// One row group of a data file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RowGroup {
    /// Where it starts in its file.
    pub offset: u64,
    /// Length of all its column chunks together.
    pub bytes: u64,
    /// Number of frames.
    pub rows: u64,
    /// CRC-32C of these bytes.
    pub crc32c: u32,
    /// Episodes in it: (episode, `frame_index` of its first frame here, number of frames).
    pub episodes: Vec<(u64, u64, u64)>,
}

impl Sidecar {
    /// Reads the text of a sidecar; the error says what is wrong with it.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let Version { version } = serde_json::from_slice(text).map_err(|e| e.to_string())?;
        if version != SIDECAR_VERSION {
            return Err(format!(
                "version {version} is not known; this build reads {SIDECAR_VERSION}, delete \
                 it and it is made anew"
            ));
        }
        let sidecar: Self = serde_json::from_slice(text).map_err(|e| e.to_string())?;
        let mut faults = sidecar.action.faults("its statistics of actions");
        if let Some(proprio) = &sidecar.proprio {
            faults.extend(proprio.faults("its statistics of proprioception"));
        }
        faults.extend(left_out_fault(&sidecar.left_out));
        if sidecar.transform.hash != sidecar.transform.hash_of_contents() {
            faults.push("its transform does not have the hash that it names".into());
        }
        if !faults.is_empty() {
            return Err(faults.join("; "));
        }
        match sidecar.files.iter().find(|file| !file.is_consistent()) {
            Some(file) => Err(format!("its entry for {} contradicts itself", file.path)),
            None => Ok(sidecar),
        }
    }

    /// Returns the text of the sidecar.
    pub fn to_json(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec(self).expect("a sidecar has only strings as map keys");
        text.push(b'\n');
        text
    }

    /// Returns the hash of the data and of what is done to them: what a checkpoint remembers.
    pub(crate) fn samples_hash(&self) -> String {
        hash_lines([&*self.dataset_hash, &*self.transform.hash])
    }

    /// Puts other statistics in place of those that it was made with.
    pub(crate) fn with_statistics(mut self, statistics: Statistics) -> Self {
        self.transform = statistics.transform;
        self.action = statistics.action;
        self.proprio = statistics.proprio;
        self.left_out = statistics.left_out;
        self
    }

    /// Returns the number of frames.
    pub fn num_frames(&self) -> u64 {
        let groups = self.files.iter().flat_map(|file| &file.row_groups);
        groups.map(|group| group.rows).sum()
    }
}

/// Returns what is wrong with the rows that a filter leaves out: they must be in order.
pub(crate) fn left_out_fault(left_out: &[(u64, u64)]) -> Option<String> {
    let mut end = 0;
    for &(first, rows) in left_out {
        end = match first.checked_add(rows) {
            Some(next) if first >= end => next,
            _ => return Some("its rows that are left out are not in order".into()),
        };
    }
    None
}

/// Hashes what determines the samples of a dataset.
pub(crate) fn dataset_hash(fps: f64, tasks: &[String], files: &[DataFile]) -> String {
    let mut lines = vec![format!("pollen dataset 1, {fps} frames a second")];
    lines.extend(tasks.iter().map(|task| format!("task {task:?}")));
    for file in files {
        lines.push(format!(
            "file {:?} {} {}",
            file.path, file.bytes, file.sha256
        ));
        for group in &file.row_groups {
            lines.push(format!(
                "row group {} {} {} {:08x} {:?}",
                group.offset, group.bytes, group.rows, group.crc32c, group.episodes
            ));
        }
    }
    hash_lines(lines.iter().map(String::as_str))
}

pub(crate) fn hash_lines<'a>(lines: impl IntoIterator<Item = &'a str>) -> String {
    let mut hash = Sha256::new();
    for line in lines {
        hash.update(line.as_bytes());
        hash.update(b"\n");
    }
    hex(&hash.finalize())
}

/// Writes bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string cannot fail");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sidecar() -> Sidecar {
        let files = vec![DataFile {
            path: "data/chunk-000/file-000.parquet".into(),
            bytes: 100,
            sha256: "00".into(),
            row_groups: vec![RowGroup {
                offset: 4,
                bytes: 80,
                rows: 5,
                crc32c: 7,
                episodes: vec![(0, 0, 3), (1, 0, 2)],
            }],
        }];
        Sidecar {
            version: SIDECAR_VERSION,
            dataset_hash: dataset_hash(10.0, &["lift".into()], &files),
            fps: 10.0,
            transform: ColumnTransform::columns("action", "observation.state"),
            action: ActionStats::of(&[0.1, 0.2, 1.0 / 3.0], 1).expect("finite"),
            proprio: None,
            left_out: Vec::new(),
            files,
        }
    }

    #[test]
    fn round_trips() {
        let sidecar = sidecar();
        assert_eq!(Sidecar::parse(&sidecar.to_json()).expect("parses"), sidecar);
    }

    #[test]
    fn hostile_texts_are_refused() {
        let mut long = sidecar();
        long.files[0].row_groups[0].bytes = 97;
        let mut huge = sidecar();
        huge.files[0].row_groups[0].offset = u64::MAX;
        let mut rows = sidecar();
        rows.files[0].row_groups[0].rows = 6;
        let with_episodes = |episodes: &[(u64, u64, u64)]| {
            let mut wrong = sidecar();
            wrong.files[0].row_groups[0].episodes = episodes.to_vec();
            wrong
        };
        let overflow = with_episodes(&[(0, 0, u64::MAX), (1, 0, 6)]);
        let from_elsewhere = with_episodes(&[(0, 2, 3), (1, 0, 2)]);
        let empty = with_episodes(&[(0, 0, 5), (1, 0, 0)]);
        for wrong in [long, huge, rows, overflow, from_elsewhere, empty] {
            let error = Sidecar::parse(&wrong.to_json()).expect_err("contradiction");
            assert!(error.contains("contradicts itself"), "{error}");
        }
        let newer = sidecar();
        let text = String::from_utf8(newer.to_json()).expect("ASCII");
        let text = text.replace("\"version\":1", "\"version\":2");
        let error = Sidecar::parse(text.as_bytes()).expect_err("version");
        assert!(error.contains("delete it"), "{error}");
        assert!(Sidecar::parse(b"{").is_err());
    }

    #[test]
    fn the_hash_follows_the_contents() {
        let base = sidecar();
        let mut other = base.files.clone();
        other[0].row_groups[0].crc32c = 8;
        let hash = |files: &[DataFile]| dataset_hash(10.0, &["lift".into()], files);
        assert_eq!(base.dataset_hash, hash(&base.files));
        assert_ne!(base.dataset_hash, hash(&other));
    }
}

//! The metadata of LeRobot datasets, as far as a conversion needs it.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::columns;
use crate::error::{Error, Result};
use crate::parquet_file::ParquetFile;
use crate::reader::Reader;
use crate::source::FieldKind;

const INFO: &str = "meta/info.json";
/// Columns that every dataset has and the writer makes anew.
const MADE_ANEW: [&str; 5] = [
    "timestamp",
    "frame_index",
    "episode_index",
    "index",
    "task_index",
];

/// `meta/info.json`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Info {
    codebase_version: String,
    fps: f64,
    #[serde(default)]
    robot_type: Option<String>,
    #[serde(default)]
    total_episodes: Option<u64>,
    #[serde(default)]
    chunks_size: Option<i64>,
    #[serde(default)]
    video_path: Option<String>,
    features: BTreeMap<String, Feature>,
}

#[derive(Clone, Debug, Deserialize)]
struct Feature {
    dtype: String,
    #[serde(default)]
    shape: Vec<u32>,
    #[serde(default)]
    names: Value,
}

/// Where the frames of an episode start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct VideoPlace {
    pub(crate) chunk: i64,
    pub(crate) file: i64,
    /// Seconds from the start of the file.
    pub(crate) from: f64,
}

impl Info {
    pub(crate) fn read(reader: &Reader) -> Result<Self> {
        let text = reader.get(INFO)?;
        let info: Self =
            serde_json::from_slice(&text).map_err(|e| Error::invalid(reader.name(INFO), e))?;
        let known = ["v2.0", "v2.1", "v3."];
        if !known
            .iter()
            .any(|version| info.codebase_version.starts_with(version))
        {
            let version = &info.codebase_version;
            let reason = format!("codebase_version {version} is not known; v2.0 to v3.0 are read");
            return Err(Error::invalid(reader.name(INFO), reason));
        }
        if !(info.fps.is_finite() && info.fps > 0.0) {
            let reason = format!("fps = {} is not a frequency", info.fps);
            return Err(Error::invalid(reader.name(INFO), reason));
        }
        Ok(info)
    }

    pub(crate) fn is_v3(&self) -> bool {
        self.codebase_version.starts_with("v3.")
    }

    pub(crate) fn fps(&self) -> f64 {
        self.fps
    }

    pub(crate) fn robot_type(&self) -> Option<String> {
        self.robot_type.clone()
    }

    pub(crate) fn num_episodes(&self) -> Option<u64> {
        self.total_episodes
    }

    pub(crate) fn chunks_size(&self) -> i64 {
        self.chunks_size.unwrap_or(1000)
    }

    pub(crate) fn video_path(&self) -> &str {
        let default = if self.is_v3() {
            "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        } else {
            "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        };
        self.video_path.as_deref().unwrap_or(default)
    }

    /// Returns the features that a conversion can take.
    pub(crate) fn fields(&self) -> impl Iterator<Item = (&str, FieldKind)> {
        let features = self
            .features
            .iter()
            .filter(|(name, _)| !MADE_ANEW.contains(&name.as_str()));
        features.map(|(name, feature)| {
            let numbers = ["float", "int", "uint", "bool"];
            let kind = match feature.dtype.as_str() {
                "image" | "video" => FieldKind::Image,
                "string" => FieldKind::Text,
                dtype if numbers.iter().any(|start| dtype.starts_with(start)) => FieldKind::Numbers,
                _ => FieldKind::Other,
            };
            (name.as_str(), kind)
        })
    }

    /// Returns the names of the numbers of features: a list or, in old datasets, one under a key.
    pub(crate) fn names(&self) -> BTreeMap<String, Vec<String>> {
        let names = self.features.iter().filter_map(|(name, feature)| {
            let list = match &feature.names {
                Value::Object(keys) => keys.values().next()?,
                list => list,
            };
            let texts = list
                .as_array()?
                .iter()
                .map(|text| text.as_str().map(String::from));
            Some((name.clone(), texts.collect::<Option<_>>()?))
        });
        names.collect()
    }

    pub(crate) fn is_video(&self, feature: &str) -> bool {
        self.features
            .get(feature)
            .is_some_and(|feature| feature.dtype == "video")
    }

    /// Returns the features that are videos.
    pub(crate) fn videos(&self) -> impl Iterator<Item = &str> {
        self.features
            .keys()
            .map(String::as_str)
            .filter(|name| self.is_video(name))
    }

    /// Returns height and width: the shape without its channels, whichever end they are at.
    pub(crate) fn image_size(&self, feature: &str) -> Option<(u32, u32)> {
        match self.features.get(feature)?.shape[..] {
            [height, width, 3] | [3, height, width] => Some((height, width)),
            _ => None,
        }
    }
}

/// Returns the instructions by task index.
pub(crate) fn read_tasks(reader: &Reader, info: &Info) -> Result<BTreeMap<i64, String>> {
    #[derive(Deserialize)]
    struct Line {
        task_index: i64,
        task: String,
    }
    if !info.is_v3() {
        let path = "meta/tasks.jsonl";
        let text = reader.get(path)?;
        let bad = |reason: String| Error::invalid(reader.name(path), reason);
        let text = std::str::from_utf8(&text).map_err(|e| bad(e.to_string()))?;
        let lines = text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty());
        let tasks = lines.map(|(i, line)| {
            let line: Line =
                serde_json::from_str(line).map_err(|e| bad(format!("line {}: {e}", i + 1)))?;
            Ok((line.task_index, line.task))
        });
        return tasks.collect();
    }
    let path = "meta/tasks.parquet";
    let file = ParquetFile::open(reader, path)?;
    let text = if file.has("task") {
        "task"
    } else {
        "__index_level_0__"
    };
    let mut tasks = BTreeMap::new();
    for row_group in 0..file.num_row_groups() {
        for batch in file.read(row_group, None)? {
            let part = std::slice::from_ref(&batch);
            let index = columns::numbers(part, "task_index");
            let index = index.map_err(|e| Error::invalid(reader.name(path), e))?;
            let texts = batch.column_by_name(text).map(columns::texts);
            let texts = texts.ok_or_else(|| Error::invalid(reader.name(path), "it has no task"))?;
            tasks.extend(index.values.iter().map(|i| *i as i64).zip(texts));
        }
    }
    Ok(tasks)
}

/// Returns where the videos of each episode are.
pub(crate) fn read_video_places(
    reader: &Reader,
    info: &Info,
) -> Result<BTreeMap<(String, i64), VideoPlace>> {
    let mut places = BTreeMap::new();
    for object in reader.list("meta/episodes")? {
        if !object.path.ends_with(".parquet") {
            continue;
        }
        let file = ParquetFile::open(reader, &object.path)?;
        for row_group in 0..file.num_row_groups() {
            for batch in file.read(row_group, None)? {
                let column = |name: &str| {
                    let column = columns::doubles(&batch, name);
                    column.map_err(|e| Error::invalid(file.name(), format!("{name}: {e}")))
                };
                let episodes = column("episode_index")?;
                for video in info.videos() {
                    let [chunks, files, starts] = [
                        column(&format!("videos/{video}/chunk_index"))?,
                        column(&format!("videos/{video}/file_index"))?,
                        column(&format!("videos/{video}/from_timestamp"))?,
                    ];
                    for (i, episode) in episodes.iter().enumerate() {
                        let place = VideoPlace {
                            chunk: chunks[i] as i64,
                            file: files[i] as i64,
                            from: starts[i],
                        };
                        places.insert((video.to_string(), *episode as i64), place);
                    }
                }
            }
        }
    }
    Ok(places)
}

/// Fills a path template: `{video_key}` and numbers such as `{file_index:03d}`.
pub(crate) fn path_of(template: &str, video_key: &str, values: &[(&str, i64)]) -> String {
    let mut path = template.replace("{video_key}", video_key);
    for (name, value) in values {
        for digits in 1..10_usize {
            path = path.replace(
                &format!("{{{name}:0{digits}d}}"),
                &format!("{value:0digits$}"),
            );
        }
        path = path.replace(&format!("{{{name}}}"), &value.to_string());
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_templates() {
        let path = path_of(
            "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index}.mp4",
            "observation.images.front",
            &[("chunk_index", 2), ("file_index", 17)],
        );
        assert_eq!(
            path,
            "videos/observation.images.front/chunk-002/file-17.mp4"
        );
    }
}

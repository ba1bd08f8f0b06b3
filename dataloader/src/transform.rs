//! Which columns of a dataset become actions and proprioception, what is done to them, and which
//! frames are left out.

use pollen_core::ActionSpace;
use pollen_processing::{Stored, Transform};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::columns::{ColumnNames, Columns, Rows};
use crate::dataset_config::DatasetConfig;
use crate::error::Result;
use crate::filter::FrameFilter;
use crate::parquet_file::FileName;
use crate::sidecar::hex;

/// What was done to a dataset before its statistics were taken: a part of `meta/pollen.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ColumnTransform {
    /// Feature that holds the stored actions.
    pub action: String,
    /// Feature that holds the stored state; empty for none.
    pub state: String,
    /// What the two become.
    #[serde(default, skip_serializing_if = "Transform::is_identity")]
    pub steps: Transform,
    /// Frames that no sample starts at.
    #[serde(default, skip_serializing_if = "FrameFilter::keeps_all")]
    pub filter: FrameFilter,
    /// Hash of the above and of the code's version of what is done.
    pub hash: String,
}

impl ColumnTransform {
    /// Returns the transform that takes two columns as they are.
    pub fn columns(action: &str, state: &str) -> Self {
        Self::new(action, state, Transform::default(), FrameFilter::default())
    }

    /// Returns the transform of a dataset into its action space.
    pub fn of(config: &DatasetConfig, space: &ActionSpace) -> Self {
        Self::new(
            &config.action,
            &config.state,
            config.transform.clone(),
            FrameFilter::new(config, space),
        )
    }

    fn new(action: &str, state: &str, steps: Transform, filter: FrameFilter) -> Self {
        let mut transform = Self {
            action: action.into(),
            state: state.into(),
            steps,
            filter,
            hash: String::new(),
        };
        transform.hash = transform.hash_of_contents();
        transform
    }

    /// Returns the hash that [`Self::hash`] must be.
    pub(crate) fn hash_of_contents(&self) -> String {
        let json = |value: serde_json::Result<String>| value.expect("its map keys are strings");
        let mut hash = Sha256::new();
        let as_stored = self.steps.is_identity() && self.filter.keeps_all();
        let mut lines = vec![self.action.clone(), self.state.clone()];
        if as_stored {
            lines.insert(0, "transform 1: columns as stored".into());
        } else {
            lines.insert(0, "transform 2".into());
            lines.push(json(serde_json::to_string(&self.steps)));
            lines.push(json(serde_json::to_string(&self.filter)));
        }
        for line in lines {
            hash.update(line.as_bytes());
            hash.update(b"\n");
        }
        hex(&hash.finalize())
    }

    /// Transforms the stored columns of one file, episode by episode.
    ///
    /// An episode that cannot be transformed gets NaN in place of actions, so that its samples are
    /// reported where they are used.
    pub(crate) fn apply(&self, name: &FileName, columns: Columns) -> Result<Columns> {
        if self.steps.is_identity() || columns.episode.is_empty() {
            return Ok(columns);
        }
        let (action, state) = (&columns.action, &columns.state);
        let widths = self.steps.widths(action.width, state.width);
        let widths = widths.map_err(|faults| name.bad(faults.join("; ")))?;
        let mut made = [widths.0, widths.1].map(|width| Rows {
            width,
            values: Vec::with_capacity(width * columns.episode.len()),
        });
        let mut start = 0;
        for run in columns.episode.chunk_by(|a, b| a == b) {
            let of = |rows: &Rows, from: usize| from * rows.width..(from + run.len()) * rows.width;
            let stored = Stored {
                action: &action.values[of(action, start)],
                action_width: action.width,
                state: &state.values[of(state, start)],
                state_width: state.width,
            };
            match self.steps.apply(stored) {
                Ok(transformed) => {
                    made[0].values.extend(transformed.action);
                    made[1].values.extend(transformed.state);
                }
                Err(reason) => {
                    tracing::warn!(
                        file = name.path,
                        episode = run[0],
                        reason,
                        "not transformed"
                    );
                    for rows in &mut made {
                        let filled = rows.values.len() + rows.width * run.len();
                        rows.values.resize(filled, f32::NAN);
                    }
                }
            }
            start += run.len();
        }
        let [action, state] = made;
        Ok(Columns {
            action,
            state,
            ..columns
        })
    }
}

impl ColumnNames {
    pub(crate) fn of(transform: &ColumnTransform) -> Self {
        Self {
            action: transform.action.clone(),
            state: transform.state.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollen_processing::{Op, Part};

    fn bridge() -> Transform {
        let ops = vec![Op::Difference {
            frames: 1,
            angles: Vec::new(),
        }];
        Transform {
            action: vec![Part::State {
                dims: vec![0, 1],
                ops,
            }],
            ..Transform::default()
        }
    }

    fn columns() -> Columns {
        let rows = |values: &[f32]| Rows {
            width: 1,
            values: values.to_vec(),
        };
        Columns {
            action: rows(&[9.0; 5]),
            state: rows(&[0.0, 1.0, 3.0, 10.0, 20.0]),
            episode: vec![0, 0, 0, 1, 1],
            frame: vec![0, 1, 2, 0, 1],
            task: vec![0; 5],
        }
    }

    #[test]
    fn episodes_do_not_reach_into_each_other() {
        let name = FileName {
            dataset: "a".into(),
            path: "f".into(),
        };
        let transform = ColumnTransform::new("action", "state", bridge(), FrameFilter::default());
        let made = transform.apply(&name, columns()).expect("fits");
        assert_eq!(made.action.values, [1.0, 2.0, 2.0, 10.0, 10.0]);
        assert_eq!(made.state, columns().state);
        let as_stored = ColumnTransform::columns("action", "state");
        assert_eq!(as_stored.apply(&name, columns()).expect("fits"), columns());
        let mut narrow = columns();
        narrow.state = Rows::default();
        let error = transform.apply(&name, narrow).expect_err("no state");
        assert!(error.to_string().contains("of the state"), "{error}");
    }

    #[test]
    fn the_hash_follows_every_choice() {
        let as_stored = ColumnTransform::columns("action", "state");
        let filter = FrameFilter {
            unlabelled: true,
            ..FrameFilter::default()
        };
        let all = [
            as_stored.clone(),
            ColumnTransform::columns("actions", "state"),
            ColumnTransform::new("action", "state", bridge(), FrameFilter::default()),
            ColumnTransform::new("action", "state", Transform::default(), filter.clone()),
            ColumnTransform::new("action", "state", bridge(), filter),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|b| a.hash != b.hash));
            let text = serde_json::to_string(a).expect("JSON");
            let back: ColumnTransform = serde_json::from_str(&text).expect("parses");
            assert_eq!(back, *a);
            assert_eq!(back.hash_of_contents(), a.hash);
        }
        let text = serde_json::to_string(&as_stored).expect("JSON");
        assert!(
            !text.contains("steps") && !text.contains("filter"),
            "{text}"
        );
    }
}

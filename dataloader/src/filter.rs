//! Frames that no sample starts at. They stay in storage and in the chunks of the frames before.

use pollen_core::ActionSpace;
use pollen_core::action_space::Normalize;
use serde::{Deserialize, Serialize};

use crate::columns::Columns;
use crate::dataset_config::{DatasetConfig, Motion};

/// Which frames of a dataset are left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FrameFilter {
    /// Those whose task has no text.
    #[serde(default)]
    pub unlabelled: bool,
    /// Those in which nothing moves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle: Option<Idle>,
}

/// When nothing moves: no dimension of motion exceeds `below`, and no gripper does otherwise than in
/// the frame before.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Idle {
    /// Largest motion, in the unit of each dimension.
    pub below: f32,
    /// Whether actions are positions: their motion is the difference to the frame before.
    pub absolute: bool,
    /// Dimensions of grippers.
    pub grippers: Vec<usize>,
}

/// (first global row, number of rows).
pub(crate) type RowRun = (u64, u64);

impl FrameFilter {
    pub(crate) fn new(config: &DatasetConfig, space: &ActionSpace) -> Self {
        let dims = space.dims.iter().enumerate();
        let grippers = dims.filter(|(_, dim)| dim.normalize == Normalize::Keep);
        let idle = Idle {
            below: config.filters.idle_below,
            absolute: config.motion == Motion::Absolute,
            grippers: grippers.map(|(i, _)| i).collect(),
        };
        Self {
            unlabelled: config.filters.unlabelled,
            idle: (idle.below > 0.0).then_some(idle),
        }
    }

    /// Returns whether no frame is left out.
    pub fn keeps_all(&self) -> bool {
        *self == Self::default()
    }

    /// Returns the rows of one file that are left out; `columns` are transformed, the file's first
    /// row is `first_row` of the dataset.
    pub(crate) fn left_out(
        &self,
        columns: &Columns,
        tasks: &[String],
        first_row: u64,
    ) -> Vec<RowRun> {
        let mut runs: Vec<RowRun> = Vec::new();
        if self.keeps_all() {
            return runs;
        }
        for row in 0..columns.episode.len() {
            let unlabelled = || {
                let text = tasks.get(columns.task[row] as usize);
                text.is_some_and(|text| text.trim().is_empty())
            };
            let idle = || {
                let idle = self.idle.as_ref();
                idle.is_some_and(|idle| idle.is(columns, row))
            };
            if !((self.unlabelled && unlabelled()) || idle()) {
                continue;
            }
            let at = first_row + row as u64;
            match runs.last_mut().filter(|(first, rows)| first + rows == at) {
                Some(run) => run.1 += 1,
                None => runs.push((at, 1)),
            }
        }
        runs
    }
}

impl Idle {
    fn is(&self, columns: &Columns, row: usize) -> bool {
        let now = columns.action.row(row);
        let before = (row > 0 && columns.episode[row - 1] == columns.episode[row])
            .then(|| columns.action.row(row - 1));
        now.iter().enumerate().all(|(dim, &value)| {
            let change = before.map(|before| (value - before[dim]).abs());
            if self.grippers.contains(&dim) {
                change.is_none_or(|change| change <= self.below)
            } else if self.absolute {
                change.is_some_and(|change| change <= self.below)
            } else {
                value.abs() <= self.below
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::columns::Rows;

    fn columns(actions: &[[f32; 2]], episodes: &[u64]) -> Columns {
        Columns {
            action: Rows {
                width: 2,
                values: actions.concat(),
            },
            episode: episodes.to_vec(),
            task: episodes.to_vec(),
            ..Columns::default()
        }
    }

    fn idle(absolute: bool) -> FrameFilter {
        FrameFilter {
            unlabelled: false,
            idle: Some(Idle {
                below: 0.01,
                absolute,
                grippers: vec![1],
            }),
        }
    }

    #[test]
    fn idle_frames_move_neither_arm_nor_gripper() {
        let actions = [
            [0.0, 1.0],
            [0.0, 1.0],
            [0.0, 0.0], // the gripper closes
            [0.5, 0.0],
            [0.005, 0.0],
            [0.0, 1.0], // another episode
        ];
        let columns = columns(&actions, &[0, 0, 0, 0, 0, 1]);
        let left_out = idle(false).left_out(&columns, &[], 100);
        assert_eq!(left_out, [(100, 2), (104, 2)]);
    }

    #[test]
    fn absolute_actions_are_idle_where_they_stay() {
        let actions = [
            [2.0, 1.0],
            [2.0, 1.0],
            [2.5, 1.0],
            [2.505, 1.0],
            [2.505, 1.0],
        ];
        let columns = columns(&actions, &[0, 0, 0, 0, 1]);
        assert_eq!(idle(true).left_out(&columns, &[], 0), [(1, 1), (3, 1)]);
    }

    #[test]
    fn episodes_without_an_instruction_are_left_out() {
        let columns = columns(&[[1.0, 1.0]; 5], &[0, 0, 1, 1, 2]);
        let tasks = ["lift", "  ", ""].map(str::to_owned);
        let filter = FrameFilter {
            unlabelled: true,
            idle: None,
        };
        assert_eq!(filter.left_out(&columns, &tasks, 7), [(9, 3)]);
        assert!(
            FrameFilter::default()
                .left_out(&columns, &tasks, 7)
                .is_empty()
        );
    }
}

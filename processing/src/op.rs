//! The operations of a [`Transform`](crate::Transform): each works on some dimensions over a whole
//! episode.

use serde::{Deserialize, Serialize};

use crate::conventions;
use crate::rotation::{Rotation, wrap};
use crate::transform::Stored;

/// What is done to the dimensions of a part, over a whole episode.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Op {
    /// 1 - x: changes between 1 = open and 1 = closed.
    Invert,
    /// Above `high` 1, below `low` 0, in between what is reached next.
    Binarize {
        /// Open above it.
        high: f32,
        /// Closed below it.
        low: f32,
    },
    /// +1 = close now, -1 = open now, 0 = as it is, to 1 = open and 0 = closed.
    RelativeToAbsolute,
    /// Not below `low`, not above `high`.
    Clip {
        /// Smallest value.
        low: f32,
        /// Largest value.
        high: f32,
    },
    /// x times `factor` plus `offset`: other units, other ranges.
    Scale {
        /// Multiplied.
        factor: f32,
        /// Added afterwards.
        #[serde(default)]
        offset: f32,
    },
    /// The value some frames later. The last frames of an episode have none and are left out.
    Next {
        /// How many.
        #[serde(default = "one")]
        frames: usize,
    },
    /// The value some frames later minus that of now: from absolute to delta. The last frames of an
    /// episode have none and are left out.
    Difference {
        /// How many.
        #[serde(default = "one")]
        frames: usize,
        /// Dimensions of the part that are angles in radians: their differences lie in [-pi, pi).
        #[serde(default)]
        angles: Vec<usize>,
    },
    /// Minus dimensions of the stored state: from an absolute target to a delta.
    MinusState {
        /// As in a part; as many as there are.
        dims: Vec<i64>,
        /// Dimensions of the part that are angles in radians: their differences lie in [-pi, pi).
        #[serde(default)]
        angles: Vec<usize>,
    },
    /// Plus dimensions of the stored state: from a delta to an absolute target.
    PlusState {
        /// As in a part; as many as there are.
        dims: Vec<i64>,
    },
    /// From one representation of a rotation to another.
    Rotate {
        /// As stored.
        from: Rotation,
        /// As wanted.
        to: Rotation,
    },
}

fn one() -> usize {
    1
}

/// [frames, width].
pub(crate) struct Columns {
    pub(crate) width: usize,
    pub(crate) values: Vec<f32>,
}

impl Columns {
    pub(crate) fn slice(values: &[f32], width: usize, from: usize, to: usize) -> Self {
        let rows = values.chunks_exact(width.max(1));
        Self {
            width: to - from,
            values: rows.flat_map(|row| &row[from..to]).copied().collect(),
        }
    }

    pub(crate) fn row(&self, frame: usize) -> &[f32] {
        &self.values[frame * self.width..(frame + 1) * self.width]
    }

    /// Replaces each dimension by a function of its values over the episode.
    fn each_dim(&mut self, change: impl Fn(&[f32]) -> Vec<f32>) {
        for dim in 0..self.width {
            let of_dim: Vec<f32> = self.values[dim..]
                .iter()
                .step_by(self.width)
                .copied()
                .collect();
            for (row, value) in change(&of_dim).into_iter().enumerate() {
                self.values[row * self.width + dim] = value;
            }
        }
    }

    fn each_value(&mut self, change: impl Fn(f32) -> f32) {
        for value in &mut self.values {
            *value = change(*value);
        }
    }

    /// Combines each value with another of the same dimension.
    fn with(&mut self, other: impl Fn(usize) -> f32, combine: impl Fn(usize, f32, f32) -> f32) {
        for at in 0..self.values.len() {
            self.values[at] = combine(at % self.width, self.values[at], other(at));
        }
    }
}

/// Resolves the dimensions of a slice of `width`.
pub(crate) fn range(dims: &[i64], width: usize) -> Result<(usize, usize), String> {
    let at = |dim: i64| {
        let from_end = if dim < 0 {
            (width as i64).saturating_add(dim)
        } else {
            dim
        };
        usize::try_from(from_end).ok().filter(|&dim| dim <= width)
    };
    let ends = match *dims {
        [] => Some((0, width)),
        [from] => at(from).map(|from| (from, width)),
        [from, to] => at(from).zip(at(to)),
        _ => None,
    };
    ends.filter(|(from, to)| from < to)
        .ok_or_else(|| format!("dims = {dims:?} is no range of its {width} dimensions"))
}

impl Op {
    /// Returns how many frames at the end of an episode it leaves without a value.
    pub(crate) fn tail(&self) -> usize {
        match self {
            Self::Next { frames } | Self::Difference { frames, .. } => *frames,
            _ => 0,
        }
    }

    /// Returns the width of the result for an input of `width`.
    pub(crate) fn width(&self, width: usize, state: usize) -> Result<usize, String> {
        let finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
        match self {
            Self::Binarize { high, low } | Self::Clip { low, high } if low > high => {
                Err(format!("low = {low} exceeds high = {high}"))
            }
            Self::Binarize { high, low } | Self::Clip { low, high } if !finite(&[*low, *high]) => {
                Err("low and high must be numbers".into())
            }
            Self::Scale { factor, offset } if !finite(&[*factor, *offset]) => {
                Err("factor and offset must be numbers".into())
            }
            Self::Next { frames: 0 } | Self::Difference { frames: 0, .. } => {
                Err("frames = 0 is the frame itself".into())
            }
            Self::Invert
            | Self::RelativeToAbsolute
            | Self::Binarize { .. }
            | Self::Clip { .. }
            | Self::Scale { .. }
            | Self::Next { .. } => Ok(width),
            Self::Difference { angles, .. } => angles_fit(angles, width),
            Self::MinusState { dims, angles } => {
                state_fits(dims, width, state)?;
                angles_fit(angles, width)
            }
            Self::PlusState { dims } => state_fits(dims, width, state),
            Self::Rotate { from, to } if from.width() == width => Ok(to.width()),
            Self::Rotate { from, .. } => Err(format!(
                "{from:?} takes {} dimensions, not {width}",
                from.width()
            )),
        }
    }

    pub(crate) fn apply(&self, columns: &mut Columns, stored: Stored<'_>) -> Result<(), String> {
        let state = |dims: &[i64]| {
            let (from, to) = range(dims, stored.state_width)?;
            Ok::<_, String>(Columns::slice(stored.state, stored.state_width, from, to))
        };
        let minus = |angles: &[usize], dim: usize, a: f32, b: f32| {
            if angles.contains(&dim) {
                wrap(a - b)
            } else {
                a - b
            }
        };
        match self {
            Self::Invert => columns.each_dim(conventions::invert),
            Self::Binarize { high, low } => {
                columns.each_dim(|values| conventions::binarize(values, *high, *low));
            }
            Self::RelativeToAbsolute => columns.each_dim(conventions::relative_to_absolute),
            Self::Clip { low, high } => columns.each_value(|x| x.clamp(*low, *high)),
            Self::Scale { factor, offset } => columns.each_value(|x| x * factor + offset),
            Self::Next { frames } => columns.each_dim(|values| later(values, *frames)),
            Self::Difference { frames, angles } => {
                let now = Columns {
                    width: columns.width,
                    values: columns.values.clone(),
                };
                columns.each_dim(|values| later(values, *frames));
                columns.with(|at| now.values[at], |dim, a, b| minus(angles, dim, a, b));
            }
            Self::MinusState { dims, angles } => {
                let other = state(dims)?;
                columns.with(|at| other.values[at], |dim, a, b| minus(angles, dim, a, b));
            }
            Self::PlusState { dims } => {
                let other = state(dims)?;
                columns.with(|at| other.values[at], |_, a, b| a + b);
            }
            Self::Rotate { from, to } => {
                let rows = columns.values.chunks_exact(columns.width).enumerate();
                let rows = rows.map(|(frame, row)| {
                    from.convert(row, *to).ok_or_else(|| {
                        format!("frame {frame} of its episode holds {row:?}, which is no rotation")
                    })
                });
                columns.values = rows.collect::<Result<Vec<_>, _>>()?.concat();
                columns.width = to.width();
            }
        }
        Ok(())
    }
}

fn angles_fit(angles: &[usize], width: usize) -> Result<usize, String> {
    match angles.iter().find(|&&dim| dim >= width) {
        None => Ok(width),
        Some(dim) => Err(format!("angles names dimension {dim} of {width}")),
    }
}

fn state_fits(dims: &[i64], width: usize, state: usize) -> Result<usize, String> {
    let (from, to) = range(dims, state).map_err(|e| format!("of the state, {e}"))?;
    if to - from == width {
        Ok(width)
    } else {
        Err(format!(
            "{} dimensions of the state do not fit {width}",
            to - from
        ))
    }
}

/// Returns the values some frames later; the last ones repeat.
fn later(values: &[f32], frames: usize) -> Vec<f32> {
    let last = values.len().saturating_sub(1);
    let at = (0..values.len()).map(|row| values[(row + frames).min(last)]);
    at.collect()
}

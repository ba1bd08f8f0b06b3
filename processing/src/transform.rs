//! From a dataset's stored columns to its action space: a small vocabulary, chosen in TOML.
//!
//! ```toml
//! transform.action = [
//!     { from = "state", dims = [0, 6], ops = [{ kind = "difference", angles = [3, 4, 5] }] },
//!     { from = "action", dims = [-1], ops = [{ kind = "binarize", high = 0.95, low = 0.05 }] },
//! ]
//! ```
//!
//! Parts stand side by side in their order. Each is a slice of a stored column, or a constant, on
//! which operations work one after the other, over a whole episode. Statistics are taken of the
//! result.

use serde::{Deserialize, Serialize};

use crate::op::{Columns, Op, range};

/// What a dataset's stored columns become.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Transform {
    /// Parts of the action; none leaves the stored action as it is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub action: Vec<Part>,
    /// Parts of the proprioception; none leaves the stored state as it is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub state: Vec<Part>,
    /// A step every so many frames, from the first frame of an episode on.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub every: usize,
}

fn one() -> usize {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "what serde calls")]
fn is_one(value: &usize) -> bool {
    *value == 1
}

impl Default for Transform {
    fn default() -> Self {
        Self {
            action: Vec::new(),
            state: Vec::new(),
            every: 1,
        }
    }
}

/// Some dimensions of the result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "snake_case", deny_unknown_fields)]
pub enum Part {
    /// Dimensions of the stored action.
    Action {
        /// First, and one past the last; negative ones count from the end. One number goes to the
        /// end, none takes all.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        dims: Vec<i64>,
        /// What is done to them, in this order.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        ops: Vec<Op>,
    },
    /// Dimensions of the stored state.
    State {
        /// As for the action.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        dims: Vec<i64>,
        /// As for the action.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        ops: Vec<Op>,
    },
    /// The same value in every frame.
    Constant {
        /// The value.
        value: f32,
        /// Number of dimensions.
        width: usize,
    },
}

/// The stored columns of one episode, frame by frame.
#[derive(Clone, Copy, Debug)]
pub struct Stored<'a> {
    /// [frames, `action_width`].
    pub action: &'a [f32],
    /// Dimensions of the stored action.
    pub action_width: usize,
    /// [frames, `state_width`]; empty without a state.
    pub state: &'a [f32],
    /// Dimensions of the stored state; 0 without one.
    pub state_width: usize,
}

impl Stored<'_> {
    fn frames(&self) -> usize {
        self.action
            .len()
            .checked_div(self.action_width)
            .unwrap_or(0)
    }
}

/// What an episode's columns became, with as many rows as before.
#[derive(Clone, Debug, PartialEq)]
pub struct Transformed {
    /// [frames, width]. Rows without a step of their own repeat the last step before them, so that
    /// a chunk that is padded by its last row is padded by the last action.
    pub action: Vec<f32>,
    /// [frames, width].
    pub state: Vec<f32>,
}

impl Transform {
    /// Returns whether the columns stay as they are.
    pub fn is_identity(&self) -> bool {
        *self == Self::default()
    }

    /// Returns the dimensions of the action and of the proprioception for stored columns of these
    /// widths; the error names every part that does not fit.
    pub fn widths(&self, action: usize, state: usize) -> Result<(usize, usize), Vec<String>> {
        let mut faults = Vec::new();
        if self.every == 0 {
            faults.push("every = 0: a step every frame is 1".to_owned());
        }
        let mut width = |key: &str, parts: &[Part], stored: usize| {
            if parts.is_empty() {
                return stored;
            }
            let mut sum = 0;
            for (i, part) in parts.iter().enumerate() {
                match part.width(action, state) {
                    Ok(width) => sum += width,
                    Err(reason) => faults.push(format!("{key}[{i}]: {reason}")),
                }
            }
            sum
        };
        let widths = (
            width("action", &self.action, action),
            width("state", &self.state, state),
        );
        if faults.is_empty() {
            Ok(widths)
        } else {
            Err(faults)
        }
    }

    /// Returns how many frames at the end of an episode have no action.
    pub fn tail(&self) -> usize {
        let parts = self.action.iter().chain(&self.state);
        parts.map(Part::tail).max().unwrap_or(0)
    }

    /// Returns whether frame `frame` of an episode of `frames` is a step, that is, has an action.
    pub fn is_step(&self, frame: u64, frames: u64) -> bool {
        frame.is_multiple_of(self.every as u64) && frame + (self.tail() as u64) < frames
    }

    /// Returns how many steps lie between a frame and the end of its episode, itself included.
    pub fn steps_left(&self, frame: u64, frames: u64) -> u64 {
        let end = frames.saturating_sub(self.tail() as u64);
        end.saturating_sub(frame).div_ceil(self.every as u64)
    }

    /// Transforms one episode; the error says which frame cannot be.
    ///
    /// # Panics
    /// When [`Self::widths`] has faults for these columns.
    pub fn apply(&self, stored: Stored<'_>) -> Result<Transformed, String> {
        let frames = stored.frames();
        let mut action = beside(&self.action, stored, stored.action)?;
        let state = beside(&self.state, stored, stored.state)?;
        let width = action.len().checked_div(frames).unwrap_or(0);
        if let Some(end) = frames.checked_sub(self.tail() + 1) {
            let last = end - end % self.every;
            for row in last + 1..frames {
                action.copy_within(last * width..(last + 1) * width, row * width);
            }
        }
        Ok(Transformed { action, state })
    }
}

/// Puts parts side by side.
fn beside(parts: &[Part], stored: Stored<'_>, as_is: &[f32]) -> Result<Vec<f32>, String> {
    if parts.is_empty() {
        return Ok(as_is.to_vec());
    }
    let frames = stored.frames();
    let made: Vec<Columns> = parts
        .iter()
        .map(|part| part.apply(stored))
        .collect::<Result<_, String>>()?;
    let mut values = Vec::with_capacity(frames * made.iter().map(|c| c.width).sum::<usize>());
    for frame in 0..frames {
        for columns in &made {
            values.extend_from_slice(columns.row(frame));
        }
    }
    Ok(values)
}

impl Part {
    fn ops(&self) -> &[Op] {
        match self {
            Self::Action { ops, .. } | Self::State { ops, .. } => ops,
            Self::Constant { .. } => &[],
        }
    }

    fn tail(&self) -> usize {
        self.ops().iter().map(Op::tail).sum()
    }

    fn width(&self, action: usize, state: usize) -> Result<usize, String> {
        let (dims, stored, what) = match self {
            Self::Action { dims, .. } => (dims, action, "action"),
            Self::State { dims, .. } => (dims, state, "state"),
            Self::Constant { value, width } => {
                return if value.is_finite() {
                    Ok(*width)
                } else {
                    Err(format!("value = {value} is not a number"))
                };
            }
        };
        let (from, to) = range(dims, stored).map_err(|e| format!("of the {what}, {e}"))?;
        self.ops()
            .iter()
            .try_fold(to - from, |width, op| op.width(width, state))
    }

    fn apply(&self, stored: Stored<'_>) -> Result<Columns, String> {
        let (dims, values, width) = match self {
            Self::Action { dims, .. } => (dims, stored.action, stored.action_width),
            Self::State { dims, .. } => (dims, stored.state, stored.state_width),
            Self::Constant { value, width } => {
                return Ok(Columns {
                    width: *width,
                    values: vec![*value; width * stored.frames()],
                });
            }
        };
        let (from, to) = range(dims, width)?;
        let mut columns = Columns::slice(values, width, from, to);
        for op in self.ops() {
            op.apply(&mut columns, stored)?;
        }
        Ok(columns)
    }
}

#[cfg(test)]
#[path = "transform_tests.rs"]
mod tests;

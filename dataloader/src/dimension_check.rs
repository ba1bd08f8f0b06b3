//! What is suspicious about the values of a vector, dimension by dimension.

use pollen_core::ActionSpace;
use pollen_processing::ActionStats;
use serde::Serialize;

use crate::columns::{Columns, Rows};

/// A range of the middle 98 % below this share of the whole range is tiny: normalised by it, the
/// rest of the values lie a hundred times outside of [-1, 1].
const TINY_SHARE: f32 = 0.01;
/// Below this share of a dimension's scale its quantiles are not used for normalising.
const NO_RANGE: f32 = 1e-4;
/// So many times the middle range beyond a quantile, a value is an outlier.
const FAR: f32 = 10.0;
/// Rounding that a gripper may exceed its range by.
const ROUNDING: f32 = 1e-3;

/// One dimension of an action or a state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Dimension {
    /// Its name: the embodiment's, the dataset's, or its number.
    pub name: String,
    /// Physical unit; empty where nobody says.
    pub unit: String,
}

impl Dimension {
    /// Returns the dimensions of an action space.
    pub fn of_space(space: &ActionSpace) -> Vec<Self> {
        let dims = space.dims.iter();
        dims.map(|dim| Self {
            name: dim.name.clone(),
            unit: dim.unit.clone(),
        })
        .collect()
    }

    /// Returns the dimensions of a stored vector: names the dataset gives, or numbers.
    pub fn stored(names: Option<Vec<String>>, width: usize) -> Vec<Self> {
        let names = names.filter(|names| names.len() == width);
        let names = names.unwrap_or_else(|| (0..width).map(|dim| dim.to_string()).collect());
        let unit = String::new;
        names
            .into_iter()
            .map(|name| Self { name, unit: unit() })
            .collect()
    }

    /// Returns whether it is a gripper, by its unit or its name.
    pub fn is_gripper(&self) -> bool {
        let name = self.name.to_lowercase();
        self.unit == "open_fraction" || name.contains("gripper") || name == "grasp"
    }
}

/// Something to look at, with what was seen and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What is checked, for example `constant` or `gripper_polarity`.
    pub check: &'static str,
    /// Where: a dimension, an episode; empty for the dataset.
    pub subject: String,
    /// What was found, with figures.
    pub evidence: String,
    /// What to set or do; empty where nothing is wrong.
    pub fix: String,
}

/// Counts what statistics do not tell, in a second pass over the columns.
#[derive(Debug)]
pub struct DimensionCheck<'a> {
    of: &'static str,
    stats: &'a ActionStats,
    dims: &'a [Dimension],
    not_finite: Vec<Seen>,
    beyond: Vec<Seen>,
}

/// Frames of a kind.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    frames: u64,
    /// Episode and frame of the first.
    first: (u64, u64),
}

impl Seen {
    fn add(&mut self, at: (u64, u64)) {
        if self.frames == 0 {
            self.first = at;
        }
        self.frames += 1;
    }
}

impl<'a> DimensionCheck<'a> {
    /// Starts; `of` is `action` or `state`.
    ///
    /// # Panics
    /// When there are not as many dimensions as statistics.
    pub fn new(of: &'static str, stats: &'a ActionStats, dims: &'a [Dimension]) -> Self {
        assert_eq!(
            stats.dim(),
            dims.len(),
            "one description for each dimension"
        );
        Self {
            of,
            stats,
            dims,
            not_finite: vec![Seen::default(); dims.len()],
            beyond: vec![Seen::default(); dims.len()],
        }
    }

    /// Adds the transformed columns of a file; `rows` is their action or their state.
    pub fn push(&mut self, columns: &Columns, rows: &Rows) {
        if rows.width != self.dims.len() {
            return;
        }
        for (number, row) in rows.values.chunks_exact(rows.width).enumerate() {
            let at = (columns.episode[number], columns.frame[number]);
            for (dim, &value) in row.iter().enumerate() {
                if !value.is_finite() {
                    self.not_finite[dim].add(at);
                } else if self.is_far(dim, value) {
                    self.beyond[dim].add(at);
                }
            }
        }
    }

    fn is_far(&self, dim: usize, value: f32) -> bool {
        let (low, high) = (self.stats.q01[dim], self.stats.q99[dim]);
        let far = FAR * (high - low);
        far > 0.0 && (value > high + far || value < low - far)
    }

    /// Returns what is suspicious.
    pub fn finish(self) -> Vec<Finding> {
        let mut found = Vec::new();
        for dim in 0..self.dims.len() {
            self.check(dim, &mut found);
        }
        found
    }

    fn check(&self, dim: usize, found: &mut Vec<Finding>) {
        let (stats, name) = (self.stats, &self.dims[dim]);
        let (min, max) = (stats.min[dim], stats.max[dim]);
        let (low, high) = (stats.q01[dim], stats.q99[dim]);
        let mut add = |check, evidence: String, fix: &str| {
            found.push(Finding {
                check,
                subject: format!("{} {dim} `{}`", self.of, name.name),
                evidence,
                fix: fix.into(),
            });
        };
        let seen = self.not_finite[dim];
        if seen.frames > 0 {
            add(
                "not_finite",
                format!(
                    "{} frames are NaN or infinite, the first is frame {} of episode {}",
                    seen.frames, seen.first.1, seen.first.0
                ),
                "they are left out of statistics and quarantined in training; repair them, or raise \
                 data.max_bad_samples",
            );
        }
        if name.is_gripper() {
            if min < -1.0 - ROUNDING || max > 1.0 + ROUNDING {
                add(
                    "gripper_range",
                    format!("from {min} to {max}, outside of [0, 1] and of [-1, 1]"),
                    "bring it to 1 = open, 0 = closed with { kind = \"scale\" } or \
                     { kind = \"binarize\" } in transform.action",
                );
            } else if min < -ROUNDING {
                add(
                    "gripper_range",
                    format!("from {min} to {max}: in [-1, 1], embodiments expect [0, 1]"),
                    "add { kind = \"scale\", factor = 0.5, offset = 0.5 } to its part of \
                     transform.action, and see that 1 is open",
                );
            }
            // Open or closed all but all of the time is what grippers are.
            return;
        }
        let scale = min.abs().max(max.abs()).max(1e-3);
        if max == min {
            add(
                "constant",
                format!("it is {min} in all {} frames", stats.count),
                "it is normalised to 0 and teaches nothing; if it should move, look for the right \
                 field",
            );
        } else if high - low < NO_RANGE * scale || high - low < TINY_SHARE * (max - min) {
            let wider = if high > low {
                format!(", {:.0} times as wide", (max - min) / (high - low))
            } else {
                String::new()
            };
            add(
                "tiny_range",
                format!(
                    "the middle 98 % lie from {low} to {high}, the whole from {min} to {max}{wider}"
                ),
                "divided by so little, noise fills [-1, 1]; drop frames that do not move with \
                 filters.idle_below, or set normalization = \"mean_std\"",
            );
        }
        let seen = self.beyond[dim];
        if seen.frames > 0 {
            add(
                "outliers",
                format!(
                    "{} of {} frames lie more than {FAR} middle ranges beyond the quantiles (from \
                     {min} to {max}, quantiles {low} and {high}), the first is frame {} of episode \
                     {}",
                    seen.frames, stats.count, seen.first.1, seen.first.0
                ),
                "they are clipped to -1 or 1; cut them with { kind = \"clip\" } in \
                 transform.action, or leave the episode out",
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dims(names: &[&str]) -> Vec<Dimension> {
        let names = names
            .iter()
            .map(|name| (*name).to_owned())
            .collect::<Vec<_>>();
        Dimension::stored(Some(names.clone()), names.len())
    }

    /// Columns with one row for each of `values`, [rows, width].
    fn columns(width: usize, values: &[f32]) -> Columns {
        let rows = values.len() / width;
        Columns {
            action: Rows {
                width,
                values: values.to_vec(),
            },
            episode: vec![3; rows],
            frame: (0..rows as u64).collect(),
            ..Columns::default()
        }
    }

    fn findings(names: &[&str], values: &[f32]) -> Vec<(&'static str, String)> {
        let dims = dims(names);
        let finite: Vec<f32> = values
            .chunks_exact(names.len())
            .filter(|row| row.iter().all(|value| value.is_finite()))
            .flatten()
            .copied()
            .collect();
        let stats = ActionStats::of(&finite, names.len()).expect("frames");
        let mut check = DimensionCheck::new("action", &stats, &dims);
        let columns = columns(names.len(), values);
        check.push(&columns, &columns.action);
        let found = check.finish();
        assert!(found.iter().all(|f| !f.fix.is_empty()));
        found.into_iter().map(|f| (f.check, f.evidence)).collect()
    }

    #[test]
    fn ordinary_dimensions_give_no_finding() {
        let values: Vec<f32> = (0..400)
            .flat_map(|i| [(i as f32 * 0.1).sin(), f32::from(u8::from(i % 50 > 20))])
            .collect();
        assert_eq!(findings(&["dx", "gripper"], &values), []);
    }

    #[test]
    fn every_kind_of_trouble_is_named_with_its_figures() {
        let mut values: Vec<f32> = (0..1000)
            .flat_map(|i| {
                let wave = (i as f32 * 0.1).sin();
                [0.5, 1e-5 * wave, wave, wave * 255.0, wave]
            })
            .collect();
        values[5 * 7 + 1] = 0.9; // one large motion of a dimension at rest
        values[5 * 9 + 2] = f32::NAN;
        let names = ["still", "rest", "dy", "gripper", "left_gripper"];
        let found = findings(&names, &values);
        let checks: Vec<&str> = found.iter().map(|(check, _)| *check).collect();
        assert_eq!(
            checks,
            [
                "constant",
                "tiny_range",
                "outliers",
                "not_finite",
                "gripper_range",
                "gripper_range"
            ]
        );
        assert!(found[0].1.contains("0.5 in all 999 frames"), "{found:?}");
        assert!(found[2].1.starts_with("1 of 999 frames"), "{found:?}");
        assert!(found[2].1.ends_with("frame 7 of episode 3"), "{found:?}");
        assert!(found[3].1.ends_with("frame 9 of episode 3"), "{found:?}");
        assert!(found[4].1.contains("outside of [0, 1]"), "{found:?}");
        assert!(found[5].1.contains("in [-1, 1]"), "{found:?}");
    }
}

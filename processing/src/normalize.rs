//! Scaling of actions and proprioception to [-1, 1] and back.
//!
//! The rule is y = clip(2 (x - low) / (high - low + 1e-8) - 1, -1, 1) with the 1 % and 99 %
//! quantiles, on the dimensions that the action space marks; the others pass through. A dimension
//! that (almost) never moves would be blown up to noise by it, so it falls back to minimum and
//! maximum, and if these coincide too, to 0; [`Normalizer::fallbacks`] says where.

use std::fmt;

use pollen_core::ActionSpace;
use pollen_core::action_space::Normalize;

use crate::error::Error;
use crate::stats::ActionStats;

/// Added to a range or a deviation before dividing by it.
const EPSILON: f32 = 1e-8;
/// A range below this share of a dimension's scale is no range.
const TINY_RANGE: f32 = 1e-4;
/// The scale of a dimension is its largest absolute value, but at least this, in its own unit.
const SMALLEST_SCALE: f32 = 1e-3;

/// What is done to one dimension.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Rule {
    /// Nothing.
    Keep,
    /// Scaled from [low, high] to [-1, 1], clipped.
    Bounds { low: f32, high: f32 },
    /// Centred and divided by the deviation, not clipped.
    Gaussian { mean: f32, std: f32 },
    /// 0; back to the one value it ever had.
    Constant { value: f32 },
}

/// What replaced the quantiles of a dimension that hardly moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FallbackKind {
    /// Minimum and maximum.
    MinMax,
    /// The constant 0.
    Zero,
}

/// A dimension whose quantiles could not be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fallback {
    /// Dimension.
    pub dim: usize,
    /// Its name, if the action space gives one.
    pub name: String,
    /// What is used instead.
    pub kind: FallbackKind,
}

impl fmt::Display for Fallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let instead = match self.kind {
            FallbackKind::MinMax => "its 1 % and 99 % quantiles coincide, scaled by min and max",
            FallbackKind::Zero => "it never moves, normalised to 0",
        };
        write!(f, "dimension {} `{}`: {instead}", self.dim, self.name)
    }
}

/// Brings vectors of one space to [-1, 1] and back.
#[derive(Clone, Debug, PartialEq)]
pub struct Normalizer {
    rules: Vec<Rule>,
    fallbacks: Vec<Fallback>,
}

impl Normalizer {
    /// Makes the normaliser of a dataset's actions: quantiles where the space says so.
    pub fn for_actions(stats: &ActionStats, space: &ActionSpace) -> Result<Self, Error> {
        check(stats, space.dim(), &space.name)?;
        let dims = space.dims.iter();
        Ok(Self::safe(
            stats,
            dims.map(|dim| (dim.name.clone(), dim.normalize)),
        ))
    }

    /// Makes the normaliser of proprioception: quantiles in all `dim` dimensions.
    pub fn for_proprio(stats: &ActionStats, dim: usize) -> Result<Self, Error> {
        check(stats, dim, "proprioception")?;
        let names = (0..dim).map(|i| (format!("proprio_{i}"), Normalize::Quantiles));
        Ok(Self::safe(stats, names))
    }

    /// Makes the reference's bounds without any fallback: a constant dimension goes to -1 or 1. For
    /// weights that were trained that way; `mask` marks the dimensions that are scaled.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn reference_bounds(low: &[f32], high: &[f32], mask: &[bool]) -> Self {
        assert!(low.len() == high.len() && low.len() == mask.len());
        let bounds = low.iter().zip(high);
        Self::masked(bounds.map(|(&low, &high)| Rule::Bounds { low, high }), mask)
    }

    /// Makes the alternative (x - mean) / (std + 1e-8), which is not clipped.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn reference_gaussian(mean: &[f32], std: &[f32], mask: &[bool]) -> Self {
        assert!(mean.len() == std.len() && mean.len() == mask.len());
        let moments = mean.iter().zip(std);
        Self::masked(
            moments.map(|(&mean, &std)| Rule::Gaussian { mean, std }),
            mask,
        )
    }

    fn masked(rules: impl Iterator<Item = Rule>, mask: &[bool]) -> Self {
        let rules = rules.zip(mask);
        Self {
            rules: rules
                .map(|(rule, &scaled)| if scaled { rule } else { Rule::Keep })
                .collect(),
            fallbacks: Vec::new(),
        }
    }

    fn safe(stats: &ActionStats, dims: impl Iterator<Item = (String, Normalize)>) -> Self {
        let mut fallbacks = Vec::new();
        let rules = dims.enumerate().map(|(dim, (name, normalize))| {
            if normalize == Normalize::Keep {
                return Rule::Keep;
            }
            let (min, max) = (stats.min[dim], stats.max[dim]);
            let tiny = TINY_RANGE * min.abs().max(max.abs()).max(SMALLEST_SCALE);
            let (low, high) = (stats.q01[dim], stats.q99[dim]);
            let (kind, rule) = if high - low >= tiny {
                return Rule::Bounds { low, high };
            } else if max - min >= tiny {
                let (low, high) = (min, max);
                (FallbackKind::MinMax, Rule::Bounds { low, high })
            } else {
                let value = stats.mean[dim];
                (FallbackKind::Zero, Rule::Constant { value })
            };
            fallbacks.push(Fallback { dim, name, kind });
            rule
        });
        Self {
            rules: rules.collect(),
            fallbacks,
        }
    }

    /// Returns the number of dimensions.
    pub fn dim(&self) -> usize {
        self.rules.len()
    }

    /// Returns the dimensions whose quantiles could not be used; tell the user.
    pub fn fallbacks(&self) -> &[Fallback] {
        &self.fallbacks
    }

    /// Normalises vectors in place.
    ///
    /// # Shapes
    /// `values` is [any, dim].
    pub fn normalize(&self, values: &mut [f32]) {
        self.apply(values, |rule, x| match rule {
            Rule::Keep => x,
            Rule::Bounds { low, high } => {
                (2.0 * (x - low) / (high - low + EPSILON) - 1.0).clamp(-1.0, 1.0)
            }
            Rule::Gaussian { mean, std } => (x - mean) / (std + EPSILON),
            Rule::Constant { .. } => 0.0,
        });
    }

    /// Undoes [`Self::normalize`] in place, except that clipped values stay at the bounds.
    ///
    /// # Shapes
    /// `values` is [any, dim].
    pub fn unnormalize(&self, values: &mut [f32]) {
        self.apply(values, |rule, y| match rule {
            Rule::Keep => y,
            Rule::Bounds { low, high } => (y + 1.0) * 0.5 * (high - low + EPSILON) + low,
            Rule::Gaussian { mean, std } => y * (std + EPSILON) + mean,
            Rule::Constant { value } => value,
        });
    }

    fn apply(&self, values: &mut [f32], change: impl Fn(Rule, f32) -> f32) {
        debug_assert!(values.len().is_multiple_of(self.dim()), "whole vectors");
        for vector in values.chunks_exact_mut(self.dim()) {
            for (value, &rule) in vector.iter_mut().zip(&self.rules) {
                *value = change(rule, *value);
            }
        }
    }
}

fn check(stats: &ActionStats, expected: usize, space: &str) -> Result<(), Error> {
    let lengths = [
        &stats.q01,
        &stats.q99,
        &stats.mean,
        &stats.std,
        &stats.min,
        &stats.max,
    ];
    match lengths.iter().find(|values| values.len() != expected) {
        None => Ok(()),
        Some(values) => Err(Error::Dimensions {
            space: space.into(),
            expected,
            found: values.len(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{conventions, golden};
    use pollen_core::action_space::ActionDim;
    use proptest::prelude::*;
    use serde_json::Value;

    fn floats(value: &Value) -> Vec<f32> {
        match value {
            Value::Array(items) => items.iter().flat_map(floats).collect(),
            other => vec![other.as_f64().expect("a number") as f32],
        }
    }

    fn pose(value: &Value) -> [f64; 6] {
        std::array::from_fn(|i| value[i].as_f64().expect("a number"))
    }

    fn assert_close(name: &str, ours: &[f32], theirs: &[f32]) {
        assert_eq!(ours.len(), theirs.len(), "{name}");
        for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
            let tolerance = 1e-6 + 1e-5 * b.abs();
            assert!(
                (a - b).abs() <= tolerance,
                "{name}, value {i}: {a} instead of {b}"
            );
        }
    }

    fn golden_case(case: &Value) {
        let name = case["name"].as_str().expect("a name");
        let (stats, output) = (&case["stats"], &case["output"]);
        let mask = || -> Vec<bool> {
            let mask = stats["mask"].as_array().expect("a mask");
            mask.iter().map(|m| m.as_bool().expect("a bool")).collect()
        };
        let normalizer = match name {
            "q01/q99 bounds, gripper untouched" => {
                let (low, high) = (floats(&stats["p01"]), floats(&stats["p99"]));
                Normalizer::reference_bounds(&low, &high, &mask())
            }
            "min/max bounds, no mask" => {
                let (low, high) = (floats(&stats["min"]), floats(&stats["max"]));
                Normalizer::reference_bounds(&low, &high, &mask())
            }
            "gaussian, gripper untouched" => {
                let (mean, std) = (floats(&stats["mean"]), floats(&stats["std"]));
                Normalizer::reference_gaussian(&mean, &std, &mask())
            }
            "statistics of a data set" => {
                let stats = ActionStats::of(&floats(&case["input"]), 7).expect("finite");
                for (key, ours) in [
                    ("mean", &stats.mean),
                    ("std", &stats.std),
                    ("min", &stats.min),
                    ("max", &stats.max),
                    ("p01", &stats.q01),
                    ("p99", &stats.q99),
                ] {
                    assert_close(&format!("{name}, {key}"), ours, &floats(&output[key]));
                }
                return;
            }
            "CALVIN: absolute to relative actions" => {
                let input = &case["input"];
                let steps = ["max_pos", "max_orn"].map(|key| input[key].as_f64().expect("f64"));
                let actions = input["actions"].as_array().expect("actions");
                for (i, action) in actions.iter().enumerate() {
                    let ours = conventions::relative_pose(
                        pose(action),
                        pose(&input["robot_obs"][i]),
                        steps,
                    );
                    let theirs = pose(&output[i]);
                    let off = (0..6).map(|k| (ours[k] - theirs[k]).abs());
                    assert!(
                        off.fold(0.0, f64::max) < 1e-9,
                        "{name}: {ours:?} {theirs:?}"
                    );
                    assert_eq!(output[i][6], action[6], "the gripper is kept");
                }
                return;
            }
            gripper => {
                let input = floats(&case["input"]);
                let ours = match gripper {
                    "gripper: binarize" => conventions::binarize(&input, 0.95, 0.05),
                    "gripper: invert" => conventions::invert(&input),
                    "gripper: relative to absolute" => conventions::relative_to_absolute(&input),
                    unknown => panic!("a case that no test knows: {unknown}"),
                };
                assert_close(gripper, &ours, &floats(output));
                return;
            }
        };
        let (input, expected) = (floats(&case["input"]), floats(output));
        let mut values = input.clone();
        normalizer.normalize(&mut values);
        assert_close(name, &values, &expected);
        normalizer.unnormalize(&mut values);
        let clipped = name != "gaussian, gripper untouched";
        for ((back, x), y) in values.iter().zip(&input).zip(&expected) {
            if !clipped || y.abs() < 1.0 {
                assert!(
                    (back - x).abs() < 1e-6 + 1e-5 * x.abs(),
                    "{name}: {x} -> {back}"
                );
            }
        }
    }

    #[test]
    fn golden_normalize() {
        let file: Value =
            serde_json::from_slice(&golden::read("normalize.json")).expect("valid JSON");
        let cases = file["cases"].as_array().expect("cases");
        assert!(cases.len() >= 14, "cases are missing");
        cases.iter().for_each(golden_case);
    }

    fn space(rules: &[Normalize]) -> ActionSpace {
        let dim = |(i, &normalize)| ActionDim {
            name: format!("d{i}"),
            unit: "m".into(),
            normalize,
        };
        ActionSpace {
            name: "test".into(),
            prompt: "Test".into(),
            num_arms: 1,
            proprio_dim: 0,
            dims: rules.iter().enumerate().map(dim).collect(),
        }
    }

    #[test]
    fn idle_dimensions_fall_back_and_are_reported() {
        use Normalize::{Keep, Quantiles};
        // Moving, moving in 1 frame of 400, never moving, gripper.
        let frames: Vec<f32> = (0..400)
            .flat_map(|i| {
                [
                    i as f32,
                    if i == 7 { 0.2 } else { 0.0 },
                    0.25,
                    (i % 2) as f32,
                ]
            })
            .collect();
        let stats = ActionStats::of(&frames, 4).expect("finite");
        let space = space(&[Quantiles, Quantiles, Quantiles, Keep]);
        let normalizer = Normalizer::for_actions(&stats, &space).expect("dims fit");
        let texts: Vec<String> = normalizer
            .fallbacks()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            texts,
            [
                "dimension 1 `d1`: its 1 % and 99 % quantiles coincide, scaled by min and max",
                "dimension 2 `d2`: it never moves, normalised to 0",
            ]
        );
        let mut frame = [399.0, 0.2, 0.25, 1.0];
        normalizer.normalize(&mut frame);
        assert!((frame[1] - 1.0).abs() < 1e-6);
        assert_eq!([frame[0], frame[2], frame[3]], [1.0, 0.0, 1.0]);
        let mut action = [0.0, -1.0, 0.9, 0.3];
        normalizer.unnormalize(&mut action);
        assert!((action[0] - 199.5).abs() < 1e-3 && action[1].abs() < 1e-6);
        assert_eq!(action[2..], [0.25, 0.3]);
    }

    #[test]
    fn small_motions_are_no_idle_dimension() {
        let frames: Vec<f32> = (0..100).map(|i| 1e-6 * i as f32).collect();
        let stats = ActionStats::of(&frames, 1).expect("finite");
        let normalizer = Normalizer::for_proprio(&stats, 1).expect("dims fit");
        assert!(normalizer.fallbacks().is_empty());
        let noise: Vec<f32> = (0..100).map(|i| 2.0 + 1e-6 * (i % 2) as f32).collect();
        let stats = ActionStats::of(&noise, 1).expect("finite");
        let normalizer = Normalizer::for_proprio(&stats, 1).expect("dims fit");
        assert_eq!(normalizer.fallbacks()[0].kind, FallbackKind::Zero);
    }

    #[test]
    fn foreign_statistics_are_refused() {
        let stats = ActionStats::of(&[0.0; 6], 6).expect("finite");
        let error = Normalizer::for_actions(&stats, &space(&[Normalize::Keep; 7]))
            .expect_err("six are not seven");
        assert_eq!(
            error.to_string(),
            "statistics of `test` have 6 dimensions, not 7: compute them again"
        );
    }

    proptest! {
        #[test]
        fn normalised_values_are_bounded_and_come_back(
            frames in prop::collection::vec(-3.0_f32..3.0, 6..200)
        ) {
            let whole = frames.len() / 2 * 2;
            let stats = ActionStats::of(&frames[..whole], 2).expect("finite");
            let normalizer = Normalizer::for_proprio(&stats, 2).expect("dims fit");
            let mut values = frames[..whole].to_vec();
            normalizer.normalize(&mut values);
            prop_assert!(values.iter().all(|y| (-1.0..=1.0).contains(y)));
            let normalised = values.clone();
            normalizer.unnormalize(&mut values);
            for (i, (x, back)) in frames.iter().zip(&values).enumerate() {
                let inside = normalised[i].abs() < 1.0;
                prop_assert!(!inside || (x - back).abs() < 1e-4, "{} {}", x, back);
            }
        }
    }
}

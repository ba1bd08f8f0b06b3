//! Statistics of actions and proprioception, computed exactly and in f64.
//!
//! They are made of the very values that are normalised with them, that is after every transform of
//! the dataset. The result does not depend on the order in which frames are pushed.

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Statistics of each dimension over all frames of a dataset.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActionStats {
    /// 1 % quantiles, linearly interpolated.
    pub q01: Vec<f32>,
    /// 99 % quantiles.
    pub q99: Vec<f32>,
    /// Means.
    pub mean: Vec<f32>,
    /// Population standard deviations.
    pub std: Vec<f32>,
    /// Smallest values.
    pub min: Vec<f32>,
    /// Largest values.
    pub max: Vec<f32>,
    /// Number of frames.
    pub count: u64,
}

impl ActionStats {
    /// Computes the statistics of frames stored one after the other.
    ///
    /// # Shapes
    /// `frames` is [count, dim].
    pub fn of(frames: &[f32], dim: usize) -> Result<Self, Error> {
        let mut builder = StatsBuilder::new(dim);
        builder.push(frames)?;
        builder.finish()
    }

    /// Returns the number of dimensions.
    pub fn dim(&self) -> usize {
        self.q01.len()
    }

    /// Returns every fault, each starting with `of`.
    pub fn faults(&self, of: &str) -> Vec<String> {
        let mut faults = Vec::new();
        let all = [
            ("q99", &self.q99),
            ("mean", &self.mean),
            ("std", &self.std),
            ("min", &self.min),
            ("max", &self.max),
        ];
        for (name, values) in all {
            if values.len() != self.dim() {
                let (found, expected) = (values.len(), self.dim());
                faults.push(format!(
                    "{of}: {name} has {found} dimensions, q01 {expected}"
                ));
            }
        }
        let mut values = self
            .q01
            .iter()
            .chain(all.iter().flat_map(|(_, values)| *values));
        if !values.all(|value| value.is_finite()) {
            faults.push(format!("{of}: a value is not finite"));
        }
        if self.count == 0 {
            faults.push(format!("{of}: made of no frames"));
        }
        if self.q01.iter().zip(&self.q99).any(|(low, high)| low > high) {
            faults.push(format!("{of}: q01 exceeds q99"));
        }
        faults
    }
}

/// Collects frames until the statistics can be computed; holds 4 bytes per value.
#[derive(Clone, Debug)]
pub struct StatsBuilder {
    columns: Vec<Vec<f32>>,
    rows: u64,
}

impl StatsBuilder {
    /// Starts with no frames.
    ///
    /// # Panics
    /// When `dim` is zero.
    pub fn new(dim: usize) -> Self {
        assert!(dim > 0, "a frame has at least one dimension");
        Self {
            columns: vec![Vec::new(); dim],
            rows: 0,
        }
    }

    /// Adds frames.
    ///
    /// # Shapes
    /// `frames` is [any, dim].
    pub fn push(&mut self, frames: &[f32]) -> Result<(), Error> {
        let dim = self.columns.len();
        debug_assert!(frames.len().is_multiple_of(dim), "whole frames");
        if let Some(at) = frames.iter().position(|value| !value.is_finite()) {
            return Err(Error::NotFinite {
                row: self.rows + (at / dim) as u64,
                dim: at % dim,
                value: frames[at],
            });
        }
        for frame in frames.chunks_exact(dim) {
            for (column, &value) in self.columns.iter_mut().zip(frame) {
                column.push(value);
            }
        }
        self.rows += (frames.len() / dim) as u64;
        Ok(())
    }

    /// Computes the statistics.
    pub fn finish(self) -> Result<ActionStats, Error> {
        if self.rows == 0 {
            return Err(Error::NoFrames);
        }
        let mut stats = ActionStats {
            count: self.rows,
            ..ActionStats::default()
        };
        for mut column in self.columns {
            // Sorted, so that the sums do not depend on the order of frames.
            column.sort_unstable_by(f32::total_cmp);
            let count = column.len() as f64;
            let mean = column.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
            let squares: f64 = column.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum();
            stats.q01.push(quantile(&column, 0.01));
            stats.q99.push(quantile(&column, 0.99));
            stats.mean.push(mean as f32);
            stats.std.push((squares / count).sqrt() as f32);
            stats.min.push(column[0]);
            stats.max.push(column[column.len() - 1]);
        }
        Ok(stats)
    }
}

/// Returns the quantile of sorted values, linearly interpolated between neighbours.
fn quantile(sorted: &[f32], share: f64) -> f32 {
    let at = share * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    let (below, above) = (f64::from(below), f64::from(above));
    (below + (above - below) * at.fract()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollen_core::Seed;

    #[test]
    fn a_small_set_by_hand() {
        let frames: Vec<f32> = (0..101).flat_map(|i| [i as f32, 7.0]).collect();
        let stats = ActionStats::of(&frames, 2).expect("finite");
        assert_eq!((stats.q01[0], stats.q99[0]), (1.0, 99.0));
        assert_eq!(
            (stats.min[0], stats.max[0], stats.mean[0]),
            (0.0, 100.0, 50.0)
        );
        assert!((stats.std[0] - 850.0_f32.sqrt()).abs() < 1e-4);
        assert_eq!((stats.q01[1], stats.q99[1], stats.std[1]), (7.0, 7.0, 0.0));
        assert_eq!((stats.count, stats.dim()), (101, 2));
        assert!(stats.faults("x").is_empty());
        let one = ActionStats::of(&[3.0], 1).expect("finite");
        assert_eq!((one.q01[0], one.q99[0], one.std[0]), (3.0, 3.0, 0.0));
    }

    #[test]
    fn large_offsets_keep_their_deviation() {
        let frames: Vec<f32> = (0..1000).map(|i| 1e6 + (i % 2) as f32).collect();
        let stats = ActionStats::of(&frames, 1).expect("finite");
        assert_eq!(stats.std[0], 0.5);
    }

    #[test]
    fn the_order_of_frames_does_not_matter() {
        let mut values = vec![0.0; 3000];
        Seed::new(4).draws().fill_normal(&mut values);
        let forward = ActionStats::of(&values, 3).expect("finite");
        let mut builder = StatsBuilder::new(3);
        for frame in values.chunks_exact(3).rev() {
            builder.push(frame).expect("finite");
        }
        assert_eq!(builder.finish().expect("frames"), forward);
    }

    #[test]
    fn bad_frames_are_named() {
        let error = ActionStats::of(&[0.0, 1.0, 2.0, f32::NAN], 2).expect_err("not a number");
        assert!(
            error.to_string().starts_with("frame 1, dimension 1 is NaN"),
            "{error}"
        );
        let error = StatsBuilder::new(1).finish().expect_err("no frames");
        assert!(error.to_string().contains("at least one frame"), "{error}");
    }

    #[test]
    fn faults_are_listed_together() {
        let mut stats = ActionStats::of(&[0.0, 1.0], 2).expect("finite");
        stats.mean.pop();
        stats.q01[0] = 5.0;
        stats.count = 0;
        assert_eq!(stats.faults("lift actions").len(), 3);
    }
}

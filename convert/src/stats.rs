//! Exact statistics of columns that need not fit in memory.
//!
//! Mean, deviation and range come from one pass. Quantiles are those of NumPy (linear between the
//! two nearest values): the values at the needed ranks are found by a radix descent over
//! order-preserving 32-bit keys, in three more passes of 11, 11 and 10 bits.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};

use crate::picture::ColorHistogram;

/// Names and values of the quantiles.
pub(crate) const QUANTILES: [(&str, f64); 5] = [
    ("q01", 0.01),
    ("q10", 0.10),
    ("q50", 0.50),
    ("q90", 0.90),
    ("q99", 0.99),
];

/// First bit and number of bits of each pass, from the top.
const DIGITS: [(u32, u32); 3] = [(21, 11), (10, 11), (0, 10)];

/// Statistics of a feature, one number a dimension.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct FeatureStats {
    pub(crate) min: Vec<f64>,
    pub(crate) max: Vec<f64>,
    pub(crate) mean: Vec<f64>,
    pub(crate) std: Vec<f64>,
    pub(crate) count: Vec<i64>,
    pub(crate) q01: Vec<f64>,
    pub(crate) q10: Vec<f64>,
    pub(crate) q50: Vec<f64>,
    pub(crate) q90: Vec<f64>,
    pub(crate) q99: Vec<f64>,
}

impl FeatureStats {
    /// Returns the statistics of rows that fit in memory.
    pub(crate) fn of(width: usize, rows: &[f64]) -> Self {
        let mut moments = vec![Moments::default(); width];
        for row in rows.chunks_exact(width) {
            for (moments, value) in moments.iter_mut().zip(row) {
                moments.push(*value);
            }
        }
        let quantiles = (0..width).map(|dimension| {
            let mut values: Vec<f64> = rows
                .iter()
                .skip(dimension)
                .step_by(width)
                .copied()
                .collect();
            values.sort_unstable_by(f64::total_cmp);
            QUANTILES.map(|(_, q)| {
                let (low, high, weight) = position(q, values.len() as u64);
                between(values[low as usize], values[high as usize], weight)
            })
        });
        Self::new(&moments, quantiles)
    }

    fn new(moments: &[Moments], quantiles: impl Iterator<Item = [f64; 5]>) -> Self {
        let mut stats = Self {
            count: vec![moments.first().map_or(0, |m| m.count as i64)],
            ..Self::default()
        };
        for (moments, quantiles) in moments.iter().zip(quantiles) {
            stats.min.push(moments.min);
            stats.max.push(moments.max);
            stats.mean.push(moments.mean);
            stats
                .std
                .push((moments.squares / moments.count.max(1) as f64).sqrt());
            let [q01, q10, q50, q90, q99] = quantiles;
            stats.q01.push(q01);
            stats.q10.push(q10);
            stats.q50.push(q50);
            stats.q90.push(q90);
            stats.q99.push(q99);
        }
        stats
    }

    /// Returns the real-valued statistics with their names.
    pub(crate) fn named(&self) -> [(&'static str, &[f64]); 9] {
        [
            ("min", &self.min),
            ("max", &self.max),
            ("mean", &self.mean),
            ("std", &self.std),
            ("q01", &self.q01),
            ("q10", &self.q10),
            ("q50", &self.q50),
            ("q90", &self.q90),
            ("q99", &self.q99),
        ]
    }
}

/// Returns the ranks around a quantile of `count` values, and the weight of the upper one.
fn position(q: f64, count: u64) -> (u64, u64, f64) {
    let last = count.saturating_sub(1);
    let position = q * last as f64;
    let low = (position as u64).min(last);
    (low, (low + 1).min(last), position - low as f64)
}

fn between(low: f64, high: f64, weight: f64) -> f64 {
    low + (high - low) * weight
}

/// Running mean and squared deviation (Welford).
#[derive(Clone, Copy, Debug)]
struct Moments {
    count: u64,
    mean: f64,
    squares: f64,
    min: f64,
    max: f64,
}

impl Default for Moments {
    fn default() -> Self {
        Self {
            count: 0,
            mean: 0.0,
            squares: 0.0,
            min: f64::INFINITY,
            max: f64::NEG_INFINITY,
        }
    }
}

impl Moments {
    fn push(&mut self, value: f64) {
        self.count += 1;
        let delta = value - self.mean;
        self.mean += delta / self.count as f64;
        self.squares += delta * (value - self.mean);
        self.min = self.min.min(value);
        self.max = self.max.max(value);
    }
}

/// The kind of numbers a column has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Numbers {
    /// 32-bit floats.
    Floats,
    /// Whole numbers that span less than 2^32.
    Integers,
}

/// Statistics of one column, pass by pass: [`Column::measure`] with every row, then for each of
/// [`Column::PASSES`] [`Column::count`] with every row again and [`Column::descend`].
#[derive(Debug)]
pub(crate) struct Column {
    numbers: Numbers,
    moments: Vec<Moments>,
    /// By dimension and rank: the key's digits found so far, and the rank below that prefix.
    ranks: Vec<BTreeMap<u64, (u32, u64)>>,
    /// By dimension and prefix.
    counts: Vec<BTreeMap<u32, Vec<u64>>>,
    pass: usize,
}

impl Column {
    /// Passes that find the quantiles.
    pub(crate) const PASSES: usize = DIGITS.len();

    pub(crate) fn new(width: usize, numbers: Numbers) -> Self {
        Self {
            numbers,
            moments: vec![Moments::default(); width],
            ranks: Vec::new(),
            counts: Vec::new(),
            pass: 0,
        }
    }

    pub(crate) fn width(&self) -> usize {
        self.moments.len()
    }

    /// Takes rows into mean, deviation and range.
    pub(crate) fn measure(&mut self, rows: &[f64]) {
        for row in rows.chunks_exact(self.width()) {
            for (moments, value) in self.moments.iter_mut().zip(row) {
                moments.push(*value);
            }
        }
    }

    /// Starts the search for the quantiles.
    pub(crate) fn start(&mut self) {
        let count = self.moments.first().map_or(0, |moments| moments.count);
        let ranks = QUANTILES.iter().flat_map(|(_, q)| {
            let (low, high, _) = position(*q, count);
            [low, high]
        });
        let ranks: BTreeMap<u64, (u32, u64)> = ranks.map(|rank| (rank, (0, rank))).collect();
        self.ranks = vec![ranks; self.width()];
        self.pass = 0;
        self.clear();
    }

    /// Counts one digit of every value.
    pub(crate) fn count(&mut self, rows: &[f64]) {
        let (shift, bits) = DIGITS[self.pass];
        for row in rows.chunks_exact(self.width()) {
            for (dimension, value) in row.iter().enumerate() {
                let key = self.key(dimension, *value);
                let prefix = if self.pass == 0 {
                    0
                } else {
                    key >> (shift + bits)
                };
                if let Some(counts) = self.counts[dimension].get_mut(&prefix) {
                    counts[((key >> shift) & ((1 << bits) - 1)) as usize] += 1;
                }
            }
        }
    }

    /// Follows each rank into its digit.
    pub(crate) fn descend(&mut self) {
        let (_, bits) = DIGITS[self.pass];
        for (ranks, counts) in self.ranks.iter_mut().zip(&self.counts) {
            for (prefix, rank) in ranks.values_mut() {
                let mut digit = 0;
                for count in counts.get(prefix).into_iter().flatten() {
                    if *rank < *count {
                        break;
                    }
                    *rank -= count;
                    digit += 1;
                }
                *prefix = (*prefix << bits) | digit;
            }
        }
        self.pass += 1;
        if self.pass < DIGITS.len() {
            self.clear();
        }
    }

    /// Returns the statistics after the last pass.
    pub(crate) fn finish(&self) -> FeatureStats {
        let quantiles = self.ranks.iter().enumerate().map(|(dimension, ranks)| {
            QUANTILES.map(|(_, q)| {
                let (low, high, weight) = position(q, self.moments[dimension].count);
                let value = |rank| {
                    ranks
                        .get(&rank)
                        .map_or(f64::NAN, |(key, _)| self.value(dimension, *key))
                };
                between(value(low), value(high), weight)
            })
        });
        FeatureStats::new(&self.moments, quantiles)
    }

    fn clear(&mut self) {
        let (_, bits) = DIGITS[self.pass];
        let prefixes = self.ranks.iter().map(|ranks| {
            let prefixes = ranks
                .values()
                .map(|(prefix, _)| (*prefix, vec![0; 1 << bits]));
            prefixes.collect()
        });
        self.counts = prefixes.collect();
    }

    /// Returns a key whose order is that of the values.
    fn key(&self, dimension: usize, value: f64) -> u32 {
        match self.numbers {
            Numbers::Floats => {
                let bits = (value as f32).to_bits();
                if bits >> 31 == 0 {
                    bits | 1 << 31
                } else {
                    !bits
                }
            }
            Numbers::Integers => (value - self.moments[dimension].min) as u32,
        }
    }

    fn value(&self, dimension: usize, key: u32) -> f64 {
        match self.numbers {
            Numbers::Floats => {
                let bits = if key >> 31 == 1 {
                    key & !(1 << 31)
                } else {
                    !key
                };
                f64::from(f32::from_bits(bits))
            }
            Numbers::Integers => f64::from(key) + self.moments[dimension].min,
        }
    }
}

/// Returns LeRobot's image statistics, shape [3, 1, 1], values in [0, 1].
pub(crate) fn image_stats(histogram: &ColorHistogram, num_frames: u64) -> Value {
    let mut stats: BTreeMap<&str, Vec<[[f64; 1]; 1]>> = BTreeMap::new();
    for counts in histogram.counts.as_chunks::<256>().0 {
        let total: u64 = counts.iter().sum();
        let levels = || {
            counts
                .iter()
                .enumerate()
                .map(|(i, n)| (i as f64 / 255.0, *n as f64))
        };
        let total_f = total.max(1) as f64;
        let mean = levels().map(|(level, n)| level * n).sum::<f64>() / total_f;
        let variance = levels()
            .map(|(level, n)| (level - mean).powi(2) * n)
            .sum::<f64>()
            / total_f;
        let at = |position: f64| {
            let mut below = 0.0;
            let mut levels = levels().filter(|(_, n)| *n > 0.0);
            let found = levels.find(|(_, n)| {
                below += n;
                below > position
            });
            found.map_or(0.0, |(level, _)| level)
        };
        let last = total.saturating_sub(1) as f64;
        let mut push = |name, value| stats.entry(name).or_default().push([[value]]);
        push("min", at(0.0));
        push("max", at(last));
        push("mean", mean);
        push("std", variance.sqrt());
        for (name, q) in QUANTILES {
            push(name, at((q * last).floor()));
        }
    }
    let mut stats = json!(stats);
    stats["count"] = json!([num_frames]);
    stats
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn by_passes(width: usize, numbers: Numbers, rows: &[f64], piece: usize) -> FeatureStats {
        let mut column = Column::new(width, numbers);
        let pieces = || rows.chunks(piece * width);
        pieces().for_each(|rows| column.measure(rows));
        column.start();
        for _ in 0..Column::PASSES {
            pieces().for_each(|rows| column.count(rows));
            column.descend();
        }
        column.finish()
    }

    #[test]
    fn known_values() {
        let rows: Vec<f64> = (0..=100).map(f64::from).collect();
        let stats = by_passes(1, Numbers::Integers, &rows, 7);
        assert_eq!(
            (stats.q01[0], stats.q50[0], stats.q99[0]),
            (1.0, 50.0, 99.0)
        );
        assert_eq!((stats.mean[0], stats.count[0]), (50.0, 101));
        assert!((stats.std[0] - 850_f64.sqrt()).abs() < 1e-12);
        // numpy.quantile([-1.5, 0.25, 3], [.01, .1, .5, .9, .99])
        let stats = by_passes(1, Numbers::Floats, &[3.0, -1.5, 0.25], 1);
        let expected = [-1.465, -1.15, 0.25, 2.45, 2.945];
        for ((_, values), expected) in stats.named()[4..].iter().zip(expected) {
            assert!(
                (values[0] - expected).abs() < 1e-12,
                "{values:?} {expected}"
            );
        }
    }

    proptest::proptest! {
        #[test]
        fn passes_agree_with_sorting(
            values in proptest::collection::vec(-1e6_f32..1e6, 1..200),
            width in 1..4_usize,
        ) {
            let rows: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
            let rows = &rows[..rows.len() / width * width];
            if !rows.is_empty() {
                let one = by_passes(width, Numbers::Floats, rows, 5);
                assert_eq!(one, FeatureStats::of(width, rows));
            }
        }

        #[test]
        fn whole_numbers(values in proptest::collection::vec(-5_000_i32..5_000, 1..100)) {
            let rows: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
            assert_eq!(by_passes(1, Numbers::Integers, &rows, 9), FeatureStats::of(1, &rows));
        }
    }

    #[test]
    fn image_statistics_are_those_of_the_pixels() {
        let mut histogram = ColorHistogram::default();
        histogram.count(&[0, 255, 51, 255, 255, 51]);
        let stats = image_stats(&histogram, 9);
        assert_eq!(stats["mean"], json!([[[0.5]], [[1.0]], [[0.2]]]));
        assert_eq!(stats["std"][0], json!([[0.5]]));
        assert_eq!(stats["max"], json!([[[1.0]], [[1.0]], [[0.2]]]));
        assert_eq!(stats["count"], json!([9]));
    }
}

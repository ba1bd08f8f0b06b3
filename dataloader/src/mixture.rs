//! The order of a mixture: which dataset a sample comes from, and the slice of it a rank takes.
//!
//! Weights are integers that sum to 2^32. Block `b` holds the samples `[b*M, (b+1)*M)`. Before it,
//! dataset `d` has given exactly `R(b*M*S_d) - R(b*M*S_(d-1))` samples (`S` cumulative weights over
//! 2^32, `R` rounding to the nearest integer), so counts always add up. Inside a block the datasets
//! follow each other in a seeded permutation, while each dataset's own order is kept.

use pollen_core::Seed;

use crate::config::WeightMeaning;
use crate::error::{Error, Result};
use crate::recent::Recent;
use crate::sampler::{DatasetOrder, RowGroupFrames, SampleRef};

/// The sum of all integer weights.
const UNIT: u64 = 1 << 32;
const MIN_BLOCK: u64 = 64;
const MAX_BLOCK: u64 = 1 << 24;
const KEPT_BLOCKS: usize = 8;

/// What a mixture needs to know of one dataset.
#[derive(Clone, Debug)]
pub struct MixtureSource {
    /// Name, part of the dataset's seed: its own order does not depend on the other datasets.
    pub name: String,
    /// Weight in the recipe.
    pub weight: f64,
    /// Row groups with their eligible frames.
    pub groups: Vec<RowGroupFrames>,
}

/// The order of samples of a run: index -> sample, as a pure function.
#[derive(Debug)]
pub struct Mixture {
    orders: Vec<DatasetOrder>,
    names: Vec<String>,
    weights: Vec<u64>,
    /// `cumulative[d]` is the sum of the weights before dataset `d`.
    cumulative: Vec<u64>,
    block: u64,
    seed: Seed,
    blocks: Recent<u64, Vec<(u32, u64)>>,
}

impl Mixture {
    /// Builds the order of samples; `seed` is the run's root seed.
    pub fn new(
        seed: Seed,
        sources: Vec<MixtureSource>,
        meaning: WeightMeaning,
        window_bytes: u64,
    ) -> Result<Self> {
        let seed = seed.child("order");
        let names: Vec<String> = sources.iter().map(|source| source.name.clone()).collect();
        let real: Vec<f64> = sources.iter().map(|source| source.weight).collect();
        let orders: Vec<DatasetOrder> = sources
            .into_iter()
            .enumerate()
            .map(|(d, source)| {
                let seed = seed.child("dataset").child(&source.name);
                DatasetOrder::new(d as u32, seed, window_bytes, source.groups)
            })
            .collect();
        let weights = integer_weights(&names, &real, &orders, meaning)?;
        let mut cumulative = vec![0];
        for weight in &weights {
            cumulative.push(cumulative[cumulative.len() - 1] + weight);
        }
        let smallest = weights.iter().min().copied().unwrap_or(UNIT);
        let block = (2 * UNIT).div_ceil(smallest).next_power_of_two();
        if block > MAX_BLOCK {
            let least = weights.iter().position(|&w| w == smallest).unwrap_or(0);
            return Err(Error::config(format!(
                "data.datasets.{}.weight gives it a share of {:.1e}, below {:.1e}; raise it or set \
                 it to 0",
                names[least],
                smallest as f64 / UNIT as f64,
                2.0 / MAX_BLOCK as f64
            )));
        }
        Ok(Self {
            orders,
            names,
            weights,
            cumulative,
            block: block.max(MIN_BLOCK),
            seed: seed.child("blocks"),
            blocks: Recent::new(KEPT_BLOCKS),
        })
    }

    /// Returns the datasets' names in the order of [`SampleRef::dataset`].
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Returns each dataset's share of samples; they sum to 1.
    pub fn shares(&self) -> Vec<f64> {
        self.weights
            .iter()
            .map(|&w| w as f64 / UNIT as f64)
            .collect()
    }

    /// Returns the order of dataset `dataset`.
    pub fn order(&self, dataset: usize) -> &DatasetOrder {
        &self.orders[dataset]
    }

    /// Returns the number of samples in a block.
    pub fn block_len(&self) -> u64 {
        self.block
    }

    /// Returns how many samples each dataset gives before block `block`.
    pub fn counts_before_block(&self, block: u64) -> Vec<u64> {
        let samples = u128::from(block) * u128::from(self.block);
        let before = |weight: u64| {
            ((samples * u128::from(weight) + u128::from(UNIT / 2)) / u128::from(UNIT)) as u64
        };
        self.cumulative
            .windows(2)
            .map(|pair| before(pair[1]) - before(pair[0]))
            .collect()
    }

    /// Returns how many samples each dataset gives before index `index`.
    pub fn counts_before(&self, index: u64) -> Vec<u64> {
        let number = index / self.block;
        let mut counts = self.counts_before_block(number);
        let rest = (index % self.block) as usize;
        if rest > 0 {
            let block = self.blocks.get(number, || self.deal(number));
            for (dataset, _) in &block[..rest] {
                counts[*dataset as usize] += 1;
            }
        }
        counts
    }

    /// Returns the sample at `index` of the run.
    pub fn sample(&self, index: u64) -> SampleRef {
        let number = index / self.block;
        let block = self.blocks.get(number, || self.deal(number));
        let (dataset, position) = block[(index % self.block) as usize];
        self.orders[dataset as usize].at(position)
    }

    /// Returns global batch `step`: the samples `[step*global_batch, (step+1)*global_batch)`, in
    /// the order of their index.
    pub fn global_batch(&self, step: u64, global_batch: usize) -> Vec<(u64, SampleRef)> {
        self.batch_from(step * global_batch as u64, global_batch)
    }

    /// Returns the `len` samples from index `first` on.
    pub fn batch_from(&self, first: u64, len: usize) -> Vec<(u64, SampleRef)> {
        (first..first + len as u64)
            .map(|index| (index, self.sample(index)))
            .collect()
    }

    /// Returns the part of global batch `step` that `rank` of `world_size` takes.
    ///
    /// The batch is sorted by (dataset, row group, frame) before it is cut, so that a row group is
    /// opened by one rank, or by two at a border.
    pub fn rank_slice(
        &self,
        step: u64,
        global_batch: usize,
        rank: usize,
        world_size: usize,
    ) -> Vec<(u64, SampleRef)> {
        let batch = self.global_batch(step, global_batch);
        rank_slice(batch, rank, world_size)
    }

    /// Makes the (dataset, position in its own stream) of every sample of a block.
    fn deal(&self, number: u64) -> Vec<(u32, u64)> {
        let mut next = self.counts_before_block(number);
        let after = self.counts_before_block(number + 1);
        let datasets: Vec<u32> = next
            .iter()
            .zip(&after)
            .enumerate()
            .flat_map(|(d, (from, to))| std::iter::repeat_n(d as u32, (to - from) as usize))
            .collect();
        self.seed
            .index(number)
            .permutation(datasets.len())
            .into_iter()
            .map(|slot| {
                let dataset = datasets[slot as usize];
                let position = next[dataset as usize];
                next[dataset as usize] += 1;
                (dataset, position)
            })
            .collect()
    }
}

/// Sorts a global batch by (dataset, row group, frame) and cuts out the slice of `rank`.
pub(crate) fn rank_slice(
    mut batch: Vec<(u64, SampleRef)>,
    rank: usize,
    world_size: usize,
) -> Vec<(u64, SampleRef)> {
    batch.sort_unstable_by_key(|&(index, s)| (s.dataset, s.row_group, s.frame, index));
    let start = batch.len() * rank / world_size;
    let end = batch.len() * (rank + 1) / world_size;
    batch[start..end].to_vec()
}

/// Turns the recipe's weights into integers that sum to 2^32 (largest remainder first).
fn integer_weights(
    names: &[String],
    real: &[f64],
    orders: &[DatasetOrder],
    meaning: WeightMeaning,
) -> Result<Vec<u64>> {
    let mut faults = Vec::new();
    if names.is_empty() {
        faults.push("data.datasets has no dataset with a weight above 0".to_owned());
    }
    for ((name, weight), order) in names.iter().zip(real).zip(orders) {
        if !(weight.is_finite() && *weight > 0.0) {
            faults.push(format!(
                "data.datasets.{name}.weight = {weight} is not a positive number"
            ));
        }
        if order.num_frames() == 0 {
            faults.push(format!(
                "data.datasets.{name} has no eligible frame; shorten holdout_episodes or set its \
                 weight to 0"
            ));
        }
    }
    if !faults.is_empty() {
        return Err(Error::Config { faults });
    }
    let effective: Vec<f64> = real
        .iter()
        .zip(orders)
        .map(|(weight, order)| match meaning {
            WeightMeaning::Share => *weight,
            WeightMeaning::TimesFrames => weight * order.num_frames() as f64,
        })
        .collect();
    let total: f64 = effective.iter().sum();
    let exact: Vec<f64> = effective.iter().map(|w| w / total * UNIT as f64).collect();
    let mut weights: Vec<u64> = exact.iter().map(|w| (w.floor() as u64).max(1)).collect();
    let mut by_remainder: Vec<usize> = (0..weights.len()).collect();
    by_remainder.sort_by(|&a, &b| {
        (exact[b].fract())
            .total_cmp(&exact[a].fract())
            .then(a.cmp(&b))
    });
    let assigned: u64 = weights.iter().sum();
    for &d in by_remainder
        .iter()
        .take(UNIT.saturating_sub(assigned) as usize)
    {
        weights[d] += 1;
    }
    // Rounding may leave a unit or two too many or too few; the largest weight takes them.
    let largest = (0..weights.len())
        .max_by_key(|&d| (weights[d], std::cmp::Reverse(d)))
        .unwrap_or(0);
    let assigned: u64 = weights.iter().sum();
    weights[largest] = weights[largest] + UNIT - assigned;
    Ok(weights)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::Run;
    use proptest::prelude::*;

    fn source(name: &str, weight: f64, num_groups: u64, frames: u64) -> MixtureSource {
        let groups = (0..num_groups)
            .map(|g| RowGroupFrames {
                bytes: 1000 + 10 * g,
                runs: vec![Run {
                    episode: g,
                    first_row: g * frames,
                    rows: frames,
                }],
            })
            .collect();
        MixtureSource {
            name: name.into(),
            weight,
            groups,
        }
    }

    fn mixture(weights: &[f64], seed: u64) -> Mixture {
        let sources = weights
            .iter()
            .enumerate()
            .map(|(d, &weight)| source(&format!("d{d}"), weight, 5 + d as u64, 11))
            .collect();
        Mixture::new(Seed::new(seed), sources, WeightMeaning::Share, 3000).expect("valid")
    }

    #[test]
    fn a_weight_times_frames_is_a_share_of_frames() {
        let sources = vec![source("a", 1.0, 10, 30), source("b", 2.0, 10, 10)];
        let mixture =
            Mixture::new(Seed::new(0), sources, WeightMeaning::TimesFrames, 5000).expect("valid");
        let shares = mixture.shares();
        assert!((shares[0] - 0.6).abs() < 1e-9 && (shares[1] - 0.4).abs() < 1e-9);
    }

    #[test]
    fn faults_are_reported_together() {
        let sources = vec![source("a", -1.0, 1, 1), source("b", 1.0, 0, 1)];
        let error = Mixture::new(Seed::new(0), sources, WeightMeaning::Share, 5000)
            .expect_err("two faults")
            .to_string();
        assert!(error.contains("data.datasets.a.weight = -1"), "{error}");
        assert!(error.contains("data.datasets.b has no eligible"), "{error}");
        let tiny = vec![source("a", 1.0, 1, 1), source("b", 1e-9, 1, 1)];
        let error = Mixture::new(Seed::new(0), tiny, WeightMeaning::Share, 5000)
            .expect_err("too small")
            .to_string();
        assert!(error.contains("data.datasets.b.weight"), "{error}");
    }

    #[test]
    fn a_dataset_keeps_its_order_whatever_joins_it() {
        let both = mixture(&[1.0, 3.0], 4);
        let alone = mixture(&[1.0], 4);
        let of_both: Vec<u64> = (0..400)
            .map(|i| both.sample(i))
            .filter(|s| s.dataset == 0)
            .map(|s| s.frame)
            .collect();
        let of_one: Vec<u64> = (0..of_both.len() as u64)
            .map(|i| alone.sample(i).frame)
            .collect();
        assert_eq!(of_both, of_one);
    }

    proptest! {
        #[test]
        fn counts_are_exact_at_every_block_boundary(
            weights in prop::collection::vec(0.01_f64..10.0, 1..6),
            seed in any::<u64>(),
        ) {
            let mixture = mixture(&weights, seed);
            prop_assert_eq!(mixture.weights.iter().sum::<u64>(), UNIT);
            let mut counts = vec![0_u64; weights.len()];
            for block in 0..4 {
                prop_assert_eq!(&counts, &mixture.counts_before_block(block));
                let first = block * mixture.block_len();
                let mut in_block = vec![0_u64; weights.len()];
                for (index, sample) in mixture.batch_from(first, mixture.block_len() as usize) {
                    if index % 13 == 0 {
                        let so_far = counts.iter().zip(&in_block).map(|(a, b)| a + b);
                        prop_assert_eq!(mixture.counts_before(index), so_far.collect::<Vec<_>>());
                    }
                    in_block[sample.dataset as usize] += 1;
                }
                prop_assert!(in_block.iter().all(|&n| n >= 1), "{:?}", in_block);
                for (count, n) in counts.iter_mut().zip(&in_block) {
                    *count += n;
                }
                let samples = (first + mixture.block_len()) as f64;
                for (count, share) in counts.iter().zip(mixture.shares()) {
                    prop_assert!((*count as f64 - samples * share).abs() <= 1.0);
                }
            }
        }

        #[test]
        fn every_frame_of_every_dataset_once_an_epoch(
            weights in prop::collection::vec(0.2_f64..3.0, 1..4),
            seed in any::<u64>(),
        ) {
            let mixture = mixture(&weights, seed);
            let mut seen: Vec<Vec<u64>> = vec![Vec::new(); weights.len()];
            let mut index = 0;
            while (0..seen.len()).any(|d| (seen[d].len() as u64) < mixture.order(d).num_frames()) {
                let sample = mixture.sample(index);
                seen[sample.dataset as usize].push(sample.frame);
                index += 1;
            }
            for (d, mut frames) in seen.into_iter().enumerate() {
                let len = mixture.order(d).num_frames();
                frames.truncate(len as usize);
                frames.sort_unstable();
                prop_assert_eq!(frames, (0..len).collect::<Vec<_>>());
            }
        }

        #[test]
        fn ranks_share_a_global_batch_out(
            seed in any::<u64>(),
            step in 0_u64..1000,
            per_rank in 1_usize..4,
        ) {
            let mixture = mixture(&[1.0, 0.4], seed);
            let global = 24 * per_rank;
            let expected = mixture.global_batch(step, global);
            for world in [1, 2, 3, 8] {
                let mut union = Vec::new();
                for rank in 0..world {
                    let slice = mixture.rank_slice(step, global, rank, world);
                    prop_assert_eq!(slice.len(), global / world);
                    let groups: Vec<(u32, u32)> =
                        slice.iter().map(|(_, s)| (s.dataset, s.row_group)).collect();
                    prop_assert!(groups.is_sorted());
                    union.extend(slice);
                }
                union.sort_unstable();
                prop_assert_eq!(&union, &expected);
            }
        }
    }
}

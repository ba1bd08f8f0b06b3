//! Randomness that belongs to the sample, not to the rank: noise, flow time, stochastic depth and
//! token dropout are functions of (seed, sample index), so they are the same for every world size.

use pollen_core::Seed;

/// Upper end of the flow time; `t = 1` is pure noise (reference: 1 - 1e-5).
const TIME_SPAN: f64 = 1.0 - 1e-5;

/// The seeds of a run's training.
#[derive(Clone, Copy, Debug)]
pub struct Randomness {
    root: Seed,
}

impl Randomness {
    /// Returns the randomness below a run's seed.
    pub fn new(seed: u64) -> Self {
        Self {
            root: Seed::new(seed),
        }
    }

    /// Returns the flow time of position `j` in the unsorted global batch of `global_batch`
    /// samples: stratified over the whole batch, `t_j = (u + j/B) mod (1 - 1e-5)` with one `u` a
    /// step.
    pub fn flow_time(&self, step: u64, j: u64, global_batch: u64) -> f32 {
        let u = self
            .root
            .child("flow time")
            .index(step)
            .draws()
            .uniform_f64();
        ((u + j as f64 / global_batch as f64) % TIME_SPAN) as f32
    }

    /// Fills `noise` of shape [horizon, `width`] with the sample's standard normal noise; entries
    /// from `dim` on are zero.
    pub fn noise(&self, sample: u64, width: usize, dim: usize, noise: &mut [f32]) {
        let mut draws = self.root.child("noise").index(sample).draws();
        for action in noise.chunks_exact_mut(width) {
            draws.fill_normal(&mut action[..dim]);
            action[dim..].fill(0.0);
        }
    }

    /// Fills `keep` with one factor per residual block: 0, or 1 / (1 - rate) (stochastic depth,
    /// Huang et al., 2016).
    pub fn depth_keep(&self, sample: u64, rates: &[f64], keep: &mut [f32]) {
        let mut draws = self.root.child("stochastic depth").index(sample).draws();
        for (factor, &rate) in keep.iter_mut().zip(rates) {
            let kept = draws.uniform_f64() >= rate;
            *factor = if kept {
                (1.0 / (1.0 - rate)) as f32
            } else {
                0.0
            };
        }
    }

    /// Fills `keep` with 0 or 1 / (1 - rate) for every feature of the sample's context.
    pub fn token_keep(&self, sample: u64, rate: f64, keep: &mut [f32]) {
        let mut draws = self.root.child("token dropout").index(sample).draws();
        let scale = (1.0 / (1.0 - rate)) as f32;
        let rate = rate as f32;
        for factor in keep {
            *factor = if draws.uniform_f32() < rate {
                0.0
            } else {
                scale
            };
        }
    }

    /// Returns the seed of elementwise dropout: the same bits only at the same world size.
    pub fn dropout(&self, step: u64, micro_batch: u32, rank: u32) -> Seed {
        let seed = self
            .root
            .child("dropout")
            .index(step)
            .index(u64::from(micro_batch));
        seed.index(u64::from(rank))
    }

    /// Returns the seeds of the sampler's start noise for the `draw`-th chunk of an observation in
    /// the evaluation.
    #[must_use]
    pub fn eval(&self, draw: u64) -> Self {
        Self {
            root: self.root.child("eval").index(draw),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flow_times_are_stratified_over_the_global_batch() {
        let random = Randomness::new(1);
        let mut times: Vec<f32> = (0..64).map(|j| random.flow_time(5, j, 64)).collect();
        times.sort_by(f32::total_cmp);
        assert!(times.iter().all(|t| (0.0..1.0).contains(t)));
        // One per stratum: neighbours are 1/64 apart, up to the step at the modulus.
        assert!(
            times
                .windows(2)
                .all(|pair| (pair[1] - pair[0] - 1.0 / 64.0).abs() < 1e-4)
        );
        assert_ne!(random.flow_time(6, 0, 64), random.flow_time(5, 0, 64));
    }

    #[test]
    fn noise_is_zero_beyond_the_action_space() {
        let random = Randomness::new(1);
        let (mut a, mut b) = ([9.0; 12], [9.0; 12]);
        random.noise(3, 4, 3, &mut a);
        random.noise(3, 4, 3, &mut b);
        assert_eq!(a, b);
        assert!(
            a.chunks(4)
                .all(|action| action[3] == 0.0 && action[0] != 0.0)
        );
    }

    #[test]
    fn dropped_and_kept_factors_average_to_one() {
        let random = Randomness::new(2);
        let mut keep = vec![0.0; 100_000];
        random.token_keep(0, 0.1, &mut keep);
        let mean = keep.iter().sum::<f32>() / keep.len() as f32;
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
        let mut depth = [0.0; 2];
        random.depth_keep(0, &[0.0, 1.0 - 1e-12], &mut depth);
        assert_eq!(depth, [1.0, 0.0]);
    }
}

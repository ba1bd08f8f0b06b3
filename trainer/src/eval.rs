//! Error of sampled actions on held-out episodes, against predicting the training mean.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use burn::module::Module;
use pollen_dataloader::{HoldoutLoader, HostBatch, SampleRef};
use pollen_observe::SpaceError;

use crate::data_parallel::sum_f64;
use crate::error::Error;
use crate::optim::host as host_values;
use crate::phases::Phase;
use crate::step::Trainer;

/// Sums of one action space.
#[derive(Clone, Debug, Default)]
struct Sums {
    entries: f64,
    error: f64,
    single_error: f64,
    mean_error: f64,
    chunks: f64,
}

impl Trainer {
    /// Returns the held-out error of the weights as they are, if it was measured.
    pub(crate) fn eval_error(&self) -> Option<f64> {
        let (step, error) = self.measured?;
        (step == self.step).then_some(error)
    }

    /// Samples `eval.samples` chunks for every `eval.frame_stride`-th held-out frame and returns
    /// the mean squared error of their mean, and of single ones, in normalised units by action
    /// space; the ranks share the work.
    ///
    /// The mean is what compares with the mean predictor: of two draws from the same distribution
    /// one misses the other by twice its variance, so that even a perfect policy's single samples
    /// can lie further from a demonstration than its mean.
    ///
    /// With `train.ema` it is the averaged weights that are measured. Entries count as they do in the training loss.
    pub fn evaluate(&mut self) -> Result<BTreeMap<String, SpaceError>, Error> {
        self.timer.enter(Phase::Eval);
        if self.mean_chunks.is_empty() {
            let chunks = self.data.mean_chunks(&self.mixture);
            self.mean_chunks = self.runtime.block_on(chunks)?;
        }
        let spaces = self.config.action_spaces.len();
        let eval = self.config.eval.clone();
        let (rank, world) = (self.communicator.rank(), self.communicator.world_size());
        let mut sums = vec![Sums::default(); spaces];
        let mut episodes: Vec<BTreeSet<(u32, u64)>> = vec![BTreeSet::new(); spaces];
        let held_out = self.data.holdout(eval.frame_stride);
        for (_, sample) in &held_out {
            let space = self.data.datasets()[sample.dataset as usize].space_index();
            episodes[space as usize].insert((sample.dataset, sample.episode));
        }
        let share = |&(index, _): &(u64, SampleRef)| index as u32 % world == rank;
        let own = held_out.into_iter().filter(share).collect();
        let batches = HoldoutLoader::start(Arc::clone(&self.data), own, eval.batch, &self.runtime);
        let model = match &self.ema {
            Some(ema) => ema.model(&self.model, &self.layout).valid(),
            None => self.model.clone().valid(),
        };
        let inputs = self.batches.without_autodiff();
        for host in batches {
            let host = host?;
            let context = model.encode(&inputs.observation(&host), None);
            let draws: Vec<Vec<f32>> = (0..eval.samples as u64)
                .map(|draw| {
                    let noise = inputs.sampling_noise(&host, &inputs.randomness.eval(draw));
                    let sampled = model.sample(&context, noise, eval.denoising_steps);
                    host_values(sampled.reshape([-1]))
                })
                .collect();
            self.add(&host, &draws, &mut sums);
        }
        let flat = sums
            .iter()
            .flat_map(|s| [s.entries, s.error, s.single_error, s.mean_error, s.chunks])
            .collect();
        let flat = sum_f64(self.communicator.as_ref(), flat)?;
        self.timer.close();
        let rows = flat
            .as_chunks::<5>()
            .0
            .iter()
            .zip(&self.config.action_spaces)
            .zip(episodes);
        let errors: BTreeMap<String, SpaceError> = rows
            .filter(|((row, _), _)| row[0] > 0.0)
            .map(
                |((&[entries, error, single_error, mean_error, chunks], space), episodes)| {
                    let result = SpaceError {
                        error: error / entries,
                        single_sample_error: single_error / entries,
                        mean_predictor_error: mean_error / entries,
                        per_horizon: None,
                        episodes: episodes.len() as u64,
                        chunks: chunks as u64,
                    };
                    (space.name.clone(), result)
                },
            )
            .collect();
        if !errors.is_empty() {
            let sum: f64 = errors.values().map(|space| space.error).sum();
            self.measured = Some((self.step, sum / errors.len() as f64));
        }
        Ok(errors)
    }

    /// `draws` holds the sampled chunks, each `[B, H, A]`.
    fn add(&self, host: &HostBatch, draws: &[Vec<f32>], sums: &mut [Sums]) {
        let chunk = host.dims.action_horizon * host.dims.action_width;
        let count = draws.len() as f64;
        for (i, &space) in host.spaces.iter().enumerate() {
            let Some(mean_chunk) = &self.mean_chunks[space as usize] else {
                continue;
            };
            if host.bad.iter().any(|bad| bad.slot == i) {
                continue;
            }
            let sums = &mut sums[space as usize];
            sums.chunks += 1.0;
            for (entry, &mean) in mean_chunk.iter().enumerate() {
                let at = i * chunk + entry;
                if host.valid[at] == 0 {
                    continue;
                }
                let target = f64::from(host.actions[at]);
                let misses = draws.iter().map(|draw| f64::from(draw[at]) - target);
                sums.entries += 1.0;
                sums.single_error += misses.clone().map(|miss| miss * miss).sum::<f64>() / count;
                sums.error += (misses.sum::<f64>() / count).powi(2);
                sums.mean_error += (f64::from(mean) - target).powi(2);
            }
        }
    }
}

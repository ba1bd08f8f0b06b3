//! The training loader of one rank, and the loader of held-out episodes.

use std::sync::Arc;

use pollen_core::Seed;
use tokio::runtime::Handle;

use crate::batch::HostBatch;
use crate::data::Data;
use crate::error::{Error, Result};
use crate::mixture::{Mixture, rank_slice};
use crate::pipeline::{Pipeline, Plan};
use crate::sampler::SampleRef;

/// What a [`Loader`] is started with.
#[derive(Clone, Debug)]
pub struct LoaderArgs {
    /// The opened datasets.
    pub data: Arc<Data>,
    /// The order of samples, from [`Data::mixture`].
    pub mixture: Arc<Mixture>,
    /// The run's root seed: augmentation draws from it.
    pub seed: Seed,
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// Samples of a step, over all ranks.
    pub global_batch: usize,
    /// Samples of a micro-batch of this rank.
    pub micro_batch: usize,
    /// Samples consumed so far by all ranks: the whole state of the loader.
    pub first_sample: u64,
}

/// Yields this rank's micro-batches of one global batch after the other, without an end.
#[derive(Debug)]
pub struct Loader {
    pipeline: Pipeline,
    micro_batches: usize,
}

impl Loader {
    /// Starts to prefetch on `runtime`, a multi-threaded one that outlives the loader.
    pub fn start(args: LoaderArgs, runtime: &Handle) -> Result<Self> {
        let LoaderArgs {
            data,
            mixture,
            seed,
            rank,
            world_size,
            global_batch,
            micro_batch,
            first_sample,
        } = args;
        check_sizes(global_batch, micro_batch, world_size)?;
        if rank >= world_size {
            return Err(Error::config(format!(
                "rank {rank} is not below {world_size}"
            )));
        }
        warn_of_small_cache(&data, world_size);
        let plans = (0..).flat_map(move |step: u64| {
            let first = first_sample + step * global_batch as u64;
            let batch = mixture.batch_from(first, global_batch);
            let slice = rank_slice(batch, rank, world_size);
            let plans: Vec<Plan> = slice.chunks(micro_batch).map(<[_]>::to_vec).collect();
            plans
        });
        let augment = Some(seed.child("augment"));
        Ok(Self {
            pipeline: Pipeline::start(data, plans, augment, runtime),
            micro_batches: global_batch / world_size / micro_batch,
        })
    }

    /// Waits for the next micro-batch.
    ///
    /// An error takes the place of the micro-batch it struck; the next call goes on behind it.
    pub fn next_micro_batch(&mut self) -> Result<HostBatch> {
        self.pipeline
            .next()?
            .ok_or(Error::Ended { part: "fetch task" })
    }

    /// Returns the number of micro-batches of this rank in a global batch.
    pub fn micro_batches_per_step(&self) -> usize {
        self.micro_batches
    }
}

/// Two windows of each dataset may be open at a time, shared out among the ranks.
fn warn_of_small_cache(data: &Data, world_size: usize) {
    let window = data.config().window_bytes.as_u64();
    let open: u64 = data
        .datasets()
        .iter()
        .map(|dataset| dataset.bytes().min(2 * window))
        .sum();
    let (needed, cache) = (open / world_size as u64, data.config().cache_bytes.as_u64());
    if needed > cache {
        tracing::warn!(
            needed,
            cache,
            "row groups will be fetched again and again; raise data.cache_bytes or lower \
             data.window_bytes"
        );
    }
}

/// Refuses sizes that would make a global batch inexact, and says which fit.
pub fn check_sizes(global_batch: usize, micro_batch: usize, world_size: usize) -> Result<()> {
    let fits = |world: usize, micro: usize| {
        global_batch > 0 && world > 0 && micro > 0 && global_batch.is_multiple_of(world * micro)
    };
    if fits(world_size, micro_batch) {
        return Ok(());
    }
    let list = |numbers: Vec<usize>| {
        let numbers: Vec<String> = numbers.iter().map(usize::to_string).collect();
        numbers.join(", ")
    };
    let worlds: Vec<usize> = (1..=global_batch)
        .filter(|&world| fits(world, micro_batch))
        .take(12)
        .collect();
    let micros: Vec<usize> = (1..=global_batch)
        .filter(|&micro| fits(world_size, micro))
        .take(12)
        .collect();
    let advice = match (worlds.is_empty(), micros.is_empty()) {
        (false, false) => format!(
            "use {} ranks, or micro-batches of {}",
            list(worlds),
            list(micros)
        ),
        (false, true) => format!("use {} ranks", list(worlds)),
        (true, false) => format!("use micro-batches of {}", list(micros)),
        (true, true) => "change the global batch".to_owned(),
    };
    Err(Error::WorldSize {
        global_batch,
        micro_batch,
        world_size,
        advice,
    })
}

/// Yields batches of given samples in their order, without augmentation, and ends.
#[derive(Debug)]
pub struct HoldoutLoader {
    pipeline: Pipeline,
    left: usize,
}

impl HoldoutLoader {
    /// Starts on samples of [`Data::holdout`], or on a rank's share of them.
    ///
    /// The last batch may be smaller.
    pub fn start(
        data: Arc<Data>,
        samples: Vec<(u64, SampleRef)>,
        batch: usize,
        runtime: &Handle,
    ) -> Self {
        let batch = batch.max(1);
        let left = samples.len().div_ceil(batch);
        let mut samples = samples.into_iter();
        let plans = (0..left).map(move |_| samples.by_ref().take(batch).collect::<Plan>());
        Self {
            left,
            pipeline: Pipeline::start(data, plans, None, runtime),
        }
    }

    /// Waits for the next batch; `None` after the last.
    pub fn next_batch(&mut self) -> Result<Option<HostBatch>> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        match self.pipeline.next()? {
            Some(batch) => Ok(Some(batch)),
            None => Err(Error::Ended { part: "fetch task" }),
        }
    }
}

impl Iterator for HoldoutLoader {
    type Item = Result<HostBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_batch().transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_do_not_fit_are_refused_with_those_that_do() {
        check_sizes(24, 4, 3).expect("fits");
        let error = check_sizes(24, 4, 5).expect_err("5").to_string();
        assert!(error.contains("use 1, 2, 3, 6 ranks"), "{error}");
        let error = check_sizes(24, 5, 3).expect_err("5").to_string();
        assert!(error.contains("use micro-batches of 1, 2, 4, 8"), "{error}");
        assert!(check_sizes(24, 0, 3).is_err());
        assert!(check_sizes(0, 1, 1).is_err());
    }
}

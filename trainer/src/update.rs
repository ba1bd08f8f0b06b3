//! The update at the end of a step: norm, learning rates, AdamW on this rank's shard, new weights.

use burn::tensor::{Device, Tensor};
use pollen_collectives::{Buffer, Handle, HostBuffer};
use pollen_model::Flower;

use crate::clip;
use crate::config::{Group, OptimizerConfig};
use crate::data_parallel::{Reduction, own_memory, padded_len, sum_f64, to_device};
use crate::device_memory::{Lease, Place};
use crate::ema::Ema;
use crate::error::Error;
use crate::layout::{Bucket, Entry, Layout, Shard};
use crate::optim::{AdamW, host};
use crate::step::Trainer;
use crate::weights::FlatWeights;

/// What every rank knows of a global batch.
pub(crate) struct GlobalBatch {
    pub(crate) valid_entries: u64,
    /// Action spaces that occur in it.
    pub(crate) spaces: Vec<String>,
}

impl Trainer {
    /// What every rank knows of the whole global batch from the sample order alone.
    pub(crate) fn global_batch(&self, step: u64) -> GlobalBatch {
        let size = self.config.train.global_batch as usize;
        let mut batch = GlobalBatch {
            valid_entries: 0,
            spaces: Vec::new(),
        };
        for (_, sample) in self.mixture.global_batch(step, size) {
            batch.valid_entries += self.data.valid_entries(sample);
            let space = &self.data.datasets()[sample.dataset as usize]
                .action_space()
                .name;
            if !batch.spaces.contains(space) {
                batch.spaces.push(space.clone());
            }
        }
        batch
    }

    /// Clips, updates this rank's share of each bucket, gathers the others' and puts the new values
    /// into the model. Nothing is written into a tensor that is there already.
    pub(crate) fn update(
        &mut self,
        reduced: Vec<Tensor<1>>,
        grad_norm: f64,
        learning_rate: [(Group, f64); 2],
        global: &GlobalBatch,
    ) -> Result<(), Error> {
        let active = |entry: &Entry| {
            entry
                .action_space()
                .is_none_or(|space| global.spaces.iter().any(|s| s == space))
        };
        let change = Change {
            gradients: reduced,
            factor: clip::factor(grad_norm, self.config.train.clip_norm),
            learning_rate,
            active: &active,
        };
        let update = Update {
            layout: &self.layout,
            reduction: &self.reduction,
            config: &self.config.train.optimizer,
            device: self.device.clone().inner(),
        };
        self.model = update.apply(&self.model, &mut self.optimizer, self.ema.as_mut(), change)?;
        Ok(())
    }
}

/// Returns the sums of squares of all chunks of the reduced gradient, of which this rank has its
/// shares.
pub(crate) fn square_sums(
    layout: &Layout,
    reduction: &Reduction,
    reduced: &[Tensor<1>],
) -> Result<Vec<f64>, Error> {
    let shard = reduction.shard;
    let own = match reduction.place {
        Place::Host => reduced
            .iter()
            .map(|values| clip::square_sums(&host(values.clone())))
            .collect(),
        Place::Device(_) => square_sums_there(reduced),
    };
    let mut sums = Vec::new();
    for (bucket, own) in layout.buckets().iter().zip::<Vec<Vec<f64>>>(own) {
        let first = sums.len();
        sums.resize(first + bucket.range.len().div_ceil(clip::CHUNK), 0.0);
        let at = first + bucket.share(shard).start.div_ceil(clip::CHUNK);
        sums[at..at + own.len()].copy_from_slice(&own);
    }
    if shard == Shard::WHOLE {
        return Ok(sums);
    }
    // Each sum is some rank's, and zero elsewhere: adding changes no bit.
    sum_f64(reduction.communicator.as_ref(), sums)
}

/// As [`clip::square_sums`] of each bucket, with f32 sums on the device and one copy to the host.
fn square_sums_there(reduced: &[Tensor<1>]) -> Vec<Vec<f64>> {
    let counts = reduced
        .iter()
        .map(|values| values.dims()[0].div_ceil(clip::CHUNK));
    let counts: Vec<usize> = counts.collect();
    let full = reduced.iter().zip(&counts).filter(|&(_, &count)| count > 0);
    let sums: Vec<Tensor<1>> = full
        .map(|(values, &count)| {
            let values = own_memory(values.clone(), 0, count * clip::CHUNK);
            let chunks: Tensor<2> = values.reshape([count, clip::CHUNK]);
            (chunks.clone() * chunks).sum_dim(1).reshape([count])
        })
        .collect();
    if sums.is_empty() {
        return vec![Vec::new(); counts.len()];
    }
    let mut sums = host(Tensor::cat(sums, 0)).into_iter().map(f64::from);
    counts
        .iter()
        .map(|&count| sums.by_ref().take(count).collect())
        .collect()
}

/// Returns the learning rates after so many updates.
pub(crate) fn learning_rates(config: &OptimizerConfig, updates: u64) -> [(Group, f64); 2] {
    [Group::Head, Group::Vlm].map(|group| {
        let settings = config.group(group);
        let rate = settings
            .schedule
            .learning_rate(settings.learning_rate, updates);
        (group, rate)
    })
}

/// What the end of a step reads and does not change.
pub(crate) struct Update<'a> {
    pub(crate) layout: &'a Layout,
    pub(crate) reduction: &'a Reduction,
    pub(crate) config: &'a OptimizerConfig,
    /// Of the weights, without autodiff.
    pub(crate) device: Device,
}

/// What one step changes the weights by.
pub(crate) struct Change<'a> {
    /// This rank's share of each bucket's reduced gradient.
    pub(crate) gradients: Vec<Tensor<1>>,
    /// What the gradients are multiplied by, at most 1.
    pub(crate) factor: f64,
    pub(crate) learning_rate: [(Group, f64); 2],
    /// Whether a parameter takes part.
    pub(crate) active: &'a dyn Fn(&Entry) -> bool,
}

impl Update<'_> {
    /// Returns the model with new weights.
    pub(crate) fn apply(
        &self,
        model: &Flower,
        optimizer: &mut AdamW,
        mut ema: Option<&mut Ema>,
        change: Change<'_>,
    ) -> Result<Flower, Error> {
        let shard = optimizer.shard();
        optimizer.begin_update();
        let mut values = FlatWeights::of(model, self.layout);
        let mut updated = Vec::with_capacity(change.gradients.len());
        for (index, gradient) in change.gradients.into_iter().enumerate() {
            let bucket = &self.layout.buckets()[index];
            let group = self.layout.entries()[bucket.entries.start].group;
            let rates = change.learning_rate;
            let (_, rate) = rates[usize::from(rates[1].0 == group)];
            let weights = values.take(self.layout, index);
            let share = bucket.share(shard);
            let own = if share.is_empty() {
                None
            } else {
                let gradient = if change.factor < 1.0 {
                    gradient * change.factor
                } else {
                    gradient
                };
                Some(optimizer.update_bucket(
                    self.layout,
                    index,
                    weights.slice([share]),
                    gradient,
                    (rate, self.config),
                    change.active,
                ))
            };
            updated.push(self.hand_out(bucket, shard, own)?);
        }
        for (index, bucket) in updated.into_iter().enumerate() {
            let weights = match bucket {
                Updated::Whole(weights) => *weights,
                Updated::Parts(handle) => {
                    let mut weights: Vec<f32> = handle.wait()?.try_into()?;
                    weights.truncate(self.layout.buckets()[index].range.len());
                    to_device(weights, &self.device)
                }
                Updated::There(handle, lease) => {
                    handle.wait()?;
                    let len = self.layout.buckets()[index].range.len();
                    lease.end()?.slice([0..len])
                }
            };
            if let Some(ema) = &mut ema {
                ema.update(index, weights.clone(), optimizer.updates());
            }
            values.put(self.layout, index, &weights);
        }
        Ok(values.into_model(model.clone()))
    }

    /// Gives this rank's share of a bucket to the others, if each has its own.
    fn hand_out(
        &self,
        bucket: &Bucket,
        shard: Shard,
        own: Option<Tensor<1>>,
    ) -> Result<Updated, Error> {
        if shard == Shard::WHOLE {
            let whole = own.ok_or_else(|| Error::internal("an empty bucket"))?;
            return Ok(Updated::Whole(Box::new(whole)));
        }
        let communicator = self.reduction.communicator.as_ref();
        let padded = padded_len(bucket, communicator);
        let part = padded / communicator.world_size() as usize;
        if let Some(memory) = self.reduction.place.lender(communicator) {
            let bucket = match own {
                Some(own) => own_memory(own, shard.part * part, padded),
                None => Tensor::zeros([padded], &self.device),
            };
            let lease = memory.lease(bucket)?;
            let handle = communicator.all_gather(Buffer::Device(lease.buffer()))?;
            return Ok(Updated::There(handle, lease));
        }
        let mut values = own.map(host).unwrap_or_default();
        values.resize(part, 0.0);
        let buffer = Buffer::Host(HostBuffer::F32(values));
        Ok(Updated::Parts(communicator.all_gather(buffer)?))
    }
}

/// A bucket's new values.
enum Updated {
    /// All of them are here.
    Whole(Box<Tensor<1>>),
    /// The ranks' parts are on their way.
    Parts(Handle),
    /// The same, in the device memory where the bucket will lie.
    There(Handle, Lease),
}

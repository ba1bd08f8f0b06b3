//! The update at the end of a step: norm, learning rates, AdamW on this rank's shard, new weights.

use burn::tensor::Tensor;
use pollen_collectives::{Buffer, Handle, HostBuffer};

use crate::clip;
use crate::config::Group;
use crate::data_parallel::{padded_len, sum_f64, to_device};
use crate::error::Error;
use crate::layout::{Bucket, Entry, Shard};
use crate::optim::host;
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

    /// Returns the sums of squares of all chunks of the reduced gradient, of which this rank has
    /// its shares.
    pub(crate) fn square_sums(&self, reduced: &[Vec<f32>]) -> Result<Vec<f64>, Error> {
        let shard = self.optimizer.shard();
        let mut sums = Vec::new();
        for (bucket, values) in self.layout.buckets().iter().zip(reduced) {
            let first = sums.len();
            sums.resize(first + bucket.range.len().div_ceil(clip::CHUNK), 0.0);
            let own = clip::square_sums(values);
            let at = first + bucket.share(shard).start.div_ceil(clip::CHUNK);
            sums[at..at + own.len()].copy_from_slice(&own);
        }
        if shard == Shard::WHOLE {
            return Ok(sums);
        }
        // Each sum is some rank's, and zero elsewhere: adding changes no bit.
        sum_f64(self.communicator.as_ref(), sums)
    }

    pub(crate) fn learning_rates(&self) -> [(Group, f64); 2] {
        let update = self.optimizer.updates();
        [Group::Head, Group::Vlm].map(|group| {
            let settings = self.config.train.optimizer.group(group);
            (
                group,
                settings
                    .schedule
                    .learning_rate(settings.learning_rate, update),
            )
        })
    }

    /// Clips, updates this rank's share of each bucket, gathers the others' and puts the new values
    /// into the model. Nothing is written into a tensor that is there already.
    pub(crate) fn update(
        &mut self,
        reduced: Vec<Vec<f32>>,
        grad_norm: f64,
        learning_rate: [(Group, f64); 2],
        global: &GlobalBatch,
    ) -> Result<(), Error> {
        let factor = clip::factor(grad_norm, self.config.train.clip_norm);
        let active = |entry: &Entry| {
            entry
                .action_space()
                .is_none_or(|space| global.spaces.iter().any(|s| s == space))
        };
        let device = self.device.clone().inner();
        let shard = self.optimizer.shard();
        self.optimizer.begin_update();
        let mut values = FlatWeights::of(&self.model, &self.layout);
        let mut updated = Vec::with_capacity(reduced.len());
        for (index, gradient) in reduced.into_iter().enumerate() {
            let bucket = &self.layout.buckets()[index];
            let group = self.layout.entries()[bucket.entries.start].group;
            let (_, rate) = learning_rate[usize::from(learning_rate[1].0 == group)];
            let weights = values.take(&self.layout, index);
            let share = bucket.share(shard);
            let own = if share.is_empty() {
                None
            } else {
                let mut gradient = to_device(gradient, &device);
                if factor < 1.0 {
                    gradient = gradient * factor;
                }
                Some(self.optimizer.update_bucket(
                    &self.layout,
                    index,
                    weights.slice([share]),
                    gradient,
                    (rate, &self.config.train.optimizer),
                    active,
                ))
            };
            updated.push(self.hand_out(bucket, own)?);
        }
        for (index, bucket) in updated.into_iter().enumerate() {
            let weights = match bucket {
                Updated::Whole(weights) => *weights,
                Updated::Parts(handle) => {
                    let mut weights: Vec<f32> = handle.wait()?.try_into()?;
                    weights.truncate(self.layout.buckets()[index].range.len());
                    to_device(weights, &device)
                }
            };
            if let Some(ema) = &mut self.ema {
                ema.update(index, weights.clone(), self.optimizer.updates());
            }
            values.put(&self.layout, index, &weights);
        }
        self.model = values.into_model(self.model.clone());
        Ok(())
    }

    /// Gives this rank's share of a bucket to the others, if each has its own.
    fn hand_out(&self, bucket: &Bucket, own: Option<Tensor<1>>) -> Result<Updated, Error> {
        let communicator = self.communicator.as_ref();
        if self.optimizer.shard() == Shard::WHOLE {
            let whole = own.ok_or_else(|| Error::internal("an empty bucket"))?;
            return Ok(Updated::Whole(Box::new(whole)));
        }
        let mut values = own.map(host).unwrap_or_default();
        let len = padded_len(bucket, communicator) / communicator.world_size() as usize;
        values.resize(len, 0.0);
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
}

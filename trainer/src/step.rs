//! One optimizer step, the whole of it.

use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use pollen_collectives::Communicator;
use pollen_dataloader::{BadSample, Data, HostBatch, Loader, Mixture};
use pollen_model::{Flower, SegmentedPass};

use crate::batch::{BatchBuilder, FlowBatch, next_micro_batch};
use crate::clip;
use crate::config::{Group, RunConfig};
use crate::data_parallel::{Gradients, Reduction, sum_f64};
use crate::ema::Ema;
use crate::error::Error;
use crate::layout::Layout;
use crate::optim::AdamW;
use crate::phases::{Phase, PhaseTimer};
use crate::signals::StopFlags;
use crate::update::{learning_rates, square_sums};
use crate::verdict::Verdict;

/// What one step did.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// The reduced verdict.
    pub verdict: Verdict,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rates used, by group.
    pub learning_rate: [(Group, f64); 2],
    /// Whether the weights were left alone because the loss or a gradient was not finite.
    pub skipped: bool,
    /// Hashes of this rank's own first bucket and of the reduced one, if asked for.
    pub exchange: Option<(String, String)>,
    /// The sample indices that all loaders delivered, sorted, while the audit lasts.
    pub audit: Option<Vec<u64>>,
    /// Samples of this rank that could not be loaded.
    pub bad: Vec<BadSample>,
}

/// Everything that a step reads and writes.
pub struct Trainer {
    pub(crate) config: RunConfig,
    pub(crate) model: Flower,
    pub(crate) layout: Layout,
    pub(crate) optimizer: AdamW,
    pub(crate) ema: Option<Ema>,
    pub(crate) data: Arc<Data>,
    pub(crate) mixture: Arc<Mixture>,
    /// Mean action chunk of each action space over the training data, `[H, A]`.
    pub(crate) mean_chunks: Vec<Option<Vec<f32>>>,
    pub(crate) loader: Loader,
    pub(crate) runtime: tokio::runtime::Handle,
    pub(crate) batches: BatchBuilder,
    pub(crate) communicator: Arc<dyn Communicator>,
    pub(crate) reduction: Reduction,
    pub(crate) device: Device,
    pub(crate) timer: PhaseTimer,
    pub(crate) stop: StopFlags,
    pub(crate) accumulation: u32,
    /// Steps done.
    pub(crate) step: u64,
    /// Steps whose update was skipped.
    pub(crate) non_finite: u64,
    /// Samples that no rank could load.
    pub(crate) bad_samples: u64,
    /// The step measured last on held-out episodes, and the mean error over action spaces.
    pub(crate) measured: Option<(u64, f64)>,
    pub(crate) over_budget: bool,
    /// Whether this rank's part of a checkpoint could not be written.
    pub(crate) save_failed: bool,
    pub(crate) prove_exchange: bool,
    pub(crate) audits_left: u64,
}

impl std::fmt::Debug for Trainer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trainer")
            .field("step", &self.step)
            .finish_non_exhaustive()
    }
}

impl Trainer {
    /// Runs one step: next batch, forward, backward, all-reduce, clip, update.
    pub fn train_step(&mut self) -> Result<StepReport, Error> {
        let step = self.step;
        let global = self.global_batch(step);
        self.timer.begin_step(step + 1);

        let (layout, device) = (&self.layout, &self.device);
        let mut gradients = Gradients::new(layout, &self.reduction, device, self.prove_exchange);
        let mut verdict = Verdict::default();
        let (mut delivered, mut bad) = (Vec::new(), Vec::new());
        for micro_batch in 0..self.accumulation {
            self.timer.enter(Phase::Data);
            let host = next_micro_batch(&mut self.loader, step + 1)?;
            verdict.count(&host);
            delivered.extend(host.sample_indices.iter().map(|&index| index as i64));
            bad.extend_from_slice(&host.bad);

            self.timer.enter(Phase::Forward);
            let (pass, loss) = self.micro_batch_loss(&host, micro_batch, global.valid_entries);
            verdict.loss += f64::from(loss.clone().into_scalar::<f32>());

            self.timer.enter(Phase::Backward);
            for named in pass.backward(&loss) {
                gradients.add(named, micro_batch + 1 == self.accumulation)?;
            }
        }

        self.timer.enter(Phase::AllReduce);
        let (reduced, own_hash) = gradients.finish()?;
        let square_sums = square_sums(&self.layout, &self.reduction, &reduced)?;
        let verdict = self.agree(verdict)?;
        self.check_count(verdict, global.valid_entries)?;
        let audit = self.audit(delivered)?;
        self.bad_samples += verdict.bad_samples as u64;

        self.timer.enter(Phase::Optimizer);
        let grad_norm = clip::norm(&square_sums);
        let exchange = own_hash.map(|own| (own, crate::data_parallel::hash(&square_sums)));
        let skipped = !(verdict.loss.is_finite() && grad_norm.is_finite());
        let optimizer = &self.config.train.optimizer;
        let learning_rate = learning_rates(optimizer, self.optimizer.updates());
        if skipped {
            self.non_finite += 1;
        } else {
            self.update(reduced, grad_norm, learning_rate, &global)?;
        }
        self.timer.close();
        self.step += 1;
        Ok(StepReport {
            verdict,
            grad_norm,
            learning_rate,
            skipped,
            exchange,
            audit,
            bad,
        })
    }

    /// The rank's share of the loss: squared errors over the *global* count of valid entries, so
    /// that a rank with more padding does not count more.
    fn micro_batch_loss(
        &self,
        host: &HostBatch,
        micro_batch: u32,
        valid_entries: u64,
    ) -> (SegmentedPass, Tensor<1>) {
        let (pass, batch) = self.forward(host, self.step, micro_batch);
        let velocity = pass.velocity();
        let squares =
            pollen_model::velocity_loss(velocity, batch.noise, batch.actions, batch.valid);
        (pass, squares / valid_entries as f64)
    }

    /// Runs the model on a micro-batch with the randomness of its place in the run.
    pub(crate) fn forward(
        &self,
        host: &HostBatch,
        step: u64,
        micro_batch: u32,
    ) -> (SegmentedPass, FlowBatch) {
        let rank = self.communicator.rank();
        let dropout = self.batches.randomness.dropout(step, micro_batch, rank);
        let batch = self.batches.flow(host, step, dropout, &self.model);
        let (z, t) = (batch.noisy(), batch.time.clone());
        let pass = self.model.segments(&batch.observation, &batch.masks, z, t);
        (pass, batch)
    }

    /// Sums the verdicts, so that all ranks decide alike.
    fn agree(&self, mut own: Verdict) -> Result<Verdict, Error> {
        own.terminate = f64::from(u8::from(self.stop.terminate()));
        own.interrupt = f64::from(u8::from(self.stop.interrupt()));
        own.over_budget = f64::from(u8::from(self.over_budget));
        own.save_failed = f64::from(u8::from(self.save_failed));
        own.data_wait_s = self.timer.spent(Phase::Data).as_secs_f64();
        Verdict::from_slice(&sum_f64(self.communicator.as_ref(), own.to_vec())?)
    }

    /// The count made from sample ids before the step must be what the batches really held.
    fn check_count(&self, verdict: Verdict, expected: u64) -> Result<(), Error> {
        if verdict.valid_entries == expected as f64 {
            return Ok(());
        }
        Err(Error::internal(format!(
            "step {}: the loaders of all ranks delivered {} valid action entries where the sample \
             order has {expected}",
            self.step, verdict.valid_entries
        )))
    }

    /// Gathers what the loaders of all ranks delivered and compares it with the sample order.
    fn audit(&mut self, delivered: Vec<i64>) -> Result<Option<Vec<u64>>, Error> {
        if self.audits_left == 0 {
            return Ok(None);
        }
        self.audits_left -= 1;
        let gathered = self.communicator.all_gather(delivered.into())?.wait()?;
        let gathered: Vec<i64> = gathered.try_into()?;
        let gathered: Vec<u64> = gathered.into_iter().map(|id| id as u64).collect();
        let (size, world_size) = (
            self.config.train.global_batch as usize,
            self.communicator.world_size() as usize,
        );
        let due: Vec<Vec<u64>> = (0..world_size)
            .map(|rank| {
                let slice = self.mixture.rank_slice(self.step, size, rank, world_size);
                slice.into_iter().map(|(index, _)| index).collect()
            })
            .collect();
        match crate::audit::check(&gathered, &due) {
            Ok(samples) => Ok(Some(samples)),
            Err(fault) => Err(Error::Audit {
                step: self.step + 1,
                fault: Box::new(fault),
            }),
        }
    }
}

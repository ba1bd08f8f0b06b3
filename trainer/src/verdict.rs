//! What all ranks decide together, once a step.

use pollen_dataloader::HostBatch;

use crate::error::Error;

/// What a rank tells the others once a step, and the sum it gets back.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Verdict {
    /// Sum of squared errors over valid entries, divided by their global count: the loss.
    pub loss: f64,
    /// Valid entries that were counted in the batches themselves, those of bad samples included.
    pub valid_entries: f64,
    /// Samples that could not be loaded.
    pub bad_samples: f64,
    /// Ranks that were asked to terminate.
    pub terminate: f64,
    /// Ranks that were interrupted.
    pub interrupt: f64,
    /// Ranks whose clock says that the budget is spent.
    pub over_budget: f64,
    /// Ranks whose part of a checkpoint could not be written.
    pub save_failed: f64,
    /// Seconds waited for data.
    pub data_wait_s: f64,
}

impl Verdict {
    pub(crate) fn count(&mut self, host: &HostBatch) {
        let in_quarantine: u64 = host.bad.iter().map(|bad| bad.entries).sum();
        self.valid_entries += (host.num_valid() + in_quarantine) as f64;
        self.bad_samples += host.bad.len() as f64;
    }

    pub(crate) fn to_vec(self) -> Vec<f64> {
        vec![
            self.loss,
            self.valid_entries,
            self.bad_samples,
            self.terminate,
            self.interrupt,
            self.over_budget,
            self.save_failed,
            self.data_wait_s,
        ]
    }

    pub(crate) fn from_slice(v: &[f64]) -> Result<Self, Error> {
        let &[
            loss,
            valid_entries,
            bad_samples,
            terminate,
            interrupt,
            over_budget,
            save_failed,
            data_wait_s,
        ] = v
        else {
            return Err(Error::internal("the reduced vector has another length"));
        };
        Ok(Self {
            loss,
            valid_entries,
            bad_samples,
            terminate,
            interrupt,
            over_budget,
            save_failed,
            data_wait_s,
        })
    }
}

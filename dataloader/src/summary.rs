//! What a mixture amounts to, for `pollen data index` and the start of a run.

use serde::Serialize;

use crate::data::Data;
use crate::mixture::Mixture;

/// Figures of one dataset.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DatasetSummary {
    /// Name in the recipe.
    pub name: String,
    /// Hash of its contents.
    pub hash: String,
    /// Episodes, held-out ones included.
    pub episodes: usize,
    /// Episodes held out.
    pub held_out_episodes: usize,
    /// Frames of training episodes: the length of an epoch.
    pub frames: u64,
    /// Row groups.
    pub row_groups: usize,
    /// Bytes of the data files.
    pub bytes: u64,
    /// Windows of the first epoch.
    pub windows: usize,
    /// Share of samples.
    pub share: f64,
}

/// Figures of a mixture.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// In the order of [`SampleRef::dataset`](crate::SampleRef).
    pub datasets: Vec<DatasetSummary>,
    /// Training frames of all datasets.
    pub frames: u64,
    /// Episodes of all datasets.
    pub episodes: usize,
    /// Row groups of all datasets.
    pub row_groups: usize,
    /// Bytes of all datasets.
    pub bytes: u64,
}

impl Summary {
    /// Collects the figures.
    pub fn new(data: &Data, mixture: &Mixture) -> Self {
        let shares = mixture.shares();
        let datasets: Vec<DatasetSummary> = data
            .datasets()
            .iter()
            .enumerate()
            .map(|(d, dataset)| DatasetSummary {
                name: dataset.name().to_owned(),
                hash: dataset.sidecar().dataset_hash.clone(),
                episodes: dataset.num_episodes(),
                held_out_episodes: dataset.config().holdout_episodes.len(),
                frames: mixture.order(d).num_frames(),
                row_groups: dataset.num_row_groups(),
                bytes: dataset.bytes(),
                windows: mixture.order(d).num_windows(0),
                share: shares[d],
            })
            .collect();
        Self {
            frames: datasets.iter().map(|d| d.frames).sum(),
            episodes: datasets.iter().map(|d| d.episodes).sum(),
            row_groups: datasets.iter().map(|d| d.row_groups).sum(),
            bytes: datasets.iter().map(|d| d.bytes).sum(),
            datasets,
        }
    }
}

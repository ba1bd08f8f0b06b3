//! What a policy that sees nothing should predict, to compare held-out errors with.

use futures::{StreamExt, TryStreamExt};
use pollen_core::ErrorClass;

use crate::batch::ModelShape;
use crate::data::{Data, frames_of};
use crate::error::Result;
use crate::mixture::Mixture;
use crate::sampler::RowGroupFrames;

/// Most row groups read of a dataset: an estimate from some ten thousand frames is a baseline as good
/// as that from all, and a start does not read the columns of a whole mixture.
const MAX_ROW_GROUPS: usize = 64;
const REQUESTS: usize = 8;

impl Data {
    /// Returns the mean normalised action chunk of each action space over the training frames,
    /// weighted by the datasets' shares: what a policy that sees nothing should predict. `None` for
    /// a space without data. Reads low-dimensional columns only, of 64 row groups of a dataset at
    /// most, spread evenly.
    ///
    /// # Shapes
    /// `[H, A]`, zero beyond the space.
    pub async fn mean_chunks(&self, mixture: &Mixture) -> Result<Vec<Option<Vec<f32>>>> {
        let ModelShape {
            action_horizon,
            action_width,
            ..
        } = self.shape();
        let spaces = self.datasets().iter().map(|d| d.space_index() as usize + 1);
        let num_spaces = spaces.max().unwrap_or(0);
        // Per space and entry: (weighted sum, weight).
        let mut sums = vec![vec![(0.0_f64, 0.0_f64); action_horizon * action_width]; num_spaces];
        for (d, share) in mixture.shares().into_iter().enumerate() {
            let (dataset, prepare) = (&self.datasets()[d], &self.prepare()[d]);
            let chosen = spread(dataset.frames(false), MAX_ROW_GROUPS);
            let frames = chosen.iter().flat_map(|group| &group.runs);
            let weight = share / frames.map(|run| run.rows).sum::<u64>() as f64;
            let sums = &mut sums[dataset.space_index() as usize];
            let width = dataset.action_space().dim();
            let reads = (0_u32..)
                .zip(&chosen)
                .filter(|(_, group)| !group.runs.is_empty())
                .map(|(g, _)| async move {
                    match dataset.columns(g).await {
                        Ok(columns) => Ok(Some((g, columns))),
                        // What cannot be used is reported when it is loaded.
                        Err(error) if error.class() == ErrorClass::Corrupt => Ok(None),
                        Err(error) => Err(error),
                    }
                });
            let mut reads = std::pin::pin!(futures::stream::iter(reads).buffered(REQUESTS));
            while let Some(read) = reads.try_next().await? {
                let Some((g, columns)) = read else { continue };
                for sample in frames_of(d as u32, &chosen).filter(|s| s.row_group == g) {
                    let rows_left = dataset.rows_left(sample.frame) as usize;
                    let row = dataset.row_in_group(sample);
                    let chunk = prepare.chunk(&columns.action, row, rows_left, action_horizon);
                    let Ok(chunk) = chunk else { continue };
                    let counted = self.counted_steps(sample);
                    for (step, action) in chunk.chunks_exact(width).take(counted).enumerate() {
                        let entries = &mut sums[step * action_width..][..width];
                        for (entry, &value) in entries.iter_mut().zip(action) {
                            entry.0 += weight * f64::from(value);
                            entry.1 += weight;
                        }
                    }
                }
            }
        }
        let mean = |(sum, weight): (f64, f64)| {
            if weight > 0.0 {
                (sum / weight) as f32
            } else {
                0.0
            }
        };
        let chunks = sums.into_iter().map(|sums| {
            let any = sums.iter().any(|&(_, weight)| weight > 0.0);
            any.then(|| sums.into_iter().map(mean).collect())
        });
        Ok(chunks.collect())
    }
}

/// Leaves the frames of `most` row groups at most, those in between empty.
fn spread(mut groups: Vec<RowGroupFrames>, most: usize) -> Vec<RowGroupFrames> {
    let full: Vec<usize> = (0..groups.len())
        .filter(|&g| !groups[g].runs.is_empty())
        .collect();
    if full.len() > most {
        for (i, &g) in full.iter().enumerate() {
            // The first of each of `most` stretches of equal length.
            if i > 0 && i * most / full.len() == (i - 1) * most / full.len() {
                groups[g].runs.clear();
            }
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::Run;

    #[test]
    fn chosen_row_groups_are_spread_evenly() {
        let groups = |num: u64| -> Vec<RowGroupFrames> {
            let run = |g| Run {
                episode: g,
                first_row: 10 * g,
                rows: 10,
            };
            (0..num)
                .map(|g| RowGroupFrames {
                    bytes: 1,
                    // Every fifth has no training frame.
                    runs: if g % 5 == 0 { vec![] } else { vec![run(g)] },
                })
                .collect()
        };
        assert_eq!(spread(groups(50), 40), groups(50));
        let chosen = spread(groups(1000), 40);
        let at: Vec<usize> = (0..1000).filter(|&g| !chosen[g].runs.is_empty()).collect();
        assert_eq!(at.len(), 40);
        assert!(
            at.windows(2)
                .all(|pair| (24..=26).contains(&(pair[1] - pair[0])))
        );
    }
}

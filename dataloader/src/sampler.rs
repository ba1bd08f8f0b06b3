//! The order of one dataset: every eligible frame exactly once an epoch, a window of row groups at
//! a time.
//!
//! ```text
//! epoch e:   row groups in a seeded order | cut into windows by bytes
//! window w:  the frames of its row groups, dealt evenly: sorted by ((k + jitter) / n, row group)
//! ```
//!
//! Position -> frame is a pure function. What it needs is built once per (epoch, window) and kept
//! for the latest few; then a jump costs one binary search.

use pollen_core::Seed;
use serde::{Deserialize, Serialize};

use crate::recent::Recent;

/// Version of the order of samples; a golden file pins what it means.
pub const ORDER_VERSION: u32 = 1;

/// Epochs and windows kept: one is left while the next is entered, and evaluation may jump.
const KEPT: usize = 4;

/// One sample: the frame at which its window starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SampleRef {
    /// Position of the dataset in the mixture (sorted by name).
    pub dataset: u32,
    /// Number of the row group, counted through the files of the dataset.
    pub row_group: u32,
    /// Episode, as stored.
    pub episode: u64,
    /// Global row in the dataset.
    pub frame: u64,
}

/// Eligible frames of one episode inside one row group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Episode, as stored.
    pub episode: u64,
    /// Global row of the first frame.
    pub first_row: u64,
    /// Number of frames.
    pub rows: u64,
}

/// One row group as the order sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowGroupFrames {
    /// Bytes in storage: windows are cut by these.
    pub bytes: u64,
    /// Eligible frames, in the order of rows.
    pub runs: Vec<Run>,
}

/// The order of one dataset's eligible frames.
#[derive(Debug)]
pub struct DatasetOrder {
    dataset: u32,
    seed: Seed,
    window_bytes: u64,
    groups: Vec<Group>,
    num_frames: u64,
    epochs: Recent<u64, Epoch>,
    windows: Recent<(u64, usize), Vec<(u32, u32)>>,
}

#[derive(Debug)]
struct Group {
    bytes: u64,
    num_frames: u32,
    /// Runs, each with the number of eligible frames before it.
    runs: Vec<(u32, Run)>,
}

/// The row groups of one epoch in their order, and where its windows end.
#[derive(Debug)]
struct Epoch {
    groups: Vec<u32>,
    /// Per window: (row groups up to its end, frames up to its end).
    ends: Vec<(usize, u64)>,
}

impl DatasetOrder {
    /// Builds the order of the dataset at position `dataset` of its mixture.
    ///
    /// `seed` must belong to this dataset alone. A row group larger than `window_bytes` is a window
    /// of its own.
    pub fn new(dataset: u32, seed: Seed, window_bytes: u64, groups: Vec<RowGroupFrames>) -> Self {
        let groups: Vec<Group> = groups
            .into_iter()
            .map(|group| {
                let mut num_frames = 0;
                let runs = group
                    .runs
                    .into_iter()
                    .map(|run| {
                        let before = num_frames;
                        num_frames += run.rows as u32;
                        (before, run)
                    })
                    .collect();
                Group {
                    bytes: group.bytes,
                    num_frames,
                    runs,
                }
            })
            .collect();
        Self {
            dataset,
            seed,
            window_bytes,
            num_frames: groups.iter().map(|g| u64::from(g.num_frames)).sum(),
            groups,
            epochs: Recent::new(KEPT),
            windows: Recent::new(KEPT),
        }
    }

    /// Returns the number of eligible frames, which is the length of an epoch.
    pub fn num_frames(&self) -> u64 {
        self.num_frames
    }

    /// Returns the number of windows of epoch `epoch`.
    pub fn num_windows(&self, epoch: u64) -> usize {
        self.epoch(epoch).ends.len()
    }

    /// Returns the sample at `position` of this dataset's endless stream of epochs.
    ///
    /// # Panics
    /// When the dataset has no eligible frame.
    pub fn at(&self, position: u64) -> SampleRef {
        let number = position / self.num_frames;
        let in_epoch = position % self.num_frames;
        let epoch = self.epoch(number);
        let window = epoch.ends.partition_point(|&(_, frames)| {
            compared();
            frames <= in_epoch
        });
        let before = window.checked_sub(1).map_or(0, |last| epoch.ends[last].1);
        let frames = self
            .windows
            .get((number, window), || self.deal(number, &epoch, window));
        let (group, k) = frames[(in_epoch - before) as usize];
        self.frame(group, k)
    }

    fn frame(&self, group: u32, k: u32) -> SampleRef {
        let runs = &self.groups[group as usize].runs;
        let at = runs.partition_point(|&(before, _)| {
            compared();
            before <= k
        });
        let (before, run) = runs[at - 1];
        SampleRef {
            dataset: self.dataset,
            row_group: group,
            episode: run.episode,
            frame: run.first_row + u64::from(k - before),
        }
    }

    fn epoch(&self, number: u64) -> std::sync::Arc<Epoch> {
        self.epochs.get(number, || {
            let mut groups = self
                .seed
                .child("row_groups")
                .index(number)
                .permutation(self.groups.len());
            groups.retain(|&g| self.groups[g as usize].num_frames > 0);
            let mut ends: Vec<(usize, u64)> = Vec::new();
            let (mut bytes, mut frames) = (0, 0);
            for (i, &g) in groups.iter().enumerate() {
                let group = &self.groups[g as usize];
                if bytes > 0 && bytes + group.bytes > self.window_bytes {
                    ends.push((i, frames));
                    bytes = 0;
                }
                bytes += group.bytes;
                frames += u64::from(group.num_frames);
            }
            ends.push((groups.len(), frames));
            Epoch { groups, ends }
        })
    }

    /// Deals the frames of a window: (row group, eligible frame in it).
    fn deal(&self, number: u64, epoch: &Epoch, window: usize) -> Vec<(u32, u32)> {
        let first = window.checked_sub(1).map_or(0, |last| epoch.ends[last].0);
        let seed = self.seed.child("frames").index(number);
        let mut dealt: Vec<(u64, u32, u32)> = Vec::new();
        for &g in &epoch.groups[first..epoch.ends[window].0] {
            let num_frames = self.groups[g as usize].num_frames;
            let seed = seed.index(u64::from(g));
            let mut jitter = seed.child("jitter").draws();
            let order = seed.permutation(num_frames as usize);
            for (k, frame) in order.into_iter().enumerate() {
                // (k + jitter) / n as a fixed-point fraction of 2^64.
                let numerator = u128::from((k as u64) << 32 | u64::from(jitter.next_u32())) << 32;
                dealt.push(((numerator / u128::from(num_frames)) as u64, g, frame));
            }
        }
        dealt.sort_unstable();
        dealt.into_iter().map(|(_, g, frame)| (g, frame)).collect()
    }
}

/// Counts the comparisons of searches in tests.
#[cfg(not(test))]
fn compared() {}
#[cfg(test)]
use tests::compared;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::Cell;

    thread_local! {
        static COMPARISONS: Cell<u32> = const { Cell::new(0) };
    }

    pub(super) fn compared() {
        COMPARISONS.set(COMPARISONS.get() + 1);
    }

    /// Row groups with the given (bytes, frames); episodes of 7 frames, the row after each left out.
    fn groups(shape: &[(u64, u64)]) -> Vec<RowGroupFrames> {
        let mut row = 0;
        shape
            .iter()
            .map(|&(bytes, frames)| {
                let mut left = frames;
                let mut runs = Vec::new();
                while left > 0 {
                    let rows = left.min(7);
                    runs.push(Run {
                        episode: row / 8,
                        first_row: row,
                        rows,
                    });
                    row += rows + 1;
                    left -= rows;
                }
                RowGroupFrames { bytes, runs }
            })
            .collect()
    }

    fn all_frames(groups: &[RowGroupFrames]) -> Vec<u64> {
        groups
            .iter()
            .flat_map(|g| &g.runs)
            .flat_map(|run| run.first_row..run.first_row + run.rows)
            .collect()
    }

    #[test]
    fn a_window_mixes_its_row_groups_evenly() {
        let shape = vec![(100, 40); 12];
        let order = DatasetOrder::new(0, Seed::new(5), 400, groups(&shape));
        assert_eq!(order.num_windows(0), 3);
        for window in 0..3 {
            for stretch in 0..4 {
                let mut counts = [0_u32; 12];
                for i in 0..40 {
                    counts[order.at(window * 160 + stretch * 40 + i).row_group as usize] += 1;
                }
                // Dealt evenly: 10 of each of the 4 row groups, give or take the jitter.
                let present: Vec<u32> = counts.into_iter().filter(|&n| n > 0).collect();
                assert_eq!(present.len(), 4);
                assert!(present.iter().all(|n| (9..=11).contains(n)), "{present:?}");
            }
        }
    }

    #[test]
    fn epochs_differ_and_a_jump_needs_no_replay() {
        let shape = vec![(100, 30); 9];
        let build = || DatasetOrder::new(2, Seed::new(5), 300, groups(&shape));
        let replayed = build();
        let walk: Vec<SampleRef> = (0..800).map(|i| replayed.at(i)).collect();
        assert_ne!(walk[..270], walk[270..540]);
        for jump in [799, 0, 540, 269, 270, 123] {
            assert_eq!(build().at(jump), walk[jump as usize]);
            assert_eq!(replayed.at(jump), walk[jump as usize]);
        }
    }

    #[test]
    fn a_jump_costs_a_binary_search_after_its_set_up() {
        // 256 windows of 16 row groups, each of 8 runs with 50 frames.
        let order = DatasetOrder::new(0, Seed::new(5), 1600, groups(&vec![(100, 50); 4096]));
        let window = 16 * 50;
        assert_eq!(order.num_windows(0), 256);
        let (epochs, windows) = (order.epochs.num_built(), order.windows.num_built());
        let built = || {
            let epochs = order.epochs.num_built() - epochs;
            (epochs, order.windows.num_built() - windows)
        };
        let start = 3 * order.num_frames() + 77 * window;
        order.at(start + 400);
        assert_eq!(
            built(),
            (1, 1),
            "one epoch and one window, none before them"
        );
        order.at(start + 100 * window);
        assert_eq!(built(), (1, 2));
        for offset in [0, 799, 1, 500, 123] {
            COMPARISONS.set(0);
            order.at(start + offset);
            // Among 256 windows, then among 8 runs.
            assert!(
                COMPARISONS.get() <= 9 + 4,
                "{} comparisons",
                COMPARISONS.get()
            );
        }
        assert_eq!(built(), (1, 2), "nothing is made again");
        order.at(9 * order.num_frames());
        assert_eq!(built(), (2, 3));
    }

    proptest! {
        #[test]
        fn every_eligible_frame_once_an_epoch(
            shape in prop::collection::vec((1_u64..500, 0_u64..30), 1..20),
            window in 1_u64..2000,
            seed in any::<u64>(),
        ) {
            let groups = groups(&shape);
            let expected = all_frames(&groups);
            prop_assume!(!expected.is_empty());
            let order = DatasetOrder::new(0, Seed::new(seed), window, groups.clone());
            for epoch in [0, 1, 7] {
                let start = epoch * order.num_frames();
                let mut seen = Vec::new();
                for i in start..start + order.num_frames() {
                    let sample = order.at(i);
                    let run = groups[sample.row_group as usize].runs.iter().find(|run| {
                        (run.first_row..run.first_row + run.rows).contains(&sample.frame)
                    });
                    prop_assert_eq!(run.map(|run| run.episode), Some(sample.episode));
                    seen.push(sample.frame);
                }
                seen.sort_unstable();
                prop_assert_eq!(&seen, &expected);
            }
        }
    }
}

//! What a rank keeps of weights, gradients and optimizer state, by world size.

use std::fmt::Write as _;

use pollen_observe::units;
use serde::Serialize;

use crate::config::RunConfig;
use crate::layout::{Layout, Shard};

/// Most world sizes in a table.
const ROWS: usize = 8;

/// Bytes that one rank keeps, without activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// f32 weights, all of them on every rank.
    pub weights: u64,
    /// f32 gradients of what is trained.
    pub gradients: u64,
    /// Both moments of AdamW, on the rank that has most.
    pub moments: u64,
    /// Averaged weights, if the recipe keeps them.
    pub averages: u64,
}

impl Memory {
    /// Returns what a rank of `world_size` keeps, with the moments in shards or replicated.
    ///
    /// # Errors
    /// When the model cannot be built for the recipe's action spaces.
    pub fn of(
        config: &RunConfig,
        world_size: u32,
        shard_optimizer: bool,
    ) -> Result<Self, pollen_model::Error> {
        let layout = Layout::of_run(config)?;
        let all = config.model.parameter_table(&config.action_spaces)?.count();
        // The first shard is the largest.
        let shard = Shard {
            part: 0,
            parts: if shard_optimizer {
                world_size as usize
            } else {
                1
            },
        };
        let shares = layout.buckets().iter().map(|bucket| bucket.share(shard));
        let share: usize = shares.map(|share| share.len()).sum();
        let trained = 4 * layout.len() as u64;
        Ok(Self {
            weights: 4 * all as u64,
            gradients: trained,
            moments: 2 * 4 * share as u64,
            averages: config.train.ema.as_ref().map_or(0, |_| trained),
        })
    }

    /// Returns the sum.
    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.moments + self.averages
    }
}

/// Returns a table of the memory of each rank by world size, for those that fit the global batch.
///
/// # Errors
/// When the model cannot be built for the recipe's action spaces.
pub fn table(config: &RunConfig) -> Result<String, pollen_model::Error> {
    let fitting: Vec<u32> = (1..=config.train.global_batch)
        .filter(|world| config.accumulation(*world).is_ok())
        .take(ROWS)
        .collect();
    let mut text = String::from("  memory  of each worker, without activations\n");
    let mut row = |cells: [&str; 6]| {
        let [workers, weights, gradients, replicated, sharded, total] = cells;
        let _ = writeln!(
            text,
            "          {workers:>7} {weights:>12} {gradients:>12} {replicated:>12} {sharded:>12} \
             {total:>12}"
        );
    };
    row([
        "workers",
        "weights",
        "gradients",
        "AdamW",
        "sharded",
        "total",
    ]);
    for world in fitting {
        let whole = Memory::of(config, world, false)?;
        let shards = Memory::of(config, world, true)?;
        let chosen = if config.train.shard_optimizer {
            shards
        } else {
            whole
        };
        row([
            &world.to_string(),
            &units::bytes(whole.weights + whole.averages),
            &units::bytes(whole.gradients),
            &units::bytes(whole.moments),
            &units::bytes(shards.moments),
            &units::bytes(chosen.total()),
        ]);
    }
    Ok(text)
}

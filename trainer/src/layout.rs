//! Where each trained parameter lies in the flat optimizer state.
//!
//! ```text
//! names, sorted --> regions (head decay | head no decay | vlm decay | vlm no decay) --> buckets
//! ```
//! The order follows canonical tensor names alone, so every rank, world size and program version
//! with the same hash agrees on the meaning of a flat offset.

use std::ops::Range;

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::clip::CHUNK;
use crate::config::{Group, OptimizerConfig, RunConfig};

/// One trained tensor in the flat state.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// Canonical state-dict name.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// First flat index.
    pub offset: usize,
    /// Learning-rate group.
    pub group: Group,
    /// Whether weight decay applies.
    pub decay: bool,
}

impl Entry {
    /// Returns the number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns whether the tensor has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the flat indices.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }

    /// Returns the action space this parameter serves, if it serves one alone.
    pub fn action_space(&self) -> Option<&str> {
        let mut parts = self.name.split('.');
        match parts.next() {
            Some("action_encoders" | "action_decoders" | "adaln" | "proprio_encoders") => {
                parts.next()
            }
            _ => None,
        }
    }
}

/// A run of entries of one region that is reduced and updated together.
#[derive(Clone, Debug)]
pub struct Bucket {
    /// Indices into [`Layout::entries`].
    pub entries: Range<usize>,
    /// Flat indices.
    pub range: Range<usize>,
}

/// Which part of every bucket a rank keeps the optimizer's state of, and updates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Number of this part, below `parts`.
    pub part: usize,
    /// Number of parts.
    pub parts: usize,
}

impl Shard {
    /// The whole of every bucket.
    pub const WHOLE: Self = Self { part: 0, parts: 1 };
}

impl Bucket {
    /// Returns the values of each part if the bucket is dealt to `parts` ranks: whole chunks of the
    /// norm, so that the last parts may be short or empty.
    pub fn part_len(&self, parts: usize) -> usize {
        match parts {
            1 => self.range.len(),
            _ => self.range.len().div_ceil(parts).next_multiple_of(CHUNK),
        }
    }

    /// Returns the part of a shard, counted from the bucket's start.
    pub fn share(&self, shard: Shard) -> Range<usize> {
        let (part, len) = (self.part_len(shard.parts), self.range.len());
        (part * shard.part).min(len)..(part * (shard.part + 1)).min(len)
    }
}

/// The flat layout of all trained parameters.
#[derive(Clone, Debug)]
pub struct Layout {
    entries: Vec<Entry>,
    buckets: Vec<Bucket>,
    len: usize,
}

/// Says whether the reference exempts a parameter from weight decay: its lower-cased name contains
/// `bias`, `layernorm`, `ln` or `norm`. `ln` matches every `adaln` matrix, which is meant.
pub fn is_decay_exempt(name: &str) -> bool {
    let name = name.to_lowercase();
    ["bias", "layernorm", "ln", "norm"]
        .iter()
        .any(|part| name.contains(part))
}

impl Layout {
    /// Lays out what a recipe trains.
    ///
    /// # Errors
    /// When the model cannot be built for the recipe's action spaces.
    pub fn of_run(config: &RunConfig) -> Result<Self, pollen_model::Error> {
        let table = config.model.parameter_table(&config.action_spaces)?;
        let trained = table.iter().filter(|spec| spec.trained);
        Ok(Self::new(
            trained.map(|spec| (spec.name.clone(), spec.shape.clone())),
            &config.train.optimizer,
            config.train.bucket.as_u64(),
        ))
    }

    /// Lays out `parameters` (name, shape) in buckets of at least `bucket_bytes` where a region
    /// has as much.
    pub fn new(
        parameters: impl IntoIterator<Item = (String, Vec<usize>)>,
        optimizer: &OptimizerConfig,
        bucket_bytes: u64,
    ) -> Self {
        let mut entries: Vec<Entry> = parameters
            .into_iter()
            .map(|(name, shape)| {
                let group = Group::of(&name);
                let decay = !optimizer.group(group).exempt_norms || !is_decay_exempt(&name);
                Entry {
                    name,
                    shape,
                    offset: 0,
                    group,
                    decay,
                }
            })
            .collect();
        entries.sort_by(|a, b| (a.group, !a.decay, &a.name).cmp(&(b.group, !b.decay, &b.name)));
        let mut len = 0;
        for entry in &mut entries {
            entry.offset = len;
            len += entry.len();
        }
        let mut buckets: Vec<Bucket> = Vec::new();
        for (i, entry) in entries.iter().enumerate() {
            match buckets.last_mut() {
                Some(bucket)
                    if (bucket.range.len() as u64) * 4 < bucket_bytes
                        && entries[bucket.entries.start].group == entry.group
                        && entries[bucket.entries.start].decay == entry.decay =>
                {
                    bucket.entries.end = i + 1;
                    bucket.range.end = entry.range().end;
                }
                _ => buckets.push(Bucket {
                    entries: i..i + 1,
                    range: entry.range(),
                }),
            }
        }
        Self {
            entries,
            buckets,
            len,
        }
    }

    /// Returns all entries in flat order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Returns the buckets in flat order.
    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    /// Returns the number of trained values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether nothing is trained.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the hash that a checkpoint carries: equal hashes mean equal flat offsets.
    pub fn hash(&self) -> String {
        let text = serde_json::to_vec(&self.entries).expect("names and numbers serialise");
        Sha256::digest(&text)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(names: &[&str], bucket_bytes: u64) -> Layout {
        let parameters = names.iter().map(|name| ((*name).to_owned(), vec![3, 4]));
        Layout::new(parameters, &OptimizerConfig::default(), bucket_bytes)
    }

    #[test]
    fn regions_follow_group_then_decay_then_name() {
        let layout = layout(
            &[
                "vlm.b.weight",
                "dit.0.norm1.weight",
                "cond_linear.weight",
                "action_decoders.x.weight",
            ],
            1 << 20,
        );
        let order: Vec<&str> = layout
            .entries()
            .iter()
            .map(|entry| entry.name.as_str())
            .collect();
        assert_eq!(
            order,
            [
                "action_decoders.x.weight",
                "cond_linear.weight",
                "dit.0.norm1.weight",
                "vlm.b.weight"
            ]
        );
        assert_eq!(layout.buckets().len(), 3, "a bucket never crosses a region");
        assert_eq!(layout.entries()[0].action_space(), Some("x"));
        assert_eq!(layout.entries()[1].action_space(), None);
        assert_eq!(layout.len(), 48);
    }

    #[test]
    fn shards_cover_every_bucket_once_in_whole_chunks() {
        for len in [1, CHUNK, 5 * CHUNK + 3, 64 * CHUNK] {
            let bucket = Bucket {
                entries: 0..1,
                range: 100..100 + len,
            };
            for parts in [1, 2, 3, 7] {
                let mut covered = 0;
                for part in 0..parts {
                    let share = bucket.share(Shard { part, parts });
                    assert_eq!(share.start, covered, "{len} in {parts}");
                    assert!(share.start.is_multiple_of(CHUNK) || share.is_empty());
                    covered = share.end;
                }
                assert_eq!(covered, len, "{len} in {parts}");
            }
        }
    }

    #[test]
    fn the_order_of_arrival_does_not_matter() {
        let a = layout(&["a", "b", "vlm.c"], 16);
        let b = layout(&["vlm.c", "b", "a"], 16);
        assert_eq!(a.hash(), b.hash());
        assert_ne!(a.hash(), layout(&["a", "b", "vlm.d"], 16).hash());
        assert_eq!(a.buckets().len(), 3, "a full bucket is closed");
    }
}

//! Work and memory of a model by part, from the configuration alone.
//!
//! Multiply-add counts as two operations. Only matrix products and convolutions are counted, as is
//! usual for the utilisation of a device; norms, activations and softmax are left out. Window
//! attention is counted as it runs: without the padding of windows.

use std::fmt;

use pollen_core::ActionSpace;
use serde::Serialize;

use crate::config::{FlowerConfig, ModulationKind, SINUSOID_WIDTH, SiglipConfig, patch_geometry};
use crate::error::Error;
use crate::parameters::{PROMPT, ParameterTable, grouped};

/// Bytes of a weight, and of its gradient.
const WEIGHT_BYTES: u64 = 4;
/// Bytes of the two moments that AdamW keeps for a trained weight.
const MOMENT_BYTES: u64 = 8;
/// Values that one token and channel keep for the backward pass of an attention with its
/// feed-forward layer: the 34 bytes of a half-precision layer (Korthikanti et al. 2022, eq. 2).
const KEPT_PER_CHANNEL: u64 = 17;

/// Work and memory of one part of the model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PartCost {
    /// Name of the part.
    pub part: &'static str,
    /// Parameter values.
    pub parameters: u64,
    /// Those of them that are trained.
    pub trained: u64,
    /// Floating-point operations of one sample's forward pass.
    pub forward_flops: u64,
    /// Floating-point operations of one sample's forward and backward pass.
    pub training_flops: u64,
    /// Values that one sample keeps for the backward pass, attention matrices left out.
    pub kept_values: u64,
    /// Values of attention matrices that one sample keeps for the backward pass.
    pub kept_attention_values: u64,
}

impl PartCost {
    /// Returns the bytes of the weights.
    pub fn weight_bytes(&self) -> u64 {
        self.parameters * WEIGHT_BYTES
    }

    /// Returns the bytes of the gradients.
    pub fn gradient_bytes(&self) -> u64 {
        self.trained * WEIGHT_BYTES
    }

    /// Returns the bytes of the optimizer's moments.
    pub fn optimizer_bytes(&self) -> u64 {
        self.trained * MOMENT_BYTES
    }

    /// Estimates the bytes that `samples` keep for the backward pass at `value_bytes` a value.
    pub fn activation_bytes(&self, samples: u64, value_bytes: u64) -> u64 {
        samples * value_bytes * (self.kept_values + self.kept_attention_values)
    }

    fn plus(&self, other: &Self) -> Self {
        Self {
            part: self.part,
            parameters: self.parameters + other.parameters,
            trained: self.trained + other.trained,
            forward_flops: self.forward_flops + other.forward_flops,
            training_flops: self.training_flops + other.training_flops,
            kept_values: self.kept_values + other.kept_values,
            kept_attention_values: self.kept_attention_values + other.kept_attention_values,
        }
    }
}

/// What the shared modulation saves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ModulationSaving {
    /// Parameters of the modulation in Global-AdaLN.
    pub global_adaln: u64,
    /// Parameters of the modulation in AdaLN-Zero.
    pub adaln_zero: u64,
    /// Parameters of the flow transformer with AdaLN-Zero.
    pub flow_with_adaln_zero: u64,
}

impl ModulationSaving {
    /// Returns the share of the flow transformer's parameters that Global-AdaLN saves.
    pub fn share(&self) -> f64 {
        (self.adaln_zero as f64 - self.global_adaln as f64) / self.flow_with_adaln_zero as f64
    }
}

/// Work and memory of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ModelCost {
    /// The parts, in the order of the forward pass.
    pub parts: Vec<PartCost>,
    /// What Global-AdaLN saves, whether the model uses it or not.
    pub modulation: ModulationSaving,
    /// Samples of a micro-batch, for the activations.
    pub micro_batch: u64,
    /// Bytes of a value kept for the backward pass.
    pub value_bytes: u64,
}

impl ModelCost {
    /// Returns the sum of all parts.
    pub fn total(&self) -> PartCost {
        let start = PartCost {
            part: "total",
            ..PartCost::default()
        };
        self.parts.iter().fold(start, |sum, part| sum.plus(part))
    }
}

/// Operations and kept values of a forward pass.
#[derive(Clone, Copy, Debug, Default)]
struct Work {
    flops: u64,
    kept: u64,
    kept_attention: u64,
}

impl Work {
    /// Adds `times` products `[rows, inner] x [inner, columns]`.
    fn product(&mut self, times: usize, rows: usize, inner: usize, columns: usize) {
        self.flops += 2 * (times * rows * inner * columns) as u64;
    }

    /// Adds `times` attentions of `width` channels in `heads` over `pairs` of query and key.
    fn attention(&mut self, times: usize, pairs: usize, width: usize, heads: usize, dropout: f64) {
        self.flops += 4 * (times * pairs * width) as u64;
        // Probabilities; with dropout also its mask and what it leaves.
        let kept = if dropout > 0.0 { 3 } else { 1 };
        self.kept_attention += (kept * times * pairs * heads) as u64;
    }

    /// Adds what `layers` of attention and feed-forward layer keep.
    fn keep(&mut self, layers: usize, tokens: usize, width: usize) {
        self.kept += (layers * tokens * width) as u64 * KEPT_PER_CHANNEL;
    }
}

impl FlowerConfig {
    /// Returns work and memory by part for `text_len` text tokens, `micro_batch` samples at a time
    /// and `value_bytes` per value kept for the backward pass.
    ///
    /// # Errors
    /// When the configuration cannot be built.
    pub fn cost(
        &self,
        spaces: &[ActionSpace],
        text_len: usize,
        micro_batch: u64,
        value_bytes: u64,
    ) -> Result<ModelCost, Error> {
        let table = self.parameter_table(spaces)?;
        let widest = spaces.iter().map(ActionSpace::dim).max().unwrap_or(0);
        let work = [
            ("image tower", self.vision_work()),
            ("language layers", self.language_work(text_len)),
            ("flow transformer", self.flow_work(text_len, widest)),
        ];
        let mut differentiated = false;
        let mut parts = Vec::new();
        for (part, work) in work {
            let (parameters, trained) = count(&table, part);
            // A trained part needs the gradients of its weights and of what lies inside; a frozen
            // one only lets them through, and only if something before it is trained.
            differentiated |= trained > 0;
            let kept = u64::from(differentiated);
            let backward = kept + u64::from(trained > 0);
            parts.push(PartCost {
                part,
                parameters,
                trained,
                forward_flops: work.flops,
                training_flops: work.flops * (1 + backward),
                kept_values: kept * work.kept,
                kept_attention_values: kept * work.kept_attention,
            });
        }
        Ok(ModelCost {
            parts,
            modulation: self.modulation_saving(spaces)?,
            micro_batch,
            value_bytes,
        })
    }

    fn vision_work(&self) -> Work {
        let cameras = self.num_cameras as u64;
        let one = match &self.vision.siglip {
            Some(siglip) => self.siglip_work(siglip),
            None => self.davit_work(),
        };
        Work {
            flops: cameras * one.flops,
            kept: cameras * one.kept,
            kept_attention: cameras * one.kept_attention,
        }
    }

    /// Work on one image.
    fn siglip_work(&self, siglip: &SiglipConfig) -> Work {
        let vision = &self.vision;
        let (width, layers) = (vision.dims[0], vision.depths[0]);
        let patches = vision.grid() * vision.grid();
        let square = siglip.pixel_shuffle * siglip.pixel_shuffle;
        let mut work = Work::default();
        work.product(1, patches, 3 * siglip.patch * siglip.patch, width);
        work.product(4 * layers, patches, width, width);
        work.product(2 * layers, patches, width, siglip.ffn);
        work.attention(layers, patches * patches, width, vision.heads[0], 0.0);
        work.keep(layers, patches, width);
        work.product(1, patches / square, width * square, self.language.width);
        work
    }

    /// Work on one image.
    fn davit_work(&self) -> Work {
        let vision = &self.vision;
        let mut work = Work::default();
        let (mut inputs, mut side) = (3, vision.image_size);
        for (stage, (&width, &depth)) in vision.dims.iter().zip(&vision.depths).enumerate() {
            let (kernel, stride, padding) = patch_geometry(stage);
            side = (side + 2 * padding - kernel) / stride + 1;
            let cells = side * side;
            work.product(1, cells, inputs * kernel * kernel, width);
            work.product(4 * depth, cells, 9, width);
            work.kept += (4 * depth * cells * width) as u64;
            // Attention to cells, then attention between the channels of a group: there the
            // products are as large as if each cell met as many keys as a group has channels.
            let (pairs, group) = (
                window_pairs(side, vision.window),
                width / vision.groups[stage],
            );
            work.attention(depth, pairs, width, vision.heads[stage], 0.0);
            work.attention(depth, cells * group, width, 0, 0.0);
            work.kept_attention += (depth * width * group) as u64;
            work.product(2 * depth, cells, width, 12 * width);
            work.keep(2 * depth, cells, width);
            inputs = width;
        }
        work.product(1, vision.num_tokens(), inputs, self.language.width);
        work
    }

    fn language_work(&self, text_len: usize) -> Work {
        let language = self.pruned_language();
        let (width, layers, heads) = (language.width, language.layers, language.heads);
        let tokens = self.joined_len(text_len);
        let mut work = Work::default();
        if let Some(decoder) = &language.decoder {
            let queries = heads * decoder.head_dim;
            work.product(2 * layers, tokens, width, queries);
            work.product(
                2 * layers,
                tokens,
                width,
                decoder.kv_heads * decoder.head_dim,
            );
            work.product(3 * layers, tokens, width, language.ffn);
            work.attention(layers, tokens * tokens, queries, heads, 0.0);
        } else {
            work.product(4 * layers, tokens, width, width);
            work.product(2 * layers, tokens, width, language.ffn);
            work.attention(layers, tokens * tokens, width, heads, language.dropout);
        }
        work.keep(layers, tokens, width);
        if self.rereads_text() {
            work.product(6 * layers, text_len, width, width);
            work.product(2 * layers, tokens, width, width);
            work.product(2 * layers, text_len, width, language.ffn);
            for keys in [text_len, tokens] {
                let pairs = text_len * keys;
                work.attention(layers, pairs, width, heads, language.dropout);
                work.keep(layers, text_len, width);
            }
            work.kept += (2 * layers * tokens * width) as u64;
        }
        work
    }

    fn flow_work(&self, text_len: usize, action_dim: usize) -> Work {
        let flow = &self.flow;
        let (width, layers, steps) = (flow.width, flow.layers, flow.action_horizon);
        let context = self.context_len(text_len);
        let mut work = Work::default();
        work.product(1, context, self.language.width, width);
        work.product(2, 1, SINUSOID_WIDTH, width);
        work.product(2, 1, width, width);
        work.product(2, steps, action_dim, width);
        work.product(1, steps, width, width);
        match flow.modulation {
            ModulationKind::GlobalAdaln => {
                work.product(1, 1, width, 9 * width);
                work.product(layers, 1, width, flow.modulation_rank);
                work.product(layers, 1, flow.modulation_rank, 6 * width);
            }
            ModulationKind::AdalnZero => work.product(layers, 1, width, 6 * width),
        }
        work.product(6 * layers, steps, width, width);
        work.product(2 * layers, context, width, width);
        work.product(3 * layers, steps, width, flow.hidden());
        for keys in [steps, context] {
            let dropout = flow.dropout_attention;
            work.attention(layers, steps * keys, width, flow.heads, dropout);
            work.keep(layers, steps, width);
        }
        work.kept += (2 * layers * context * width) as u64;
        work
    }

    fn modulation_saving(&self, spaces: &[ActionSpace]) -> Result<ModulationSaving, Error> {
        let tables = [ModulationKind::GlobalAdaln, ModulationKind::AdalnZero].map(|modulation| {
            let mut config = self.clone();
            config.flow.modulation = modulation;
            config.frozen = Vec::new();
            config.parameter_table(spaces)
        });
        let [global, zero] = tables;
        let (global, zero) = (global?, zero?);
        let modulation = |table: &ParameterTable| -> u64 {
            table
                .iter()
                .filter(|spec| {
                    spec.name.starts_with("adaln.") || spec.name.contains(".adaLN_modulation.")
                })
                .map(|spec| spec.len() as u64)
                .sum()
        };
        Ok(ModulationSaving {
            global_adaln: modulation(&global),
            adaln_zero: modulation(&zero),
            flow_with_adaln_zero: count(&zero, "flow transformer").0,
        })
    }
}

/// Pairs of query and key of all windows of a map of `side` x `side` cells; the padding of a
/// window is one more key.
fn window_pairs(side: usize, window: usize) -> usize {
    let bands = |length: usize| [(length / window, window), (1, length % window)];
    let mut pairs = 0;
    for (rows, height) in bands(side) {
        for (columns, width) in bands(side) {
            let cells = height * width;
            let padded = usize::from(cells < window * window);
            pairs += rows * columns * cells * (cells + padded);
        }
    }
    pairs
}

fn count(table: &ParameterTable, part: &str) -> (u64, u64) {
    let mut counts = (0, 0);
    for spec in table.iter().filter(|spec| spec.name != PROMPT) {
        if part_of(&spec.name) == part {
            counts.0 += spec.len() as u64;
            counts.1 += if spec.trained { spec.len() as u64 } else { 0 };
        }
    }
    counts
}

fn part_of(name: &str) -> &'static str {
    if name.starts_with("vlm.language_model.") || name.starts_with("vlm.text_model.") {
        "language layers"
    } else if name.starts_with("vlm.") {
        "image tower"
    } else {
        "flow transformer"
    }
}

impl fmt::Display for ModelCost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<18} {:>13} {:>10} {:>10} {:>11} {:>11} {:>11} {:>13}",
            "part",
            "trained",
            "fwd GFLOP",
            "step GFLOP",
            "weights MB",
            "grads MB",
            "AdamW MB",
            "activations MB"
        )?;
        let giga = |flops: u64| flops as f64 / 1e9;
        let mega = |bytes: u64| bytes as f64 / 1e6;
        for part in self.parts.iter().chain([&self.total()]) {
            writeln!(
                f,
                "{:<18} {:>13} {:>10.3} {:>10.3} {:>11.1} {:>11.1} {:>11.1} {:>13.1}",
                part.part,
                grouped(part.trained as usize),
                giga(part.forward_flops),
                giga(part.training_flops),
                mega(part.weight_bytes()),
                mega(part.gradient_bytes()),
                mega(part.optimizer_bytes()),
                mega(part.activation_bytes(self.micro_batch, self.value_bytes)),
            )?;
        }
        writeln!(
            f,
            "GFLOP of one sample; activations: an estimate for {} sample(s) at {} bytes a value",
            self.micro_batch, self.value_bytes
        )?;
        let saving = &self.modulation;
        let share = 100.0 * saving.share();
        write!(
            f,
            "modulation: {} parameters with global_adaln, {} with adaln_zero; global_adaln {} {:.1} % \
             of the flow transformer",
            grouped(saving.global_adaln as usize),
            grouped(saving.adaln_zero as usize),
            if share < 0.0 { "costs" } else { "saves" },
            share.abs()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{flower_config, space};

    fn full(cameras: usize, text_len: usize) -> ModelCost {
        let spaces = [
            space("joint_single", 8, 0),
            space("eef_delta", 7, 0),
            space("bimanual_nav", 16, 0),
        ];
        let mut config = flower_config("flower.toml");
        config.num_cameras = cameras;
        config.frozen = Vec::new();
        config.cost(&spaces, text_len, 1, 2).expect("valid")
    }

    #[track_caller]
    fn close(actual: u64, unit: f64, expected: f64) {
        let actual = actual as f64 / unit;
        assert!(
            (actual / expected - 1.0).abs() < 0.01,
            "{actual:.2} is not {expected}"
        );
    }

    /// GFLOP of a forward pass, derived by hand from the layer shapes of the published model: image
    /// tower without padding, text encoder, flow transformer, all of them.
    #[test]
    fn operations_of_the_full_model_are_those_of_its_layer_shapes() {
        for (cameras, text_len, expected) in [
            (1, 50, [126.8, 31.0, 18.8, 176.6]),
            (1, 20, [126.8, 21.7, 16.5, 164.9]),
            (2, 50, [253.5, 46.7, 22.8, 323.0]),
            (2, 20, [253.5, 37.3, 20.4, 311.2]),
        ] {
            let cost = full(cameras, text_len);
            for (part, expected) in cost.parts.iter().zip(expected) {
                close(part.forward_flops, 1e9, expected);
                assert_eq!(part.training_flops, 3 * part.forward_flops);
            }
            close(cost.total().forward_flops, 1e9, expected[3]);
        }
    }

    /// Megabytes a sample in half precision, without attention matrices.
    #[test]
    fn activations_of_the_full_model_are_those_of_its_layer_shapes() {
        for (cameras, expected) in [(1, [236.0, 42.0, 33.0]), (2, [473.0, 63.0, 36.0])] {
            for (part, expected) in full(cameras, 50).parts.iter().zip(expected) {
                let megabytes = (2 * part.kept_values) as f64 / 1e6;
                assert_eq!(megabytes.round(), expected, "{}", part.part);
                assert!(part.kept_attention_values > 0);
            }
        }
    }

    #[test]
    fn memory_follows_the_trained_parameters() {
        let spaces = [space("eef_delta", 7, 0)];
        let mut config = flower_config("flower-tiny.toml");
        let cost = |config: &FlowerConfig| config.cost(&spaces, 20, 4, 4).expect("valid");
        let trained = cost(&config);
        let table = config.parameter_table(&spaces).expect("valid");
        assert_eq!(trained.total().parameters, table.count() as u64);
        config.frozen = vec!["vlm.".into()];
        let frozen = cost(&config);
        for part in &frozen.parts[..2] {
            assert_eq!(part.optimizer_bytes() + part.gradient_bytes(), 0);
            assert_eq!(part.training_flops, part.forward_flops);
            assert_eq!(part.activation_bytes(4, 4), 0);
        }
        assert_eq!(frozen.parts[2], trained.parts[2]);
        // Gradients pass through a frozen text encoder to a trained image tower.
        config.frozen = vec!["vlm.language_model.".into()];
        let through = &cost(&config).parts[1];
        assert_eq!(through.trained, 0);
        assert_eq!(through.training_flops, 2 * through.forward_flops);
        assert!(through.kept_values > 0);
        let text = frozen.to_string();
        assert!(text.contains("global_adaln costs"), "{text}");
    }

    #[test]
    fn global_adaln_saves_a_tenth_of_the_published_head() {
        let saving = full(2, 50).modulation;
        assert_eq!(saving.global_adaln, 28_311_552 + 18 * 1_841_408);
        assert_eq!(saving.adaln_zero, 18 * (6 * 1024 * 1024 + 6 * 1024));
        assert!((0.10..0.15).contains(&saving.share()), "{}", saving.share());
    }

    #[test]
    fn pairs_of_windows_count_the_padding_as_one_key() {
        // One window of 2 x 2 whole, two of 2 x 1 and one of 1 x 1 with a key for the padding.
        assert_eq!(window_pairs(3, 2), 4 * 4 + 2 * (2 * 3) + 2);
        assert_eq!(window_pairs(4, 2), 4 * 16);
    }
}

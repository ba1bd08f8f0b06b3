//! What weights were trained with and do not show: settings that a recipe must share with them.

use pollen_model::{CrossAttentionMask, FlowerConfig, NormVariant};
use serde::{Deserialize, Serialize};

/// Settings that change what the flow transformer's weights mean.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choices {
    /// Base of the rotary positions.
    pub rope_theta: f64,
    /// What the context mask does in the cross-attention.
    pub cross_attention_mask: CrossAttentionMask,
    /// The normalisation of tokens, queries, keys and context.
    pub norm: NormVariant,
}

impl Choices {
    /// Returns the choices of a model.
    pub fn of(config: &FlowerConfig) -> Self {
        Self {
            rope_theta: config.flow.rope_theta,
            cross_attention_mask: config.cross_attention_mask,
            norm: config.flow.norm,
        }
    }

    /// Returns a sentence for every choice in which the recipe differs.
    pub fn faults(&self, recipe: &Self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut compare = |key: &str, trained: String, set: String| {
            if trained != set {
                faults.push(format!(
                    "the weights were trained with {key} = {trained}, the recipe has {set}; set \
                     {key} = {trained} in the recipe"
                ));
            }
        };
        compare(
            "model.flow.rope_theta",
            text(&self.rope_theta),
            text(&recipe.rope_theta),
        );
        compare(
            "model.cross_attention_mask",
            text(&self.cross_attention_mask),
            text(&recipe.cross_attention_mask),
        );
        compare("model.flow.norm", text(&self.norm), text(&recipe.norm));
        faults
    }
}

/// Returns a value as a recipe has it.
pub(crate) fn text(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("numbers and names serialise")
}

/// Returns the first of `thetas` that gives these tables, `[positions, pairs]` each, within
/// `tolerance`.
pub(crate) fn theta_of(
    (cosines, sines): (&[f32], &[f32]),
    pairs: usize,
    thetas: &[f64],
    tolerance: f32,
) -> Option<f64> {
    let positions = cosines.len() / pairs;
    thetas.iter().copied().find(|&theta| {
        let (cos, sin) = pollen_model::rope_tables(theta, positions, 2 * pairs);
        let close = |a: &[f32], b: &[f32]| {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= tolerance)
        };
        close(cosines, &cos) && close(sines, &sin)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_is_recognised_from_rounded_tables() {
        for theta in [32.0, 1000.0] {
            let (cos, sin) = pollen_model::rope_tables(theta, 100, 64);
            let round = |values: &[f32]| -> Vec<f32> {
                let rounded = values.iter().map(|&x| half::bf16::from_f32(x).to_f32());
                rounded.collect()
            };
            let found = |tolerance| {
                let tables = (round(&cos), round(&sin));
                theta_of(
                    (&tables.0, &tables.1),
                    32,
                    &[500.0, 32.0, 1000.0],
                    tolerance,
                )
            };
            assert_eq!(found(4e-3), Some(theta));
            assert_eq!(found(1e-3), None, "bf16 is coarser than that");
            let exact = theta_of((&cos, &sin), 32, &[32.0, 1000.0], 1e-3);
            assert_eq!(exact, Some(theta));
        }
    }
}

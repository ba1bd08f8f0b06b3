//! Sinusoidal embeddings of flow time and control frequency.

use burn::module::Module;
use burn::tensor::activation::silu;
use burn::tensor::{Tensor, TensorData};

use crate::config::SINUSOID_WIDTH;
use crate::layers::Linear;
use crate::weights::Weights;

/// Embeds a number: sinusoids, then two linear layers with a SiLU between them.
#[derive(Module, Debug)]
pub(crate) struct SinusoidEmbedder {
    first: Linear,
    second: Linear,
    frequencies: Tensor<1>,
}

impl SinusoidEmbedder {
    /// Builds the embedder at `path` for wavelengths between 1 and `base`, with arguments
    /// multiplied by `scale`.
    pub(crate) fn new(weights: &mut Weights, path: &str, base: f64, scale: f32) -> Self {
        let table = frequencies(base, scale);
        Self {
            first: Linear::new(weights, &format!("{path}.mlp.0")),
            second: Linear::new(weights, &format!("{path}.mlp.2")),
            frequencies: Tensor::from_data(
                TensorData::new(table, [SINUSOID_WIDTH / 2]),
                weights.device(),
            ),
        }
    }

    /// Returns cosines, then sines.
    ///
    /// # Shapes
    /// `[batch] -> [batch, 256]`
    pub(crate) fn sinusoid(&self, x: Tensor<1>) -> Tensor<2> {
        let angles = x.unsqueeze_dim::<2>(1) * self.frequencies.clone().unsqueeze();
        Tensor::cat(vec![angles.clone().cos(), angles.sin()], 1)
    }

    /// # Shapes
    /// `[batch] -> [batch, width]`
    pub(crate) fn forward(&self, x: Tensor<1>) -> Tensor<2> {
        let hidden = silu(self.first.forward(self.sinusoid(x)));
        self.second.forward(hidden)
    }
}

/// Returns `scale * base^(-i / 128)` in the reference's own order of f32 operations: an argument
/// reaches 1000, where one unit in the last place already shows in the sinusoid.
pub(crate) fn frequencies(base: f64, scale: f32) -> Vec<f32> {
    let half = SINUSOID_WIDTH / 2;
    let slope = -base.ln() as f32;
    (0..half)
        .map(|i| {
            let exponent = slope * i as f32 / half as f32;
            f64::from(exponent).exp() as f32 * scale
        })
        .collect()
}

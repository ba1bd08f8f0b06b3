//! Rotary positions in the half-split pairing: element `j` turns with `j + E / 2`.

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};

use crate::layers::like;

/// Cosines and sines of every position, `[positions, E / 2]` each.
#[derive(Module, Debug)]
pub(crate) struct Rope {
    cos: Tensor<2>,
    sin: Tensor<2>,
}

impl Rope {
    /// Tabulates `positions` rows for heads of `head_dim`.
    pub(crate) fn new(theta: f64, positions: usize, head_dim: usize, device: &Device) -> Self {
        let (cos, sin) = tables(theta, positions, head_dim);
        let shape = [positions, head_dim / 2];
        Self {
            cos: Tensor::from_data(TensorData::new(cos, shape), device),
            sin: Tensor::from_data(TensorData::new(sin, shape), device),
        }
    }

    /// Rotates queries or keys at positions 0, 1, ...
    ///
    /// # Shapes
    /// `[B, H, T, E] -> [B, H, T, E]`
    pub(crate) fn rotate(&self, x_BHTE: Tensor<4>) -> Tensor<4> {
        let [_, _, tokens, width] = x_BHTE.dims();
        let half = width / 2;
        let rows = |table: &Tensor<2>| like(table.clone().narrow(0, 0, tokens), &x_BHTE);
        let (cos, sin) = (rows(&self.cos), rows(&self.sin));
        let (cos, sin) = (cos.unsqueeze::<4>(), sin.unsqueeze::<4>());
        let first = x_BHTE.clone().narrow(3, 0, half);
        let second = x_BHTE.narrow(3, half, half);
        Tensor::cat(
            vec![
                first.clone() * cos.clone() - second.clone() * sin.clone(),
                second * cos + first * sin,
            ],
            3,
        )
    }
}

/// Returns cosines and sines of `position * theta^(-2j / head_dim)`, position by position. The
/// angles are rounded to f32 as the published tables have them.
pub fn tables(theta: f64, positions: usize, head_dim: usize) -> (Vec<f32>, Vec<f32>) {
    let mut cos = Vec::with_capacity(positions * head_dim / 2);
    let mut sin = Vec::with_capacity(positions * head_dim / 2);
    for position in 0..positions {
        for pair in 0..head_dim / 2 {
            let frequency = theta.powf(-2.0 * pair as f64 / head_dim as f64) as f32;
            let angle = f64::from(position as f32 * frequency);
            cos.push(angle.cos() as f32);
            sin.push(angle.sin() as f32);
        }
    }
    (cos, sin)
}

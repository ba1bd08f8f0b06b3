//! Attention inside windows, and attention between channels.
//!
//! Legend: B images, H x W cells, C channels, G heads or groups, E channels of one, N cells.

use burn::module::Module;
use burn::tensor::activation::softmax;
use burn::tensor::{Tensor, TensorData};

use crate::attention::{Dropped, attend};
use crate::layers::{LayerNorm, Linear, in_f32, like};
use crate::weights::Weights;

/// Attention among the cells of a window.
#[derive(Module, Debug)]
pub(crate) struct WindowAttention {
    norm: LayerNorm,
    qkv: Linear,
    proj: Linear,
    heads: usize,
    window: usize,
}

impl WindowAttention {
    pub(crate) fn new(weights: &mut Weights, path: &str, heads: usize, window: usize) -> Self {
        Self {
            norm: LayerNorm::new(weights, &format!("{path}.norm")),
            qkv: Linear::new(weights, &format!("{path}.fn.qkv")),
            proj: Linear::new(weights, &format!("{path}.fn.proj")),
            heads,
            window,
        }
    }

    /// The reference pads the normed map with zeros at the right and the bottom to whole windows,
    /// and lets the padding take part. A padded cell's query, key and value are the projection's
    /// bias, so all padded keys of a window act as one whose logit carries the logarithm of their
    /// number, and padded queries are never asked for: the same result without padding anything.
    ///
    /// # Shapes
    /// `[B, H, W, C] -> [B, H, W, C]`
    pub(crate) fn forward(&self, x_BHWC: Tensor<4>) -> Tensor<4> {
        let [_, height, width, _] = x_BHWC.dims();
        let qkv_BHWC = self.qkv.forward(self.norm.forward(x_BHWC));
        let rows = bands(height, self.window).map(|(top, tall, side)| {
            let row = qkv_BHWC.clone().narrow(1, top, tall);
            let blocks = bands(width, self.window).map(|(left, wide, across)| {
                self.attend_windows(row.clone().narrow(2, left, wide), (side, across))
            });
            join(blocks.collect(), 2)
        });
        self.proj.forward(join(rows.collect(), 1))
    }

    /// Attends inside the windows of `side` x `across` cells that tile the map.
    ///
    /// # Shapes
    /// `[B, H, W, 3 * C] -> [B, H, W, C]`
    fn attend_windows(&self, qkv_BHWC: Tensor<4>, (side, across): (usize, usize)) -> Tensor<4> {
        let [batch, height, width, channels] = qkv_BHWC.dims();
        let (rows, columns) = (height / side, width / across);
        let windows = batch * rows * columns;
        let qkv = qkv_BHWC
            .reshape([batch, rows, side, columns, across, channels])
            .swap_dims(2, 3)
            .reshape([windows, side * across, channels]);
        let [q, mut k, mut v] = split_three(&qkv, self.heads);
        let mut bias = None;
        let padding = self.window * self.window - side * across;
        if padding > 0 {
            let (key, value, logit) = self.padded_key(&qkv, side * across, padding);
            k = Tensor::cat(vec![k, key], 2);
            v = Tensor::cat(vec![v, value], 2);
            bias = Some(logit);
        }
        attend(q, k, v, bias, Dropped::NEVER)
            .swap_dims(1, 2)
            .reshape([batch, rows, columns, side, across, channels / 3])
            .swap_dims(2, 3)
            .reshape([batch, height, width, channels / 3])
    }

    /// The key and the value that stand for `padding` padded cells, and what is added to the
    /// logits of `cells` real keys and this one.
    ///
    /// # Shapes
    /// `[windows, G, 1, E]` twice, `[1, 1, 1, cells + 1]`
    fn padded_key(
        &self,
        qkv: &Tensor<3>,
        cells: usize,
        padding: usize,
    ) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
        let windows = qkv.dims()[0];
        let bias = like(self.qkv.bias(), qkv);
        let device = bias.device();
        let channels = bias.dims()[0] / 3;
        let width = channels / self.heads;
        let [key, value] = [1, 2].map(|part| {
            bias.clone()
                .narrow(0, part * channels, channels)
                .reshape([1, self.heads, 1, width])
                .expand([windows, self.heads, 1, width])
        });
        let mut logits = vec![0.0; cells];
        logits.push((padding as f32).ln());
        let logits = TensorData::new(logits, [1, 1, 1, cells + 1]);
        (key, value, Tensor::from_data(logits, &device))
    }
}

/// Cuts `length` cells into whole windows and the rest: (start, cells, side of a window there).
fn bands(length: usize, window: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    let whole = length - length % window;
    [(0, whole, window), (whole, length - whole, length - whole)]
        .into_iter()
        .filter(|(_, cells, _)| *cells > 0)
}

/// Concatenates along `axis`, without copying a single part.
fn join(mut parts: Vec<Tensor<4>>, axis: usize) -> Tensor<4> {
    match parts.len() {
        1 => parts.remove(0),
        _ => Tensor::cat(parts, axis),
    }
}

/// Attention among the channels of a group.
#[derive(Module, Debug)]
pub(crate) struct ChannelAttention {
    norm: LayerNorm,
    qkv: Linear,
    proj: Linear,
    groups: usize,
}

impl ChannelAttention {
    pub(crate) fn new(weights: &mut Weights, path: &str, groups: usize) -> Self {
        Self {
            norm: LayerNorm::new(weights, &format!("{path}.norm")),
            qkv: Linear::new(weights, &format!("{path}.fn.qkv")),
            proj: Linear::new(weights, &format!("{path}.fn.proj")),
            groups,
        }
    }

    /// # Shapes
    /// `[B, H, W, C] -> [B, H, W, C]`
    pub(crate) fn forward(&self, x_BHWC: Tensor<4>) -> Tensor<4> {
        let [batch, height, width, channels] = x_BHWC.dims();
        let cells = height * width;
        let normed = self.norm.forward(x_BHWC);
        let qkv = self.qkv.forward(normed.reshape([batch, cells, channels]));
        let [q_BGNE, k_BGNE, v_BGNE] = split_three(&qkv, self.groups);
        let mixed_BNC = attend_channels(q_BGNE, k_BGNE, v_BGNE)
            .swap_dims(1, 2)
            .reshape([batch, cells, channels]);
        self.proj
            .forward(mixed_BNC)
            .reshape([batch, height, width, channels])
    }
}

/// Returns the values mixed among the channels of their group, softmax in f32.
///
/// # Shapes
/// `[B, G, N, E]` each
pub(crate) fn attend_channels(
    q_BGNE: Tensor<4>,
    k_BGNE: Tensor<4>,
    v_BGNE: Tensor<4>,
) -> Tensor<4> {
    let scale = 1.0 / (q_BGNE.dims()[2] as f64).sqrt();
    let logits_BGEE = (q_BGNE * scale).transpose().matmul(k_BGNE);
    let weights_BGEE = in_f32(logits_BGEE, |logits| softmax(logits, 3));
    v_BGNE.matmul(weights_BGEE.transpose())
}

/// Splits a fused projection: `[B, N, 3 * G * E]` to three of `[B, G, N, E]`.
fn split_three(qkv: &Tensor<3>, parts: usize) -> [Tensor<4>; 3] {
    let [batch, cells, width] = qkv.dims();
    let channels = width / 3;
    [0, 1, 2].map(|i| {
        qkv.clone()
            .narrow(2, i * channels, channels)
            .reshape([batch, cells, parts, channels / parts])
            .swap_dims(1, 2)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parameters::{ParameterSpec, ParameterTable};
    use crate::testing::{hold_generator, mini, values};
    use burn::tensor::{Device, Distribution};
    use pollen_core::Seed;

    /// The reference's formulation: the map padded with zeros to whole windows.
    fn padded(attention: &WindowAttention, x_BHWC: Tensor<4>) -> Tensor<4> {
        let [batch, height, width, channels] = x_BHWC.dims();
        let side = attention.window;
        let (rows, columns) = (height.div_ceil(side), width.div_ceil(side));
        let (tall, wide) = (rows * side, columns * side);
        let normed = attention.norm.forward(x_BHWC);
        let canvas = Tensor::zeros([batch, tall, wide, channels], &normed.device());
        let canvas = canvas.slice_assign([0..batch, 0..height, 0..width, 0..channels], normed);
        let windows = canvas
            .reshape([batch, rows, side, columns, side, channels])
            .swap_dims(2, 3)
            .reshape([batch * rows * columns, side * side, channels]);
        let [q, k, v] = split_three(&attention.qkv.forward(windows), attention.heads);
        let dropped = Dropped {
            rate: 0.0,
            train: false,
        };
        let mixed = attend(q, k, v, None, dropped).swap_dims(1, 2).reshape([
            batch * rows * columns,
            side * side,
            channels,
        ]);
        attention
            .proj
            .forward(mixed)
            .reshape([batch, rows, columns, side, side, channels])
            .swap_dims(2, 3)
            .reshape([batch, tall, wide, channels])
            .narrow(1, 0, height)
            .narrow(2, 0, width)
    }

    #[test]
    fn one_key_stands_for_the_padding() {
        let _held = hold_generator();
        let device = Device::flex().autodiff();
        device.seed(5);
        let config = mini().vision;
        let mut table = ParameterTable::default();
        table.vision(&config, 16);
        let mut source = |spec: &ParameterSpec| {
            let mut values = vec![0.0; spec.len()];
            let seed = Seed::new(9).child(spec.name.as_str());
            seed.draws().fill_normal(&mut values);
            values.iter().map(|value| value * 0.5).collect()
        };
        let mut weights = Weights::new(&table, &mut source, &device);
        let path = "vlm.vision_tower.blocks.1.0.spatial_block.window_attn";
        let attention = WindowAttention::new(&mut weights, path, config.heads[1], 5);
        let channels = config.dims[1];
        for (height, width) in [(10, 5), (7, 11), (3, 4), (5, 8), (2, 10)] {
            let x = Tensor::<4>::random(
                [2, height, width, channels],
                Distribution::Normal(0.0, 1.0),
                &device,
            );
            let probe = x.random_like(Distribution::Normal(0.0, 1.0));
            let run = |forward: &dyn Fn(Tensor<4>) -> Tensor<4>| {
                let x = x.clone().detach().require_grad();
                let output = forward(x.clone());
                let gradients = (output.clone() * probe.clone()).sum().backward();
                let of_bias = attention.qkv.bias().grad(&gradients).expect("tracked");
                let of_x = x.grad(&gradients).expect("tracked");
                [values(output.inner()), values(of_x), values(of_bias)]
            };
            let expected = run(&|x| padded(&attention, x));
            let folded = run(&|x| attention.forward(x));
            for (what, (a, b)) in ["output", "gradient of x", "gradient of the bias"]
                .iter()
                .zip(expected.iter().zip(&folded))
            {
                assert_eq!(a.len(), b.len());
                for (a, b) in a.iter().zip(b) {
                    assert!(
                        (a - b).abs() <= 1e-4 * (1.0 + a.abs()),
                        "{height} x {width}, {what}: {b} is not {a}"
                    );
                }
            }
        }
    }
}

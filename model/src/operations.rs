//! Single operations of the model at the shapes they have in it, for measuring.
//!
//! What runs is what the layers run, without the weights' names and the data around it.

use std::any::Any;

use burn::tensor::activation::softmax;
use burn::tensor::module::{conv2d, layer_norm, linear};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Device, Distribution, FloatDType, Tensor};
use serde::{Deserialize, Serialize};

use crate::attention::{Dropped, attend};
use crate::config::Precision;
use crate::layers::{LAYER_NORM_EPS, in_f32};
use crate::vision::attend_channels;

/// A kind of operation, by the name that `benches/pytorch/micro.py` gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationKind {
    /// A linear layer: `[rows, in, out]`.
    Matmul,
    /// A 3 x 3 convolution with one filter for each channel, added to its input: `[B, H, W, C]`.
    Depthwise,
    /// Attention inside windows: `[windows, heads, cells, width of a head]`.
    WindowAttention,
    /// Attention among channels: `[images, groups, cells, width of a group]`.
    ChannelAttention,
    /// LayerNorm of rows: `[rows, width]`.
    LayerNorm,
    /// Softmax of rows: `[rows, width]`.
    Softmax,
}

/// An operation with random inputs.
#[derive(Debug)]
pub struct Operation(Inputs);

#[derive(Debug)]
enum Inputs {
    Matmul(Tensor<2>, Tensor<2>),
    Depthwise(Tensor<4>, Tensor<4>, Tensor<1>),
    WindowAttention([Tensor<4>; 3]),
    ChannelAttention([Tensor<4>; 3]),
    LayerNorm(Tensor<2>, Tensor<1>, Tensor<1>),
    Softmax(Tensor<2>),
}

impl Operation {
    /// Draws the inputs on a device; on one with autodiff all of them want a gradient.
    ///
    /// # Errors
    /// When the kind has no such shape.
    pub fn new(
        kind: OperationKind,
        shape: &[usize],
        precision: Precision,
        device: &Device,
    ) -> Result<Self, String> {
        let inputs = Random { precision, device };
        Ok(Self(match (kind, shape) {
            (OperationKind::Matmul, &[rows, inner, columns]) => Inputs::Matmul(
                inputs.normal([rows, inner]),
                inputs.normal([columns, inner]),
            ),
            (OperationKind::Depthwise, &[batch, height, width, channels]) => Inputs::Depthwise(
                inputs.normal([batch, height, width, channels]),
                inputs.normal([channels, 1, 3, 3]),
                inputs.normal([channels]),
            ),
            (OperationKind::WindowAttention, &[a, b, c, d]) => {
                Inputs::WindowAttention([(); 3].map(|()| inputs.normal([a, b, c, d])))
            }
            (OperationKind::ChannelAttention, &[a, b, c, d]) => {
                Inputs::ChannelAttention([(); 3].map(|()| inputs.normal([a, b, c, d])))
            }
            // Norms keep their weights in f32.
            (OperationKind::LayerNorm, &[rows, width]) => Inputs::LayerNorm(
                inputs.normal([rows, width]),
                inputs.in_f32().normal([width]),
                inputs.in_f32().normal([width]),
            ),
            (OperationKind::Softmax, &[rows, width]) => {
                Inputs::Softmax(inputs.normal([rows, width]))
            }
            _ => return Err(format!("{kind:?} has no shape {shape:?}")),
        }))
    }

    /// Runs it once: the forward pass, and the backward pass for inputs that want a gradient. What
    /// it returns must be kept until the device is done, or a lazy one may compute nothing.
    pub fn run(&self) -> Box<dyn Any> {
        match &self.0 {
            Inputs::Matmul(x, weight) => {
                passes(linear(x.clone(), weight.clone().transpose(), None))
            }
            Inputs::Depthwise(x, weight, bias) => {
                let options = ConvOptions::new([1; 2], [1; 2], [1; 2], weight.dims()[0]);
                let map = x.clone().permute([0, 3, 1, 2]);
                let map = conv2d(map, weight.clone(), Some(bias.clone()), options);
                passes(x.clone() + map.permute([0, 2, 3, 1]))
            }
            Inputs::WindowAttention([q, k, v]) => passes(attend(
                q.clone(),
                k.clone(),
                v.clone(),
                None,
                Dropped::NEVER,
            )),
            Inputs::ChannelAttention([q, k, v]) => {
                passes(attend_channels(q.clone(), k.clone(), v.clone()))
            }
            Inputs::LayerNorm(x, weight, bias) => passes(in_f32(x.clone(), |x| {
                layer_norm(x, weight.clone(), Some(bias.clone()), LAYER_NORM_EPS)
            })),
            Inputs::Softmax(x) => passes(in_f32(x.clone(), |x| softmax(x, 1))),
        }
    }
}

fn passes<const D: usize>(output: Tensor<D>) -> Box<dyn Any> {
    if output.is_autodiff() {
        Box::new(output.backward())
    } else {
        Box::new(output)
    }
}

#[derive(Clone, Copy)]
struct Random<'a> {
    precision: Precision,
    device: &'a Device,
}

impl Random<'_> {
    fn in_f32(self) -> Self {
        Self {
            precision: Precision::F32,
            ..self
        }
    }

    fn normal<const D: usize>(self, shape: [usize; D]) -> Tensor<D> {
        let plain = self.device.clone().inner();
        let values: Tensor<D> = Tensor::random(shape, Distribution::Normal(0.0, 1.0), &plain);
        let values = match self.precision {
            Precision::F32 => values,
            Precision::Bf16 => values.cast(FloatDType::BF16),
        };
        if self.device.is_autodiff() {
            Tensor::autodiff(values).require_grad()
        } else {
            values
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Gradients;

    #[test]
    fn every_kind_runs_in_both_passes_and_precisions() {
        let kinds = [
            (OperationKind::Matmul, vec![3, 4, 5]),
            (OperationKind::Depthwise, vec![1, 5, 5, 4]),
            (OperationKind::WindowAttention, vec![2, 2, 4, 3]),
            (OperationKind::ChannelAttention, vec![2, 2, 4, 3]),
            (OperationKind::LayerNorm, vec![3, 8]),
            (OperationKind::Softmax, vec![3, 8]),
        ];
        for (kind, shape) in kinds {
            for precision in [Precision::F32, Precision::Bf16] {
                let device = Device::flex();
                let plain = Operation::new(kind, &shape, precision, &device).expect("fits");
                assert!(!plain.run().is::<Gradients>(), "{kind:?}");
                let device = device.autodiff();
                let trained = Operation::new(kind, &shape, precision, &device).expect("fits");
                assert!(trained.run().is::<Gradients>(), "{kind:?}");
            }
            let wrong = Operation::new(kind, &[7], Precision::F32, &Device::flex());
            assert!(wrong.expect_err("one axis").contains("[7]"));
        }
    }
}

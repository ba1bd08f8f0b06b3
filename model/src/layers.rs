//! Thin layers with weights in PyTorch's layout, so that files are read and written without
//! transposing anything.

use burn::module::{Module, Param};
use burn::tensor::module::{conv2d, layer_norm, linear};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{DType, Device, Distribution, Int, Tensor};
use pollen_core::Seed;

use crate::config::NormVariant;
use crate::weights::Weights;

pub(crate) const LAYER_NORM_EPS: f64 = 1e-5;
const RMS_NORM_EPS: f64 = 1e-6;

/// A linear layer, weight `[out, in]`.
#[derive(Module, Debug)]
pub(crate) struct Linear {
    weight: Param<Tensor<2>>,
    bias: Option<Param<Tensor<1>>>,
}

impl Linear {
    /// Builds the layer at `path`, with a bias if the table has one.
    pub(crate) fn new(weights: &mut Weights, path: &str) -> Self {
        let bias = format!("{path}.bias");
        Self {
            weight: weights.param(&format!("{path}.weight")),
            bias: weights.has(&bias).then(|| weights.param(&bias)),
        }
    }

    /// Returns the bias of a layer that has one.
    pub(crate) fn bias(&self) -> Tensor<1> {
        self.bias.as_ref().expect("the layer has a bias").val()
    }

    /// Applies the layer to the last axis.
    ///
    /// # Shapes
    /// `[.., in] -> [.., out]`
    pub(crate) fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let bias = self.bias.as_ref().map(|bias| like(bias.val(), &x));
        let weight = like(self.weight.val(), &x);
        linear(x, weight.transpose(), bias)
    }
}

/// LayerNorm over the last axis.
#[derive(Module, Debug)]
pub(crate) struct LayerNorm {
    weight: Param<Tensor<1>>,
    bias: Param<Tensor<1>>,
    eps: f64,
}

impl LayerNorm {
    pub(crate) fn new(weights: &mut Weights, path: &str) -> Self {
        Self::with_eps(weights, path, LAYER_NORM_EPS)
    }

    /// Builds the norm with another addition to the variance.
    pub(crate) fn with_eps(weights: &mut Weights, path: &str, eps: f64) -> Self {
        Self {
            weight: weights.param(&format!("{path}.weight")),
            bias: weights.param(&format!("{path}.bias")),
            eps,
        }
    }

    /// # Shapes
    /// `[.., width] -> [.., width]`
    pub(crate) fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        in_f32(x, |x| {
            layer_norm(x, self.weight.val(), Some(self.bias.val()), self.eps)
        })
    }
}

/// Normalisation of the last axis without a mean in the numerator and without a bias.
#[derive(Module, Debug)]
pub(crate) struct RmsNorm {
    weight: Param<Tensor<1>>,
    #[module(skip)]
    variant: NormVariant,
    eps: f64,
}

impl RmsNorm {
    pub(crate) fn new(weights: &mut Weights, path: &str, variant: NormVariant) -> Self {
        Self {
            weight: weights.param(&format!("{path}.weight")),
            variant,
            eps: RMS_NORM_EPS,
        }
    }

    /// Builds a norm by the root of the mean square with another addition to it.
    pub(crate) fn with_eps(weights: &mut Weights, path: &str, eps: f64) -> Self {
        Self {
            eps,
            ..Self::new(weights, path, NormVariant::Rms)
        }
    }

    /// # Shapes
    /// `[.., width] -> [.., width]`
    pub(crate) fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        in_f32(x, |x| {
            let scale = match self.variant {
                NormVariant::Rms => x.clone().square().mean_dim(D - 1),
                NormVariant::Variance => x.clone().var(D - 1),
            };
            x / (scale + self.eps).sqrt() * self.weight.val().unsqueeze()
        })
    }
}

/// Subtracts the mean and divides by the standard deviation of the last axis.
pub(crate) fn stateless_norm<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    in_f32(x, |x| {
        let centred = x.clone() - x.mean_dim(D - 1);
        let variance = centred.clone().square().mean_dim(D - 1);
        centred / (variance + RMS_NORM_EPS).sqrt()
    })
}

/// A table of vectors, one per row.
#[derive(Module, Debug)]
pub(crate) struct Embedding {
    weight: Param<Tensor<2>>,
}

impl Embedding {
    pub(crate) fn new(weights: &mut Weights, path: &str) -> Self {
        Self {
            weight: weights.param(&format!("{path}.weight")),
        }
    }

    /// Returns the rows named by `ids`.
    ///
    /// # Shapes
    /// `[batch, tokens] -> [batch, tokens, width]`
    pub(crate) fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let [batch, tokens] = ids.dims();
        let table = self.weight.val();
        let width = table.dims()[1];
        table
            .select(0, ids.reshape([batch * tokens]))
            .reshape([batch, tokens, width])
    }

    /// Returns `count` rows from `start` on, `[count, width]`.
    pub(crate) fn rows(&self, start: usize, count: usize) -> Tensor<2> {
        self.weight.val().narrow(0, start, count)
    }
}

/// A 2-D convolution, weight `[out, in / groups, kernel, kernel]`.
#[derive(Module, Debug)]
pub(crate) struct Conv2d {
    weight: Param<Tensor<4>>,
    bias: Param<Tensor<1>>,
    stride: usize,
    padding: usize,
}

impl Conv2d {
    pub(crate) fn new(weights: &mut Weights, path: &str, stride: usize, padding: usize) -> Self {
        Self {
            weight: weights.param(&format!("{path}.weight")),
            bias: weights.param(&format!("{path}.bias")),
            stride,
            padding,
        }
    }

    /// Convolves a feature map; as many groups as the weight's input channels leave.
    ///
    /// # Shapes
    /// `[batch, height, width, in] -> [batch, height', width', out]`
    pub(crate) fn forward(&self, x_BHWC: Tensor<4>) -> Tensor<4> {
        let weight = like(self.weight.val(), &x_BHWC);
        let bias = like(self.bias.val(), &x_BHWC);
        let groups = x_BHWC.dims()[3] / weight.dims()[1];
        let options = ConvOptions::new([self.stride; 2], [self.padding; 2], [1; 2], groups);
        let x_BCHW = x_BHWC.permute([0, 3, 1, 2]);
        conv2d(x_BCHW, weight, Some(bias), options).permute([0, 2, 3, 1])
    }
}

/// Two linear layers with a GELU between them.
#[derive(Module, Debug)]
pub(crate) struct Mlp {
    fc1: Linear,
    fc2: Linear,
}

impl Mlp {
    pub(crate) fn new(weights: &mut Weights, path: &str) -> Self {
        Self {
            fc1: Linear::new(weights, &format!("{path}.fc1")),
            fc2: Linear::new(weights, &format!("{path}.fc2")),
        }
    }

    /// Applies both layers; `dropout` acts after the GELU.
    ///
    /// # Shapes
    /// `[.., in] -> [.., out]`
    pub(crate) fn forward<const D: usize>(
        &self,
        x: Tensor<D>,
        dropout_rate: f64,
        train: bool,
    ) -> Tensor<D> {
        let hidden = gelu(self.fc1.forward(x));
        self.fc2.forward(dropout(hidden, dropout_rate, train))
    }
}

/// The exact GELU. Composed here because the fused operation differentiates the tanh
/// approximation on some backends.
pub(crate) fn gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let erf = (x.clone() * std::f64::consts::FRAC_1_SQRT_2).erf();
    x * (erf * 0.5 + 0.5)
}

/// The GELU in its tanh approximation, with which SigLIP was trained.
pub(crate) fn gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let cubic = x.clone() * x.clone() * x.clone() * 0.044_715 + x.clone();
    let tanh = (cubic * (2.0 / std::f64::consts::PI).sqrt()).tanh();
    x * (tanh * 0.5 + 0.5)
}

/// Returns `x` in the element type of `other`. Parameters are f32 and follow what they are applied
/// to: their gradients come back as f32.
pub(crate) fn like<const D: usize, const E: usize>(x: Tensor<D>, other: &Tensor<E>) -> Tensor<D> {
    to(x, other.dtype())
}

/// Returns `x` in an element type, untouched if it has it.
pub(crate) fn to<const D: usize>(x: Tensor<D>, dtype: DType) -> Tensor<D> {
    if x.dtype() == dtype { x } else { x.cast(dtype) }
}

/// Computes in f32 what bf16 is too coarse for, sums over many values above all; the result has the
/// element type of `x`.
pub(crate) fn in_f32<const D: usize>(
    x: Tensor<D>,
    compute: impl FnOnce(Tensor<D>) -> Tensor<D>,
) -> Tensor<D> {
    let dtype = x.dtype();
    to(compute(to(x, DType::F32)), dtype)
}

/// Returns the tensor twice, each with a gradient of its own, so that what one user of a shared
/// tensor adds up does not mix with what the others add: sums of gradients then have the same
/// order wherever a backward pass is cut.
pub(crate) fn fork<const D: usize>(x: Tensor<D>) -> (Tensor<D>, Tensor<D>) {
    let dims = x.dims();
    (x.clone().reshape(dims), x.reshape(dims))
}

/// Sets the state of the backend's generator while training, so that what dropout draws from here
/// on depends on the seed alone.
pub(crate) fn reseed(device: &Device, seed: Option<Seed>) {
    if let Some(seed) = seed {
        device.seed(seed.value());
    }
}

/// Zeroes values at random while training and scales up the rest; otherwise the identity.
pub(crate) fn dropout<const D: usize>(x: Tensor<D>, rate: f64, train: bool) -> Tensor<D> {
    if !train || rate == 0.0 {
        return x;
    }
    let keep = 1.0 - rate;
    let mask = x.random_like(Distribution::Bernoulli(keep)) / keep;
    x * mask
}

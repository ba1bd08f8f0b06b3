//! bf16 against f32: operation by operation at the model's shapes, and a training step.

use burn::tensor::activation::softmax;
use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use pollen_core::Seed;

use super::{Findings, Site, TF32_ALLOWANCE};
use crate::device::DeviceKind;
use crate::error::Error;
use crate::optim::host;

/// bf16 keeps 8 bits: an element is off by up to 2^-9 of itself, and a product of two by twice that.
const ALLOWANCE: f64 = 1e-2;

/// Matrix products of the model, as rows per sample, inner width and columns.
const PRODUCTS: [(&str, usize, usize, usize); 8] = [
    ("vision stage 1 feed-forward", 3136, 256, 1024),
    ("vision stage 2 feed-forward", 784, 512, 2048),
    ("vision stage 3 qkv", 196, 1024, 3072),
    ("vision stage 4 feed-forward", 49, 2048, 8192),
    ("language feed-forward", 150, 1024, 4096),
    ("language projection", 150, 1024, 1024),
    ("flow qkv", 20, 1024, 3072),
    ("flow feed-forward", 20, 1024, 2816),
];
/// Rows of the result that are computed once more in f64.
const EXACT_ROWS: usize = 2;

pub(super) fn run(site: &Site, findings: &mut Findings) -> Result<(), Error> {
    let device = &site.device;
    if !device.supports_dtype(FloatDType::BF16) {
        findings.wrong("the device has no bf16");
        return Ok(());
    }
    let samples = match site.kind {
        DeviceKind::Cpu => 1,
        DeviceKind::Cuda => 16,
    };
    for (name, rows, inner, columns) in PRODUCTS {
        // The CPU computes bf16 through f32, slowly.
        let rows = match site.kind {
            DeviceKind::Cpu => rows.min(49),
            DeviceKind::Cuda => rows * samples,
        };
        let (left, right) = (
            normal("left", rows * inner),
            normal("right", inner * columns),
        );
        let exact = products(&left, &right, inner, columns);
        let a = matrix(left, [rows, inner], device);
        let b = matrix(right, [inner, columns], device);
        let full = a.clone().matmul(b.clone());
        let half = a.cast(FloatDType::BF16).matmul(b.cast(FloatDType::BF16));
        let full = flat(full);
        let apart = relative(&full[..exact.len()], &exact);
        findings.at_most(format!("{name}: f32 against f64"), apart, TF32_ALLOWANCE);
        let apart = relative(&flat(half.cast(FloatDType::F32)), &widen(&full));
        findings.at_most(format!("{name}: bf16 against f32"), apart, ALLOWANCE);
    }
    attention(site, findings, samples);
    super::gradients::bf16(site, findings)
}

/// Attention of the text encoder, `[B, heads, T, D]`, with f32 softmax as the model has it.
fn attention(site: &Site, findings: &mut Findings, samples: usize) {
    let (heads, tokens, width) = (16, 150, 64);
    let shape = [samples, heads, tokens, width];
    let [q, k, v] = ["q", "k", "v"].map(|name| {
        let values = normal(name, shape.iter().product());
        Tensor::<4>::from_data(TensorData::new(values, shape), &site.device)
    });
    let run = |dtype: FloatDType| {
        let cast = |x: &Tensor<4>| x.clone().cast(dtype);
        let logits = cast(&q).matmul(cast(&k).swap_dims(2, 3)) / (width as f64).sqrt();
        let weights = softmax(logits.cast(FloatDType::F32), 3).cast(dtype);
        flat(weights.matmul(cast(&v)).cast(FloatDType::F32))
    };
    let (full, half) = (run(FloatDType::F32), run(FloatDType::BF16));
    findings.at_most(
        "attention: bf16 against f32",
        relative(&half, &widen(&full)),
        2.0 * ALLOWANCE,
    );
}

fn normal(name: &str, count: usize) -> Vec<f32> {
    let mut values = vec![0.0; count];
    Seed::new(5).child(name).draws().fill_normal(&mut values);
    values
}

fn matrix(values: Vec<f32>, shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn flat<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    host(tensor.reshape([-1]))
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

/// Returns the first rows of a matrix product, in f64.
fn products(left: &[f32], right: &[f32], inner: usize, columns: usize) -> Vec<f64> {
    let rows = left.chunks_exact(inner).take(EXACT_ROWS);
    rows.flat_map(|row| {
        let mut sums = vec![0.0; columns];
        for (&a, b) in row.iter().zip(right.chunks_exact(columns)) {
            for (sum, &b) in sums.iter_mut().zip(b) {
                *sum += f64::from(a) * f64::from(b);
            }
        }
        sums
    })
    .collect()
}

/// Returns the Euclidean norm of the difference over that of what is wanted.
pub(super) fn relative(got: &[f32], want: &[f64]) -> f64 {
    let pairs = got.iter().zip(want);
    let apart: f64 = pairs.map(|(&a, b)| (f64::from(a) - b).powi(2)).sum();
    let norm: f64 = want.iter().map(|b| b * b).sum();
    if norm == 0.0 {
        apart.sqrt()
    } else {
        (apart / norm).sqrt()
    }
}

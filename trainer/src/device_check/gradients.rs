//! One training step, beside the same step on the CPU.

use std::collections::BTreeMap;

use burn::tensor::Device;
use pollen_dataloader::HostBatch;
use pollen_model::Precision;
use serde_json::json;

use super::bf16::relative;
use super::{Findings, Site, Subject, available_bytes, trained_a_little};
use crate::bench::Bench;
use crate::data_parallel::to_device;
use crate::device::DeviceKind;
use crate::error::Error;
use crate::layout::Layout;
use crate::optim::host;

/// Words of a prompt.
const WORDS: usize = 12;
/// Parameters whose gradient is this small a part of the whole are not compared by themselves: they
/// are the remainder of sums that cancel.
const NEGLIGIBLE: f64 = 1e-3;
/// What the CPU needs for the whole model: weights, moments, gradients twice, activations.
const FULL_BYTES: u64 = 24 << 30;

/// A step's loss and gradients, and the model that made it.
struct Step {
    bench: Bench,
    batch: HostBatch,
    loss: f64,
    gradients: Vec<Vec<f32>>,
}

fn step(
    subject: &Subject,
    precision: Precision,
    samples: usize,
    device: &Device,
) -> Result<Step, Error> {
    let mut bench = trained_a_little(subject, precision, device)?;
    let spaces: Vec<usize> = (0..subject.spaces.len()).collect();
    let batch = bench.random_batch(samples, WORDS, &spaces);
    let (loss, gradients) = bench.gradients(&batch, &mut |_| {})?;
    let gradients = gradients.into_iter().map(host).collect();
    Ok(Step {
        bench,
        batch,
        loss,
        gradients,
    })
}

/// Of a small model everything is compared.
pub(super) fn small(site: &Site, findings: &mut Findings) -> Result<(), Error> {
    let samples = site.small.spaces.len();
    let mut here = step(&site.small, Precision::F32, samples, &site.device)?;
    let mut cpu = step(&site.small, Precision::F32, samples, &Device::flex())?;
    let allowance = site.allowance();
    findings.at_most("loss", off(here.loss, cpu.loss), allowance);
    let layout = cpu.bench.layout.clone();
    let (got, want) = (here.gradients.concat(), widen(&cpu.gradients));
    findings.at_most("all gradients", relative(&got, &want), allowance);
    let whole = norm(&want);
    for entry in layout.entries() {
        let want = &want[entry.range()];
        if norm(want) > NEGLIGIBLE * whole {
            let apart = relative(&got[entry.range()], want);
            findings.at_most(
                format!("gradient of {}", entry.name),
                apart,
                10.0 * allowance,
            );
        }
    }
    // AdamW's first step is nearly the sign of the gradient: both get the same one.
    let gradients = cpu.gradients.clone();
    for it in [&mut here, &mut cpu] {
        let device = it.bench.device.clone().inner();
        let same = gradients
            .iter()
            .map(|values| to_device(values.clone(), &device));
        it.bench.update(same.collect(), &it.batch)?;
    }
    let weights = |bench: &Bench| -> Vec<f32> {
        let all = bench.model.flat_parameters().into_iter();
        all.flat_map(|(_, values)| host(values)).collect()
    };
    let pairs = weights(&here.bench).into_iter().zip(weights(&cpu.bench));
    let apart = pairs.map(|(a, b)| f64::from((a - b).abs() / (1.0 + b.abs())));
    let bound = match site.kind {
        DeviceKind::Cpu => 0.0,
        DeviceKind::Cuda => 1e-6,
    };
    findings.at_most("weights after AdamW", apart.fold(0.0, f64::max), bound);
    Ok(())
}

/// In bf16 a step does nearly what it does in f32, on the same device.
pub(super) fn bf16(site: &Site, findings: &mut Findings) -> Result<(), Error> {
    let samples = site.small.spaces.len();
    let run = |precision| step(&site.small, precision, samples, &site.device);
    let (wide, narrow) = (run(Precision::F32)?, run(Precision::Bf16)?);
    findings.at_most(
        "loss of a step: bf16 against f32",
        off(narrow.loss, wide.loss),
        2e-2,
    );
    let want = widen(&wide.gradients);
    let apart = relative(&narrow.gradients.concat(), &want);
    findings.at_most("all gradients: bf16 against f32", apart, 0.1);
    if narrow.loss.to_bits() == wide.loss.to_bits() {
        findings.wrong("the step in bf16 was computed in f32");
    }
    Ok(())
}

/// Of the whole model, whose rounding differs in every sum, norms are compared.
pub(super) fn full(site: &Site, findings: &mut Findings) -> Result<(), Error> {
    if site.kind == DeviceKind::Cpu {
        findings.skipped = Some("it compares a GPU with the CPU at 947M parameters".into());
        return Ok(());
    }
    if let Some(available) = available_bytes().filter(|&bytes| bytes < FULL_BYTES) {
        findings.skipped = Some(format!(
            "the CPU's half needs {} GiB of memory, {} GiB are available",
            FULL_BYTES >> 30,
            available >> 30
        ));
        return Ok(());
    }
    by_norms(&site.full, &site.device, findings)
}

fn by_norms(subject: &Subject, device: &Device, findings: &mut Findings) -> Result<(), Error> {
    let subject = without_element_dropout(subject);
    let Step {
        loss, gradients, ..
    } = step(&subject, Precision::F32, 1, device)?;
    let cpu = step(&subject, Precision::F32, 1, &Device::flex())?;
    findings.at_most("loss", off(loss, cpu.loss), 1e-2);
    let got = norms(&cpu.bench.layout, &gradients);
    let want = norms(&cpu.bench.layout, &cpu.gradients);
    let whole = |norms: &BTreeMap<String, f64>| norms.values().map(|x| x * x).sum::<f64>().sqrt();
    findings.at_most(
        "norm of all gradients",
        off(whole(&got), whole(&want)),
        1e-2,
    );
    for (part, &want_norm) in &want {
        if want_norm > NEGLIGIBLE * whole(&want) {
            let apart = off(got[part], want_norm);
            findings.at_most(format!("norm of gradients of {part}"), apart, 5e-2);
        }
    }
    let apart = relative(&gradients.concat(), &widen(&cpu.gradients));
    findings.at_most("all gradients", apart, 0.1);
    findings.measured("norms", json!({ "here": got, "cpu": want }));
    Ok(())
}

/// The backend's own generator draws other masks on other devices.
fn without_element_dropout(subject: &Subject) -> Subject {
    let mut subject = subject.clone();
    subject.model.language.dropout = 0.0;
    let flow = &mut subject.model.flow;
    flow.dropout_attention = 0.0;
    flow.dropout_residual = 0.0;
    flow.dropout_mlp = 0.0;
    flow.dropout_proprio = 0.0;
    subject
}

/// Returns the norms of the gradients by the first parts of the parameters' names.
fn norms(layout: &Layout, gradients: &[Vec<f32>]) -> BTreeMap<String, f64> {
    let flat = gradients.concat();
    let mut squares = BTreeMap::new();
    for entry in layout.entries() {
        let parts: Vec<&str> = entry.name.split('.').take(2).collect();
        let sum: f64 = flat[entry.range()]
            .iter()
            .map(|&x| f64::from(x).powi(2))
            .sum();
        *squares.entry(parts.join(".")).or_insert(0.0) += sum;
    }
    squares
        .into_iter()
        .map(|(part, sum): (String, f64)| (part, sum.sqrt()))
        .collect()
}

fn widen(gradients: &[Vec<f32>]) -> Vec<f64> {
    gradients.iter().flatten().map(|&x| f64::from(x)).collect()
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn off(got: f64, want: f64) -> f64 {
    (got - want).abs() / want.abs()
}

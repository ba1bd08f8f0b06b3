//! Training steps whose gradients go through NCCL, beside the same steps of a rank that is alone.

use std::sync::Arc;
use std::time::Duration;

use pollen_collectives::{Backend, Communicator, Config, Deadline, Store, StoreServer, rendezvous};
use pollen_model::Precision;

use super::{Findings, Site, trained_a_little};
use crate::bench::Bench;
use crate::clip;
use crate::config::ReduceDtype;
use crate::device::DeviceKind;
use crate::error::Error;
use crate::layout::Shard;
use crate::optim::host;
use crate::update::square_sums;

/// Training steps.
const STEPS: usize = 3;
/// Words of a prompt.
const WORDS: usize = 8;
/// How long NCCL may take to start and to do one operation.
const TIMEOUT: Duration = Duration::from_mins(1);

pub(super) fn run(site: &Site, findings: &mut Findings) -> Result<(), Error> {
    if site.kind == DeviceKind::Cpu {
        findings.skipped = Some("NCCL works on GPUs alone".into());
        return Ok(());
    }
    let mut alone = trained_a_little(&site.small, Precision::F32, &site.device)?;
    let through = trained_a_little(&site.small, Precision::F32, &site.device)?;
    let mut through = through.exchanging(nccl()?, Shard::WHOLE, ReduceDtype::F32);
    let spaces: Vec<usize> = (0..site.small.spaces.len()).collect();
    let batch = alone.random_batch(site.small.spaces.len(), WORDS, &spaces);
    for step in 0..STEPS {
        let (_, gradients) = alone.gradients(&batch, &mut |_| {})?;
        let (_, exchanged) = through.gradients(&batch, &mut |_| {})?;
        let pairs = gradients.iter().zip(&exchanged);
        let wrong: usize = pairs.map(|(a, b)| different(a.clone(), b.clone())).sum();
        let what = format!("step {step}: gradients that NCCL changed");
        findings.at_most(what, wrong as f64, 0.0);
        let there = clip::norm(&square_sums(&alone.layout, &alone.reduction, &gradients)?);
        let sums = gradients
            .iter()
            .map(|values| clip::square_sums(&host(values.clone())));
        let here = clip::norm(&sums.collect::<Vec<_>>().concat());
        let what = format!("step {step}: norm taken on the GPU against the host's in f64");
        findings.at_most(what, (there / here - 1.0).abs(), 1e-6);
        alone.update(gradients, &batch)?;
        through.update(exchanged, &batch)?;
        alone.step += 1;
        through.step += 1;
    }
    findings.at_most(
        "weights that differ after all steps",
        weights_apart(&alone, &through) as f64,
        0.0,
    );
    Ok(())
}

/// Returns NCCL with this process as its only rank.
fn nccl() -> Result<Arc<dyn Communicator>, Error> {
    let server = StoreServer::bind("127.0.0.1:0")?;
    let store = Store::connect(&server.address().to_string(), Deadline::after(TIMEOUT))?;
    let config = Config {
        backend: Backend::Nccl,
        timeout: TIMEOUT,
        join_timeout: TIMEOUT,
        ..Config::default()
    };
    Ok(rendezvous::connect_on(&config, &store, 0, 1, 0, Some(0))?)
}

/// Returns the number of values whose bits differ.
fn different(a: burn::tensor::Tensor<1>, b: burn::tensor::Tensor<1>) -> usize {
    let (a, b) = (host(a), host(b));
    if a.len() != b.len() {
        return a.len().max(b.len());
    }
    let pairs = a.iter().zip(&b);
    pairs.filter(|(a, b)| a.to_bits() != b.to_bits()).count()
}

fn weights_apart(a: &Bench, b: &Bench) -> usize {
    let pairs = a.model.flat_parameters().into_iter();
    let pairs = pairs.zip(b.model.flat_parameters());
    pairs.map(|((_, a), (_, b))| different(a, b)).sum()
}

//! The process that stages run in.

use std::io::Write;
use std::time::Instant;

use anyhow::Result;
use pollen_core::ExitCode;
use pollen_trainer::device::{DeviceChoice, Seat};
use pollen_trainer::device_check::{STAGES, Site, Subject};

use super::record::{Record, binary_hash};
use super::{Listed, demo, nccl};
use crate::args::{CheckedDevice, GpuCheckArgs};
use crate::recipe::Recipe;

/// What stands before the name of a stage that has ended, on standard output.
pub(super) const DONE: &str = "done ";

/// Training steps of the soak.
const SOAK_STEPS: u64 = 2000;

/// The recipe of the whole model wants to be told where its data lie; none are read.
const NO_DATA: [&str; 1] = ["data.root=memory:///none"];

/// Runs stages one after another; each leaves its file before the next begins.
pub(super) fn run(args: &GpuCheckArgs, stages: &[Listed]) -> Result<ExitCode> {
    let choice = match args.device {
        CheckedDevice::Cuda => DeviceChoice::Cuda,
        CheckedDevice::Cpu => DeviceChoice::Cpu,
    };
    let binary = binary_hash()?;
    let seat = Seat::of(choice, 0)?;
    let (device, kind) = (seat.open()?, seat.kind());
    let site = Site {
        device,
        kind,
        small: subject("demo", &[])?,
        full: subject("oxe", &NO_DATA)?,
        golden: args.golden.clone(),
        scratch: args.out.join("scratch"),
        soak_steps: if args.quick {
            SOAK_STEPS / 10
        } else {
            SOAK_STEPS
        },
    };
    for (name, ..) in stages {
        let began = Instant::now();
        let result = match STAGES.iter().find(|stage| stage.name == *name) {
            Some(stage) => stage.run(&site).map_err(anyhow::Error::from),
            None if *name == nccl::NAME => nccl::run(args, kind),
            None => demo::run(args, kind),
        };
        let mut record = match result {
            Ok(findings) => Record::new(args, &binary, name, findings),
            Err(error) => Record::failed(args, &binary, name, format!("{error:#}")),
        };
        // The next stage may start processes of its own on the same device.
        site.device.memory_cleanup();
        record.seconds = began.elapsed().as_secs_f64();
        record.write(&args.out)?;
        let mut out = std::io::stdout().lock();
        writeln!(out, "{DONE}{name}")?;
        out.flush()?;
    }
    Ok(ExitCode::Done)
}

/// Returns the model of a recipe.
fn subject(recipe: &str, overrides: &[&str]) -> Result<Subject> {
    let overrides: Vec<String> = overrides.iter().map(|&set| set.into()).collect();
    let config = Recipe::load(recipe, &overrides)?.config;
    Ok(Subject {
        model: config.model,
        spaces: config.action_spaces,
    })
}

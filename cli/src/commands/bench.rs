//! `pollen bench`: speed and memory of the training step and of the policy.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pollen_core::{ActionSpace, ConfigError, ExitCode};
use pollen_model::{FlowerConfig, Part};
use pollen_trainer::bench::{Bench, HostBatch, Lap};
use pollen_trainer::device::{Device, Seat};
use serde_json::{Value, json};

use crate::args::{BenchArgs, Measure, Switch};
use crate::recipe::action_space;

/// Bounds of the runs of one measurement.
const LEAST: usize = 3;
const MOST: usize = 200;
const MIB: f64 = 1024.0 * 1024.0;

pub(crate) fn run(args: &BenchArgs) -> Result<ExitCode> {
    if let Some(file) = &args.operations {
        return super::bench_operations::run(args, file);
    }
    let (config, spaces) = (model(args)?, spaces(&args.model, &args.spaces)?);
    let turns = turns(args, &spaces)?;
    if args.dump.is_some() && args.dropout == Switch::On {
        return Err(usage(
            "--dump",
            "the loss of two implementations agrees only with --dropout off",
        ));
    }
    let seat = Seat::of(args.device, 0)?;
    let (device, kind) = (seat.open()?, seat.kind());
    let mut bench = Bench::new(&config, &spaces, args.precision, args.seed, &device)?;
    let cost = config.cost(&spaces, args.text_len, 1, args.precision.value_bytes())?;
    let flops: BTreeMap<&str, u64> = cost
        .parts
        .iter()
        .map(|part| (part.part, part.forward_flops))
        .collect();
    emit(&json!({
        "kind": "environment",
        "implementation": "pollen",
        "version": env!("CARGO_PKG_VERSION"),
        "device": kind.name(),
        "threads": std::thread::available_parallelism().map_or(1, usize::from),
        "model": args.model.file_name().map(|name| name.to_string_lossy().into_owned()),
        "parameters": config.parameter_table(&spaces)?.count(),
        "cameras": config.num_cameras,
        "chunk": config.flow.action_horizon,
        "text_len": args.text_len,
        "precision": args.precision,
        "dropout": args.dropout == Switch::On,
        "forward_flops": flops,
    }))?;
    if let Some(dir) = &args.dump {
        let host = bench.random_batch(args.micro_batch[0], args.text_len, &turns);
        super::bench_dump::write(&mut bench, &host, dir)?;
    }
    if args.measure.contains(&Measure::Train) {
        let mut sizes = args.micro_batch.clone();
        sizes.sort_unstable();
        for size in sizes {
            emit(&train(&mut bench, size, &turns, args, &device)?)?;
        }
    }
    if args.measure.contains(&Measure::Latency) {
        emit(&latency(bench, &turns, args, &device)?)?;
    }
    Ok(ExitCode::Done)
}

/// Reads the model's sizes and applies the command line to them.
fn model(args: &BenchArgs) -> Result<FlowerConfig> {
    let origin = args.model.display().to_string();
    let text = std::fs::read_to_string(&args.model).map_err(|source| ConfigError::Read {
        path: origin.clone(),
        source,
    })?;
    let mut layered = pollen_core::Layered::from_text(&text, &origin)?;
    let mut config: FlowerConfig = layered.take_section("model")?;
    config.num_cameras = args.cameras.unwrap_or(config.num_cameras);
    config.flow.action_horizon = args.chunk.unwrap_or(config.flow.action_horizon);
    if args.dropout == Switch::Off {
        config = config.without_dropout();
    }
    Ok(config)
}

/// Reads action spaces from the folder beside that of the model file.
fn spaces(model: &Path, names: &[String]) -> Result<Vec<ActionSpace>> {
    let configs = model.parent().and_then(Path::parent);
    let configs = configs.unwrap_or(Path::new("configs"));
    names
        .iter()
        .map(|name| action_space(configs, name))
        .collect()
}

fn turns(args: &BenchArgs, spaces: &[ActionSpace]) -> Result<Vec<usize>> {
    let index = |name: &String| {
        let found = spaces.iter().position(|space| &space.name == name);
        found.ok_or_else(|| {
            let known = args.spaces.join(", ");
            usage(
                "--batch-spaces",
                &format!("`{name}` is not among --spaces {known}"),
            )
        })
    };
    let turns: Vec<usize> = args.batch_spaces.iter().map(index).collect::<Result<_>>()?;
    let counts = [
        turns.len(),
        args.text_len,
        args.denoising_steps,
        args.micro_batch.len(),
    ];
    if counts.contains(&0) || args.micro_batch.contains(&0) {
        return Err(usage("pollen bench", "every count must be at least 1"));
    }
    Ok(turns)
}

pub(super) fn usage(origin: &str, fault: &str) -> anyhow::Error {
    ConfigError::Invalid {
        origin: origin.into(),
        faults: vec![fault.into()],
    }
    .into()
}

/// Measures whole steps, and then the share of each part in steps that wait for the device after
/// each of them.
fn train(
    bench: &mut Bench,
    size: usize,
    turns: &[usize],
    args: &BenchArgs,
    device: &Device,
) -> Result<Value> {
    let host = bench.random_batch(size, args.text_len, turns);
    let start = Instant::now();
    let (loss, _) = bench.step(&host, &mut |_| {})?;
    wait(device)?;
    let first = start.elapsed();
    let times = times(args, || {
        bench.step(&host, &mut |_| {})?;
        wait(device)
    })?;
    let parts = parts(bench, &host, device, args.warmup.max(LEAST))?;
    let step = median(&times);
    Ok(json!({
        "kind": "train",
        "micro_batch": size,
        "step_ms": step,
        "step_ms_p90": percentile(&times, 0.9),
        "samples_per_s": size as f64 * 1e3 / step,
        "tokens_per_s": {
            "vision": image_tokens(bench) * size as f64 * 1e3 / step,
            "text": (image_tokens(bench) + 1.0 + args.text_len as f64) * size as f64 * 1e3 / step,
            "flow": bench.model().config().flow.action_horizon as f64 * size as f64 * 1e3 / step,
        },
        "parts_ms": parts,
        "peak_memory_mib": memory(device)?,
        "steps": times.len(),
        "first_step_s": first.as_secs_f64(),
        "loss": loss,
    }))
}

fn image_tokens(bench: &Bench) -> f64 {
    let config = bench.model().config();
    (config.num_cameras * config.vision.num_tokens()) as f64
}

/// Returns the median milliseconds of each part of a step.
fn parts(
    bench: &mut Bench,
    host: &HostBatch,
    device: &Device,
    steps: usize,
) -> Result<BTreeMap<&'static str, f64>> {
    let mut by_part: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
    for _ in 0..steps {
        let mut spent: BTreeMap<&'static str, Duration> = BTreeMap::new();
        let mut failed = None;
        let mut last = Instant::now();
        bench.step(host, &mut |lap| {
            failed = failed.take().or(wait(device).err());
            *spent.entry(name(lap)).or_default() += last.elapsed();
            last = Instant::now();
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        for (part, time) in spent {
            by_part.entry(part).or_default().push(ms(time));
        }
    }
    Ok(by_part
        .into_iter()
        .map(|(part, times)| (part, median(&times)))
        .collect())
}

fn name(lap: Lap) -> &'static str {
    match lap {
        Lap::Copy => "copies",
        Lap::Model(Part::Vision) => "vision",
        Lap::Model(Part::Language) => "text",
        Lap::Model(Part::Flow) => "flow",
        Lap::Optimizer => "optimizer",
    }
}

fn latency(bench: Bench, turns: &[usize], args: &BenchArgs, device: &Device) -> Result<Value> {
    let host = bench.random_batch(1, args.text_len, &turns[..1]);
    let policy = bench.into_policy();
    let start = Instant::now();
    policy.act(&host, args.denoising_steps);
    let first = start.elapsed();
    let times = times(args, || {
        policy.act(&host, args.denoising_steps);
        Ok(())
    })?;
    Ok(json!({
        "kind": "latency",
        "denoising_steps": args.denoising_steps,
        "ms": median(&times),
        "ms_p90": percentile(&times, 0.9),
        "calls": times.len(),
        "first_call_s": first.as_secs_f64(),
        "peak_memory_mib": memory(device)?,
    }))
}

/// Runs `once` for about the asked time after the warm-up; returns every run's milliseconds.
pub(super) fn times(args: &BenchArgs, mut once: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    for _ in 0..args.warmup {
        once()?;
    }
    let end = Instant::now() + Duration::from_secs_f64(args.seconds.max(0.0));
    let mut times = Vec::new();
    while times.len() < LEAST || (times.len() < MOST && Instant::now() < end) {
        let start = Instant::now();
        once()?;
        times.push(ms(start.elapsed()));
    }
    Ok(times)
}

pub(super) fn wait(device: &Device) -> Result<()> {
    device
        .sync()
        .map_err(|error| anyhow::anyhow!("the device failed: {error:?}"))
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

pub(super) fn median(times: &[f64]) -> f64 {
    percentile(times, 0.5)
}

/// Returns the time that `share` of the runs did not exceed.
fn percentile(times: &[f64], share: f64) -> f64 {
    let mut ordered = times.to_vec();
    ordered.sort_by(f64::total_cmp);
    ordered[((share * ordered.len() as f64) as usize).min(ordered.len() - 1)]
}

/// Returns the MiB that the device's allocator has taken so far, which it does not give back; on a
/// CPU the peak of the process.
fn memory(device: &Device) -> Result<f64> {
    if let Some(usage) = device.memory_pool_usage() {
        return Ok(usage.bytes_reserved as f64 / MIB);
    }
    let path = "/proc/self/status";
    let text = std::fs::read_to_string(path).with_context(|| path.to_owned())?;
    let peak = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let Some(kib) = peak.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<f64>().ok())
    else {
        bail!("{path} tells no peak of memory (VmHWM)");
    };
    Ok(kib / 1024.0)
}

pub(super) fn emit(line: &Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

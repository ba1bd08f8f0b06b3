//! The stage `demo`: the first steps of a real run, from its data to its checkpoint.

use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use pollen_launcher::RunDir;
use pollen_observe::{Event, read_events};
use pollen_trainer::device::DeviceKind;
use pollen_trainer::device_check::Findings;
use serde_json::json;

use crate::args::GpuCheckArgs;

pub(super) const NAME: &str = "demo";
pub(super) const ABOUT: &str = "200 steps of the demo's run on one worker, the loss falls";

/// Steps of the run.
const STEPS: usize = 200;
/// What the loss must have fallen to, of what it was: in 200 steps, and in a tenth of them, while the
/// learning rate is still rising.
const FALLEN_TO: [f64; 2] = [0.75, 1.0];

pub(super) fn run(args: &GpuCheckArgs, kind: DeviceKind) -> Result<Findings> {
    let mut findings = Findings::default();
    let steps = if args.quick { STEPS / 10 } else { STEPS };
    std::fs::create_dir_all(&args.out)?;
    let out = args.out.canonicalize()?.join("scratch").join("demo");
    if out.exists() {
        std::fs::remove_dir_all(&out)
            .with_context(|| format!("cannot remove {}", out.display()))?;
    }
    let runs = out.join("runs");
    let base = format!("file://{}", out.display());
    let mut sets = vec![
        format!("train.steps={steps}"),
        format!("train.device={}", kind.name()),
        format!("data.root={base}/datasets"),
        format!("run.url={base}/checkpoints"),
        "launch.workers=1".into(),
        "launch.max_restarts=0".into(),
        "launch.object_server=none".into(),
        "observe.sinks=[\"events\"]".into(),
    ];
    // The archive for GPU machines has the smaller dataset alone.
    if !std::path::Path::new("demo/data/two_arm_handover").exists() {
        sets.push("data.datasets.two_arm_handover.weight=0".into());
    }
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["launch", "demo", "--runs"]).arg(&runs);
    for set in &sets {
        command.args(["--set", set]);
    }
    let output = command.stdin(Stdio::null()).output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().last().unwrap_or("it said nothing");
        findings.wrong(format!(
            "pollen launch demo ended with {}: {said}",
            output.status
        ));
        return Ok(findings);
    }
    let made = RunDir::list(&runs, "demo")?;
    let run = made.first().context("the run left no folder")?;
    let (mut losses, mut rates) = (Vec::new(), Vec::new());
    for record in read_events(&run.events())? {
        if let Event::Step(step) = record.event {
            losses.push(step.loss);
            rates.push(step.samples_per_s);
        }
    }
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let part = (losses.len() / 10).max(1);
    let first = mean(losses.get(..part).context("the run made no steps")?);
    let last = mean(&losses[losses.len() - part..]);
    findings.at_most(
        "steps that are missing",
        (steps - losses.len().min(steps)) as f64,
        0.0,
    );
    let fallen = FALLEN_TO[usize::from(args.quick)];
    findings.at_most(
        "loss of the last tenth over that of the first",
        last / first,
        fallen,
    );
    rates.sort_by(f64::total_cmp);
    findings.measured(
        "losses",
        losses.iter().step_by(part).copied().collect::<Vec<_>>(),
    );
    findings.measured("samples_per_s", json!(rates[rates.len() / 2]));
    std::fs::remove_dir_all(&out)?;
    Ok(findings)
}

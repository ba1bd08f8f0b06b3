//! The stage `nccl`: all-reduce on raw device memory, alone and with two ranks, and what happens when
//! one of them is killed.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pollen_collectives::{Deadline, NcclCheck, NcclReport, Store, StoreServer};
use pollen_core::ExitCode;
use pollen_trainer::device::{DeviceKind, Offer};
use pollen_trainer::device_check::Findings;
use serde_json::json;

use crate::args::{GpuCheckArgs, NcclRank};

pub(super) const NAME: &str = "nccl";
pub(super) const ABOUT: &str =
    "all-reduce through NCCL equals Gloo's, alone and with two ranks; a killed rank ends the other";

/// f32 values of the buffer: one bucket of gradients of 64 MiB.
const VALUES: usize = 16 << 20;
/// How long ranks may take to find each other and to do one operation.
const TIMEOUT: Duration = Duration::from_mins(1);
/// How long the other rank may take to give up after a kill, seconds.
const GIVES_UP_IN: f64 = 10.0;
/// Several ranks on one GPU, which NCCL allows from 2.30 on if few of its blocks are used.
const SHARED_GPU: [(&str, &str); 2] = [("NCCL_MULTI_RANK_GPU_ENABLE", "1"), ("NCCL_MAX_CTAS", "4")];

pub(super) fn run(args: &GpuCheckArgs, kind: DeviceKind) -> Result<Findings> {
    let mut findings = Findings::default();
    if kind == DeviceKind::Cpu {
        findings.skipped = Some("NCCL works on GPUs alone".into());
        return Ok(findings);
    }
    let gpus = Offer::here().gpus;
    findings.measured("gpus", json!(gpus));
    alone(args, &mut findings)?;
    together(args, gpus, &mut findings)?;
    Ok(findings)
}

/// One rank: NCCL on the memory of this GPU.
fn alone(args: &GpuCheckArgs, findings: &mut Findings) -> Result<()> {
    let server = StoreServer::bind("127.0.0.1:0")?;
    let mut rank = Rank::start(args, (0, 1), 0, &server.address().to_string(), false)?;
    match rank.report()? {
        Ok(report) => note(findings, "one rank", &report),
        Err(said) => findings.wrong(format!("one rank: {said}")),
    }
    Ok(())
}

/// Two ranks, on one GPU if there is no second, of which one is killed at the end.
fn together(args: &GpuCheckArgs, gpus: usize, findings: &mut Findings) -> Result<()> {
    let server = StoreServer::bind("127.0.0.1:0")?;
    let address = server.address().to_string();
    let start = |rank: u32| {
        let gpu = rank as usize % gpus.max(1);
        Rank::start(args, (rank, 2), gpu, &address, gpus < 2)
    };
    let (mut first, mut second) = (start(0)?, start(1)?);
    for (rank, name) in [(&mut first, "rank 0 of 2"), (&mut second, "rank 1 of 2")] {
        match rank.report()? {
            Ok(report) => note(findings, name, &report),
            Err(said) if gpus < 2 && said.contains("Duplicate GPU") => {
                let reason = "this NCCL allows one rank a GPU: 2.30 or newer is needed";
                findings.measured("two_ranks", reason);
                return Ok(());
            }
            Err(said) => {
                findings.wrong(format!("{name}: {said}"));
                return Ok(());
            }
        }
    }
    second.child.kill()?;
    let killed = Instant::now();
    let said = first.line()?;
    findings.at_most(
        "seconds after a kill until the other rank gave up",
        killed.elapsed().as_secs_f64(),
        GIVES_UP_IN,
    );
    if !said.contains("rank 1") {
        findings.wrong(format!("the other rank does not name rank 1: {said}"));
    }
    findings.measured("after_a_kill", said);
    Ok(())
}

fn note(findings: &mut Findings, name: &str, report: &NcclReport) {
    let what = format!("{name}: values that differ from Gloo's sum");
    findings.at_most(what, report.wrong as f64, 0.0);
    findings.measured(
        name,
        json!({"values": report.values, "seconds": report.seconds}),
    );
}

/// A rank in a process of its own.
struct Rank {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Rank {
    fn start(
        args: &GpuCheckArgs,
        (rank, world): (u32, u32),
        gpu: usize,
        store: &str,
        shared: bool,
    ) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["gpu-check", "--nccl-rank"])
            .arg(format!("{rank},{world},{gpu},{store}"))
            .arg("--out")
            .arg(&args.out);
        if shared {
            command.envs(SHARED_GPU);
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let out = child.stdout.take().context("the rank has no output")?;
        Ok(Self {
            child,
            out: BufReader::new(out),
        })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.out.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    /// Returns the rank's report, or what it said instead.
    fn report(&mut self) -> Result<Result<NcclReport, String>> {
        let line = self.line()?;
        Ok(serde_json::from_str(&line).map_err(|_| {
            if line.is_empty() {
                "it ended without a word".into()
            } else {
                line
            }
        }))
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a rank's process does: a report on standard output, then, beside others, reductions until
/// one fails, and why it did.
pub(super) fn rank(rank: &NcclRank) -> Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    let mut say = |text: String| -> Result<()> {
        let text = text.replace('\n', " ");
        writeln!(out, "{text}")?;
        Ok(out.flush()?)
    };
    let store = Store::connect(&rank.store, Deadline::after(TIMEOUT))?;
    let check = NcclCheck::connect(&store, (rank.rank, rank.world), rank.gpu, VALUES, TIMEOUT);
    let check = match check {
        Ok(check) => check,
        Err(error) => {
            say(error.to_string())?;
            return Err(error.into());
        }
    };
    say(serde_json::to_string(&check.compare()?)?)?;
    if rank.world > 1 {
        say(check.until_failure().to_string())?;
    }
    Ok(ExitCode::Done)
}

//! `pollen gpu-check`: stages in child processes, what they found in files, a table at the end.
//!
//! ```text
//! pending stages --by whether kernels are fused--> child: stage, file, "done", stage, file, ...
//!                                                     | crash or time limit: the stage has failed,
//!                                                     v the rest go on in a new child
//! ```

mod demo;
mod nccl;
mod record;
mod worker;

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};

use anyhow::{Context, Result};
use pollen_core::{ConfigError, ExitCode};
use pollen_trainer::device::Offer;
use pollen_trainer::device_check::{STAGES, Stage};
use pollen_trainer::kernel_cache;

use crate::args::{CheckedDevice, GpuCheckArgs};
use record::{Record, Status, binary_hash};

/// Switches burn's kernel fusion off: no fused kernel is ever looked for.
const UNFUSED: (&str, &str) = ("BURN_FUSION_MAX_EXPLORATIONS", "0");

/// Name, one line about it, and whether kernels are fused.
type Listed = (&'static str, &'static str, bool);

/// Returns all stages in the order they run in: the cheap ones that find most come first.
fn stages() -> Vec<Listed> {
    let of = |stage: &Stage| (stage.name, stage.about, stage.fused);
    let mut all: Vec<Listed> = STAGES.iter().map(of).collect();
    all.push((nccl::NAME, nccl::ABOUT, true));
    all.push((demo::NAME, demo::ABOUT, true));
    all
}

pub(crate) fn run(args: &GpuCheckArgs) -> Result<ExitCode> {
    if let Some(rank) = &args.nccl_rank {
        return nccl::rank(rank);
    }
    let chosen = chosen(&args.stages)?;
    if args.here {
        return worker::run(args, &chosen);
    }
    std::fs::create_dir_all(&args.out)
        .with_context(|| format!("cannot make {}", args.out.display()))?;
    if args.list {
        return list(args, &chosen);
    }
    if args.device == CheckedDevice::Cuda
        && let Some(reason) = Offer::here().lacks()
    {
        return Err(invalid(format!(
            "no GPU: {reason}; --device cpu tries the stages here"
        )));
    }
    let binary = binary_hash()?;
    let mut pending = Vec::new();
    for stage in &chosen {
        let old = Record::read(&args.out, stage.0)?;
        if args.again || !old.is_some_and(|old| old.still_counts(args, &binary)) {
            Record::remove(&args.out, stage.0)?;
            pending.push(*stage);
        }
    }
    say(&format!(
        "{} stages, {} of them to run, results in {}\n",
        chosen.len(),
        pending.len(),
        args.out.display()
    ))?;
    for fused in [true, false] {
        let group = pending.iter().filter(|stage| stage.2 == fused);
        supervise(args, &binary, fused, group.map(|stage| stage.0).collect())?;
    }
    conclude(args, &chosen)
}

fn invalid(fault: String) -> anyhow::Error {
    ConfigError::Invalid {
        origin: "gpu-check".into(),
        faults: vec![fault],
    }
    .into()
}

fn say(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Returns the stages that were asked for, or all.
fn chosen(names: &[String]) -> Result<Vec<Listed>> {
    let all = stages();
    if let Some(unknown) = names
        .iter()
        .find(|name| !all.iter().any(|stage| stage.0 == name.as_str()))
    {
        let known: Vec<&str> = all.iter().map(|stage| stage.0).collect();
        return Err(invalid(format!(
            "--stage {unknown}: no such stage; there are {}",
            known.join(", ")
        )));
    }
    let wanted = |stage: &Listed| names.is_empty() || names.iter().any(|name| name == stage.0);
    Ok(all.into_iter().filter(wanted).collect())
}

fn list(args: &GpuCheckArgs, chosen: &[Listed]) -> Result<ExitCode> {
    let mut text = String::new();
    for (name, about, _) in chosen {
        let known = Record::read(&args.out, name)?.map_or("not run", |record| record.status.name());
        let _ = writeln!(text, "{name:16} {known:8} {about}");
    }
    say(&text)?;
    Ok(ExitCode::Done)
}

/// What a child is heard to do.
enum Heard {
    /// A stage has ended and its file is written.
    Done(String),
    /// It writes no more.
    End,
}

/// Runs stages in children, a new one after each that dies.
fn supervise(args: &GpuCheckArgs, binary: &str, fused: bool, names: Vec<&str>) -> Result<()> {
    let mut left = VecDeque::from(names);
    while let Some(first) = left.front() {
        let log = args.out.join(format!("{first}.log"));
        let mut child = spawn(args, fused, &left, &log)?;
        let heard = listen(&mut child)?;
        while let Some(&stage) = left.front() {
            let failure = match heard.recv_timeout(args.limit) {
                Ok(Heard::Done(done)) if done == stage => {
                    left.pop_front();
                    report(args, stage)?;
                    continue;
                }
                Ok(Heard::Done(_)) => continue,
                Ok(Heard::End) | Err(RecvTimeoutError::Disconnected) => {
                    let status = child.wait()?;
                    format!("its process ended ({status}): {}", last_words(&log))
                }
                Err(RecvTimeoutError::Timeout) => {
                    let limit = humantime::format_duration(args.limit);
                    format!("not done within {limit}: {}", last_words(&log))
                }
            };
            left.pop_front();
            Record::failed(args, binary, stage, failure).write(&args.out)?;
            report(args, stage)?;
            break;
        }
        // Of a child that is done, nothing is left to end.
        let _ = child.kill();
        child.wait()?;
    }
    Ok(())
}

fn spawn(args: &GpuCheckArgs, fused: bool, names: &VecDeque<&str>, log: &Path) -> Result<Child> {
    let executable = std::env::current_exe().context("cannot tell where this program lies")?;
    let file =
        std::fs::File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut command = Command::new(executable);
    command
        .args(["gpu-check", "--here", "--out"])
        .arg(&args.out);
    command.arg("--golden").arg(&args.golden);
    for name in names {
        command.args(["--stage", name]);
    }
    if args.device == CheckedDevice::Cpu {
        command.args(["--device", "cpu"]);
    }
    if args.quick {
        command.arg("--quick");
    }
    if !fused {
        command.env(UNFUSED.0, UNFUSED.1);
    }
    // Beside the results, so that whoever carries those to the next machine carries it along.
    if std::env::var_os(kernel_cache::VARIABLE).is_none() {
        command.env(kernel_cache::VARIABLE, args.out.join("kernels"));
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(file)
        .spawn()
        .context("cannot start the stages' process")
}

fn listen(child: &mut Child) -> Result<Receiver<Heard>> {
    let stdout = child
        .stdout
        .take()
        .context("the stages' output is not there")?;
    let (tell, heard) = channel();
    std::thread::Builder::new()
        .name("gpu-check-child".into())
        .spawn(move || {
            for line in BufReader::new(stdout)
                .lines()
                .map_while(std::io::Result::ok)
            {
                if let Some(stage) = line.strip_prefix(worker::DONE)
                    && tell.send(Heard::Done(stage.to_owned())).is_err()
                {
                    return;
                }
            }
            // Nobody may be listening any more.
            let _ = tell.send(Heard::End);
        })
        .context("cannot start a thread")?;
    Ok(heard)
}

/// Returns why a stage's process ended, by its log.
fn last_words(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let said = reason(&text).unwrap_or("it said nothing");
    format!("{said} (all of it: {})", log.display())
}

/// Returns what a panic said, which a backtrace follows, or else the last line.
fn reason(log: &str) -> Option<&str> {
    let lines: Vec<&str> = log
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let panic = lines.iter().rposition(|line| line.contains("panicked at "));
    let said = panic.and_then(|at| lines.get(at + 1));
    said.or(lines.last()).copied()
}

/// Prints a stage's line.
fn report(args: &GpuCheckArgs, stage: &str) -> Result<()> {
    match Record::read(&args.out, stage)? {
        Some(record) => say(&record.line()),
        None => anyhow::bail!("stage {stage} said it was done and left no file"),
    }
}

/// Prints the table and returns the exit code.
fn conclude(args: &GpuCheckArgs, chosen: &[Listed]) -> Result<ExitCode> {
    let mut failed = 0;
    let mut text = String::from("\nsummary\n");
    for (name, ..) in chosen {
        let record = Record::read(&args.out, name)?;
        let record = record.with_context(|| format!("stage {name} left no file"))?;
        failed += u32::from(record.status == Status::Fail);
        text += &record.line();
    }
    let verdict = match failed {
        0 => "no stage failed".into(),
        1 => "1 stage failed".into(),
        _ => format!("{failed} stages failed"),
    };
    let _ = writeln!(
        text,
        "{verdict}; results: {}",
        args.out.join("*.json").display()
    );
    say(&text)?;
    Ok(if failed == 0 {
        ExitCode::Done
    } else {
        ExitCode::Infrastructure
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_of_a_crash_is_not_its_backtrace() {
        let panic = "WARN slow\n\nthread 'main' (7) panicked at src/x.rs:3:9:\nno kernel for sm_90a\n\
                     stack backtrace:\n   0: std::panicking::begin\n             at x.rs:1\n";
        assert_eq!(reason(panic), Some("no kernel for sm_90a"));
        assert_eq!(reason("a\nerror: no driver\n\n"), Some("error: no driver"));
        assert_eq!(reason(""), None);
    }
}

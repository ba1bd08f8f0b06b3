//! `pollen data convert`: other formats to LeRobotDataset v3.0.

use std::io::Write;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use pollen_convert::{Error, Mapping, Progress, Stage, convert};
use pollen_core::ExitCode;

use crate::args::ConvertArgs;

pub(crate) fn run(args: &ConvertArgs) -> Result<ExitCode> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).context("cannot hear signals")?;
    }
    let bar = ProgressBar::new_spinner();
    let plain = "{spinner} {msg} {pos} episodes [{elapsed}]";
    if let Ok(style) = ProgressStyle::with_template(plain) {
        bar.set_style(style);
    }
    let runtime = tokio::runtime::Runtime::new().context("cannot start the I/O threads")?;
    let outcome = runtime.block_on(Box::pin(convert(&wanted(args), |progress| {
        show(&bar, progress);
        if stop.load(Ordering::Relaxed) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })));
    bar.finish_and_clear();
    let report = match outcome {
        Err(Error::Stopped { .. }) if stop.load(Ordering::Relaxed) => {
            writeln!(
                std::io::stderr(),
                "stopped; the same command goes on from here"
            )?;
            return Ok(ExitCode::Interrupted);
        }
        outcome => outcome?,
    };
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{}: {} episodes, {} frames, {} bytes in {} files, {:.1} s",
        report.kind, report.episodes, report.frames, report.bytes, report.files, report.seconds
    )?;
    for dropped in &report.dropped {
        writeln!(out, "left out {}: {}", dropped.what, dropped.why)?;
    }
    for note in &report.notes {
        writeln!(out, "note: {note}")?;
    }
    Ok(ExitCode::Done)
}

fn wanted(args: &ConvertArgs) -> pollen_convert::ConvertArgs {
    let mut wanted = pollen_convert::ConvertArgs::new(&args.source, &args.destination);
    wanted.kind = args.kind;
    wanted.split.clone_from(&args.split);
    wanted.mapping = Mapping {
        cameras: args.cameras.clone(),
        state: args.states.clone(),
        action: args.actions.clone(),
        instruction: args.instruction.clone(),
    };
    wanted.resize = args.resize;
    wanted.jpeg_quality = Some(args.jpeg_quality);
    wanted.rotate = args.rotate;
    wanted.fps = args.fps;
    wanted.task.clone_from(&args.task);
    wanted.jobs = args.jobs.unwrap_or(wanted.jobs);
    wanted
}

fn show(bar: &ProgressBar, progress: &Progress) {
    let stage = match progress.stage {
        Stage::Converting => "converting",
        Stage::Verifying => "verifying",
    };
    bar.set_message(match progress.total_episodes {
        Some(total) => format!("{stage} {total}:"),
        None => stage.to_owned(),
    });
    bar.set_position(progress.episodes);
}

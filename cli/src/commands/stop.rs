//! `pollen stop`: asks a run to save and end.

use std::io::Write;

use anyhow::{Result, bail};
use pollen_core::ExitCode;
use pollen_launcher::RunDir;
use pollen_observe::{Event, RunView, read_events, units};

use crate::args::StopArgs;

pub(crate) fn run(args: &StopArgs) -> Result<ExitCode> {
    let run = RunDir::find(&args.run.runs, &args.run.run)?;
    let Some(holder) = run.holder() else {
        write!(
            std::io::stdout().lock(),
            "run {} is not being worked on\n{}",
            run.id(),
            saved(&run)?
        )?;
        return Ok(ExitCode::Done);
    };
    writeln!(
        std::io::stdout().lock(),
        "asked process {} to save and end run {}",
        holder.pid(),
        run.id()
    )?;
    holder.terminate()?;
    if !holder.wait_gone(args.timeout) {
        bail!(
            "process {} still works on run {} after {}: look at `pollen logs {}`, or end it with \
             `kill -9 {}`; the last checkpoint stands",
            holder.pid(),
            run.id(),
            humantime::format_duration(args.timeout),
            run.id(),
            holder.pid()
        );
    }
    write!(std::io::stdout().lock(), "{}", saved(&run)?)?;
    Ok(ExitCode::Done)
}

/// Says how the run ended and what it left.
fn saved(run: &RunDir) -> Result<String> {
    let path = run.events();
    let records = if path.exists() {
        read_events(&path)?
    } else {
        Vec::new()
    };
    let end = records.iter().rev().find_map(|record| match &record.event {
        Event::End { exit_code, reason } if record.rank.is_none() => {
            Some(format!("{reason} (exit {exit_code})\n"))
        }
        _ => None,
    });
    let left = match RunView::of(&records).checkpoint {
        Some(checkpoint) => format!(
            "saved: step {} in {}, {}; the same `pollen launch` goes on from it\n",
            units::count(checkpoint.step),
            checkpoint.url,
            units::bytes(checkpoint.bytes)
        ),
        None => "nothing was saved: the same `pollen launch` starts from the beginning\n".into(),
    };
    Ok(end.unwrap_or_default() + &left)
}

//! `pollen ps`: which runs are being worked on, and how far they are.

use std::io::Write;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use pollen_collectives::{Beat, Deadline, Store};
use pollen_core::ExitCode;
use pollen_launcher::RunDir;
use pollen_observe::{RunView, read_events, units};
use serde::Serialize;

use crate::args::PsArgs;

/// How long a run's store may take to answer.
const ANSWER: Duration = Duration::from_secs(2);

/// One run.
#[derive(Debug, Serialize)]
struct Row {
    run: String,
    recipe: String,
    /// Process id of its launcher; none for a run that nobody works on.
    pid: Option<u32>,
    generation: u64,
    step: u64,
    steps: Option<u64>,
    samples_per_s: Option<f64>,
    workers: Vec<Worker>,
    /// Seconds since the newest sign of life of any worker.
    last_beat_s: Option<f64>,
}

/// One worker, as its newest beat describes it.
#[derive(Debug, Serialize)]
struct Worker {
    rank: u32,
    host: String,
    pid: u32,
    step: u64,
    phase: String,
    last_beat_s: f64,
}

pub(crate) fn run(args: &PsArgs) -> Result<ExitCode> {
    let now = SystemTime::now();
    let mut rows = Vec::new();
    for run in RunDir::list_all(&args.runs)? {
        if args.all || run.holder().is_some() {
            rows.push(row(&run, now)?);
        }
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        for row in &rows {
            writeln!(out, "{}", serde_json::to_string(row)?)?;
        }
    } else {
        write!(out, "{}", table(&rows))?;
    }
    Ok(ExitCode::Done)
}

fn row(run: &RunDir, now: SystemTime) -> Result<Row> {
    let path = run.events();
    let records = if path.exists() {
        read_events(&path)?
    } else {
        Vec::new()
    };
    let view = RunView::of(&records);
    let holder = run.holder();
    let workers = if holder.is_some() {
        workers(run, now)
    } else {
        Vec::new()
    };
    let ages = workers.iter().map(|worker| worker.last_beat_s);
    Ok(Row {
        run: run.id().to_owned(),
        recipe: run.record().recipe.clone(),
        pid: holder.map(|holder| holder.pid()),
        generation: run.record().generation,
        step: view.steps_done(),
        steps: view.steps_total(),
        samples_per_s: view.step.as_ref().map(|step| step.samples_per_s),
        last_beat_s: ages.min_by(f64::total_cmp),
        workers,
    })
}

/// Asks the run's store for the beats; a store that does not answer has none.
fn workers(run: &RunDir, now: SystemTime) -> Vec<Worker> {
    let Some(meeting) = run.meeting() else {
        return Vec::new();
    };
    let Ok(store) = Store::connect(&meeting.store, Deadline::after(ANSWER)) else {
        return Vec::new();
    };
    let store = store.prefixed(&format!("g{}/", meeting.generation));
    let beats = (0..meeting.workers).filter_map(|rank| {
        let beat: Beat = store.newest_beat(rank).ok()??;
        let age = now.duration_since(beat.sent).unwrap_or_default();
        Some(Worker {
            rank,
            host: beat.host,
            pid: beat.pid,
            step: beat.step,
            phase: beat.phase,
            last_beat_s: age.as_secs_f64(),
        })
    });
    beats.collect()
}

fn table(rows: &[Row]) -> String {
    if rows.is_empty() {
        return "no run is being worked on; --all lists the others\n".into();
    }
    let mut cells = vec![
        [
            "RUN",
            "RECIPE",
            "STEP",
            "RATE",
            "LAST BEAT",
            "PID",
            "WORKERS",
        ]
        .map(str::to_owned),
    ];
    for row in rows {
        let phases: Vec<&str> = row.workers.iter().map(|w| w.phase.as_str()).collect();
        let workers = match phases.len() {
            0 => "-".to_owned(),
            count => format!("{count} ({})", phases.join(", ")),
        };
        let steps = row.steps.map_or_else(|| "?".to_owned(), units::count);
        cells.push([
            row.run.clone(),
            row.recipe.clone(),
            format!("{}/{steps}", units::count(row.step)),
            row.samples_per_s
                .map_or_else(|| "-".to_owned(), |rate| format!("{rate:.1} samples/s")),
            row.last_beat_s.map_or_else(
                || "-".to_owned(),
                |age| format!("{} ago", units::seconds(age)),
            ),
            row.pid
                .map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            workers,
        ]);
    }
    let widths: Vec<usize> = (0..cells[0].len())
        .map(|column| cells.iter().map(|row| row[column].len()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in cells {
        let padded: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(padded.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_reads_as_intended() {
        let worker = |rank, phase: &str| Worker {
            rank,
            host: "n1".into(),
            pid: 7,
            step: 13,
            phase: phase.into(),
            last_beat_s: 0.4,
        };
        let running = Row {
            run: "20260102-030405-a1b2c3d4".into(),
            recipe: "demo".into(),
            pid: Some(4711),
            generation: 1,
            step: 1200,
            steps: Some(3000),
            samples_per_s: Some(52.04),
            workers: vec![worker(0, "forward"), worker(1, "all_reduce")],
            last_beat_s: Some(0.4),
        };
        let expected = "\
RUN                       RECIPE  STEP         RATE            LAST BEAT  PID   WORKERS
20260102-030405-a1b2c3d4  demo    1,200/3,000  52.0 samples/s  0.4s ago   4711  2 (forward, all_reduce)
";
        assert_eq!(table(&[running]), expected);
        assert!(table(&[]).contains("--all"));
    }
}

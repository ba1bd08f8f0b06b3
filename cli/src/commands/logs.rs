//! `pollen logs`: what a run's workers wrote.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use pollen_core::ExitCode;
use pollen_launcher::RunDir;

use crate::args::LogsArgs;

/// How often growing logs are looked at.
const TICK: Duration = Duration::from_millis(200);

pub(crate) fn run(args: &LogsArgs) -> Result<ExitCode> {
    let run = RunDir::find(&args.run.runs, &args.run.run)?;
    let mut reader = Reader::default();
    let mut generation = run.record().generation;
    loop {
        // Asked first: what is written until the end is read after it.
        let goes_on = args.follow && run.holder().is_some();
        reader.print(&run, generation, args.rank)?;
        let newest = RunDir::open(run.path())?.record().generation;
        if newest > generation {
            reader.print(&run, generation, args.rank)?;
            generation = newest;
            continue;
        }
        if !goes_on {
            break;
        }
        std::thread::sleep(TICK);
    }
    if reader.files.is_empty() {
        let which = args
            .rank
            .map_or_else(String::new, |rank| format!(" of rank {rank}"));
        anyhow::bail!(
            "run {} has no log{which} of start {generation} in {}",
            run.id(),
            run.path().join("logs").display()
        );
    }
    Ok(ExitCode::Done)
}

/// How far each log was printed.
#[derive(Debug, Default)]
struct Reader {
    files: BTreeMap<PathBuf, u64>,
}

impl Reader {
    /// Prints what is new, whole lines only; those of several workers with their rank.
    fn print(&mut self, run: &RunDir, generation: u64, only: Option<u32>) -> Result<()> {
        let workers = run.meeting().map_or(1, |meeting| meeting.workers);
        let mut out = std::io::stdout().lock();
        for rank in only.map_or(0..workers, |rank| rank..rank + 1) {
            let path = run.log(rank, generation);
            let mut file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot read {}", path.display()));
                }
            };
            let offset = self.files.entry(path.clone()).or_default();
            let mut bytes = Vec::new();
            file.seek(SeekFrom::Start(*offset))
                .and_then(|_| file.read_to_end(&mut bytes))
                .with_context(|| format!("cannot read {}", path.display()))?;
            let whole = bytes
                .iter()
                .rposition(|byte| *byte == b'\n')
                .map_or(0, |at| at + 1);
            *offset += whole as u64;
            let prefix = match only {
                None if workers > 1 => format!("rank {rank}: "),
                _ => String::new(),
            };
            for line in String::from_utf8_lossy(&bytes[..whole]).lines() {
                writeln!(out, "{prefix}{line}")?;
            }
        }
        out.flush()?;
        Ok(())
    }
}

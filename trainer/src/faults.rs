//! Faults at a named (generation, rank, step, place), for tests only: feature `faults`.
//!
//! `POLLEN_FAULT="kill@rank=1,step=7,place=backward"` kills the process when it gets there. Kinds:
//! `kill` (SIGKILL), `freeze` (SIGSTOP; go on with SIGCONT), `error` (a stage of a checkpoint fails
//! with an I/O error; elsewhere the thread panics), `hold` (wait until the file `until=PATH`
//! exists), `mark` (only write the file), `trace` (append the place to the file `to=PATH`),
//! `poison` (makes the loss of the step NaN; no place), `repeat` (the first sample of each
//! micro-batch is said to be `sample=ID`; no place). Every fault first writes the file `mark=PATH`,
//! if given, so that a test can wait for the place to be reached. Conditions that are left out match
//! anything; several faults are separated by `;`. A place is a phase of the step or a stage of a
//! checkpoint such as `before MANIFEST`. `tests/faults` strikes at every place that a trace of an
//! undisturbed run shows.

#[cfg(feature = "faults")]
mod active {
    use std::cell::Cell;
    use std::fs::OpenOptions;
    use std::io::{self, Write as _};
    use std::path::PathBuf;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    #[derive(Debug, Default)]
    struct Fault {
        kind: String,
        generation: Option<u64>,
        rank: Option<u32>,
        step: Option<u64>,
        place: Option<String>,
        mark: Option<PathBuf>,
        until: Option<PathBuf>,
        to: Option<PathBuf>,
        sample: Option<u64>,
    }

    fn parse(text: &str) -> Fault {
        let (kind, conditions) = text.split_once('@').unwrap_or((text, ""));
        let mut fault = Fault {
            kind: kind.trim().to_owned(),
            ..Fault::default()
        };
        for (key, value) in conditions
            .split(',')
            .filter_map(|pair| pair.split_once('='))
        {
            let number = || {
                value
                    .parse()
                    .unwrap_or_else(|_| panic!("POLLEN_FAULT: {key}={value}"))
            };
            match key.trim() {
                "generation" => fault.generation = Some(number()),
                "rank" => fault.rank = Some(number() as u32),
                "step" => fault.step = Some(number()),
                "place" => fault.place = Some(value.to_owned()),
                "mark" => fault.mark = Some(value.into()),
                "until" => fault.until = Some(value.into()),
                "to" => fault.to = Some(value.into()),
                "sample" => fault.sample = Some(number()),
                other => panic!("POLLEN_FAULT: unknown condition `{other}`"),
            }
        }
        fault
    }

    static STEP: AtomicU64 = AtomicU64::new(0);
    thread_local! {
        /// The step whose checkpoint this thread writes.
        static SAVED: Cell<Option<u64>> = const { Cell::new(None) };
    }
    static FAULTS: OnceLock<Vec<Fault>> = OnceLock::new();
    static WHO: OnceLock<(u64, u32)> = OnceLock::new();

    pub(crate) fn identify(generation: u64, rank: u32) {
        WHO.get_or_init(|| (generation, rank));
    }

    /// A phase of the step: what is asked for here strikes. An `error` panics, since phases
    /// begin where nothing can fail.
    pub(crate) fn reach(step: u64, place: &str) {
        STEP.store(step, Ordering::Relaxed);
        strike_at(step, place).unwrap_or_else(|error| panic!("{error}"));
    }

    fn strike_at(step: u64, place: &str) -> io::Result<()> {
        matching(step)
            .filter(|fault| fault.place.as_ref().is_none_or(|wanted| wanted == place))
            .try_for_each(|fault| strike(fault, step, place))
    }

    /// Returns the faults of this process at `step`, wherever in it.
    fn matching(step: u64) -> impl Iterator<Item = &'static Fault> {
        let faults = FAULTS.get_or_init(|| {
            let text = std::env::var("POLLEN_FAULT").unwrap_or_default();
            text.split(';')
                .filter(|part| !part.trim().is_empty())
                .map(parse)
                .collect()
        });
        let who = WHO.get().copied();
        faults.iter().filter(move |fault| {
            who.is_some_and(|(generation, rank)| {
                fault.generation.is_none_or(|wanted| wanted == generation)
                    && fault.rank.is_none_or(|wanted| wanted == rank)
                    && fault.step.is_none_or(|wanted| wanted == step)
            })
        })
    }

    /// Returns whether the batches of `step` are poisoned.
    pub(crate) fn poisons(step: u64) -> bool {
        matching(step).any(|fault| fault.kind == "poison")
    }

    /// Returns the sample that a batch of `step` is said to hold once more.
    pub(crate) fn repeats(step: u64) -> Option<u64> {
        let repeat = matching(step).find(|fault| fault.kind == "repeat");
        repeat.map(|fault| fault.sample.expect("POLLEN_FAULT: repeat needs sample=ID"))
    }

    /// Says which step's checkpoint this thread writes from here on.
    pub(crate) fn saving(step: u64) {
        SAVED.set(Some(step));
    }

    /// A stage of a checkpoint belongs to the step that is saved; one outside a save, such as the
    /// claim, to the step reached last.
    pub(crate) fn reach_stage(stage: &str) -> io::Result<()> {
        let step = SAVED.get().unwrap_or_else(|| STEP.load(Ordering::Relaxed));
        strike_at(step, stage)
    }

    fn strike(fault: &Fault, step: u64, place: &str) -> io::Result<()> {
        use rustix::process::{Signal, getpid, kill_process};
        if let Some(mark) = &fault.mark {
            std::fs::write(mark, std::process::id().to_string())?;
        }
        match fault.kind.as_str() {
            "kill" => kill_process(getpid(), Signal::KILL)?,
            // To this very thread: it must not run on until another one has taken the signal.
            "freeze" => signal_hook::low_level::raise(signal_hook::consts::SIGSTOP)?,
            "error" => {
                let text = format!("POLLEN_FAULT: error in `{place}` of step {step}");
                return Err(io::Error::other(text));
            }
            "hold" => {
                let until = fault.until.as_ref();
                let until = until.expect("POLLEN_FAULT: hold needs until=PATH");
                while !until.exists() {
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
            "trace" => {
                let to = fault.to.as_ref();
                let to = to.expect("POLLEN_FAULT: trace needs to=PATH");
                let (generation, rank) = WHO.get().expect("faults match a known rank only");
                let thread = SAVED.get().map_or("training", |_| "saving");
                // One write, so that lines of several processes do not mix.
                let line = format!("{generation} {rank} {step} {thread} {place}\n");
                let mut file = OpenOptions::new().create(true).append(true).open(to)?;
                file.write_all(line.as_bytes())?;
            }
            "mark" | "poison" | "repeat" => {}
            other => panic!("POLLEN_FAULT: unknown kind `{other}`"),
        }
        Ok(())
    }
}

#[cfg(feature = "faults")]
pub(crate) use active::{identify, poisons, reach, reach_stage, repeats, saving};

/// Does nothing: faults are compiled in for tests only.
#[cfg(not(feature = "faults"))]
pub(crate) fn identify(_generation: u64, _rank: u32) {}

/// Does nothing: faults are compiled in for tests only.
#[cfg(not(feature = "faults"))]
pub(crate) fn reach(_step: u64, _place: &str) {}

/// Does nothing: faults are compiled in for tests only.
#[cfg(not(feature = "faults"))]
#[allow(clippy::unnecessary_wraps, reason = "with faults it may fail")]
pub(crate) fn reach_stage(_stage: &str) -> std::io::Result<()> {
    Ok(())
}

/// Does nothing: faults are compiled in for tests only.
#[cfg(not(feature = "faults"))]
pub(crate) fn saving(_step: u64) {}

/// Returns false: faults are compiled in for tests only.
#[cfg(not(feature = "faults"))]
pub(crate) fn poisons(_step: u64) -> bool {
    false
}

/// Returns nothing: faults are compiled in for tests only.
#[cfg(not(feature = "faults"))]
pub(crate) fn repeats(_step: u64) -> Option<u64> {
    None
}

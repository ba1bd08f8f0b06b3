//! All cases, made from the places that a run shows, and the choice among them.

use std::fmt::Write as _;
use std::path::Path;

use crate::places::{Group, Place, of_group};
use crate::store_cases::StoreCase;

/// The last step of a run.
pub(crate) const STEPS: u64 = 6;
/// The step between two checkpoints that faults strike.
const STEP: u64 = 5;
/// The save that faults strike: the second one, which deletes the first.
const SAVED: u64 = 4;

/// The stage from which on a checkpoint counts.
const COMMIT: &str = "after log entry";

/// What happens at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// SIGKILL.
    Kill,
    /// SIGKILL, and again when the next start gets there.
    Twice,
    /// SIGSTOP: the process is there and does nothing.
    Freeze,
    /// A stage of a checkpoint fails; elsewhere the thread panics.
    Error,
}

impl Kind {
    pub(crate) const ALL: [Self; 4] = [Self::Kill, Self::Twice, Self::Freeze, Self::Error];

    /// The word in a case's name.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Twice => "twice",
            Self::Freeze => "freeze",
            Self::Error => "error",
        }
    }

    /// The kind of fault that the trainer knows.
    fn injected(self) -> &'static str {
        match self {
            Self::Kill | Self::Twice => "kill",
            Self::Freeze => "freeze",
            Self::Error => "error",
        }
    }

    /// Whether faults of this kind make sense in the group: a restore follows a kill already.
    pub(crate) fn fits(self, group: Group) -> bool {
        !(self == Self::Twice && group == Group::Restore)
    }
}

/// One run with its faults.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub name: String,
    pub kind: Kind,
    pub group: Group,
    pub place: Place,
    /// Whether the checkpoint that is struck counts: its entry in the log is written.
    pub committed: bool,
}

/// The fault before a restore: in the middle of a step after the first two checkpoints.
pub(crate) fn first_kill() -> String {
    format!("kill@generation=1,rank=1,step={STEP},place=backward")
}

impl Case {
    fn new(kind: Kind, group: Group, place: &Place, committed: bool) -> Self {
        let at = place.name.replace([' ', '_'], "-");
        let name = format!("{}-rank{}-{}-{at}", kind.word(), place.rank, group.word());
        Self {
            name,
            kind,
            group,
            place: place.clone(),
            committed,
        }
    }

    /// Number of times that the run is struck.
    pub(crate) fn strikes(&self) -> u64 {
        match (self.kind, self.group) {
            (Kind::Twice, _) | (_, Group::Restore) => 2,
            _ => 1,
        }
    }

    /// The value of `POLLEN_FAULT`; strike number n leaves the file that `mark(n)` names.
    pub(crate) fn fault(&self, mark: impl Fn(u64) -> std::path::PathBuf) -> String {
        let Place { rank, name, .. } = &self.place;
        let marked = |number: u64| format!("mark={}", Path::display(&mark(number)));
        let mut text = String::new();
        let mut at = self.place.generation;
        if self.group == Group::Restore {
            let _ = write!(text, "{},{};", first_kill(), marked(1));
        }
        let step = self.place.step;
        let _ = write!(
            text,
            "{}@generation={at},rank={rank},step={step},place={name},{}",
            self.kind.injected(),
            marked(at)
        );
        if self.kind == Kind::Twice {
            // Whatever step it gets to the place: it may have been saved the first time.
            at += 1;
            let _ = write!(
                text,
                ";kill@generation={at},rank={rank},place={name},{}",
                marked(at)
            );
        }
        text
    }
}

/// Makes all cases; `calm` is the trace of an undisturbed run, `resumed` that of one struck by
/// [`first_kill`].
pub(crate) fn all(calm: &[Place], resumed: &[Place]) -> Vec<Case> {
    let mut cases = Vec::new();
    for group in Group::ALL {
        let trace = if group == Group::Restore {
            resumed
        } else {
            calm
        };
        let places = of_group(trace, group, STEP, SAVED);
        for kind in Kind::ALL.into_iter().filter(|kind| kind.fits(group)) {
            let mut committed = false;
            for place in &places {
                committed |= place.name == COMMIT;
                cases.push(Case::new(kind, group, place, committed && place.rank == 0));
            }
        }
    }
    cases
}

/// A case of either sort.
#[derive(Clone, Debug)]
pub(crate) enum Any {
    Rank(Case),
    Store(StoreCase),
}

impl Any {
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Rank(case) => &case.name,
            Self::Store(case) => &case.name,
        }
    }
}

/// Chooses by `POLLEN_FAULTS`: `all`, part of a name, or `k/n`, every n-th case from the k-th on.
/// Without it a tenth, another one each day.
pub(crate) fn choose(cases: &[Any], wanted: Option<&str>, day: u64) -> (String, Vec<Any>) {
    let part = |k: u64, n: u64| -> Vec<Any> {
        let chosen = (1..).zip(cases).filter(|(number, _)| number % n == k % n);
        chosen.map(|(_, case)| case.clone()).collect()
    };
    match wanted {
        None | Some("") => {
            let k = day % 10 + 1;
            (format!("POLLEN_FAULTS={k}/10, today's tenth"), part(k, 10))
        }
        Some("all") => ("POLLEN_FAULTS=all".into(), cases.to_vec()),
        Some(text) => {
            let fraction = text.split_once('/').and_then(|(k, n)| {
                let (k, n) = (k.parse().ok()?, n.parse().ok()?);
                (1 <= k && k <= n).then_some((k, n))
            });
            let chosen = if let Some((k, n)) = fraction {
                part(k, n)
            } else {
                // From the start of a word on: `store` is not part of `restore`.
                let text = format!("-{text}");
                let named = |case: &&Any| format!("-{}", case.name()).contains(&text);
                cases.iter().filter(named).cloned().collect()
            };
            assert!(
                !chosen.is_empty(),
                "POLLEN_FAULTS={text} names no case: use all, part of a name in docs/faults.md, or k/n"
            );
            (format!("POLLEN_FAULTS={text}"), chosen)
        }
    }
}

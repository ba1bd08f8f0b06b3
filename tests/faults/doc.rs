//! `docs/faults.md`, written from the cases.

use std::fmt::Write as _;

use crate::cases::{Case, Kind};
use crate::lab::root;
use crate::places::Group;
use crate::proxy::Spoil;
use crate::store_cases::StoreCase;

const HEAD: &str = "\
# Faults that a run survives

Written by `tests/faults` from the places that an undisturbed run goes through; do not edit.
`POLLEN_FAULTS=write make test-faults` writes it anew, and the test fails where it is stale.

Each case is a run of two workers over Gloo and SeaweedFS, six steps, a checkpoint every second
step, one of them kept. Its fault strikes one rank at one place; the launcher starts the workers
again. Afterwards

- the weights, the optimizer's state and the loss of every step are those of the undisturbed run, to
  the bit;
- there was one start for each fault, it went on from a checkpoint at least as new as the newest that
  had been reported, and the two workers exchanged gradients;
- every published checkpoint verifies; nothing but the newest is left in the store, unless the last
  start saved nothing;
- no process is left.

`make test-faults` runs all cases, `make test` a tenth of them, another one each day;
`POLLEN_FAULTS=all|PART-OF-A-NAME|K/N` chooses. A case is named
`<fault>-rank<rank>-<when>-<place>`, for example `kill-rank0-save-before-MANIFEST`.
";

fn heading(group: Group) -> &'static str {
    match group {
        Group::Start => "## start: before the first step",
        Group::Step => "## step: in the thread that trains",
        Group::Save => "## save: in the thread that saves",
        Group::Restore => "## restore: in the second start, before its first step",
    }
}

const STORE: &str = "
## store: a request that fails

A proxy between the workers and SeaweedFS spoils one request, the second of its kind where there are
two. Nobody is started again for it; everything else holds as above. A case is named
`store-<fault>-<method>-<object>`; `POLLEN_FAULTS_DOWN=60s` keeps the store away for longer than
3 seconds.

| fault | |
|---|---|
";

fn of_store(spoil: Spoil) -> &'static str {
    match spoil {
        Spoil::Refused => "500, and nothing is done",
        Spoil::Silent => "no answer, and nothing is done",
        Spoil::Slow => "the answer comes late",
        Spoil::Truncated => "the answer breaks off in its body",
        Spoil::AnswerLost => "it is done, and the connection breaks before the answer",
        Spoil::Conflict => "409: another conditional write is under way",
        Spoil::Down => "every connection breaks at once, for a while",
    }
}

fn meaning(kind: Kind) -> &'static str {
    match kind {
        Kind::Kill => "SIGKILL",
        Kind::Twice => "SIGKILL, and again when the next start gets there",
        Kind::Freeze => "SIGSTOP: the rank is found to hang, named in an event and killed",
        Kind::Error => {
            "a stage of a checkpoint fails with an I/O error; elsewhere the thread panics"
        }
    }
}

/// The table of all cases.
pub(crate) fn document(cases: &[Case], stores: &[StoreCase]) -> String {
    let mut text = HEAD.to_owned();
    let count = cases.len() + stores.len();
    let _ = writeln!(text, "\n{count} cases.\n\n| fault | |\n|---|---|");
    for kind in Kind::ALL {
        let _ = writeln!(text, "| {} | {} |", kind.word(), meaning(kind));
    }
    for group in Group::ALL {
        let _ = writeln!(
            text,
            "\n{}\n\n| place | rank | faults |\n|---|---|---|",
            heading(group)
        );
        let members: Vec<&Case> = cases.iter().filter(|case| case.group == group).collect();
        let mut done: Vec<(u32, &str)> = Vec::new();
        for case in &members {
            let key = (case.place.rank, case.place.name.as_str());
            if done.contains(&key) {
                continue;
            }
            done.push(key);
            let here = members.iter().filter(|other| other.place == case.place);
            let kinds: Vec<&str> = here.map(|other| other.kind.word()).collect();
            let _ = writeln!(text, "| {} | {} | {} |", key.1, key.0, kinds.join(", "));
        }
    }
    text.push_str(STORE);
    for spoil in Spoil::ALL {
        let _ = writeln!(text, "| {} | {} |", spoil.word(), of_store(spoil));
    }
    text.push_str("\n| request | faults |\n|---|---|\n");
    let mut done = Vec::new();
    for case in stores {
        let asked = &case.order.asked;
        if done.contains(&asked) {
            continue;
        }
        done.push(asked);
        let here = stores.iter().filter(|other| other.order.asked == *asked);
        let spoils: Vec<&str> = here.map(|other| other.order.spoil.word()).collect();
        let new = if asked.conditional {
            ", if it is not there"
        } else {
            ""
        };
        let when = if case.resumed { ", in a restore" } else { "" };
        let (method, object) = (&asked.method, &asked.object);
        let _ = writeln!(
            text,
            "| {method} {object}{new}{when} | {} |",
            spoils.join(", ")
        );
    }
    text
}

/// Compares the committed table with the cases, or writes it.
pub(crate) fn check(cases: &[Case], stores: &[StoreCase], write: bool) {
    let path = root().join("docs/faults.md");
    let want = document(cases, stores);
    if write {
        std::fs::write(&path, &want).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == want,
        "docs/faults.md is stale: POLLEN_FAULTS=write make test-faults"
    );
}

//! Two workers over Gloo and SeaweedFS, struck at every place that an undisturbed run goes through:
//! `docs/faults.md` lists the cases.

#![allow(clippy::unwrap_used, reason = "tests")]

mod cases;
mod doc;
#[path = "../lab/mod.rs"]
mod lab;
mod places;
mod proxy;
mod store_cases;
mod world;

use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use cases::{Any, choose};
use world::{World, today};

#[test]
fn every_fault_is_survived() {
    let wanted = std::env::var("POLLEN_FAULTS").ok();
    let wanted = wanted.as_deref();
    let start = Instant::now();
    let world = World::new();
    let ranks = cases::all(&world.calm.places, &world.resumed.places);
    let stores = store_cases::all(&world.calm.requests, &world.resumed.requests);
    doc::check(&ranks, &stores, wanted == Some("write"));
    let ranks = ranks.into_iter().map(Any::Rank);
    let all: Vec<Any> = ranks.chain(stores.into_iter().map(Any::Store)).collect();
    if wanted == Some("write") {
        return;
    }
    let (choice, chosen) = choose(&all, wanted, today());
    say(&format!(
        "faults: {} of {} cases ({choice}); undisturbed runs took {:.0} s",
        chosen.len(),
        all.len(),
        start.elapsed().as_secs_f64()
    ));
    let failed = run(&world, &chosen);
    say(&format!(
        "faults: {} cases in {:.0} s",
        chosen.len(),
        start.elapsed().as_secs_f64()
    ));
    assert!(failed.is_empty(), "failed: {}", failed.join(", "));
}

/// Runs the cases on all processors; returns the names of those that failed.
fn run(world: &World, cases: &[Any]) -> Vec<String> {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(4));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(case) = cases.get(number) else { break };
                    let start = Instant::now();
                    let survived = catch_unwind(AssertUnwindSafe(|| world.check(case))).is_ok();
                    say(&format!(
                        "faults: {}/{} {} {} {:.1} s",
                        number + 1,
                        cases.len(),
                        case.name(),
                        if survived { "ok" } else { "FAILED" },
                        start.elapsed().as_secs_f64()
                    ));
                    if !survived {
                        let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                        failed.push(case.name().to_owned());
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Prints a line past the capture of the test harness: it shows how far the cases are.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

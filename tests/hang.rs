//! A worker stopped from outside: it is named, all threads are written down, the run starts again
//! and ends with the weights of an undisturbed one.

#![allow(clippy::unwrap_used, reason = "tests")]

mod lab;

use lab::{Finished, Lab, PATIENCE, is_alive, signal, wait_for, wait_for_mark};
use pollen_collectives::{Deadline, Store, StoreServer};
use pollen_observe::{Event, Record};

const STEPS: u64 = 8;
/// A beat every 0.1 s and silence from 6 s on: sixty beats may be late.
const LIMITS: &[&str] = &[
    "watchdog.interval=100ms",
    "watchdog.min_timeout=6s",
    "watchdog.max_timeout=6s",
];

/// The only `hang` event, which must name `rank`.
#[track_caller]
fn hang(run: &Finished, rank: u32) -> (Record, u64, String) {
    let mut hangs = run.events().into_iter().filter_map(|record| {
        let Event::Hang {
            ref who,
            hung_rank,
            step,
            ref phase,
            since_s,
        } = record.event
        else {
            return None;
        };
        assert_eq!(hung_rank, Some(rank), "{record:?}");
        assert!(who.starts_with(&format!("rank {rank} on ")), "{who}");
        assert!(since_s >= 6.0, "{since_s}");
        let phase = phase.clone();
        Some((record, step, phase))
    });
    let hang = hangs.next().unwrap();
    assert!(hangs.next().is_none(), "one verdict a generation");
    hang
}

/// One restore: of `newest`, or of the one before if the stop came while it was being written.
#[track_caller]
fn assert_resumed(run: &Finished, newest: u64) {
    let restores = run.restores();
    assert!(
        restores == [newest] || restores == [newest - 2],
        "{restores:?}"
    );
}

#[test]
fn a_stopped_worker_is_named_and_the_run_ends_with_the_same_weights() {
    let lab = Lab::folder();
    let calm = lab.launch("calm", 2).run().expect(0);
    let mark = lab.path("mark");
    // Rank 1 says when it is in the forward pass of step 5, and waits there to be stopped.
    let fault = format!(
        "hold@generation=1,rank=1,step=5,place=forward,mark={},until={}",
        mark.display(),
        lab.path("never").display()
    );
    let server = StoreServer::bind("127.0.0.1:0").unwrap();
    let address = server.address().to_string();
    let running = lab
        .launch("stopped", 2)
        .set(LIMITS)
        .set(&[&format!("launch.store={address}")])
        .fault(&fault)
        .spawn();
    let worker = wait_for_mark(&mark);
    let store = Store::connect(&address, Deadline::after(PATIENCE))
        .unwrap()
        .prefixed("g1/");
    wait_for("a beat from where it waits", || {
        let beat = store.newest_beat(1).unwrap()?;
        (beat.step == 5 && beat.phase == "forward").then_some(())
    });
    signal(worker, "STOP");
    let run = running.wait().expect(0);
    wait_for("the stopped worker's end", || {
        (!is_alive(worker)).then_some(())
    });
    assert_resumed(&run, 4);
    assert_eq!(
        run.state_hashes(&lab, STEPS),
        calm.state_hashes(&lab, STEPS)
    );

    let (record, step, phase) = hang(&run, 1);
    assert_eq!((record.generation, step, phase.as_str()), (1, 5, "forward"));
    let report = |name: &str| {
        let path = run.run_dir().join("logs").join(name);
        std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    };
    // Rank 0 waits for it in the all-reduce; its own report says so.
    let living = report("hang-rank-0.g1.txt");
    assert!(living.contains("step        5 all_reduce"), "{living}");
    assert!(living.contains("pollen-watch"), "{living}");
    // It noticed, and wrote down the threads of the stopped process as well.
    assert_eq!(record.rank, Some(0));
    assert!(
        living.contains(&format!("process {worker}")) && living.contains("T (stopped)"),
        "{living}"
    );
    let restart = run
        .events()
        .into_iter()
        .find_map(|record| match record.event {
            Event::Restart { reason, .. } => Some(reason),
            _ => None,
        })
        .unwrap();
    assert!(
        restart.contains("hung in forward of step 5"),
        "the restart says why: {restart}"
    );
}

#[test]
fn the_only_worker_is_watched_by_the_launcher() {
    let lab = Lab::folder();
    let mark = lab.path("mark");
    let fault = format!(
        "freeze@generation=1,step=5,place=backward,mark={}",
        mark.display()
    );
    let run = lab
        .launch("alone", 1)
        .set(LIMITS)
        .fault(&fault)
        .run()
        .expect(0);
    let (record, step, _) = hang(&run, 0);
    assert_eq!(record.rank, None, "found by the launcher");
    assert!(step <= 5, "{step}: where its last beat came from");
    let report = run.run_dir().join("logs/hang-launcher.g1.txt");
    let report = std::fs::read_to_string(report).unwrap();
    assert!(report.contains("T (stopped)"), "{report}");
    assert_resumed(&run, 4);
}

//! Two workers over Gloo and an S3 server.

#![allow(clippy::unwrap_used, reason = "tests")]

mod lab;

use std::collections::BTreeSet;

use lab::{Finished, Lab, NO_DROPOUT, is_alive, list, saved_steps, wait_for, wait_for_mark};
use pollen_observe::Event;

const STEPS: u64 = 8;

/// The workers exchanged gradients: own ones differ, the sum is the same.
#[track_caller]
fn assert_exchanged(run: &Finished, workers: usize) {
    let mut own = BTreeSet::new();
    let mut reduced = BTreeSet::new();
    for record in run
        .events()
        .into_iter()
        .filter(|record| record.generation == 1)
    {
        if let Event::GradientExchange {
            own_hash,
            reduced_hash,
            ..
        } = record.event
        {
            own.insert(own_hash);
            reduced.insert(reduced_hash);
        }
    }
    assert_eq!(
        (own.len(), reduced.len()),
        (workers, 1),
        "{own:?} {reduced:?}"
    );
    assert!(own.is_disjoint(&reduced));
}

#[test]
fn a_launcher_killed_with_its_workers_is_survived_with_the_same_bits() {
    let lab = Lab::s3();
    let calm = lab.launch("calm", 2).run().expect(0);
    assert_exchanged(&calm, 2);
    let want = calm.state_hashes(&lab, STEPS);
    // The launcher is killed, its workers die with it. `faults` kills single workers.
    let mark = lab.path("mark");
    let fault = format!(
        "freeze@generation=1,rank=1,step=5,place=forward,mark={}",
        mark.display()
    );
    let running = lab.launch("all", 2).fault(&fault).spawn();
    let worker = wait_for_mark(&mark);
    running.signal("KILL");
    drop(running);
    wait_for("the worker to die", || (!is_alive(worker)).then_some(()));
    let resumed = lab.launch("all", 2).run().expect(0);
    assert!(matches!(resumed.restores()[..], [2 | 4]));
    assert_eq!(resumed.state_hashes(&lab, STEPS), want);
}

#[test]
fn two_workers_become_one_with_the_same_samples_and_losses() {
    let lab = Lab::s3();
    let run = |name: &str, workers: u32, steps: &str| {
        lab.launch(name, workers)
            .set(NO_DROPOUT)
            .set(&[steps])
            .run()
            .expect(0)
    };
    let calm = run("calm", 2, "train.steps=24");
    run("changed", 2, "train.steps=4");
    let changed = run("changed", 1, "train.steps=24");
    assert_eq!(changed.restores(), [4]);
    let (want, got) = (calm.audits(), changed.audits());
    assert_eq!(want.len(), 24);
    assert_eq!(got, want, "the loaders delivered the same samples");
    let want = calm.losses();
    for (step, loss) in changed.losses() {
        let difference = (loss - want[&step]).abs() / want[&step];
        assert!(
            difference < 1e-4,
            "step {step}: {loss} {} ({difference:e})",
            want[&step]
        );
    }
}

#[test]
fn a_run_whose_launcher_died_publishes_nothing_to_s3() {
    assert_orphans_publish_nothing(&Lab::s3());
}

#[test]
fn a_run_whose_launcher_died_publishes_nothing_to_a_folder() {
    assert_orphans_publish_nothing(&Lab::folder());
}

/// Real orphans: the workers of a killed launcher, which train on beside the next generation and
/// reach a checkpoint before it.
fn assert_orphans_publish_nothing(lab: &Lab) {
    let want = lab
        .launch("calm", 2)
        .run()
        .expect(0)
        .state_hashes(lab, STEPS);

    // Generation 1 keeps its store and outlives its launcher; rank 1 waits in step 3. (Not frozen:
    // the kernel hangs up on stopped processes whose parent dies.)
    let store = pollen_collectives::StoreServer::bind("127.0.0.1:0").unwrap();
    let address = format!("launch.store={}", store.address());
    let orphans = ["launch.die_with_launcher=false", address.as_str()];
    let [waiting, other, go, held, free] =
        ["waiting", "other", "go", "held", "free"].map(|name| lab.path(name));
    let first = format!(
        "hold@generation=1,rank=1,step=3,place=forward,mark={},until={};\
         mark@generation=1,rank=0,step=3,place=forward,mark={}",
        waiting.display(),
        go.display(),
        other.display()
    );
    let running = lab
        .launch("orphaned", 2)
        .set(&orphans)
        .fault(&first)
        .spawn();
    let workers = [wait_for_mark(&waiting), wait_for_mark(&other)];
    let runs = lab.path("runs-orphaned/demo");
    wait_for("the checkpoint of step 2", || {
        saved_steps(&lab::run_dir(&runs)).contains(&2).then_some(())
    });
    running.signal("KILL");
    drop(running);
    assert!(
        workers.iter().all(|&pid| is_alive(pid)),
        "the workers live on"
    );

    // Generation 2 claims the run, restores step 2 and waits before the next checkpoint.
    let second = format!(
        "hold@generation=2,rank=0,step=3,place=forward,mark={},until={}",
        held.display(),
        free.display()
    );
    let running = lab.launch("orphaned", 2).fault(&second).spawn();
    wait_for_mark(&held);
    // The orphans go on and reach the checkpoint of step 4 first.
    std::fs::write(&go, "").unwrap();
    for worker in workers {
        wait_for("the orphans to end", || (!is_alive(worker)).then_some(()));
    }
    let dir = lab::run_dir(&runs);
    let id = dir.file_name().unwrap().to_str().unwrap();
    let url = format!("{}/runs-orphaned/demo/{id}/checkpoints", lab.base_url());
    let objects = list(lab, &url);
    assert!(
        objects
            .iter()
            .any(|path| path.starts_with("step-00000004/g1/")),
        "the orphans did write: {objects:?}"
    );
    std::fs::write(&free, "").unwrap();
    let finished = running.wait().expect(0);
    assert_eq!(finished.restores(), [2]);
    assert_eq!(finished.state_hashes(lab, STEPS), want);

    let checkpoints: Vec<u64> = finished
        .events()
        .into_iter()
        .filter(|record| matches!(record.event, Event::Checkpoint { step, .. } if step > 2))
        .map(|record| record.generation)
        .collect();
    assert!(
        checkpoints.iter().all(|&generation| generation == 2),
        "{checkpoints:?}"
    );
    let ends: Vec<String> = finished
        .events()
        .into_iter()
        .filter(|record| record.generation == 1)
        .filter_map(|record| match record.event {
            Event::End { reason, .. } => Some(reason),
            _ => None,
        })
        .collect();
    assert!(
        ends.iter()
            .any(|reason| reason.contains("replaced by generation 2")),
        "generation 1 says that it was fenced: {ends:?}"
    );
}

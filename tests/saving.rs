//! Checkpoints are written beside the training: one in flight, none lost, failures found out.

#![allow(clippy::unwrap_used, reason = "tests")]

mod lab;

use lab::{Lab, run_dir, saved_steps, wait_for, wait_for_mark};
use pollen_observe::Event;

const STEPS: u64 = 8;
/// Nothing is deleted, so that each checkpoint can be compared.
const KEEP_ALL: &[&str] = &["checkpoint.keep_last=100"];

#[test]
fn training_goes_on_while_a_checkpoint_is_written_and_changes_none_of_its_bytes() {
    let lab = Lab::folder();
    let calm = lab.launch("calm", 1).set(KEEP_ALL).run().expect(0);
    let [saving, next, go] = ["saving", "next", "go"].map(|name| lab.path(name));
    // The save of step 2 waits before its first byte until the training has come to the next save.
    let fault = format!(
        "hold@step=2,place=before model-00001-of-00001.safetensors,mark={},until={};\
         mark@step=4,place=checkpoint,mark={}",
        saving.display(),
        go.display(),
        next.display()
    );
    let running = lab.launch("slow", 1).set(KEEP_ALL).fault(&fault).spawn();
    wait_for_mark(&saving);
    wait_for_mark(&next);
    let runs = lab.path("runs-slow/demo");
    assert!(
        saved_steps(&run_dir(&runs)).is_empty(),
        "one in flight, none done"
    );
    std::fs::write(&go, "").unwrap();
    let slow = running.wait().expect(0);
    for step in [2, 4, STEPS] {
        assert_eq!(
            slow.state_hashes(&lab, step),
            calm.state_hashes(&lab, step),
            "step {step}"
        );
    }
    assert_eq!(saved_steps(&slow.run_dir()), [2, 4, 6, 8]);
    // The save of step 2 took the whole wait, the step none of it; the next one had to wait.
    let times: Vec<(f64, f64)> = slow
        .events()
        .into_iter()
        .filter_map(|record| match record.event {
            Event::Checkpoint {
                stall_s, seconds, ..
            } => Some((stall_s, seconds)),
            _ => None,
        })
        .collect();
    assert!(times[0].0 < times[0].1, "{times:?}");
}

#[test]
fn a_stop_publishes_the_save_in_flight_and_then_its_own() {
    let lab = Lab::folder();
    let [saving, go] = ["saving", "go"].map(|name| lab.path(name));
    let fault = format!(
        "hold@step=4,place=before MANIFEST,mark={},until={}",
        saving.display(),
        go.display()
    );
    let running = lab
        .launch("stopped", 1)
        .set(&["train.steps=1000", "checkpoint.every_steps=4"])
        .fault(&fault)
        .spawn();
    wait_for_mark(&saving);
    running.signal("TERM");
    // The worker has stopped training when its last step's phases end with a checkpoint.
    let runs = lab.path("runs-stopped/demo");
    wait_for("the step that stops", || {
        let log = std::fs::read_to_string(run_dir(&runs).join("events.jsonl")).unwrap();
        log.contains("\"step\":5").then_some(())
    });
    std::fs::write(&go, "").unwrap();
    let stopped = running.wait().expect(85);
    let last = stopped.losses().keys().copied().max().unwrap();
    assert_eq!(saved_steps(&stopped.run_dir()), [4, last]);
}

#[test]
fn a_save_that_fails_stops_the_run_at_a_later_step_with_its_reason() {
    let lab = Lab::folder();
    let [saving, go] = ["saving", "go"].map(|name| lab.path(name));
    let fault = format!(
        "hold@step=4,place=before MANIFEST,mark={},until={}",
        saving.display(),
        go.display()
    );
    let running = lab
        .launch("failing", 2)
        .set(&[
            "train.steps=100000",
            "checkpoint.every_steps=4",
            "storage.retry_for=1s",
            "launch.max_restarts=0",
        ])
        .fault(&fault)
        .spawn();
    wait_for_mark(&saving);
    // The folder of checkpoints becomes a file: nothing can be written below it.
    let id = run_dir(&lab.path("runs-failing/demo"));
    let id = id.file_name().unwrap().to_str().unwrap();
    let folder = lab.path(&format!("bucket/runs-failing/demo/{id}/checkpoints"));
    std::fs::rename(&folder, lab.path("away")).unwrap();
    std::fs::write(&folder, "").unwrap();
    std::fs::write(&go, "").unwrap();
    let failed = running.wait().expect(1);
    let reasons: Vec<String> = failed
        .events()
        .into_iter()
        .filter(|record| record.rank.is_some())
        .filter_map(|record| match record.event {
            Event::End { reason, .. } => Some(reason),
            _ => None,
        })
        .collect();
    assert_eq!(
        reasons.len(),
        2,
        "both ranks end by themselves: {reasons:?}"
    );
    assert!(
        reasons.iter().all(|reason| reason.contains("MANIFEST")),
        "{reasons:?}"
    );
    assert!(
        failed.losses().keys().any(|step| *step > 4),
        "training had gone on"
    );
}

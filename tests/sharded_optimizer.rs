//! The optimizer in shards (ZeRO-1) does what the replicated one does, to the bit.

#![allow(clippy::unwrap_used, reason = "tests")]

mod lab;

use lab::{Finished, Lab, open_checkpoint, run_dir, saved_steps, wait_for_mark};
use pollen_checkpoints::{Change, diff};
use pollen_trainer::memory::Memory;

const SHARDED: &str = "train.shard_optimizer=true";
/// 12 micro-batches; a norm that clips, averages, every dropout on.
const SETS: &[&str] = &[
    "train.global_batch=24",
    "train.micro_batch=2",
    "train.steps=6",
    "train.clip_norm=0.1",
    "train.ema.power=0.75",
    "checkpoint.keep_last=100",
];

fn launch(lab: &Lab, name: &str, workers: u32, sets: &[&str]) -> Finished {
    let launch = lab.launch(name, workers).set(SETS).set(sets);
    launch.run().expect(0)
}

/// Asserts that all weights, averages and moments have the same bits, in whatever files they lie.
#[track_caller]
fn assert_same(what: &str, a: &Finished, b: &Finished, step: u64) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (a, b) = (
        open_checkpoint(a, step, &runtime),
        open_checkpoint(b, step, &runtime),
    );
    let diffs = diff((&a.0, &a.1), (&b.0, &b.1)).unwrap();
    let moments = diffs.iter().filter(|one| one.name.starts_with("optim:"));
    assert_eq!(moments.count(), 2, "{what}");
    for one in diffs {
        assert_eq!(
            one.change,
            Change::None,
            "{what}, step {step}: {}",
            one.name
        );
    }
}

#[test]
fn shards_have_the_bits_of_the_whole_at_any_number_of_workers() {
    let lab = Lab::folder();
    for workers in [1, 2, 3] {
        let whole = launch(&lab, &format!("whole-{workers}"), workers, &[]);
        let shards = launch(&lab, &format!("shards-{workers}"), workers, &[SHARDED]);
        let what = format!("{workers} workers");
        assert_eq!(shards.losses(), whole.losses(), "{what}");
        assert_same(&what, &shards, &whole, 6);
        let config = shards.config();
        // The moments really lay in shards: each rank wrote several ranges, and not all of it.
        let manifest = shards.manifest(&lab, 6);
        let files = manifest["files"].as_array().unwrap();
        let held: Vec<u64> = files
            .iter()
            .filter(|file| file["kind"] == "optim")
            .map(|file| {
                let flat = file["flat"].as_array().unwrap();
                flat.iter()
                    .map(|range| range["len"].as_u64().unwrap())
                    .sum()
            })
            .collect();
        assert_eq!(held.len(), workers as usize);
        assert!(held.iter().all(|&held| held > 0), "{what}: {held:?}");
        let moments = |sharded| Memory::of(&config, workers, sharded).unwrap().moments;
        assert_eq!(moments(true), 4 * held[0], "{what}: the plan's figure");
        assert_eq!(moments(false), 4 * held.iter().sum::<u64>(), "{what}");
    }
}

#[test]
fn checkpoints_go_from_one_to_the_other_and_back() {
    let lab = Lab::folder();
    let calm = launch(&lab, "calm", 3, &[]);
    let mut run = None;
    for (steps, sets) in [(2, vec![SHARDED]), (4, vec![]), (6, vec![SHARDED])] {
        let steps = format!("train.steps={steps}");
        let sets: Vec<&str> = std::iter::once(&*steps).chain(sets).collect();
        run = Some(launch(&lab, "changed", 3, &sets));
    }
    let run = run.unwrap();
    assert_eq!(run.restores(), [2, 4]);
    assert_eq!(run.losses(), calm.losses());
    assert_same("back and forth", &run, &calm, 6);
}

#[test]
fn a_save_during_updates_keeps_the_bytes_of_its_step() {
    let lab = Lab::folder();
    let calm = launch(&lab, "calm", 2, &[]);
    let [saving, next, go] = ["saving", "next", "go"].map(|name| lab.path(name));
    // Both ranks go through the updates of steps 3 and 4 before the first byte of step 2 is written.
    let fault = format!(
        "hold@rank=0,step=2,place=before model-00001-of-00002.safetensors,mark={},until={go};\
         hold@rank=1,step=2,place=before model-00002-of-00002.safetensors,until={go};\
         mark@rank=0,step=4,place=checkpoint,mark={}",
        saving.display(),
        next.display(),
        go = go.display(),
    );
    let running = lab
        .launch("slow", 2)
        .set(SETS)
        .set(&[SHARDED])
        .fault(&fault)
        .spawn();
    wait_for_mark(&saving);
    wait_for_mark(&next);
    assert!(saved_steps(&run_dir(&lab.path("runs-slow/demo"))).is_empty());
    std::fs::write(&go, "").unwrap();
    let slow = running.wait().expect(0);
    for step in [2, 4, 6] {
        assert_same("a slow save", &slow, &calm, step);
    }
}

#[test]
fn sending_gradients_during_the_backward_pass_changes_no_bit() {
    let lab = Lab::folder();
    let small = "train.bucket=16 KiB";
    let overlapped = launch(&lab, "overlapped", 2, &[small]);
    let waiting = launch(&lab, "waiting", 2, &[small, "train.overlap=false"]);
    assert_eq!(overlapped.losses(), waiting.losses());
    assert_same("overlap", &overlapped, &waiting, 6);
}

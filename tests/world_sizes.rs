//! Any number of workers computes the same gradients, takes the same samples and resumes from what
//! any other number saved. Real processes over Gloo; no dropout, which depends on the rank.

#![allow(clippy::unwrap_used, reason = "tests")]

mod lab;

use std::collections::BTreeMap;

use lab::{Finished, Lab, NO_DROPOUT, open_checkpoint};
use pollen_checkpoints::{Change, diff};
use pollen_observe::Event;
use pollen_trainer::layout::{Entry, Layout};

/// 12 micro-batches: 1, 2, 3, 4, 6 or 12 workers share them evenly.
const BATCH: &[&str] = &["train.global_batch=24", "train.micro_batch=2"];

fn launch(lab: &Lab, name: &str, workers: u32, sets: &[&str]) -> Finished {
    lab.launch(name, workers)
        .set(NO_DROPOUT)
        .set(BATCH)
        .set(&["train.clip_norm=1e9", "checkpoint.keep_last=100"])
        .set(sets)
        .run()
        .expect(0)
}

/// What one checkpoint says of every trained tensor.
struct Saved {
    layout: Layout,
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
}

fn saved(run: &Finished, step: u64) -> Saved {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (checkpoints, restored) = open_checkpoint(run, step, &runtime);
    let layout = Layout::of_run(&run.config()).unwrap();
    assert_eq!(
        layout.hash(),
        restored.manifest.head.layout_hash,
        "the offsets are those of the run"
    );
    let read = |name| {
        let len = layout.len() as u64;
        checkpoints.read_flat(&restored, name, 0..len).unwrap()
    };
    Saved {
        exp_avg: read("exp_avg"),
        exp_avg_sq: read("exp_avg_sq"),
        layout,
    }
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

/// Asserts that each tensor's values agree to a relative L2 of `bound`; tensors below a millionth
/// of the whole are rounding alone, such as the moments of a key's bias, and are measured by that.
#[track_caller]
fn assert_close(what: &str, layout: &Layout, got: &[f32], want: &[f32], bound: f64) {
    let rounding = 1e-6 * norm(want.iter().map(|&x| f64::from(x)));
    for entry in layout.entries() {
        let (got, want) = (&got[entry.range()], &want[entry.range()]);
        let pairs = got.iter().zip(want);
        let error = norm(pairs.map(|(&a, &b)| f64::from(a) - f64::from(b)));
        let size = norm(want.iter().map(|&x| f64::from(x)));
        assert!(
            error <= bound * size.max(rounding),
            "{what}: {}: {error:e} of {size:e}",
            entry.name
        );
    }
}

#[test]
fn gradients_are_those_of_one_process() {
    let lab = Lab::folder();
    // After the first update the first moment is the gradient times 1 - beta1, to the bit.
    let sets = ["train.steps=1", "checkpoint.every_steps=1"];
    let one = launch(&lab, "w1", 1, &sets);
    let spaces: Vec<String> = one
        .events()
        .into_iter()
        .filter_map(|record| match record.event {
            Event::Step(step) => Some(step.datasets),
            _ => None,
        })
        .flat_map(BTreeMap::into_keys)
        .collect();
    assert!(
        spaces.len() >= 2,
        "datasets of several action spaces: {spaces:?}"
    );
    let want = saved(&one, 1);
    let moving = |entry: &&Entry| want.exp_avg[entry.range()].iter().any(|&g| g != 0.0);
    for space in ["eef_delta", "bimanual_eef_delta"] {
        let mut entries = want.layout.entries().iter().filter(moving);
        assert!(
            entries.any(|entry| entry.action_space() == Some(space)),
            "{space} has gradients"
        );
    }
    for workers in [2, 3, 4] {
        let run = launch(&lab, &format!("w{workers}"), workers, &sets);
        let got = saved(&run, 1);
        let what = format!("{workers} workers");
        assert_close(&what, &want.layout, &got.exp_avg, &want.exp_avg, 1e-5);
    }
}

#[test]
fn gradients_in_bf16_are_rounded_and_no_more() {
    let lab = Lab::folder();
    let sets = ["train.steps=1", "checkpoint.every_steps=1"];
    let want = saved(&launch(&lab, "f32", 3, &sets), 1);
    let sets = [sets[0], sets[1], "train.reduce_dtype=bf16"];
    let got = saved(&launch(&lab, "bf16", 3, &sets), 1);
    assert_ne!(got.exp_avg, want.exp_avg, "half the bytes travelled");
    // Twice half a unit in the eighth bit.
    assert_close(
        "bf16",
        &want.layout,
        &got.exp_avg,
        &want.exp_avg,
        1.0 / 128.0,
    );
}

#[test]
fn twenty_steps_have_the_same_losses() {
    let lab = Lab::folder();
    let sets = ["train.steps=20", "checkpoint.every_steps=20"];
    let want = launch(&lab, "w1", 1, &sets).losses();
    assert_eq!(want.len(), 20);
    for workers in [2, 4] {
        let losses = launch(&lab, &format!("w{workers}"), workers, &sets).losses();
        assert_losses(&format!("{workers} workers"), &losses, &want);
    }
}

#[track_caller]
fn assert_losses(what: &str, got: &BTreeMap<u64, f64>, want: &BTreeMap<u64, f64>) {
    assert!(got.keys().eq(want.keys()), "{what}");
    for (step, loss) in got {
        let difference = (loss - want[step]).abs() / want[step];
        assert!(difference < 1e-4, "{what}, step {step}: {difference:e}");
    }
}

#[test]
fn four_workers_become_two_and_then_three() {
    let lab = Lab::folder();
    let calm = launch(
        &lab,
        "calm",
        4,
        &["train.steps=12", "checkpoint.every_steps=4"],
    );
    let mut run = None;
    for (workers, steps) in [(4, 4), (2, 8), (3, 12)] {
        let steps = format!("train.steps={steps}");
        run = Some(launch(
            &lab,
            "changed",
            workers,
            &[&steps, "checkpoint.every_steps=4"],
        ));
    }
    let run = run.unwrap();
    assert_eq!(run.restores(), [4, 8]);
    assert_eq!(
        run.audits(),
        calm.audits(),
        "the same samples in the same order"
    );
    assert_eq!(run.audits().len(), 12);
    assert_losses("changed", &run.losses(), &calm.losses());
    for (step, world_size) in [(4, 4), (8, 2), (12, 3)] {
        let (got, want) = (saved(&run, step), saved(&calm, step));
        assert_eq!(run.manifest(&lab, step)["world_size"], world_size);
        let what = format!("step {step}");
        assert_close(&what, &want.layout, &got.exp_avg, &want.exp_avg, 1e-3);
        assert_close(&what, &want.layout, &got.exp_avg_sq, &want.exp_avg_sq, 1e-3);
    }
}

/// A step whose loss is not finite changes nothing: what follows a resume is what was restored.
#[test]
fn what_other_numbers_of_workers_restore_is_what_was_saved_to_the_bit() {
    let lab = Lab::folder();
    let saves = ["checkpoint.every_steps=1", "train.ema.power=0.75"];
    let mut runs = Vec::new();
    for (workers, steps, shards) in [(4, 3, true), (2, 4, false), (3, 5, true), (1, 6, false)] {
        let sets = [
            format!("train.steps={steps}"),
            format!("train.shard_optimizer={shards}"),
        ];
        let launch = lab.launch("still", workers).set(NO_DROPOUT).set(BATCH);
        let launch = launch.set(&["train.clip_norm=1e9", "checkpoint.keep_last=100"]);
        let launch = launch.set(&saves).set(&[&sets[0], &sets[1]]);
        let poison = "poison@rank=0,step=4;poison@rank=0,step=5;poison@rank=0,step=6";
        runs.push(launch.fault(poison).run().expect(0));
    }
    let run = runs.pop().unwrap();
    assert_eq!(run.restores(), [3, 4, 5]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (first, saved) = open_checkpoint(&run, 3, &runtime);
    for step in [4, 5, 6] {
        let (other, restored) = open_checkpoint(&run, step, &runtime);
        let head = &restored.manifest.head;
        assert_eq!((head.step, head.updates), (step, 3));
        let diffs = diff((&first, &saved), (&other, &restored)).unwrap();
        assert!(diffs.iter().any(|one| one.name.starts_with("ema:")));
        assert!(diffs.iter().any(|one| one.name == "optim:exp_avg_sq"));
        for one in diffs {
            assert_eq!(one.change, Change::None, "step {step}: {}", one.name);
        }
    }
}

#[test]
fn a_number_of_workers_that_does_not_fit_is_refused_with_those_that_do() {
    let lab = Lab::folder();
    launch(&lab, "refused", 2, &["train.steps=2"]);
    let refused = lab
        .launch("refused", 5)
        .set(NO_DROPOUT)
        .set(BATCH)
        .set(&["train.clip_norm=1e9", "train.steps=4"])
        .run()
        .expect(2);
    assert!(
        refused.stderr.contains("1, 2, 3, 4, 6, 12"),
        "{}",
        refused.stderr
    );
}

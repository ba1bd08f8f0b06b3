//! A run that starts from the weights of another.

#![allow(clippy::unwrap_used, reason = "tests")]

mod lab;

use lab::{Finished, Lab};
use pollen_observe::Event;

/// Steps that change nothing.
const STILL: [&str; 5] = [
    "train.steps=2",
    "train.optimizer.head.learning_rate=0.0",
    "train.optimizer.head.weight_decay=0.0",
    "train.optimizer.vlm.learning_rate=0.0",
    "train.optimizer.vlm.weight_decay=0.0",
];

/// The folder of a run's last checkpoint.
fn checkpoint(run: &Finished) -> String {
    let events = run.events().into_iter().rev();
    let mut urls = events.filter_map(|record| match record.event {
        Event::Checkpoint { url, .. } => Some(url),
        _ => None,
    });
    urls.next().unwrap()
}

fn model_hash(run: &Finished, lab: &Lab) -> String {
    run.state_hashes(lab, 2)["model-00001-of-00001.safetensors"].clone()
}

#[test]
fn a_run_starts_from_the_weights_it_is_given() {
    let lab = Lab::folder();
    let first = lab
        .launch("first", 1)
        .set(&["train.steps=2"])
        .run()
        .expect(0);
    let url = checkpoint(&first);
    let from = format!("init.from={url}");
    let still = |name: &str, sets: &[&str]| lab.launch(name, 1).set(&STILL).set(sets).run();
    let second = still("second", &[&from, "seed=8"]).expect(0);
    assert_eq!(model_hash(&second, &lab), model_hash(&first, &lab));
    let random = still("random", &["seed=8"]).expect(0);
    assert_ne!(model_hash(&random, &lab), model_hash(&first, &lab));

    let deeper = still("deeper", &[&from, "model.flow.layers=2"]).expect(2);
    let lines: Vec<&str> = deeper.stderr.lines().collect();
    assert!(
        deeper.stderr.contains("dit.1.") && deeper.stderr.contains("init.allow_missing"),
        "{lines:?}"
    );
    let allowed = ["model.flow.layers=2", "init.allow_missing=[\"dit.1.\"]"];
    still("allowed", &[&from, allowed[0], allowed[1]]).expect(0);
}

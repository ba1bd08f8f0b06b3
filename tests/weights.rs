//! A run that starts from the weights of another.

#![allow(clippy::unwrap_used, reason = "tests")]

mod lab;

use std::process::{Command, Output};

use lab::{Finished, Lab, root};
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

/// Runs `pollen` in the repository's root.
fn pollen(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pollen"));
    command.current_dir(root()).args(args).output().unwrap()
}

#[track_caller]
fn stdout(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn a_checkpoint_is_exported_imported_and_started_from() {
    let lab = Lab::folder();
    let ema = "train.ema={ inv_gamma = 1.0, power = 0.1, min = 0.0, max = 0.5 }";
    let first = lab
        .launch("first", 1)
        .set(&["train.steps=2", ema])
        .run()
        .expect(0);
    let step = checkpoint(&first);
    let (all, _) = step.split_once("/step-").unwrap();
    let config = first.run_dir().join("config.toml");
    let config = config.to_str().unwrap();
    let path = |name: &str| lab.path(name).to_str().unwrap().to_owned();
    let (flower, imported, vlm) = (path("flower"), path("imported"), path("vlm"));

    let other = pollen(&["export", &step, &flower, "--recipe", "demo"]);
    assert_eq!(other.status.code(), Some(2));
    let other = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(other.contains("another configuration"), "{other}");

    stdout(&pollen(&["export", all, &flower, "--recipe", config]));
    let dry = [
        "weights",
        "import",
        &flower,
        &imported,
        "--recipe",
        config,
        "--dry-run",
    ];
    let report = stdout(&pollen(&dry));
    assert!(
        report.contains("loaded     dit.0.norm1.weight\n"),
        "{report}"
    );
    assert!(!lab.path("imported").exists(), "a dry run writes nothing");
    stdout(&pollen(&dry[..6]));
    let from = format!("init.from={imported}");
    let second = lab.launch("second", 1).set(&STILL).set(&[&from]);
    let second = second.run().expect(0);
    assert_eq!(model_hash(&second, &lab), model_hash(&first, &lab));

    let averages = ["export", &step, &vlm, "--recipe", config, "--what", "vlm"];
    stdout(&pollen(&[&averages[..], &["--weights", "ema"]].concat()));
    let file = |name: &str| std::fs::read(lab.path(name)).unwrap();
    let raw = path("raw");
    stdout(&pollen(&[
        "export", &step, &raw, "--recipe", config, "--what", "vlm",
    ]));
    assert_eq!(file("vlm/config.json"), file("raw/config.json"));
    let name = "model-00001-of-00001.safetensors";
    assert_ne!(file(&format!("vlm/{name}")), file(&format!("raw/{name}")));

    // One byte of the weights is another: the checksum says so.
    let damaged = step.strip_prefix("file://").unwrap();
    let shard = std::path::Path::new(damaged).join(name);
    let mut bytes = std::fs::read(&shard).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let refused = pollen(&["export", &step, &path("never"), "--recipe", config]);
    assert_eq!(refused.status.code(), Some(93));
    let refused = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        refused.contains(name) && refused.contains("crc32c"),
        "{refused}"
    );
    assert!(!lab.path("never").exists());
}

//! `pollen checkpoint` on what a real run left.

#![allow(clippy::unwrap_used, reason = "tests")]

mod lab;

use std::process::{Command, Output};

use lab::{Lab, root};
use serde_json::Value;

fn pollen(args: &[&str]) -> (i32, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = Command::new(env!("CARGO_BIN_EXE_pollen"))
        .current_dir(root())
        .arg("checkpoint")
        .args(args)
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

/// Steps and states of `ls --json`.
fn listed(place: &str) -> Vec<(u64, String)> {
    let (code, stdout, stderr) = pollen(&["ls", place, "--json"]);
    assert_eq!(code, 0, "{stderr}");
    let lines = stdout
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines
        .map(|line| {
            assert!(line["bytes"].as_u64().unwrap() > 1000 && line["age_s"].is_number());
            let state = line["state"].as_str().unwrap().to_owned();
            (line["step"].as_u64().unwrap(), state)
        })
        .collect()
}

#[test]
fn a_runs_checkpoints_are_listed_verified_compared_and_deleted() {
    let lab = Lab::folder();
    let run = lab
        .launch("kept", 1)
        .set(&[
            "checkpoint.keep_last=1",
            "checkpoint.keep_every=4",
            "checkpoint.keep_best=1",
            "eval.every_steps=2",
        ])
        .run()
        .expect(0);
    let folder = run.run_dir().display().to_string();

    // Every checkpoint was measured before it was saved; the best one is kept beside 4 and 8.
    let mut errors: Vec<(f64, u64)> = Vec::new();
    for record in run.events() {
        if let pollen_observe::Event::Eval { step, spaces } = record.event {
            let sum: f64 = spaces.values().map(|space| space.error).sum();
            errors.push((sum / spaces.len() as f64, step));
        }
    }
    errors.sort_by(|a, b| a.0.total_cmp(&b.0));
    assert_eq!(
        errors.len(),
        4,
        "steps 2, 4, 6 and 8, each once: {errors:?}"
    );
    let mut kept = vec![4, 8, errors[0].1];
    kept.sort_unstable();
    kept.dedup();
    let steps: Vec<(u64, String)> = kept
        .iter()
        .map(|step| (*step, "published".to_owned()))
        .collect();
    assert_eq!(listed(&folder), steps);
    let head = run.manifest(&lab, 8);
    let last = errors.iter().find(|(_, step)| *step == 8).unwrap().0;
    assert_eq!(head["eval_error"].as_f64(), Some(last));

    let (code, stdout, _) = pollen(&["verify", &folder]);
    assert_eq!((code, stdout.matches(": whole").count()), (0, kept.len()));

    let (four, eight) = (
        format!("{folder}/step-00000004/g1"),
        format!("{folder}/step-00000008/g1"),
    );
    let (_, same, _) = pollen(&["diff", &folder, &eight]);
    let total = same.rsplit_once(" of ").unwrap().1;
    let total: usize = total.split(' ').next().unwrap().parse().unwrap();
    assert!(
        same.contains(&format!("{total} of {total} tensors have the same bits")),
        "{same}"
    );
    let (_, other, _) = pollen(&["diff", &four, &eight, "--json"]);
    let changed: Vec<Value> = other
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(changed.len(), total);
    let moments = changed
        .iter()
        .find(|line| line["tensor"] == "optim:exp_avg");
    assert!(moments.unwrap()["relative_l2"].as_f64().unwrap() > 0.0);

    let (code, _, stderr) = pollen(&["rm", &eight]);
    assert_eq!(code, 2);
    assert!(stderr.contains("a restart needs it"), "{stderr}");
    let (code, _, stderr) = pollen(&["rm", &folder]);
    assert_eq!(code, 2);
    assert!(stderr.contains("step-00000600/g1"), "{stderr}");
    assert_eq!(pollen(&["rm", &four]).0, 0);
    assert!(listed(&folder).iter().all(|(step, _)| *step != 4));

    // Damage is found, by name, with the exit code of bad data.
    let bucket = lab.path("bucket");
    let mut open = vec![bucket];
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(path.read_dir().unwrap().map(|entry| entry.unwrap().path()));
        } else if path.ends_with("step-00000008/g1/contract.json") {
            let mut bytes = std::fs::read(&path).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            std::fs::write(&path, bytes).unwrap();
        }
    }
    let (code, stdout, _) = pollen(&["verify", &eight]);
    assert_eq!(code, 93, "{stdout}");
    assert!(
        stdout.contains("`contract.json` has another crc32c"),
        "{stdout}"
    );
}

#[test]
fn the_best_cannot_be_kept_unmeasured() {
    let lab = Lab::folder();
    let refused = lab
        .launch("refused", 1)
        .set(&["checkpoint.keep_best=1"])
        .run()
        .expect(2);
    assert!(
        refused.stderr.contains("eval.every_steps"),
        "{}",
        refused.stderr
    );
}

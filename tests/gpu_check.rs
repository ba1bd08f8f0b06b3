//! `pollen gpu-check`, on the CPU: what stages leave, and what their failures do to the others.

#![allow(clippy::unwrap_used, reason = "tests")]

mod lab;

use std::path::Path;

use lab::{Printed, pollen};
use serde_json::Value;
use tempfile::TempDir;

/// Runs stages on the CPU with their results in `out`.
fn check(out: &Path, stages: &[&str], more: &[&str]) -> Printed {
    let mut args = vec!["gpu-check", "--device", "cpu", "--quick", "--out"];
    args.push(out.to_str().unwrap());
    for stage in stages {
        args.extend(["--stage", stage]);
    }
    args.extend(more);
    pollen(&args)
}

fn record(out: &Path, stage: &str) -> Value {
    let text = std::fs::read(out.join(format!("{stage}.json"))).unwrap();
    serde_json::from_slice(&text).unwrap()
}

#[test]
fn stages_that_passed_are_kept() {
    let out = TempDir::new().unwrap();
    let stages = [
        "golden",
        "golden-unfused",
        "bf16",
        "gradients",
        "checkpoint",
    ];
    let run = check(out.path(), &stages, &[]);
    assert_eq!(run.code, Some(0), "{}{}", run.stdout, run.stderr);
    assert!(
        run.stdout.contains("5 stages, 5 of them to run"),
        "{}",
        run.stdout
    );
    for stage in stages {
        let record = record(out.path(), stage);
        assert_eq!(record["status"], "pass", "{record:#}");
        assert_eq!(record["device"], "cpu");
        let findings = record["findings"].as_array().unwrap();
        assert!(!findings.is_empty() && findings.iter().all(|f| f["holds"] == true));
    }
    // One file of tensors each: none is left out.
    let files = std::fs::read_dir(lab::root().join("tests/golden")).unwrap();
    let names: Vec<String> = files
        .map(|file| file.unwrap().path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "safetensors")
        })
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    let compared = &record(out.path(), "golden")["measured"];
    // What no device computes: pictures, learning rates; AdamW is compared in `gradients`.
    let host = ["augment_free_preprocess", "lr_schedules", "adamw"];
    for name in names.iter().filter(|name| !host.contains(&name.as_str())) {
        assert!(
            compared[name]["compared"].as_u64() > Some(0),
            "{name}: {compared:#}"
        );
    }
    let again = check(out.path(), &stages, &[]);
    assert_eq!(again.code, Some(0));
    assert!(
        again.stdout.contains("5 stages, 0 of them to run"),
        "{}",
        again.stdout
    );
    // A tenth of the steps is not the whole check.
    let mut whole = vec!["gpu-check", "--device", "cpu", "--list", "--out"];
    whole.push(out.path().to_str().unwrap());
    let list = pollen(&whole).stdout;
    assert!(list.contains("soak             not run"), "{list}");
    assert!(list.contains("golden           pass"), "{list}");
}

#[test]
fn a_stage_that_fails_or_hangs_does_not_stop_the_others() {
    let out = TempDir::new().unwrap();
    let stages = ["golden", "gradients"];
    let run = check(out.path(), &stages, &["--golden", "/nowhere"]);
    assert_eq!(run.code, Some(75), "{}{}", run.stdout, run.stderr);
    assert!(run.stdout.contains("1 stage failed"), "{}", run.stdout);
    assert_eq!(record(out.path(), "golden")["status"], "fail");
    let failure = record(out.path(), "golden")["failure"].to_string();
    assert!(failure.contains("/nowhere/"), "{failure}");
    assert_eq!(record(out.path(), "gradients")["status"], "pass");
    // The one that failed runs again, and only that.
    let again = check(out.path(), &stages, &[]);
    assert_eq!(again.code, Some(0), "{}", again.stdout);
    assert!(
        again.stdout.contains("2 stages, 1 of them to run"),
        "{}",
        again.stdout
    );

    // A process takes longer than this to start.
    let late = check(out.path(), &["bf16"], &["--limit", "1us"]);
    assert_eq!(late.code, Some(75));
    let failure = record(out.path(), "bf16")["failure"].to_string();
    assert!(failure.contains("not done within 1us"), "{failure}");
}

#[test]
fn what_cannot_be_checked_is_said_in_one_line() {
    let out = TempDir::new().unwrap();
    let out = out.path().to_str().unwrap();
    let run = pollen(&["gpu-check", "--out", out]);
    assert_eq!(
        run.code,
        Some(2),
        "tests are built without CUDA: {}",
        run.stdout
    );
    assert_eq!(run.stderr.lines().count(), 1, "{}", run.stderr);
    assert!(run.stderr.contains("no GPU") && run.stderr.contains("--device cpu"));
    let run = pollen(&["gpu-check", "--out", out, "--stage", "gold"]);
    assert_eq!(run.code, Some(2));
    assert!(run.stderr.contains("golden-unfused"), "{}", run.stderr);
}

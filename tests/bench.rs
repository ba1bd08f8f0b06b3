//! `pollen bench`: what it prints and writes, and what it refuses.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::process::{Command, Output};

fn bench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pollen"))
        .arg("bench")
        .args(arguments)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .output()
        .unwrap()
}

#[test]
fn steps_calls_and_the_batch_for_others_come_out() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().to_str().unwrap();
    let small = ["--micro-batch", "2", "--text-len", "5", "--cameras", "1"];
    let quick = ["--seconds", "0", "--warmup", "0", "--dropout", "off"];
    let dump = ["--dump", folder, "--batch-spaces", "eef_delta,bimanual_nav"];
    let run = bench(&[&small[..], &quick, &dump].concat());
    assert!(run.status.success(), "{run:?}");
    let lines: Vec<serde_json::Value> = String::from_utf8(run.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let kinds: Vec<&str> = lines
        .iter()
        .map(|line| line["kind"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["environment", "train", "latency"]);
    let step = &lines[1];
    for part in ["copies", "vision", "text", "flow", "optimizer"] {
        assert!(
            step["parts_ms"][part].as_f64().unwrap() > 0.0,
            "{part}: {step}"
        );
    }
    assert!(step["peak_memory_mib"].as_f64().unwrap() > 1.0);
    assert_eq!(lines[2]["denoising_steps"], 4);

    let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    let (weights, batch) = (read("weights.safetensors"), read("batch.safetensors"));
    let weights = safetensors::SafeTensors::deserialize(&weights).unwrap();
    let batch = safetensors::SafeTensors::deserialize(&batch).unwrap();
    assert!(
        weights
            .names()
            .iter()
            .any(|name| name.starts_with("dit.0."))
    );
    assert_eq!(batch.tensor("images").unwrap().shape(), [2, 1, 3, 64, 64]);
    assert_eq!(batch.tensor("actions").unwrap().shape(), [2, 10, 16]);
    assert_eq!(batch.tensor("proprio").unwrap().shape(), [2, 16]);
    let result: serde_json::Value = serde_json::from_slice(&read("result.json")).unwrap();
    assert!(result["loss"].as_f64().unwrap() > 0.0);
}

#[test]
fn operations_are_measured_at_the_shapes_of_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("micro.jsonl");
    let lines = [
        r#"{"torch": "2.9.0"}"#,
        r#"{"kind": "matmul", "name": "flow: mlp", "shape": [6, 8, 4], "dtype": "f32", "forward_ms": 1}"#,
        r#"{"kind": "layer_norm", "name": "text", "shape": [6, 8], "dtype": "bf16", "forward_ms": 1}"#,
    ];
    std::fs::write(&file, lines.join("\n")).unwrap();
    let arguments = ["--device", "cpu", "--seconds", "0", "--operations"];
    let run = bench(&[&arguments[..], &[file.to_str().unwrap()]].concat());
    assert!(run.status.success(), "{run:?}");
    let text = String::from_utf8(run.stdout).unwrap();
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert_eq!(lines[0]["shape"], serde_json::json!([6, 8, 4]));
    assert_eq!(lines[1]["dtype"], "bf16");
    for line in &lines {
        let forward = line["forward_ms"].as_f64().unwrap();
        assert!(
            forward > 0.0 && line["training_ms"].as_f64().unwrap() > 0.0,
            "{line}"
        );
    }
}

#[test]
fn what_cannot_be_compared_is_refused() {
    for (arguments, word) in [
        (vec!["--dump", "/nowhere"], "--dropout off"),
        (vec!["--batch-spaces", "elsewhere"], "elsewhere"),
        (vec!["--micro-batch", "0"], "at least 1"),
        (vec!["--model", "configs/model/none.toml"], "none.toml"),
        (vec!["--operations", "none.jsonl"], "none.jsonl"),
    ] {
        let run = bench(&arguments);
        assert_eq!(run.status.code(), Some(2), "{run:?}");
        let error = String::from_utf8(run.stderr).unwrap();
        assert!(error.contains(word), "{word} is not in: {error}");
    }
}

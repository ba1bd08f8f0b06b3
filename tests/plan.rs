//! `pollen plan`: from one measured device to many.

#![allow(clippy::unwrap_used, reason = "tests")]

mod lab;

use lab::{Lab, pollen};
use serde_json::Value;

const FULL: &[&str] = &["plan", "oxe", "--set", "data.root=s3://bucket/oxe"];

fn plan(args: &[&str]) -> lab::Printed {
    pollen(&[FULL, args].concat())
}

#[test]
fn the_full_model_is_predicted_and_its_budget_explained() {
    let args = ["--step-seconds", "0.206", "--micro-batch", "128"];
    let more = ["--gpus", "64,8", "--price", "2"];
    let printed = plan(&[args, more[..].try_into().unwrap()].concat());
    assert_eq!(printed.code, Some(0), "{printed:?}");
    for part in [
        "96.2%",
        "8 GPUs: 171 of 200 GPU-hours",
        "64 GPUs: 308 GPU-hours break the budget of 200; all-reduce costs 138 of them",
        "train.reduce_dtype = \"bf16\": 199 GPU-hours, fits",
    ] {
        assert!(printed.stdout.contains(part), "{part}: {}", printed.stdout);
    }
    let json = plan(&[&args[..], &more, &["--json"]].concat()).stdout;
    let json: Value = serde_json::from_str(&json).unwrap();
    let rows = json["scaling"]["predictions"].as_array().unwrap();
    assert_eq!(
        (rows[0]["gpus"].as_u64(), rows[1]["gpus"].as_u64()),
        (Some(8), Some(64))
    );
    let number = |row: &Value, key: &str| row[key].as_f64().unwrap();
    let (few, many) = (&rows[0], &rows[1]);
    assert!((number(few, "usd") - 2.0 * number(few, "gpu_hours")).abs() < 1e-9);
    assert!(few["budget"]["cause"].is_null());
    assert_eq!(many["budget"]["cause"], "all-reduce");
    assert!(few["memory_bytes"]["moments"].as_u64().unwrap() > 7_000_000_000);
}

#[test]
fn a_run_is_what_it_is_planned_from() {
    let lab = Lab::folder();
    lab.launch("measured", 2)
        .set(&["train.steps=9"])
        .run()
        .expect(0);
    let runs = lab.path("runs-measured");
    let from = ["plan", "demo", "--runs", runs.to_str().unwrap(), "--from"];
    let printed = pollen(&[&from[..], &["demo", "--json"]].concat());
    assert_eq!(printed.code, Some(0), "{printed:?}");
    let json: Value = serde_json::from_str(&printed.stdout).unwrap();
    let model = &json["scaling"]["model"];
    assert!(model["measured"]["sample_s"].as_f64().unwrap() > 0.0);
    assert!(model["measured"]["optimizer_s"].as_f64().unwrap() > 0.0);
    assert_eq!(model["measured"]["micro_batch"], 2);
    // Without --link it is that of what ran.
    assert_eq!(model["link"]["name"], "loopback");

    let missing = pollen(&[&from[..], &["oxe"]].concat());
    assert_eq!(missing.code, Some(2), "{missing:?}");
}

#[test]
fn what_cannot_be_predicted_is_refused() {
    for (args, part) in [
        (&["--gpus", "8"][..], "--step-seconds"),
        (&["--mfu", "0.4", "--gpus", "48"], "32, 64, 128"),
        (&["--mfu", "0"], "above 0"),
        (&["--mfu", "0.4", "--link", "pigeon"], "h100-ndr"),
        (&["--mfu", "0.4", "--link", "gpus=8,inside=476"], "between"),
        (
            &["--mfu", "0.4", "--step-seconds", "1"],
            "cannot be used with",
        ),
    ] {
        let printed = plan(args);
        assert_eq!(printed.code, Some(2), "{args:?}: {printed:?}");
        assert!(
            printed.stderr.contains(part),
            "{args:?}: {}",
            printed.stderr
        );
    }
}

#[test]
fn a_simulation_picks_the_interval_and_repeats_with_its_seed() {
    let simulate = |more: &[&str]| {
        let args = ["--mfu", "0.4", "--simulate", "--set", "train.steps=5000"];
        let printed = plan(&[&args[..], &["--repeats", "2"], more].concat());
        assert_eq!(printed.code, Some(0), "{printed:?}");
        printed
    };
    // So many failures that 5,000 steps on 1,024 GPUs see some.
    let many = ["--gpus", "8,1024", "--mtbf-hours", "50", "--json"];
    let first = simulate(&many);
    assert!(
        first.stderr.contains("simulating 1024 GPUs: "),
        "{}",
        first.stderr
    );
    assert_eq!(first.stdout, simulate(&many).stdout);
    let other = simulate(&[&many[..], &["--seed", "1"]].concat());
    assert_ne!(first.stdout, other.stdout);

    let json: Value = serde_json::from_str(&first.stdout).unwrap();
    let choices = json["simulation"].as_array().unwrap();
    assert_eq!(choices.len(), 2);
    let goodput = |choice: &Value| choice["goodput"].as_f64().unwrap();
    assert!(goodput(&choices[0]) > goodput(&choices[1]));
    let many = &choices[1];
    let candidates = many["candidates"].as_array().unwrap();
    let picked = candidates
        .iter()
        .find(|candidate| candidate["every_steps"] == many["every_steps"])
        .unwrap();
    assert!(picked["mean"]["failures"].as_u64().unwrap() > 0, "{picked}");
    let best = candidates
        .iter()
        .map(|candidate| candidate["mean"]["goodput"].as_f64().unwrap())
        .fold(0.0, f64::max);
    assert!(goodput(many) >= best - 0.0005 && goodput(many) <= best);
    // The recipe's own interval is among them.
    assert!(
        candidates.iter().any(|c| c["every_steps"] == 2000),
        "{many}"
    );

    let text = simulate(&["--gpus", "8"]).stdout;
    for part in [
        "picked: checkpoint.every_steps = ",
        "Young says ",
        "the recipe's",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

//! `pollen ps`, `logs` and `stop` on a real run, and data that changed since its checkpoint.

#![allow(clippy::unwrap_used, reason = "tests")]

mod lab;

use lab::{Lab, is_alive, pollen, saved_steps, wait_for};

#[test]
fn a_running_run_is_seen_read_and_stopped() {
    let lab = Lab::folder();
    let runs = lab.path("runs-busy");
    let runs = runs.to_str().unwrap();
    let running = lab
        .launch("busy", 2)
        .set(&["train.steps=1000000", "watchdog.interval=100ms"])
        .env("POLLEN_LOG", "info")
        .spawn();
    let row = wait_for("two workers that train", || {
        let out = pollen(&["ps", "--runs", runs, "--json"]);
        let row: serde_json::Value = serde_json::from_str(out.stdout.lines().next()?).unwrap();
        let ready = row["workers"].as_array()?.len() == 2 && row["step"].as_u64()? >= 4;
        ready.then_some(row)
    });
    assert_eq!(row["recipe"], "demo");
    assert_eq!(row["pid"], running.pid());
    assert_eq!(row["steps"], 1_000_000);
    assert!(row["samples_per_s"].as_f64().unwrap() > 0.0, "{row}");
    let workers: Vec<u32> = row["workers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|worker| worker["pid"].as_u64().unwrap() as u32)
        .collect();
    assert!(workers.iter().all(|&pid| is_alive(pid)), "{row}");
    let id = row["run"].as_str().unwrap();
    let text = pollen(&["ps", "--runs", runs]).stdout;
    assert!(text.contains(id) && text.contains("samples/s"), "{text}");

    let both = pollen(&["logs", &id[..15], "--runs", runs]).stdout;
    assert!(
        both.contains("rank 0: ") && both.contains("rank 1: "),
        "{both}"
    );
    let one = pollen(&["logs", "demo", "--runs", runs, "--rank", "1"]).stdout;
    assert!(
        one.contains("gloo is connected") && !one.contains("rank 0: "),
        "{one}"
    );

    // Workers that need longer than `launch.grace` are killed, and what they had is lost.
    let grace = std::time::Duration::from_secs(30);
    let asked = std::time::Instant::now();
    let stopped = pollen(&["stop", "demo", "--runs", runs]);
    running.wait().expect(85);
    assert!(asked.elapsed() < grace, "saved within the grace time");
    let dir = lab::run_dir(&lab.path("runs-busy/demo"));
    let last = *saved_steps(&dir).last().unwrap();
    assert!(
        last >= row["step"].as_u64().unwrap(),
        "what was trained is saved"
    );
    let expected = format!("saved: step {last} in ");
    assert!(stopped.stdout.contains(&expected), "{stopped:?}");
    assert!(workers.iter().all(|&pid| !is_alive(pid)));

    assert!(
        pollen(&["ps", "--runs", runs])
            .stdout
            .contains("no run is being worked on")
    );
    let again = pollen(&["stop", "demo", "--runs", runs]).stdout;
    assert!(
        again.contains("is not being worked on") && again.contains(&expected),
        "{again}"
    );
    let unknown = pollen(&["logs", "2025", "--runs", runs]);
    assert_eq!(unknown.code, Some(2));
    assert!(
        unknown.stderr.contains(id),
        "names the runs there are: {unknown:?}"
    );
}

#[test]
fn data_that_changed_is_refused_until_it_is_accepted() {
    let lab = Lab::folder();
    lab.launch("changed", 1)
        .set(&["train.steps=4"])
        .run()
        .expect(0);
    // Another version of the dataset: its frame rate, and with it the index that is made anew.
    let meta = lab.path("bucket/datasets/lift/meta");
    let mut info: serde_json::Value =
        serde_json::from_slice(&std::fs::read(meta.join("info.json")).unwrap()).unwrap();
    info["fps"] = (info["fps"].as_u64().unwrap() + 1).into();
    std::fs::write(meta.join("info.json"), serde_json::to_vec(&info).unwrap()).unwrap();
    std::fs::remove_file(meta.join("pollen.json")).unwrap();
    // Nothing is staged from the demo again.
    let staged = lab.path("bucket/datasets").display().to_string();
    let stage = format!("run.stage_from={staged}");
    let more = ["train.steps=6", stage.as_str()];
    let refused = lab.launch("changed", 1).set(&more).run();
    assert_eq!(refused.status.code(), Some(93), "{refused:?}");
    assert!(refused.stderr.contains("--accept-new-data"), "{refused:?}");
    let accepted = lab
        .launch("changed", 1)
        .arg("--accept-new-data")
        .set(&more)
        .run()
        .expect(0);
    assert_eq!(accepted.restores(), [4]);
}

//! The object store goes away for 20 seconds while two workers use it: the run waits, says so and
//! goes on.

#![allow(clippy::unwrap_used, reason = "tests")]

mod lab;

use std::process::{Command, Stdio};
use std::time::Duration;

use lab::{Finished, Lab, Launch, signal, wait_for_mark};
use pollen_observe::Event;

const STEPS: u64 = 8;
const OUTAGE: Duration = Duration::from_secs(20);

/// Loaders that read on without end, short requests, and a mark when rank 0 is about to save.
fn launch(lab: &Lab, name: &str, mark: &std::path::Path) -> Launch {
    let fault = format!(
        "mark@generation=1,rank=0,step=4,place=before model-00001-of-00002.safetensors,mark={}",
        mark.display()
    );
    let sets = [
        "data.prefetch_batches=100000",
        "data.cache_bytes=256 KiB",
        "storage.request_timeout=3s",
    ];
    lab.launch(name, 2).set(&sets).fault(&fault)
}

/// At least one GET and one PUT failed, were tried again, and worked; the workers never restarted.
#[track_caller]
fn assert_waited(run: &Finished) {
    let events = run.events();
    let count = |wanted: &str| {
        let recovered = |event: &Event| match event {
            Event::StoreRecovered {
                operation,
                waited_s,
                ..
            } => operation == wanted && *waited_s > 1.0,
            _ => false,
        };
        events
            .iter()
            .filter(|record| recovered(&record.event))
            .count()
    };
    assert!(
        count("get") >= 1 && count("put") >= 1,
        "get {} put {}",
        count("get"),
        count("put")
    );
    assert!(
        events
            .iter()
            .any(|record| matches!(record.event, Event::StoreRetry { .. }))
    );
    assert!(
        events.iter().all(|record| record.generation == 1),
        "no worker was restarted"
    );
    assert!(
        run.stdout.contains("retr"),
        "the summary says so: {}",
        run.stdout
    );
}

#[test]
fn a_frozen_store_is_waited_for() {
    let lab = Lab::s3();
    let calm = lab.launch("calm", 2).run().expect(0);
    let mark = lab.path("mark");
    let running = launch(&lab, "frozen", &mark).spawn();
    wait_for_mark(&mark);
    signal(lab.server().pid(), "STOP");
    std::thread::sleep(OUTAGE);
    signal(lab.server().pid(), "CONT");
    let run = running.wait().expect(0);
    assert_waited(&run);
    assert_eq!(
        run.state_hashes(&lab, STEPS),
        calm.state_hashes(&lab, STEPS)
    );
}

#[test]
fn a_store_that_dies_and_comes_back_is_waited_for() {
    let lab = Lab::s3();
    let calm = lab.launch("calm", 2).run().expect(0);
    let want = calm.state_hashes(&lab, STEPS);
    let mark = lab.path("mark");
    let running = launch(&lab, "killed", &mark).spawn();
    wait_for_mark(&mark);

    let pid = lab.server().pid();
    let read = |name: &str| std::fs::read(format!("/proc/{pid}/{name}")).unwrap();
    let strings = |bytes: Vec<u8>| -> Vec<String> {
        let parts = bytes.split(|&b| b == 0).filter(|part| !part.is_empty());
        parts
            .map(|part| String::from_utf8(part.to_vec()).unwrap())
            .collect()
    };
    let command = strings(read("cmdline"));
    let environment = strings(read("environ"));
    let folder = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap();
    signal(pid, "KILL");
    std::thread::sleep(OUTAGE);
    let mut server = Command::new(&command[0])
        .args(&command[1..])
        .env_clear()
        .envs(environment.iter().filter_map(|pair| pair.split_once('=')))
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();

    let run = running.wait().expect(0);
    assert_waited(&run);
    assert_eq!(run.state_hashes(&lab, STEPS), want);
    server.kill().unwrap();
    server.wait().unwrap();
}

#[test]
fn wrong_credentials_are_named_and_end_the_run_at_once() {
    let lab = Lab::s3();
    for (name, variable) in [
        ("key", "AWS_ACCESS_KEY_ID"),
        ("secret", "AWS_SECRET_ACCESS_KEY"),
    ] {
        let run = lab.launch(name, 2).env(variable, "wrong").run().expect(2);
        assert!(run.stderr.contains(variable), "{}", run.stderr);
    }
}

/// The limit of a file's size stands for a disk that is full: the write fails.
#[test]
fn a_full_disk_is_named_and_costs_no_checkpoint() {
    let lab = Lab::folder();
    let calm = lab.launch("calm", 2).run().expect(0);
    let set = &["launch.max_restarts=1"];
    let whole = &["train.steps=2", "launch.max_restarts=1"];
    let before = lab.launch("full", 2).set(whole).run().expect(0);
    assert_eq!(lab::saved_steps(&before.run_dir()), [2]);
    let full = lab
        .launch("full", 2)
        .set(set)
        .file_limit(64)
        .run()
        .expect(1);
    let said = full.stderr.clone() + &full.stdout;
    assert!(said.contains("no space left for"), "{said}");
    assert!(
        said.contains("step-00000004"),
        "the object is named: {said}"
    );
    let codes = full
        .events()
        .into_iter()
        .find_map(|record| match record.event {
            Event::Restart { exit_codes, .. } => Some(exit_codes),
            _ => None,
        });
    assert!(codes.unwrap().contains(&75), "the node is suspect");
    // With room again it goes on from what was saved before.
    let run = lab.launch("full", 2).set(set).run().expect(0);
    assert_eq!(
        run.state_hashes(&lab, STEPS),
        calm.state_hashes(&lab, STEPS)
    );
    assert!(run.restores().iter().all(|step| *step == 2));
}

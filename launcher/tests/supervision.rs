//! Supervision with real processes. Workers are small shell scripts; they and the tests wait for
//! each other through files and events, never for a time.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use pollen_core::ExitCode;
use pollen_launcher::{
    Config, Job, Observer, Outcome, ProcessId, RunDir, RunRequest, StopHandle, StopSignal,
    Supervisor, WorkerCommand,
};
use pollen_observe::{Event, Record, read_events};

/// Far longer than anything here takes.
const LIMIT: Duration = Duration::from_mins(2);

/// Shell functions for workers: `event KIND FIELDS` appends a record, `wait_for FILE` waits.
const PRELUDE: &str = r#"
dir=$1
event() {
    printf '{"time":"2026-01-02T03:04:05.006Z","run":"r","generation":%s,"rank":%s,"event":"%s",%s}\n' \
        "$POLLEN_GENERATION" "$RANK" "$1" "$2" >>"$dir/events.jsonl"
}
ready() { event budget '"gpu_hours":0,"max_gpu_hours":null'; }
checkpoint() { event checkpoint '"step":1,"url":"u","bytes":1,"stall_s":0,"seconds":0'; }
wait_for() { until [ -e "$1" ]; do sleep 0.01; done; }
hang() { while :; do sleep 0.05; done; }
"#;

struct Bench {
    _root: tempfile::TempDir,
    run: RunDir,
    config: Config,
}

impl Bench {
    fn new(workers: u32) -> Self {
        let root = tempfile::tempdir().unwrap();
        let run = RunDir::find_or_create(&RunRequest {
            root: root.path(),
            recipe: "demo",
            identity: "a1b2c3d4",
            steps: 10,
            now: SystemTime::now(),
        })
        .unwrap();
        Self {
            _root: root,
            run,
            config: Config {
                workers: NonZeroU32::new(workers).unwrap(),
                grace: LIMIT,
                backoff: Duration::from_millis(1),
                ..Config::default()
            },
        }
    }

    fn dir(&self) -> PathBuf {
        self.run.path().to_path_buf()
    }

    fn run(&mut self, script: &str, reaction: Reaction) -> (Outcome, Watcher) {
        let mut supervisor = Supervisor::default();
        let mut watcher = Watcher {
            stop: supervisor.stop_handle(),
            reaction,
            ready: 0,
            records: Vec::new(),
            said: Vec::new(),
        };
        let lock = self.run.lock().unwrap();
        let command = WorkerCommand {
            // A shell cannot trap what it inherits as ignored, and a test run in the background
            // of a script inherits SIGINT so.
            program: "/usr/bin/env".into(),
            args: vec![
                "--default-signal=INT,TERM,HUP".into(),
                "/bin/sh".into(),
                "-c".into(),
                format!("{PRELUDE}{script}").into(),
                "worker".into(),
                self.run.path().into(),
            ],
            env: vec![("FROM_CALLER".into(), "yes".into())],
            env_remove: vec!["CARGO_MANIFEST_DIR".into()],
        };
        let job = Job {
            run: &mut self.run,
            lock: &lock,
            config: &self.config,
            command,
            steps: 10,
        };
        let outcome = supervisor.run(job, &mut watcher).unwrap();
        (outcome, watcher)
    }

    fn events(&self) -> Vec<Event> {
        let records = read_events(&self.run.events()).unwrap();
        records.into_iter().map(|record| record.event).collect()
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.dir().join(name)).unwrap()
    }
}

/// What the watcher does when all workers have said that they are ready.
#[derive(Clone, Copy)]
enum Reaction {
    Nothing,
    Stop(StopSignal),
    StopTwice(StopSignal),
    /// Stops in the pause before a restart.
    StopAtRestart(StopSignal),
}

struct Watcher {
    stop: StopHandle,
    reaction: Reaction,
    ready: usize,
    records: Vec<Record>,
    said: Vec<String>,
}

impl Observer for Watcher {
    fn records(&mut self, records: &[Record]) {
        for record in records {
            if let (Event::Restart { .. }, Reaction::StopAtRestart(signal)) =
                (&record.event, self.reaction)
            {
                self.stop.stop(signal);
            }
            if matches!(record.event, Event::Budget { .. }) {
                self.ready += 1;
                match self.reaction {
                    Reaction::Stop(signal) if self.ready == 2 => self.stop.stop(signal),
                    Reaction::StopTwice(signal) if self.ready == 2 => {
                        self.stop.stop(signal);
                        self.stop.stop(signal);
                    }
                    _ => {}
                }
            }
        }
        self.records.extend_from_slice(records);
    }

    fn say(&mut self, text: &str) {
        self.said.push(text.to_owned());
    }
}

fn wait_gone(pid: &str) {
    let pid = pid.trim().parse().unwrap();
    // No such process any more is what is hoped for.
    if let Some(process) = ProcessId::of(pid) {
        assert!(process.wait_gone(LIMIT), "process {pid} lives on");
    }
}

#[test]
fn workers_get_the_contract_and_a_finished_run_is_marked() {
    let mut bench = Bench::new(2);
    let script = r#"
        echo "$RANK/$WORLD_SIZE local $LOCAL_RANK/$LOCAL_WORLD_SIZE node $NODE_RANK g$POLLEN_GENERATION"
        echo "at $MASTER_ADDR:$MASTER_PORT caller $FROM_CALLER removed [$CARGO_MANIFEST_DIR]" >&2
        echo "launcher $POLLEN_LAUNCHER_PID"
        [ -n "$MASTER_PORT" ] && [ "$MASTER_PORT" != 0 ]
    "#;
    let (outcome, watcher) = bench.run(script, Reaction::Nothing);
    assert_eq!(outcome.exit, ExitCode::Done);
    assert_eq!((outcome.restarts, outcome.log), (0, None));
    let log = bench.read("logs/rank-1.g1.log");
    assert!(log.contains("1/2 local 1/2 node 0 g1"), "{log}");
    assert!(log.contains("at 127.0.0.1:"), "{log}");
    assert!(log.contains("caller yes removed []"), "{log}");
    assert!(
        log.contains(&format!("launcher {}", std::process::id())),
        "{log}"
    );
    let record = RunDir::open(&bench.dir()).unwrap().record().clone();
    assert!(record.finished);
    assert_eq!(record.final_step, Some(10));
    // The observer saw the end, written by the launcher itself.
    assert_eq!(watcher.records.last().unwrap().rank, None);
    assert_eq!(
        bench.events(),
        vec![Event::End {
            exit_code: 0,
            reason: "all workers reached the last step".into()
        }]
    );
}

#[test]
fn a_crash_ends_the_others_and_starts_the_next_generation() {
    let mut bench = Bench::new(2);
    let script = r#"
        [ "$POLLEN_GENERATION" = 2 ] && exit 0
        [ "$RANK" = 0 ] && { touch "$dir/rank0"; hang; }
        wait_for "$dir/rank0"
        kill -9 $$
    "#;
    let (outcome, watcher) = bench.run(script, Reaction::Nothing);
    assert_eq!(outcome.exit, ExitCode::Done);
    assert_eq!(outcome.restarts, 1);
    let Event::Restart {
        reason,
        exit_codes,
        pause_s,
    } = &bench.events()[0]
    else {
        panic!("{:?}", bench.events())
    };
    assert_eq!(
        reason,
        "rank 1 was killed by SIGKILL, as happens when memory runs out; starting again, 3 restarts left"
    );
    assert_eq!(exit_codes, &[143, 137]);
    assert!((0.0005..=0.001).contains(pause_s), "{pause_s}");
    assert_eq!(bench.run.record().generation, 2);
    assert!(
        watcher.said.iter().any(|text| text.contains("rank 1")),
        "{:?}",
        watcher.said
    );
    assert!(bench.dir().join("logs/rank-0.g2.log").is_file());
}

#[test]
fn a_stop_ends_the_pause_before_a_restart() {
    let mut bench = Bench::new(1);
    bench.config.backoff = LIMIT * 100;
    bench.config.max_backoff = LIMIT * 100;
    let stop = Reaction::StopAtRestart(StopSignal::Interrupt);
    let (outcome, _) = bench.run("kill -9 $$", stop);
    assert_eq!(outcome.exit, ExitCode::Interrupted);
    assert!(
        outcome.reason.contains("the last checkpoint stands"),
        "{outcome:?}"
    );
    assert_eq!(bench.run.record().generation, 1);
}

#[test]
fn the_restart_budget_ends_and_the_failing_log_is_shown() {
    let mut bench = Bench::new(2);
    bench.config.max_restarts = 1;
    let script = r#"
        [ "$RANK" = 0 ] && hang
        echo "boom in generation $POLLEN_GENERATION" >&2
        exit 75
    "#;
    let (outcome, _) = bench.run(script, Reaction::Nothing);
    assert_eq!(outcome.exit, ExitCode::RestartsExhausted);
    assert_eq!(outcome.restarts, 1);
    let log = outcome.log.unwrap();
    assert_eq!(log.rank, 1);
    assert_eq!(log.lines, ["boom in generation 2"]);
    assert!(!bench.run.record().finished);
}

#[test]
fn a_newer_checkpoint_renews_the_restart_budget() {
    let mut bench = Bench::new(1);
    bench.config.max_restarts = 1;
    // Three crashes with progress are forgiven, the next two without are not.
    let script = r#"[ "$POLLEN_GENERATION" -le 3 ] && checkpoint; exit 70"#;
    let (outcome, _) = bench.run(script, Reaction::Nothing);
    assert_eq!(outcome.exit, ExitCode::RestartsExhausted);
    assert_eq!(bench.run.record().generation, 4);
    assert_eq!(outcome.restarts, 3);
}

#[test]
fn do_not_requeue_stops_for_good() {
    let mut bench = Bench::new(2);
    bench.config.grace = Duration::from_millis(100);
    let script = r#"[ "$RANK" = 0 ] && hang; exit 93"#;
    let (outcome, _) = bench.run(script, Reaction::Nothing);
    assert_eq!(outcome.exit, ExitCode::DoNotRequeue);
    assert_eq!(bench.run.record().generation, 1);
    assert_eq!(outcome.log.unwrap().rank, 1);
}

#[test]
fn one_stop_reaches_each_worker_once_and_they_save() {
    for (stop, signal, code, exit) in [
        (StopSignal::Terminate, "TERM", "85", ExitCode::Preempted),
        (StopSignal::Interrupt, "INT", "130", ExitCode::Interrupted),
    ] {
        let mut bench = Bench::new(2);
        let script = format!(
            r#"
            trap 'echo got {signal}; touch "$dir/told-$RANK"' {signal}
            ready
            wait_for "$dir/told-$RANK"
            wait_for "$dir/told-0"; wait_for "$dir/told-1"
            exit {code}
            "#
        );
        let (outcome, _) = bench.run(&script, Reaction::Stop(stop));
        assert_eq!(outcome.exit, exit, "{}", outcome.reason);
        for rank in 0..2 {
            let log = bench.read(&format!("logs/rank-{rank}.g1.log"));
            // The shell itself may add a line about its `sleep`.
            assert_eq!(log.matches("got").count(), 1, "{log}");
            assert!(log.contains(&format!("got {signal}")), "{log}");
        }
        assert!(!bench.run.record().finished);
    }
}

#[test]
fn a_second_stop_kills_at_once() {
    let mut bench = Bench::new(2);
    let script = r"trap '' TERM; ready; hang";
    let (outcome, _) = bench.run(script, Reaction::StopTwice(StopSignal::Terminate));
    // Not 85: nothing was saved.
    assert_eq!(outcome.exit, ExitCode::Infrastructure);
    assert!(
        outcome.reason.contains("the last checkpoint stands"),
        "{}",
        outcome.reason
    );
}

#[test]
fn workers_that_ignore_a_stop_are_killed_after_the_grace() {
    let mut bench = Bench::new(2);
    bench.config.grace = Duration::from_millis(100);
    let script = r"trap '' INT TERM; ready; hang";
    let (outcome, watcher) = bench.run(script, Reaction::Stop(StopSignal::Interrupt));
    assert_eq!(outcome.exit, ExitCode::Interrupted);
    let told = watcher
        .said
        .iter()
        .any(|text| text.contains("did not end in time"));
    assert!(told, "{:?}", watcher.said);
}

#[test]
fn a_workers_own_children_end_with_it() {
    let mut bench = Bench::new(1);
    let script = r#"
        sh -c 'trap "" TERM HUP INT; while :; do sleep 0.05; done' &
        echo $! >"$dir/grandchild"
        exit 0
    "#;
    let (outcome, _) = bench.run(script, Reaction::Nothing);
    assert_eq!(outcome.exit, ExitCode::Done);
    wait_gone(&bench.read("grandchild"));
}

#[test]
fn an_observer_that_panics_leaves_no_worker_behind() {
    struct Panics;
    impl Observer for Panics {
        fn records(&mut self, _: &[Record]) {
            panic!("the observer fails");
        }
        fn say(&mut self, _: &str) {}
    }
    let mut bench = Bench::new(2);
    let dir = bench.dir();
    let script = r#"trap '' TERM; echo $$ >"$dir/pid-$RANK"; ready; hang"#;
    let lock = bench.run.lock().unwrap();
    let job = Job {
        run: &mut bench.run,
        lock: &lock,
        config: &bench.config,
        command: WorkerCommand {
            program: "/bin/sh".into(),
            args: vec![
                "-c".into(),
                format!("{PRELUDE}{script}").into(),
                "worker".into(),
                dir.clone().into(),
            ],
            ..WorkerCommand::default()
        },
        steps: 10,
    };
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        Supervisor::default().run(job, &mut Panics)
    }));
    assert!(result.is_err());
    let mut seen = 0;
    for rank in 0..2 {
        // The first event may come before the second worker has written its number.
        if let Ok(pid) = fs::read_to_string(dir.join(format!("pid-{rank}"))) {
            wait_gone(&pid);
            seen += 1;
        }
    }
    assert!(seen > 0);
}

#[test]
fn a_program_that_does_not_exist_is_named() {
    struct Quiet;
    impl Observer for Quiet {
        fn records(&mut self, _: &[Record]) {}
        fn say(&mut self, _: &str) {}
    }
    let mut bench = Bench::new(2);
    let lock = bench.run.lock().unwrap();
    let job = Job {
        run: &mut bench.run,
        lock: &lock,
        config: &bench.config,
        command: WorkerCommand {
            program: Path::new("/nonexistent/pollen").into(),
            ..WorkerCommand::default()
        },
        steps: 10,
    };
    let error = Supervisor::default().run(job, &mut Quiet).unwrap_err();
    assert!(
        error.to_string().contains("rank 0 (/nonexistent/pollen)"),
        "{error}"
    );
    assert_eq!(error.class(), pollen_core::ErrorClass::User);
}

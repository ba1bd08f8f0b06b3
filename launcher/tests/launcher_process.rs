//! The launcher as a process of its own: real signals to it, and a kill that it cannot see. The
//! test binary runs itself again as the launcher and as the worker.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use pollen_launcher::parent_death::LAUNCHER_PID;
use pollen_launcher::{
    Config, Job, Observer, ProcessId, RunDir, RunRequest, Supervisor, WorkerCommand,
    die_with_launcher,
};
use pollen_observe::Record;

const LIMIT: Duration = Duration::from_mins(2);
/// Set for the copies of this binary; its value is their folder.
const FOLDER: &str = "POLLEN_TEST_FOLDER";

fn myself(test: &str, folder: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", test, "--ignored", "--nocapture"])
        .env(FOLDER, folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

fn wait_for_file(path: &Path) -> String {
    let deadline = Instant::now() + LIMIT;
    loop {
        match fs::read_to_string(path) {
            Ok(text) if text.ends_with('\n') => return text.trim().to_owned(),
            _ => assert!(Instant::now() < deadline, "{} never came", path.display()),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Ends a copy if a test fails half-way.
struct Launcher(Child);

impl Drop for Launcher {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start_launcher(folder: &Path) -> (Launcher, ProcessId) {
    start(&mut myself("as_launcher", folder), folder)
}

fn start(launcher: &mut Command, folder: &Path) -> (Launcher, ProcessId) {
    let child = Launcher(launcher.spawn().unwrap());
    let worker: u32 = wait_for_file(&folder.join("worker-pid")).parse().unwrap();
    (child, ProcessId::of(worker).unwrap())
}

#[test]
fn a_worker_dies_when_its_launcher_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let (mut launcher, worker) = start_launcher(folder.path());
    assert!(worker.is_alive());
    launcher.0.kill().unwrap();
    assert!(worker.wait_gone(LIMIT), "the worker outlived its launcher");
}

#[test]
fn a_real_sigterm_is_passed_on_and_its_meaning_returned() {
    let folder = tempfile::tempdir().unwrap();
    let (mut launcher, worker) = start_launcher(folder.path());
    let pid = launcher.0.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .unwrap()
            .success()
    );
    // The worker does not save, so this is not 85.
    assert_eq!(launcher.0.wait().unwrap().code(), Some(75));
    assert!(!worker.is_alive());
    let events = fs::read_to_string(run_dir(folder.path()).events()).unwrap();
    assert!(
        events.contains("rank 0 was killed by SIGTERM before it had saved"),
        "{events}"
    );
}

#[test]
fn under_nohup_the_end_of_the_terminal_is_still_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let launcher = myself("as_launcher", folder.path());
    let mut under_nohup = Command::new("/usr/bin/env");
    under_nohup
        .arg("--ignore-signal=HUP")
        .arg(launcher.get_program())
        .args(launcher.get_args())
        .env(FOLDER, folder.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let (launcher, _) = start(&mut under_nohup, folder.path());
    let status = fs::read_to_string(format!("/proc/{}/status", launcher.0.id())).unwrap();
    let mask = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
    };
    assert_eq!(mask("SigIgn:") & 1, 1, "{status}");
    assert_eq!(mask("SigCgt:") & 1, 0, "{status}");
    assert_ne!(mask("SigCgt:") & 1 << 14, 0, "SIGTERM is handled: {status}");
}

#[test]
fn a_worker_whose_launcher_is_gone_refuses_to_start() {
    let folder = tempfile::tempdir().unwrap();
    let output = myself("as_worker", folder.path())
        .env(LAUNCHER_PID, "1")
        .output()
        .unwrap();
    let said = fs::read_to_string(folder.path().join("refused")).unwrap();
    assert!(
        said.contains("process 1) is not the parent"),
        "{said} {output:?}"
    );
    assert!(!folder.path().join("worker-pid").exists());
}

fn run_dir(folder: &Path) -> RunDir {
    RunDir::find_or_create(&RunRequest {
        root: &folder.join("runs"),
        recipe: "demo",
        identity: "a1b2c3d4",
        steps: 10,
        now: SystemTime::now(),
    })
    .unwrap()
}

fn folder() -> Option<PathBuf> {
    std::env::var_os(FOLDER).map(PathBuf::from)
}

#[test]
#[ignore = "a helper process of the other tests"]
fn as_launcher() {
    struct Quiet;
    impl Observer for Quiet {
        fn records(&mut self, _: &[Record]) {}
        fn say(&mut self, _: &str) {}
    }
    let Some(folder) = folder() else { return };
    let mut run = run_dir(&folder);
    let lock = run.lock().unwrap();
    let config = Config::default();
    let job = Job {
        run: &mut run,
        lock: &lock,
        config: &config,
        command: WorkerCommand {
            program: std::env::current_exe().unwrap(),
            args: ["--exact", "as_worker", "--ignored"]
                .map(Into::into)
                .to_vec(),
            ..WorkerCommand::default()
        },
        steps: 10,
    };
    let outcome = Supervisor::default()
        .run_with_signals(job, &mut Quiet)
        .unwrap();
    std::process::exit(i32::from(outcome.exit.code()));
}

#[test]
#[ignore = "a helper process of the other tests"]
fn as_worker() {
    let Some(folder) = folder() else { return };
    if let Err(error) = die_with_launcher(|name| std::env::var(name).ok()) {
        fs::write(folder.join("refused"), error.to_string()).unwrap();
        return;
    }
    fs::write(
        folder.join("worker-pid"),
        format!("{}\n", std::process::id()),
    )
    .unwrap();
    loop {
        std::thread::park();
    }
}

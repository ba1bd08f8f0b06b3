//! A place to run the real command in: a folder of its own, a store, faults, and what came out.

#![allow(unreachable_pub, reason = "shared by test binaries")]
#![allow(
    dead_code,
    unused_imports,
    reason = "each test binary uses a part of this"
)]
#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    clippy::format_push_string,
    clippy::must_use_candidate,
    clippy::return_self_not_must_use,
    missing_debug_implementations,
    missing_docs,
    reason = "tests"
)]

mod process;
mod store;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use pollen_launcher::{ObjectServer, find_weed};
use pollen_observe::{Event, Record, read_events};
use tempfile::TempDir;

pub use process::{is_alive, processes_of, signal, wait_for, wait_for_mark};
pub use store::{fetch, list, open, open_checkpoint};

/// Longest wait for anything: about ten times what it takes.
pub const PATIENCE: Duration = Duration::from_mins(5);

/// A model below 100k parameters and a run of a few steps; dropout stays on.
const TINY: &[&str] = &[
    "model.vision.dims=[8, 16]",
    "model.vision.heads=[1, 2]",
    "model.vision.groups=[1, 2]",
    "model.vision.depths=[1, 1]",
    "model.vision.window=4",
    "model.vision.image_size=32",
    "model.language.width=16",
    "model.language.layers=1",
    "model.language.heads=2",
    "model.language.ffn=32",
    "model.flow.width=32",
    "model.flow.heads=2",
    "model.flow.layers=1",
    "model.flow.modulation_rank=4",
    "model.flow.action_horizon=4",
    "model.flow.rope_table_len=8",
    "data.image_size=32",
    "data.window_bytes=1 MiB",
    "data.cache_bytes=1 MiB",
    "train.global_batch=8",
    "train.micro_batch=2",
    "train.steps=8",
    "checkpoint.every_steps=2",
    "eval.frame_stride=40",
    // Tests hold workers for as long as they need; the test of hangs sets its own limits.
    "watchdog.min_timeout=10m",
    "watchdog.max_timeout=10m",
    "launch.backoff=10ms",
    "launch.max_backoff=10ms",
    "model.token_dropout=0.1",
    "model.vision.stochastic_depth=0.1",
    "model.language.dropout=0.1",
    "model.flow.dropout_attention=0.1",
    "model.flow.dropout_residual=0.1",
    "model.flow.dropout_mlp=0.1",
];

/// Every dropout switched off: for comparisons between numbers of workers.
pub const NO_DROPOUT: &[&str] = &[
    "model.token_dropout=0.0",
    "model.vision.stochastic_depth=0.0",
    "model.language.dropout=0.0",
    "model.flow.dropout_attention=0.0",
    "model.flow.dropout_residual=0.0",
    "model.flow.dropout_mlp=0.0",
];

/// Where runs and their data live.
pub struct Lab {
    dir: TempDir,
    server: Option<ObjectServer>,
}

impl Lab {
    /// Data and checkpoints in a folder.
    pub fn folder() -> Self {
        Self {
            dir: TempDir::new().unwrap(),
            server: None,
        }
    }

    /// Data and checkpoints in a real S3 server.
    pub fn s3() -> Self {
        let dir = TempDir::new().unwrap();
        let weed = find_weed(|name| std::env::var(name).ok(), &root()).unwrap();
        let server = ObjectServer::start(&weed, &dir.path().join("store"), "pollen-test").unwrap();
        Self {
            dir,
            server: Some(server),
        }
    }

    pub fn server(&self) -> &ObjectServer {
        self.server.as_ref().expect("Lab::s3")
    }

    /// Returns a path inside the lab's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The URL below which runs and data lie.
    pub fn base_url(&self) -> String {
        match &self.server {
            Some(_) => "s3://pollen-test".into(),
            None => format!("file://{}", self.path("bucket").display()),
        }
    }

    /// Prepares `pollen launch demo` with a tiny model and this lab's store; runs of different
    /// `name`s share the data and nothing else.
    pub fn launch(&self, name: &str, workers: u32) -> Launch {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pollen"));
        command.current_dir(root()).args(["launch", "demo"]);
        command
            .arg("--runs")
            .arg(self.path(&format!("runs-{name}")));
        let base = self.base_url();
        let mut sets: Vec<String> = TINY.iter().map(|set| (*set).to_owned()).collect();
        sets.push(format!("data.root={base}/datasets"));
        sets.push(format!("run.url={base}/runs-{name}"));
        sets.push(format!("launch.workers={workers}"));
        sets.push("launch.object_server=none".into());
        sets.push("observe.sinks=[\"events\"]".into());
        if let Some(server) = &self.server {
            command.envs(server.variables());
        }
        command.env("RAYON_NUM_THREADS", "1");
        Launch {
            command,
            sets,
            runs: self.path(&format!("runs-{name}/demo")),
        }
    }
}

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// A command line in the making.
pub struct Launch {
    command: Command,
    sets: Vec<String>,
    runs: PathBuf,
}

impl Launch {
    /// Overrides recipe keys.
    pub fn set(mut self, sets: &[&str]) -> Self {
        self.sets.extend(sets.iter().map(|set| (*set).to_owned()));
        self
    }

    /// Injects faults: see `trainer/src/faults.rs`.
    pub fn fault(mut self, fault: &str) -> Self {
        self.command.env("POLLEN_FAULT", fault);
        self
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: &str) -> Self {
        self.command.arg(arg);
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Limits the size of the files that the command and its workers write, in KiB.
    pub fn file_limit(mut self, kib: u32) -> Self {
        let pollen = std::mem::replace(&mut self.command, Command::new("bash"));
        let script = format!("ulimit -f {kib} && exec \"$@\"");
        self.command.args(["-c", &script, "limited"]);
        self.command
            .arg(pollen.get_program())
            .args(pollen.get_args());
        self.command.current_dir(root());
        let variables = pollen.get_envs();
        self.command
            .envs(variables.filter_map(|(name, value)| Some((name, value?))));
        self
    }

    /// Starts the command and returns at once.
    pub fn spawn(mut self) -> Running {
        for set in &self.sets {
            self.command.args(["--set", set]);
        }
        self.command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Running {
            child: Some(self.command.spawn().unwrap()),
            runs: self.runs,
        }
    }

    /// Runs the command to its end.
    pub fn run(self) -> Finished {
        self.spawn().wait()
    }
}

/// What another command printed.
#[derive(Debug)]
pub struct Printed {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// Runs `pollen` with these arguments.
pub fn pollen(args: &[&str]) -> Printed {
    let output = Command::new(env!("CARGO_BIN_EXE_pollen"))
        .current_dir(root())
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    Printed {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A launcher at work.
pub struct Running {
    child: Option<Child>,
    runs: PathBuf,
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Sends a signal to the launcher alone.
    pub fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// Waits for the launcher's end.
    pub fn wait(mut self) -> Finished {
        let Output {
            status,
            stdout,
            stderr,
        } = self.child.take().unwrap().wait_with_output().unwrap();
        Finished {
            status,
            stdout: String::from_utf8(stdout).unwrap(),
            stderr: String::from_utf8(stderr).unwrap(),
            runs: self.runs.clone(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What a launcher left.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
    runs: PathBuf,
}

impl Finished {
    /// Asserts the exit code and returns itself.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        if self.status.code() != Some(code) {
            let logs = self.logs();
            panic!(
                "exit {:?}, not {code}\n--- stdout\n{}\n--- stderr\n{}\n--- logs\n{logs}",
                self.status, self.stdout, self.stderr
            );
        }
        self
    }

    fn logs(&self) -> String {
        let Ok(entries) = std::fs::read_dir(self.run_dir().join("logs")) else {
            return String::new();
        };
        let mut text = String::new();
        for entry in entries.flatten() {
            let log = std::fs::read_to_string(entry.path()).unwrap_or_default();
            text.push_str(&format!("{}:\n{log}\n", entry.path().display()));
        }
        text
    }

    /// The folder of the only run.
    pub fn run_dir(&self) -> PathBuf {
        run_dir(&self.runs)
    }

    pub fn run_id(&self) -> String {
        self.run_dir()
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned()
    }

    pub fn events(&self) -> Vec<Record> {
        read_events(&self.run_dir().join("events.jsonl")).unwrap()
    }

    /// The resolved recipe as the trainer sees it.
    pub fn config(&self) -> pollen_trainer::RunConfig {
        let text = std::fs::read_to_string(self.run_dir().join("config.toml")).unwrap();
        let mut table: toml::Table = text.parse().unwrap();
        for section in ["launch", "run"] {
            table.remove(section);
        }
        table.try_into().unwrap()
    }

    /// Steps of the `restore` events.
    pub fn restores(&self) -> Vec<u64> {
        let events = self.events().into_iter();
        events
            .filter_map(|record| match record.event {
                Event::Restore { step, .. } => Some(step),
                _ => None,
            })
            .collect()
    }

    /// What the last evaluation found, by action space.
    #[track_caller]
    pub fn evaluation(&self) -> serde_json::Value {
        let events = self.events();
        let spaces = events.iter().rev().find_map(|record| match &record.event {
            Event::Eval { spaces, .. } => Some(serde_json::to_value(spaces).unwrap()),
            _ => None,
        });
        spaces.expect("a complete run ends with an evaluation")
    }

    /// Loss by step; a step done twice must have the same loss.
    #[track_caller]
    pub fn losses(&self) -> BTreeMap<u64, f64> {
        let mut losses = BTreeMap::new();
        for record in self.events() {
            if let Event::Step(step) = record.event
                && let Some(before) = losses.insert(step.step, step.loss)
            {
                assert_eq!(
                    before, step.loss,
                    "step {} was not repeated to the bit",
                    step.step
                );
            }
        }
        losses
    }

    /// SHA-256 of every weight and optimizer file of the checkpoint of `step`.
    pub fn state_hashes(&self, lab: &Lab, step: u64) -> BTreeMap<String, String> {
        let manifest = self.manifest(lab, step);
        let files = manifest["files"].as_array().unwrap();
        let hashes: BTreeMap<String, String> = files
            .iter()
            .map(|file| {
                let text = |key: &str| file[key].as_str().unwrap().to_owned();
                (text("name"), text("sha256"))
            })
            .filter(|(name, _)| name.ends_with(".safetensors"))
            .collect();
        assert!(hashes.len() >= 2, "weights and moments: {hashes:?}");
        hashes
    }

    /// The newest MANIFEST of `step`.
    pub fn manifest(&self, lab: &Lab, step: u64) -> serde_json::Value {
        let url = self.checkpoint_url(step);
        serde_json::from_slice(&fetch(lab, &format!("{url}/MANIFEST.json"))).unwrap()
    }

    /// Where the newest checkpoint of `step` lies.
    pub fn checkpoint_url(&self, step: u64) -> String {
        let events = self.events();
        let url = events.iter().rev().find_map(|record| match &record.event {
            Event::Checkpoint {
                step: saved, url, ..
            } if *saved == step => Some(url.clone()),
            _ => None,
        });
        url.unwrap_or_else(|| panic!("no checkpoint of step {step}"))
    }

    /// Sample ids by step, as gathered from the real loaders.
    pub fn audits(&self) -> BTreeMap<u64, Vec<u64>> {
        let audits = self.events().into_iter();
        audits
            .filter_map(|record| match record.event {
                Event::SampleAudit { step, samples } => Some((step, samples)),
                _ => None,
            })
            .collect()
    }
}

/// Steps of the `checkpoint` events so far, in the order of publishing.
pub fn saved_steps(run_dir: &Path) -> Vec<u64> {
    let events = read_events(&run_dir.join("events.jsonl")).unwrap();
    let saved = events.into_iter().filter_map(|record| match record.event {
        Event::Checkpoint { step, .. } => Some(step),
        _ => None,
    });
    saved.collect()
}

/// The only run below a recipe's folder.
pub fn run_dir(runs: &Path) -> PathBuf {
    let dirs: Vec<PathBuf> = std::fs::read_dir(runs)
        .unwrap_or_else(|e| panic!("{}: {e}", runs.display()))
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.join("run.json").exists())
        .collect();
    assert_eq!(dirs.len(), 1, "one run, not {dirs:?}");
    dirs.into_iter().next().unwrap()
}

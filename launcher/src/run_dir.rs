//! `runs/<recipe>/<run-id>/`: one folder per run, found again by the same command.
//!
//! ```text
//! runs/demo/20260102-030405-a1b2c3d4/
//!   run.json        id, identity hash, generation counter, whether and where it finished
//!   config.toml     the resolved recipe
//!   events.jsonl    the truth of the run
//!   lock            held by the launcher that works on it
//!   meeting.json    where the latest generation's workers meet
//!   logs/rank-0.g1.log
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::atomic_file;
use crate::error::Error;
use crate::lock::{self, RunLock};

/// What `run.json` holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// Format of this file.
    pub version: u32,
    /// Start time and the beginning of the identity hash.
    pub id: String,
    /// The recipe's name.
    pub recipe: String,
    /// Hash of the resolved recipe without what may change while the run goes on: steps, budget,
    /// engine.
    pub identity: String,
    /// When the run was created, RFC 3339.
    pub created: String,
    /// The latest generation handed out; 0 before the first start.
    pub generation: u64,
    /// Whether the run reached its last step.
    pub finished: bool,
    /// The step it finished at.
    pub final_step: Option<u64>,
}

/// Where the workers of the latest generation meet, for those who look at a run from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meeting {
    /// `host:port` of the store.
    pub store: String,
    /// The generation.
    pub generation: u64,
    /// Number of workers.
    pub workers: u32,
}

/// Which run to look for.
#[derive(Clone, Copy, Debug)]
pub struct RunRequest<'a> {
    /// Folder of all runs.
    pub root: &'a Path,
    /// The recipe's name: one folder level.
    pub recipe: &'a str,
    /// Hash that a run must have to be gone on with.
    pub identity: &'a str,
    /// Steps wanted now: a run that finished earlier is unfinished again.
    pub steps: u64,
    /// Time of day.
    pub now: SystemTime,
}

/// A run's folder.
#[derive(Clone, Debug)]
pub struct RunDir {
    path: PathBuf,
    record: RunRecord,
    is_new: bool,
}

impl RunDir {
    /// Returns the newest unfinished run with the wanted identity, or a new one.
    pub fn find_or_create(request: &RunRequest<'_>) -> Result<Self, Error> {
        let folder = request.root.join(request.recipe);
        fs::create_dir_all(&folder).map_err(Error::file("create", &folder))?;
        // Two launchers that start at once must not make two runs of the same command.
        let _search = lock::wait_for(&folder.join(".search.lock"))?;
        let newest = Self::list(request.root, request.recipe)?
            .into_iter()
            .rfind(|run| run.goes_on(request));
        match newest {
            Some(run) => Ok(run),
            None => Self::create(&folder, request),
        }
    }

    /// Returns all runs of a recipe, oldest first.
    pub fn list(root: &Path, recipe: &str) -> Result<Vec<Self>, Error> {
        let folder = root.join(recipe);
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::file("list", &folder)(error)),
        };
        let mut runs = Vec::new();
        for entry in entries {
            let path = entry.map_err(Error::file("list", &folder))?.path();
            // A folder without run.json is not ours, or was never finished being made.
            if path.join("run.json").is_file() {
                runs.push(Self::open(&path)?);
            }
        }
        runs.sort_by(|a, b| a.record.id.cmp(&b.record.id));
        Ok(runs)
    }

    /// Opens the folder of one run.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Ok(Self {
            record: read_record(path)?,
            path: path.to_path_buf(),
            is_new: false,
        })
    }

    fn create(folder: &Path, request: &RunRequest<'_>) -> Result<Self, Error> {
        let created = humantime::format_rfc3339_seconds(request.now).to_string();
        let stamp: String = created.chars().filter(char::is_ascii_digit).collect();
        let hash: String = request.identity.chars().take(8).collect();
        let base = format!("{}-{}-{hash}", &stamp[..8], &stamp[8..14]);
        let mut id = base.clone();
        let mut number = 1;
        let path = loop {
            let path = folder.join(&id);
            match fs::create_dir(&path) {
                Ok(()) => break path,
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    number += 1;
                    id = format!("{base}-{number}");
                }
                Err(error) => return Err(Error::file("create", &path)(error)),
            }
        };
        let logs = path.join("logs");
        fs::create_dir(&logs).map_err(Error::file("create", &logs))?;
        let run = Self {
            record: RunRecord {
                version: 1,
                id,
                recipe: request.recipe.to_owned(),
                identity: request.identity.to_owned(),
                created,
                generation: 0,
                finished: false,
                final_step: None,
            },
            path,
            is_new: true,
        };
        run.save()?;
        Ok(run)
    }

    fn goes_on(&self, request: &RunRequest<'_>) -> bool {
        let record = &self.record;
        let more = record.final_step.is_some_and(|step| step < request.steps);
        record.identity == request.identity && (!record.finished || more)
    }

    /// Returns the run's id.
    pub fn id(&self) -> &str {
        &self.record.id
    }

    /// Returns what `run.json` holds.
    pub fn record(&self) -> &RunRecord {
        &self.record
    }

    /// Returns whether this call created the run.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// Returns the run's folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path of the event file.
    pub fn events(&self) -> PathBuf {
        self.path.join("events.jsonl")
    }

    /// Returns the path of the resolved recipe.
    pub fn config(&self) -> PathBuf {
        self.path.join("config.toml")
    }

    /// Returns the path of one worker's log.
    pub fn log(&self, rank: u32, generation: u64) -> PathBuf {
        self.path
            .join(format!("logs/rank-{rank}.g{generation}.log"))
    }

    /// Writes the resolved recipe into the run's folder.
    pub fn write_config(&self, text: &str) -> Result<(), Error> {
        atomic_file::replace(&self.config(), text.as_bytes(), 0o644)
    }

    /// Writes down where the workers meet.
    pub(crate) fn write_meeting(&self, meeting: &Meeting) -> Result<(), Error> {
        let text = serde_json::to_vec(meeting).expect("strings and numbers have a JSON form");
        atomic_file::replace(&self.path.join("meeting.json"), &text, 0o644)
    }

    /// Returns where the workers of the latest generation meet; none before the first start.
    pub fn meeting(&self) -> Option<Meeting> {
        let text = fs::read(self.path.join("meeting.json")).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Returns the launcher that works on this run, if one does.
    pub fn holder(&self) -> Option<lock::Holder> {
        lock::Holder::of(&self.path.join("lock"))
    }

    /// Returns the runs of all recipes, oldest first.
    pub fn list_all(root: &Path) -> Result<Vec<Self>, Error> {
        let mut runs = Vec::new();
        let entries = match fs::read_dir(root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(runs),
            Err(error) => return Err(Error::file("list", root)(error)),
        };
        for entry in entries {
            let name = entry.map_err(Error::file("list", root))?.file_name();
            let Some(recipe) = name.to_str().filter(|name| !name.starts_with('.')) else {
                continue;
            };
            if root.join(recipe).is_dir() {
                runs.extend(Self::list(root, recipe)?);
            }
        }
        runs.sort_by(|a, b| a.record.id.cmp(&b.record.id));
        Ok(runs)
    }

    /// Returns the run that `name` means: a folder, a run's id or the beginning of it, or a recipe,
    /// of which the newest run is taken.
    pub fn find(root: &Path, name: &str) -> Result<Self, Error> {
        if Path::new(name).join("run.json").is_file() {
            return Self::open(Path::new(name));
        }
        let runs = Self::list_all(root)?;
        let mut fitting: Vec<&Self> = runs.iter().filter(|r| r.id().starts_with(name)).collect();
        if let Some(exact) = fitting.iter().find(|run| run.id() == name) {
            fitting = vec![exact];
        }
        if fitting.is_empty() {
            fitting = runs.iter().filter(|r| r.record.recipe == name).collect();
            fitting = fitting.pop().into_iter().collect();
        }
        match fitting[..] {
            [run] => Ok(run.clone()),
            [] => Err(Error::NoRun {
                name: name.to_owned(),
                root: root.to_path_buf(),
                known: runs
                    .iter()
                    .rev()
                    .take(5)
                    .map(|r| r.id().to_owned())
                    .collect(),
            }),
            _ => Err(Error::ManyRuns {
                name: name.to_owned(),
                fitting: fitting.iter().map(|run| run.id().to_owned()).collect(),
            }),
        }
    }

    /// Takes the run's lock and reads `run.json` again, as the last holder left it.
    pub fn lock(&mut self) -> Result<RunLock, Error> {
        let lock = RunLock::take(&self.path.join("lock"), &self.record.id)?;
        self.record = read_record(&self.path)?;
        Ok(lock)
    }

    /// Hands out the next generation; it is on disk before anybody can use it.
    pub fn next_generation(&mut self, _lock: &RunLock) -> Result<u64, Error> {
        self.record.generation += 1;
        self.record.finished = false;
        self.record.final_step = None;
        self.save()?;
        Ok(self.record.generation)
    }

    /// Notes that the run reached its last step.
    pub fn finish(&mut self, final_step: u64, _lock: &RunLock) -> Result<(), Error> {
        self.record.finished = true;
        self.record.final_step = Some(final_step);
        self.save()
    }

    fn save(&self) -> Result<(), Error> {
        let path = self.path.join("run.json");
        let mut text = serde_json::to_string_pretty(&self.record)
            .expect("strings, numbers and booleans have a JSON form");
        text.push('\n');
        atomic_file::replace(&path, text.as_bytes(), 0o644)
    }
}

fn read_record(folder: &Path) -> Result<RunRecord, Error> {
    let path = folder.join("run.json");
    let text = fs::read_to_string(&path).map_err(Error::file("read", &path))?;
    serde_json::from_str(&text).map_err(|source| Error::Damaged { path, source })
}

#[cfg(test)]
#[path = "run_dir_tests.rs"]
mod tests;

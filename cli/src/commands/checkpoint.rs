//! `pollen checkpoint`: what a run has saved, whether it is whole, how two of them differ.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use pollen_checkpoints::{
    Change, CheckpointId, Checkpoints, Error, Restored, State, TensorDiff, Verify, diff,
};
use pollen_core::ExitCode;
use pollen_launcher::{ObjectServer, RunDir};
use pollen_observe::units;
use pollen_storage::{Silent, Storage, StorageConfig};
use tokio::runtime::Runtime;

use super::launch::{object_server, run_url};
use crate::args::CheckpointCommand;
use crate::recipe::Recipe;

pub(crate) fn run(command: &CheckpointCommand) -> Result<ExitCode> {
    match command {
        CheckpointCommand::Ls { place, json } => list(&Place::open(place)?, *json),
        CheckpointCommand::Verify { place } => verify(&Place::open(place)?),
        CheckpointCommand::Diff {
            first,
            second,
            json,
        } => compare(&Place::open(first)?, &Place::open(second)?, *json),
        CheckpointCommand::Rm { place } => remove(&Place::open(place)?),
    }
}

/// A run's checkpoints, and one of them if the command line names one.
struct Place {
    checkpoints: Checkpoints,
    one: Option<CheckpointId>,
    _runtime: Runtime,
    _server: Option<ObjectServer>,
}

impl Place {
    fn open(text: &str) -> Result<Self> {
        let (base, one) = split(text);
        let runtime = Runtime::new().context("cannot start the I/O threads")?;
        let mut config = StorageConfig {
            retry_for: Duration::from_secs(20),
            ..StorageConfig::default()
        };
        let mut variables: std::collections::HashMap<String, String> = std::env::vars().collect();
        let folder = Path::new(base);
        let mut server = None;
        let mut url = base.to_owned();
        if folder.join("run.json").is_file() {
            let run = RunDir::open(folder)?;
            let recipe = Recipe::load_resolved(&run.config())?;
            let runs = folder.canonicalize()?;
            let runs = runs.ancestors().nth(2).unwrap_or(Path::new("/"));
            url = run_url(&recipe, runs, run.id())?;
            config.max_concurrent_requests = recipe.config.storage.max_concurrent_requests;
            server = object_server(&recipe, runs)?;
            variables.extend(server.iter().flat_map(ObjectServer::variables));
        }
        if url.rsplit('/').next() != Some("checkpoints") {
            url += "/checkpoints";
        }
        let storage = Storage::open_with(&url, &config, Arc::new(Silent), &variables)?;
        Ok(Self {
            checkpoints: Checkpoints::new(storage, runtime.handle().clone()),
            one,
            _runtime: runtime,
            _server: server,
        })
    }

    /// Returns the checkpoint that is named, or the newest that can be used.
    fn pick(&self) -> Result<Restored> {
        let Some(id) = self.one else {
            let newest = self.checkpoints.newest_by(Verify::Sizes)?;
            return newest.with_context(|| format!("{} is empty", self.checkpoints.url()));
        };
        match self.checkpoints.open(id)? {
            Ok(restored) => Ok(restored),
            Err(reason) => Err(self.damaged(id, reason)),
        }
    }

    fn damaged(&self, id: CheckpointId, reason: String) -> anyhow::Error {
        let url = format!("{}/{id}", self.checkpoints.url());
        Error::Corrupt { url, reason }.into()
    }
}

/// Splits `.../step-00000600/g1` from what comes before it.
fn split(text: &str) -> (&str, Option<CheckpointId>) {
    let text = text.trim_end_matches('/');
    let cut = text.rmatch_indices('/').nth(1).map(|(at, _)| at);
    let parts = cut.and_then(|at| Some((&text[..at], text[at + 1..].parse().ok()?)));
    match parts {
        Some((base, id)) => (base, Some(id)),
        None => (text, None),
    }
}

fn list(place: &Place, json: bool) -> Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    let now = SystemTime::now();
    if !json {
        writeln!(out, "step\tgeneration\tstate\tsize\tage")?;
    }
    for one in place.checkpoints.list()? {
        let CheckpointId { step, generation } = one.id;
        let age = one
            .modified
            .and_then(|modified| now.duration_since(modified).ok())
            .map(|age| age.as_secs_f64());
        if json {
            let line = serde_json::json!({
                "step": step,
                "generation": generation,
                "state": one.state,
                "bytes": one.bytes,
                "files": one.files,
                "age_s": age,
                "url": format!("{}/{}", place.checkpoints.url(), one.id),
            });
            writeln!(out, "{line}")?;
        } else {
            let age = age.map_or_else(|| "-".into(), units::seconds);
            let (state, size) = (one.state, units::bytes(one.bytes));
            writeln!(out, "{step}\t{generation}\t{state}\t{size}\t{age}")?;
        }
    }
    Ok(ExitCode::Done)
}

fn verify(place: &Place) -> Result<ExitCode> {
    let committed = |state| matches!(state, State::Published | State::Damaged);
    let ids: Vec<CheckpointId> = if let Some(id) = place.one {
        vec![id]
    } else {
        let listed = place.checkpoints.list()?.into_iter();
        let committed = listed.filter(|one| committed(one.state));
        committed.map(|one| one.id).collect()
    };
    let mut out = std::io::stdout().lock();
    let mut exit = ExitCode::Done;
    for id in ids {
        match place.checkpoints.verify(id)? {
            Ok(restored) => writeln!(
                out,
                "{id}: whole, {} files, {}",
                restored.manifest.files.len(),
                units::bytes(restored.manifest.bytes())
            )?,
            Err(reason) => {
                writeln!(out, "{id}: damaged: {reason}")?;
                exit = ExitCode::DoNotRequeue;
            }
        }
    }
    Ok(exit)
}

fn compare(first: &Place, second: &Place, json: bool) -> Result<ExitCode> {
    let (a, b) = (first.pick()?, second.pick()?);
    let diffs = diff((&first.checkpoints, &a), (&second.checkpoints, &b))?;
    let mut out = std::io::stdout().lock();
    if json {
        for one in &diffs {
            writeln!(out, "{}", to_json(one))?;
        }
        return Ok(ExitCode::Done);
    }
    let sides = [(first, &a), (second, &b)];
    for (side, (place, restored)) in ["first", "second"].into_iter().zip(sides) {
        let head = &restored.manifest.head;
        writeln!(
            out,
            "{side}: {}/{}, {} updates, written by {}",
            place.checkpoints.url(),
            restored.dir,
            units::count(head.updates),
            units::counted(u64::from(head.world_size), "rank", "ranks")
        )?;
    }
    let mut same = 0;
    for TensorDiff { name, change } in &diffs {
        match change {
            Change::None => same += 1,
            Change::OnlyFirst => writeln!(out, "{name}: only in the first")?,
            Change::OnlySecond => writeln!(out, "{name}: only in the second")?,
            Change::Form(a, b) => writeln!(out, "{name}: {a} and {b}")?,
            Change::Values {
                changed,
                elements,
                max_abs,
                relative_l2,
            } => writeln!(
                out,
                "{name}: {changed} of {elements} values differ, at most by {max_abs:.3e}, \
                 relative L2 {relative_l2:.3e}"
            )?,
        }
    }
    writeln!(out, "{same} of {} tensors have the same bits", diffs.len())?;
    Ok(ExitCode::Done)
}

fn to_json(one: &TensorDiff) -> serde_json::Value {
    let mut line = serde_json::json!({ "tensor": one.name });
    match &one.change {
        Change::None => line["change"] = "none".into(),
        Change::OnlyFirst => line["change"] = "only_first".into(),
        Change::OnlySecond => line["change"] = "only_second".into(),
        Change::Form(a, b) => {
            line["change"] = "form".into();
            line["forms"] = serde_json::json!([a, b]);
        }
        Change::Values {
            changed,
            elements,
            max_abs,
            relative_l2,
        } => {
            line["change"] = "values".into();
            line["changed"] = (*changed).into();
            line["elements"] = (*elements).into();
            line["max_abs"] = (*max_abs).into();
            line["relative_l2"] = (*relative_l2).into();
        }
    }
    line
}

fn remove(place: &Place) -> Result<ExitCode> {
    let Some(id) = place.one else {
        bail!(pollen_core::ConfigError::Invalid {
            origin: "pollen checkpoint rm".into(),
            faults: vec![
                "name one checkpoint: end the URL with its folder, for example \
                 /step-00000600/g1; `pollen checkpoint ls` lists them"
                    .into()
            ],
        });
    };
    place.checkpoints.remove(id)?;
    writeln!(std::io::stdout().lock(), "deleted {id}")?;
    Ok(ExitCode::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_checkpoint_is_told_from_a_run() {
        let id = CheckpointId {
            step: 600,
            generation: 1,
        };
        let run = "s3://b/runs/demo/x/checkpoints";
        assert_eq!(split(&format!("{run}/")), (run, None));
        assert_eq!(split(&format!("{run}/step-00000600/g1/")), (run, Some(id)));
        assert_eq!(split("runs/demo/x"), ("runs/demo/x", None));
        assert_eq!(split("step-00000600"), ("step-00000600", None));
    }
}

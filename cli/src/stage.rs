//! Copies local datasets into the store before a run, where files are missing there.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use pollen_storage::Storage;

/// Copies every file below `from` that `to` does not hold with the same size; returns how many.
pub(crate) async fn stage(from: &Path, to: &Storage) -> Result<usize> {
    let files = files_below(from)
        .with_context(|| format!("cannot list run.stage_from = {}", from.display()))?;
    let present: std::collections::HashMap<String, u64> = to
        .list("")
        .await?
        .into_iter()
        .map(|object| (object.path, object.size))
        .collect();
    let missing: Vec<(String, PathBuf)> = files
        .into_iter()
        .filter(|(name, path)| {
            let size = path.metadata().map(|meta| meta.len()).ok();
            size.is_none() || present.get(name).copied() != size
        })
        .collect();
    let bar = ProgressBar::new(missing.len() as u64).with_message("uploading datasets");
    if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} files") {
        bar.set_style(style);
    }
    let count = missing.len();
    for (name, path) in missing {
        let bytes = std::fs::read(&path)
            .with_context(|| format!("cannot read {} to upload it", path.display()))?;
        to.put(&name, bytes.into()).await?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(count)
}

/// Returns (name with slashes, path) of every file below `root`, sorted by name.
fn files_below(root: &Path) -> std::io::Result<Vec<(String, PathBuf)>> {
    let mut open = vec![root.to_owned()];
    let mut files = Vec::new();
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir)? {
            let path = entry?.path();
            if path.is_dir() {
                open.push(path);
            } else if let Ok(name) = path.strip_prefix(root) {
                files.push((name.to_string_lossy().replace('\\', "/"), path));
            }
        }
    }
    files.sort();
    Ok(files)
}

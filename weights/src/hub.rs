//! Weights from the Hugging Face Hub: `hf://owner/name`, `hf://owner/name@revision`, each with or
//! without `/file.safetensors`.
//!
//! Files are downloaded whole into the Hub's usual cache (`HF_HOME`) and read from there. The
//! revision becomes a commit before anything is downloaded, so all files are of one state.

use std::path::PathBuf;

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Repo, RepoType};

use crate::error::{Error, Result};
use crate::files::{INDEX, SINGLE};

/// How such URLs begin.
pub(crate) const SCHEME: &str = "hf://";
/// Times that a broken download is taken up again.
const RETRIES: usize = 5;
/// Files that a message lists.
const MOST_FILES: usize = 8;

/// What a URL names.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    repository: String,
    revision: String,
    file: Option<String>,
}

/// Downloads what a URL names and returns the local folder or file.
pub(crate) async fn fetch(url: &str) -> Result<PathBuf> {
    let target = parse(url)?;
    let owned = url.to_owned();
    // The client blocks.
    let work = tokio::task::spawn_blocking(move || download(&target, &owned));
    work.await.unwrap_or_else(|panic| {
        Err(Error::Hub {
            url: url.into(),
            source: Box::new(panic),
        })
    })
}

fn parse(url: &str) -> Result<Target> {
    let bad = || Error::NoWeights {
        url: url.into(),
        reason: "write hf://owner/name, hf://owner/name@revision or either with /file.safetensors"
            .into(),
    };
    let rest = url.strip_prefix(SCHEME).ok_or_else(bad)?;
    let mut parts = rest.trim_end_matches('/').splitn(3, '/');
    let (Some(owner), Some(name)) = (parts.next(), parts.next()) else {
        return Err(bad());
    };
    let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
    let legal = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
    };
    let file = parts.next().map(str::to_owned);
    let inside = file.iter().flat_map(|file| file.split('/')).all(legal);
    if legal(owner) && legal(name) && legal(revision) && inside {
        Ok(Target {
            repository: format!("{owner}/{name}"),
            revision: revision.into(),
            file,
        })
    } else {
        Err(bad())
    }
}

fn download(target: &Target, url: &str) -> Result<PathBuf> {
    let failed = |source: ApiError| Error::Hub {
        url: url.into(),
        source: Box::new(source),
    };
    let mut builder = ApiBuilder::from_env()
        .with_progress(false)
        .with_retries(RETRIES);
    if let Some(token) = std::env::var("HF_TOKEN").ok().filter(|t| !t.is_empty()) {
        builder = builder.with_token(Some(token));
    }
    let api = builder.build().map_err(failed)?;
    let repo = |revision: &str| {
        let model = RepoType::Model;
        api.repo(Repo::with_revision(
            target.repository.clone(),
            model,
            revision.into(),
        ))
    };
    let info = repo(&target.revision).info().map_err(failed)?;
    let repo = repo(&info.sha);
    let files: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
    let get = |repo: &ApiRepo, file: &str| {
        tracing::info!(url, file, "downloading");
        repo.get(file).map_err(failed)
    };
    let absent = |what: &str| {
        let some: Vec<&str> = files
            .iter()
            .map(String::as_str)
            .filter(|file| file.ends_with(".safetensors"))
            .take(MOST_FILES)
            .collect();
        Error::NoWeights {
            url: url.into(),
            reason: if some.is_empty() {
                format!("{what}; the repository has no safetensors files")
            } else {
                format!("{what}; name one of its files: {}", some.join(", "))
            },
        }
    };
    let has = |name: &str| files.iter().any(|file| file == name);
    if let Some(file) = &target.file {
        return if has(file) {
            get(&repo, file)
        } else {
            Err(absent(&format!("{file} is not there")))
        };
    }
    let first = if has(INDEX) {
        let index = get(&repo, INDEX)?;
        for shard in shards(&index)? {
            if !has(&shard) {
                return Err(absent(&format!(
                    "{INDEX} names {shard}, which is not there"
                )));
            }
            get(&repo, &shard)?;
        }
        index
    } else if has(SINGLE) {
        get(&repo, SINGLE)?
    } else {
        return Err(absent(&format!("neither {INDEX} nor {SINGLE} is there")));
    };
    let folder = first.parent().expect("a downloaded file lies in a folder");
    Ok(folder.into())
}

/// Returns the shards that an index names; whether it is right is checked when it is opened.
fn shards(index: &std::path::Path) -> Result<Vec<String>> {
    let corrupt = |reason: String| Error::Corrupt {
        file: index.display().to_string(),
        reason,
    };
    let json = std::fs::read(index).map_err(|error| corrupt(error.to_string()))?;
    let index: serde_json::Value = serde_json::from_slice(&json)
        .map_err(|error| corrupt(format!("it is no index of shards: {error}")))?;
    let map = index["weight_map"].as_object().into_iter().flatten();
    let mut shards: Vec<String> = map
        .filter_map(|(_, file)| file.as_str().map(str::to_owned))
        .collect();
    shards.sort_unstable();
    shards.dedup();
    Ok(shards)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_repository_revision_and_file() {
        let target = |repository: &str, revision: &str, file: Option<&str>| Target {
            repository: repository.into(),
            revision: revision.into(),
            file: file.map(str::to_owned),
        };
        for (url, expected) in [
            ("hf://a/b", target("a/b", "main", None)),
            ("hf://a/b/", target("a/b", "main", None)),
            ("hf://a/b-1.0@v2", target("a/b-1.0", "v2", None)),
            (
                "hf://a/b@v2/sub/x.safetensors",
                target("a/b", "v2", Some("sub/x.safetensors")),
            ),
        ] {
            assert_eq!(parse(url).expect(url), expected);
        }
        for url in [
            "hf://",
            "hf://a",
            "hf:///b",
            "hf://a/b@",
            "hf://a/../b",
            "hf://a/b/../../x.safetensors",
            "hf://a/b?x=1",
        ] {
            let error = parse(url).expect_err(url).to_string();
            assert!(error.contains("hf://owner/name"), "{error}");
        }
    }
}

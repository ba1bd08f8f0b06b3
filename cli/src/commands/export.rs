//! `pollen export`: a checkpoint's weights under the names that others know.

use std::io::Write;
use std::sync::Arc;

use anyhow::{Context, Result};
use pollen_checkpoints::{Checkpoints, Error, FileKind, Manifest, Verify};
use pollen_core::{ConfigError, ExitCode};
use pollen_storage::{Silent, Storage, StorageConfig};
use pollen_weights::{ExportOptions, Initial, WeightFiles, What, export};
use tokio::runtime::Runtime;

use crate::args::{ExportArgs, ExportType, WhatToExport, WhichWeights};
use crate::recipe::Recipe;

pub(crate) fn run(args: &ExportArgs) -> Result<ExitCode> {
    let recipe = Recipe::load(&args.recipe, &args.overrides)?;
    let config = &recipe.config;
    let runtime = Runtime::new().context("cannot start the I/O threads")?;
    let found = find(&args.checkpoint, &config.storage, &runtime)?;
    if let Some(manifest) = &found.manifest {
        check_recipe(args, &recipe, manifest)?;
    }
    let open = WeightFiles::open(&found.url, &config.storage, Arc::new(Silent));
    let mut files = runtime.block_on(open)?;
    if args.weights == WhichWeights::Ema {
        let averages: Vec<String> = found
            .manifest
            .iter()
            .flat_map(|manifest| manifest.of_kind(FileKind::Ema))
            .map(|file| file.name.clone())
            .collect();
        if averages.is_empty() {
            return Err(usage(
                &found.url,
                "it has no averaged weights; leave --weights ema out",
            ));
        }
        files = runtime.block_on(files.overlay(&averages))?;
    }
    let table = config.model.parameter_table(&config.action_spaces)?;
    let unused = match args.what {
        WhatToExport::Flower => vec![],
        WhatToExport::Vlm => vec!["head".to_owned()],
    };
    let weights = Initial::new(files, &table, &config.model, &unused)?;
    let options = ExportOptions {
        what: match args.what {
            WhatToExport::Flower => What::Flower,
            WhatToExport::Vlm => What::Vlm,
        },
        bf16: args.dtype == ExportType::Bf16,
        shard_bytes: args.shard_size.as_u64(),
    };
    let destination = Storage::open(&args.destination, &config.storage, Arc::new(Silent))?;
    let work = export(&weights, &config.model, &table, &options, &destination);
    let written = runtime.block_on(Box::pin(work))?;
    writeln!(
        std::io::stdout().lock(),
        "wrote {} tensors, {} bytes, in {} shards to {} from {}",
        written.tensors,
        written.bytes,
        written.shards,
        destination.url(),
        found.url
    )?;
    Ok(ExitCode::Done)
}

/// Weights under canonical names.
struct Found {
    url: String,
    /// What the checkpoint consists of, if it is one.
    manifest: Option<Manifest>,
}

/// Finds out what a URL names and verifies it.
fn find(url: &str, config: &StorageConfig, runtime: &Runtime) -> Result<Found> {
    let storage = Storage::open(url, config, Arc::new(Silent))?;
    let checkpoints = |storage| Checkpoints::new(storage, runtime.handle().clone());
    match runtime.block_on(storage.get("MANIFEST.json")) {
        Ok(json) => {
            let manifest = Manifest::parse(&json).map_err(|fault| usage(url, &fault))?;
            // .../checkpoints/step-00000100/g1
            let id = manifest.id();
            let base = url.trim_end_matches('/').strip_suffix(&id.to_string());
            let base = base.ok_or_else(|| {
                let fault =
                    format!("it is checkpoint {id}; export from the folder it was written to");
                usage(url, &fault)
            })?;
            let all = checkpoints(Storage::open(base, config, Arc::new(Silent))?);
            let restored = all.verify(id)?.map_err(|reason| Error::Corrupt {
                url: url.into(),
                reason,
            })?;
            return Ok(Found {
                url: url.into(),
                manifest: Some(restored.manifest),
            });
        }
        Err(error) if error.is_not_found() => {}
        Err(error) => return Err(error.into()),
    }
    if runtime.block_on(storage.list("log"))?.is_empty() {
        return Ok(Found {
            url: url.into(),
            manifest: None,
        });
    }
    let newest = checkpoints(storage).newest_by(Verify::Full)?;
    let newest = newest.ok_or_else(|| usage(url, "no checkpoint has been published there"))?;
    Ok(Found {
        url: format!("{}/{}", url.trim_end_matches('/'), newest.dir),
        manifest: Some(newest.manifest),
    })
}

/// Shapes do not show masks, norms and rotary positions, so the recipe must be the one that wrote
/// the checkpoint.
fn check_recipe(args: &ExportArgs, recipe: &Recipe, manifest: &Manifest) -> Result<()> {
    if args.accept_other_recipe || manifest.head.config_hash == recipe.identity() {
        return Ok(());
    }
    Err(usage(
        &args.recipe,
        &format!(
            "checkpoint {} was written with another configuration; give the run's own config.toml \
             as --recipe, or --accept-other-recipe",
            manifest.id()
        ),
    ))
}

fn usage(origin: &str, fault: &str) -> anyhow::Error {
    ConfigError::Invalid {
        origin: origin.into(),
        faults: vec![fault.into()],
    }
    .into()
}

//! Which crate may use which (`docs/architecture.md`).

use std::collections::{BTreeMap, BTreeSet};

/// Allowed uses inside the workspace, without the `pollen-` prefix.
const ALLOWED: &[(&str, &[&str])] = &[
    ("core", &[]),
    ("processing", &["core"]),
    ("storage", &["core"]),
    ("model", &["core"]),
    ("collectives", &["core"]),
    ("observe", &["core"]),
    ("convert", &["core", "processing", "storage"]),
    ("checkpoints", &["core", "storage"]),
    ("weights", &["core", "model", "storage"]),
    ("dataloader", &["core", "processing", "storage"]),
    (
        "trainer",
        &[
            "core",
            "processing",
            "storage",
            "model",
            "collectives",
            "observe",
            "checkpoints",
            "dataloader",
            "weights",
        ],
    ),
    ("launcher", &["core", "collectives", "observe"]),
];

#[test]
fn nothing_goes_sideways() {
    let metadata = cargo_metadata::MetadataCommand::new()
        .no_deps()
        .exec()
        .expect("cargo metadata");
    let allowed: BTreeMap<&str, BTreeSet<&str>> = ALLOWED
        .iter()
        .map(|(name, uses)| (*name, uses.iter().copied().collect()))
        .collect();
    let mut seen = 0;
    for package in &metadata.packages {
        let Some(name) = package.name.strip_prefix("pollen-") else {
            panic!("package {} is not named pollen-*", package.name)
        };
        if name == "cli" {
            continue;
        }
        let allowed = allowed
            .get(name)
            .unwrap_or_else(|| panic!("crate {name} has no place in tests/layering.rs"));
        for used in &package.dependencies {
            if let Some(used) = used.name.strip_prefix("pollen-") {
                assert!(allowed.contains(used), "{name} must not use {used}");
            }
        }
        seen += 1;
    }
    assert!(seen >= 10, "only {seen} crates were checked");
}

#[test]
fn only_trainer_and_model_know_the_tensor_library() {
    let metadata = cargo_metadata::MetadataCommand::new()
        .no_deps()
        .exec()
        .expect("cargo metadata");
    let users: BTreeSet<&str> = metadata
        .packages
        .iter()
        .filter(|package| package.dependencies.iter().any(|used| used.name == "burn"))
        .map(|package| package.name.as_str())
        .collect();
    assert_eq!(users, BTreeSet::from(["pollen-model", "pollen-trainer"]));
}

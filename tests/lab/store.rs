//! What lies in a lab's store.

use super::{Finished, Lab};

/// Opens the checkpoint of `step` in a lab without a server.
pub fn open_checkpoint(
    run: &Finished,
    step: u64,
    runtime: &tokio::runtime::Runtime,
) -> (
    pollen_checkpoints::Checkpoints,
    pollen_checkpoints::Restored,
) {
    let url = run.checkpoint_url(step);
    let (base, id) = url.split_at(url.find("/step-").unwrap());
    let config = pollen_storage::StorageConfig::default();
    let silent = std::sync::Arc::new(pollen_storage::Silent);
    let storage = pollen_storage::Storage::open(base, &config, silent).unwrap();
    let checkpoints = pollen_checkpoints::Checkpoints::new(storage, runtime.handle().clone());
    let id = id.trim_start_matches('/').parse().unwrap();
    let restored = checkpoints.open(id).unwrap().unwrap();
    (checkpoints, restored)
}

/// Reads one object of the lab's store.
pub fn fetch(lab: &Lab, url: &str) -> Vec<u8> {
    let (folder, name) = url.rsplit_once('/').unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let storage = open(lab, folder);
    runtime.block_on(storage.get(name)).unwrap().to_vec()
}

/// Lists the objects below a folder of the lab's store.
pub fn list(lab: &Lab, url: &str) -> Vec<String> {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let objects = runtime.block_on(open(lab, url).list("")).unwrap();
    objects.into_iter().map(|object| object.path).collect()
}

/// Opens a folder of the lab's store.
pub fn open(lab: &Lab, url: &str) -> pollen_storage::Storage {
    let mut variables: std::collections::HashMap<String, String> = std::env::vars().collect();
    if let Some(server) = &lab.server {
        variables.extend(server.variables());
    }
    let config = pollen_storage::StorageConfig::default();
    let silent = std::sync::Arc::new(pollen_storage::Silent);
    pollen_storage::Storage::open_with(url, &config, silent, &variables).unwrap()
}

//! Where the suite runs, and what a small run writes.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::BTreeMap;
use std::io::Write as _;
use std::sync::Arc;

use pollen_checkpoints::{
    Checkpoints, Claim, FileRecord, FlatSlice, ManifestHead, Published, TensorSlice, Values,
};
use pollen_storage::{Silent, Storage, StorageConfig};
use tokio::runtime::Runtime;

/// An empty folder of some store.
pub(crate) struct Place {
    pub(crate) storage: Storage,
    pub(crate) runtime: Runtime,
    folder: Option<tempfile::TempDir>,
}

impl Place {
    pub(crate) fn new(storage: Storage) -> Self {
        Self {
            storage,
            runtime: Runtime::new().unwrap(),
            folder: None,
        }
    }

    pub(crate) fn memory() -> Self {
        Self::new(open(&format!("memory:///{}", unique())))
    }

    fn folder() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let mut place = Self::new(open(path.to_str().unwrap()));
        place.folder = Some(folder);
        place
    }

    /// Returns a handle as another process would open it.
    pub(crate) fn process(&self) -> Checkpoints {
        Checkpoints::new(self.storage.clone(), self.runtime.handle().clone())
    }

    pub(crate) fn get(&self, path: &str) -> Vec<u8> {
        let bytes = self.runtime.block_on(self.storage.get(path));
        bytes.unwrap_or_else(|error| panic!("{error}")).to_vec()
    }

    pub(crate) fn put(&self, path: &str, bytes: Vec<u8>) {
        let put = self.storage.put(path, bytes.into());
        self.runtime.block_on(put).unwrap();
    }

    pub(crate) fn delete(&self, path: &str) {
        self.runtime.block_on(self.storage.delete(path)).unwrap();
    }

    pub(crate) fn paths(&self) -> Vec<String> {
        let objects = self.runtime.block_on(self.storage.list("")).unwrap();
        objects.into_iter().map(|object| object.path).collect()
    }
}

fn open(url: &str) -> Storage {
    Storage::open(url, &StorageConfig::default(), Arc::new(Silent)).unwrap()
}

fn unique() -> String {
    let mut nonce = [0; 8];
    getrandom::fill(&mut nonce).unwrap();
    format!("{:016x}", u64::from_le_bytes(nonce))
}

/// Runs a test on memory, in a folder, and in the bucket that `POLLEN_TEST_S3_URL` names.
pub(crate) fn everywhere(test: impl Fn(&Place)) {
    test(&Place::memory());
    test(&Place::folder());
    match std::env::var("POLLEN_TEST_S3_URL") {
        Ok(url) => {
            let place = Place::new(open(&url).join(&unique()));
            place.runtime.block_on(place.storage.check()).unwrap();
            test(&place);
            for path in place.paths() {
                place.delete(&path);
            }
        }
        Err(_) => {
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED on S3: POLLEN_TEST_S3_URL is not set"
            );
        }
    }
}

pub(crate) fn head(step: u64, world_size: u32) -> ManifestHead {
    ManifestHead {
        step,
        updates: step - 1,
        samples: 64 * step,
        world_size,
        config_hash: "config".into(),
        recipe_hash: "recipe".into(),
        layout_hash: "layout".into(),
        order_version: 1,
        dataset_hashes: BTreeMap::from([("bridge".into(), "hash".into())]),
        gpu_hours_spent: 0.25,
        eval_error: None,
        extra: serde_json::json!({"note": "x"}),
    }
}

/// Weights of a step, so that checkpoints can be told apart by their content.
pub(crate) fn weight(step: u64, rank: u32) -> Vec<f32> {
    (0..6)
        .map(|i| step as f32 + rank as f32 / 8.0 + i as f32 / 64.0)
        .collect()
}

/// Elements of the flat array `m`.
pub(crate) const FLAT: u64 = 10;

pub(crate) fn flat(step: u64) -> Vec<f32> {
    (0..FLAT).map(|i| (1000 * step + i) as f32).collect()
}

/// Writes one rank's part: a tensor, its share of `m`, and from rank 0 the contract.
pub(crate) fn write_rank(
    process: &Checkpoints,
    claim: &Claim,
    step: u64,
    rank: u32,
    world_size: u32,
) -> Vec<FileRecord> {
    let writer = process.writer(claim, step, rank, world_size);
    let weight = weight(step, rank);
    let tensor = TensorSlice {
        name: format!("layer{rank}.weight"),
        shape: vec![2, 3],
        values: Values::F32(&weight),
    };
    let flat = flat(step);
    let (from, to) = (
        FLAT * u64::from(rank) / u64::from(world_size),
        FLAT * u64::from(rank + 1) / u64::from(world_size),
    );
    let slice = FlatSlice {
        name: "m".into(),
        global_len: FLAT,
        offset: from,
        values: Values::F32(&flat[from as usize..to as usize]),
    };
    let mut files = writer
        .write_state(&[tensor], &[slice], None, || ())
        .unwrap();
    if rank == 0 {
        let contract = format!(r#"{{"step":{step}}}"#).into();
        files.push(writer.write_file("contract.json", contract).unwrap());
    }
    // Records travel as JSON between ranks.
    let json = serde_json::to_string(&files).unwrap();
    serde_json::from_str(&json).unwrap()
}

/// Saves a checkpoint as a world of two ranks.
pub(crate) fn save(
    process: &Checkpoints,
    claim: &Claim,
    step: u64,
) -> pollen_checkpoints::Result<Published> {
    let mut files = write_rank(process, claim, step, 0, 2);
    files.extend(write_rank(process, claim, step, 1, 2));
    process.publish(claim, head(step, 2), files)
}

pub(crate) fn newest_step(place: &Place) -> Option<(u64, u64)> {
    let restored = place.process().newest().unwrap();
    restored.map(|restored| (restored.manifest.head.step, restored.manifest.generation))
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Damage {
    Flip,
    Cut,
    Delete,
}

pub(crate) fn damage(place: &Place, path: &str, kind: Damage) {
    let mut bytes = place.get(path);
    match kind {
        Damage::Flip => *bytes.last_mut().unwrap() ^= 1,
        Damage::Cut => bytes.truncate(bytes.len() / 2),
        Damage::Delete => return place.delete(path),
    }
    place.put(path, bytes);
}

//! Loaders over a disk cache: what storage is asked for, and what a damaged cache changes.

use std::path::Path;
use std::sync::Arc;

use bytesize::ByteSize;
use pollen_dataloader::{Data, DiskCacheConfig, HostBatch};
use pollen_storage::{Counters, Storage};
use tokio::runtime::Runtime;

use crate::support::{
    SHAPE, Spec, config, demo_jpegs, loader, open_storage, runtime, spaces, take,
};

/// Takes an epoch with cold memory; returns it with what storage was asked for meanwhile.
fn epoch(root: &Path, spec: &Spec, runtime: &Runtime, cache: &Path) -> (Vec<HostBatch>, Counters) {
    let mut config = config(root, std::slice::from_ref(spec));
    // Room for the footers, and not for all row groups.
    config.cache_bytes = ByteSize::mib(4);
    config.disk_cache = Some(DiskCacheConfig {
        dir: cache.to_owned(),
        bytes: ByteSize::mib(64),
    });
    let storage: Storage = open_storage(&config.root).unwrap();
    let shared = storage.clone();
    let spaces = spaces();
    let open = move |_: &str| Ok(shared.clone());
    let data = runtime.block_on(Data::open(&config, &spaces, SHAPE, &open));
    let data = Arc::new(data.unwrap());
    let before = storage.counters();
    let batches = take(&mut loader(runtime, &data, (0, 1), 0), 7);
    let after = storage.counters();
    let counters = Counters {
        gets: after.gets - before.gets,
        bytes_read: after.bytes_read - before.bytes_read,
        ..after
    };
    (batches, counters)
}

#[test]
fn the_second_start_reads_row_groups_from_disk() {
    let dir = tempfile::tempdir().unwrap();
    let cache = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let spec = Spec::new("alpha", &Arc::new(demo_jpegs()));
    spec.write(dir.path());
    let (first, cold) = epoch(dir.path(), &spec, &runtime, cache.path());
    let (second, warm) = epoch(dir.path(), &spec, &runtime, cache.path());
    assert_eq!(first, second);
    // Footers and columns remain: small parts of each file.
    assert!(
        warm.bytes_read * 2 < cold.bytes_read && warm.gets < cold.gets,
        "{warm:?} after {cold:?}"
    );
    // Half of the entries cut, the others with a flipped byte: all come from storage again.
    let mut damaged = 0;
    for entry in std::fs::read_dir(cache.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|kind| kind == "rowgroup") {
            let mut bytes = std::fs::read(&path).unwrap();
            if damaged % 2 == 0 {
                bytes.truncate(bytes.len() / 2);
            } else {
                bytes[99] ^= 1;
            }
            std::fs::write(&path, bytes).unwrap();
            damaged += 1;
        }
    }
    assert!(damaged > 10, "{damaged} entries");
    let (third, again) = epoch(dir.path(), &spec, &runtime, cache.path());
    assert_eq!(first, third);
    assert!(again.bytes_read * 2 > cold.bytes_read, "{again:?}");
    // A folder that goes away under a loader is no error either.
    std::fs::remove_dir_all(cache.path()).unwrap();
    std::fs::write(cache.path(), "in the folder's place").unwrap();
    let (fourth, _) = epoch(dir.path(), &spec, &runtime, cache.path());
    assert_eq!(first, fourth);
}

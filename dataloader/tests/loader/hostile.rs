//! Foreign bytes: whatever a dataset's files hold, reading them ends in batches, in quarantine or
//! in an error that blames the data, never in a panic or in a request for all memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use pollen_core::ErrorClass;
use pollen_dataloader::decode::decode_jpeg;
use pollen_dataloader::{Loader, SIDECAR_PATH};
use proptest::prelude::*;
use proptest::sample::Index;
use tokio::runtime::Runtime;

use crate::damage::{Damage, damage, damaged};
use crate::support::{Spec, config, demo_jpegs, loader, open, open_storage, runtime};

/// Takes note of the largest piece of memory that anybody asks for.
struct Watched;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it is.
#[allow(unsafe_code, reason = "an allocator for tests")]
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// Above what the small files of these tests can need.
const TOO_MUCH: usize = 256 << 20;

/// A valid dataset in memory.
struct Valid {
    runtime: Runtime,
    spec: Spec,
    files: Vec<(String, Vec<u8>)>,
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

static VALID: LazyLock<Valid> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let spec = Spec {
        episodes: vec![5, 9, 4],
        rows_per_group: 6,
        episodes_per_file: 2,
        snappy: true,
        ..Spec::new("alpha", &Arc::new(demo_jpegs()))
    };
    spec.write(dir.path());
    open(&runtime, &config(dir.path(), std::slice::from_ref(&spec))).unwrap();
    let folder = dir.path().join("alpha");
    let files = files(&folder).into_iter().map(|path| {
        let name = path.strip_prefix(&folder).unwrap().to_str().unwrap();
        (name.to_owned(), std::fs::read(&path).unwrap())
    });
    Valid {
        files: files.collect(),
        runtime,
        spec,
    }
});

/// Reads the dataset with some files replaced: opens it, takes an epoch and the mean chunks.
fn read(name: &str, replaced: &[(&str, Vec<u8>)]) {
    let Valid {
        runtime,
        spec,
        files,
    } = &*VALID;
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), std::slice::from_ref(spec));
    config.root = format!("memory:///hostile-{name}");
    let storage = open_storage(&config.root).unwrap().join("alpha");
    runtime.block_on(async {
        for (path, bytes) in files {
            let bytes = replaced
                .iter()
                .find(|(p, _)| p == path)
                .map_or(bytes, |r| &r.1);
            storage.put(path, bytes.clone().into()).await.unwrap();
        }
        // What is in data files is read only by those who trust no index.
        if replaced.iter().all(|(path, _)| *path != SIDECAR_PATH) {
            storage.delete(SIDECAR_PATH).await.unwrap();
        }
    });
    let blames_the_data = |error: pollen_dataloader::Error| {
        assert_ne!(error.class(), ErrorClass::Fatal, "{error}");
        assert_ne!(error.class(), ErrorClass::Retryable, "{error}");
    };
    match open(runtime, &config) {
        Err(error) => blames_the_data(error),
        Ok(data) => match data.mixture(pollen_core::Seed::new(1)) {
            Err(error) => blames_the_data(error),
            Ok(mixture) => {
                let mut loader: Loader = loader(runtime, &data, (0, 1), 0);
                for _ in 0..loader.micro_batches_per_step() {
                    if let Err(error) = loader.next_micro_batch() {
                        blames_the_data(error);
                    }
                }
                if let Err(error) = runtime.block_on(data.mean_chunks(&mixture)) {
                    blames_the_data(error);
                }
            }
        },
    }
    let largest = LARGEST.load(Ordering::Relaxed);
    assert!(largest < TOO_MUCH, "somebody asked for {largest} bytes");
}

fn file(path: &str) -> &'static [u8] {
    let found = VALID.files.iter().find(|(name, _)| name == path);
    &found.unwrap().1
}

fn with_damage(name: &str, path: &str, damage: &Damage) {
    read(name, &[(path, damaged(file(path), damage))]);
}

#[test]
fn the_files_are_read_when_they_are_whole() {
    read("whole", &[]);
    assert!(VALID.files.len() >= 6, "{:?}", VALID.files.len());
}

proptest! {
    #[test]
    fn a_damaged_sidecar(damage in damage()) {
        with_damage("sidecar", SIDECAR_PATH, &damage);
    }

    /// Numbers of a sidecar in the places of others: it stays JSON.
    #[test]
    fn a_sidecar_with_other_numbers(at in any::<Index>(), value in prop::sample::select(vec![
        0, 1, 7, u64::from(u32::MAX), 1 << 40, u64::MAX / 2, u64::MAX,
    ])) {
        let text = std::str::from_utf8(file(SIDECAR_PATH)).unwrap();
        let starts: Vec<usize> = text
            .match_indices(|c: char| c.is_ascii_digit())
            .map(|(at, _)| at)
            .filter(|&at| !text[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || c == '.'))
            .collect();
        let start = starts[at.index(starts.len())];
        let end = text[start..].find(|c: char| !c.is_ascii_digit()).unwrap() + start;
        let changed = format!("{}{value}{}", &text[..start], &text[end..]);
        read("numbers", &[(SIDECAR_PATH, changed.into_bytes())]);
    }

    #[test]
    fn a_damaged_info(damage in damage()) {
        with_damage("info", "meta/info.json", &damage);
    }

    #[test]
    fn damaged_tasks(damage in damage()) {
        with_damage("tasks", "meta/tasks.parquet", &damage);
    }

    #[test]
    fn damaged_episodes(damage in damage()) {
        with_damage("episodes", "meta/episodes/chunk-000/file-000.parquet", &damage);
    }

    #[test]
    fn any_bytes_for_any_file(which in any::<Index>(), mut bytes: Vec<u8>, parquet: bool) {
        let (path, _) = &VALID.files[which.index(VALID.files.len())];
        if parquet {
            bytes.extend((bytes.len() as u32).to_le_bytes());
            bytes.extend(b"PAR1");
        }
        read("any", &[(path, bytes)]);
    }

    #[test]
    fn a_damaged_data_file(damage in damage(), second: bool) {
        let path = format!("data/chunk-000/file-00{}.parquet", u8::from(second));
        with_damage("data", &path, &damage);
    }

    /// The last bytes of a Parquet file say where all others are.
    #[test]
    fn a_damaged_footer(damage in damage()) {
        let path = "data/chunk-000/file-000.parquet";
        let whole = file(path);
        let (tail, end) = whole.split_at(whole.len() - 8);
        let len = u32::from_le_bytes(end[..4].try_into().unwrap()) as usize;
        let (body, footer) = tail.split_at(tail.len() - len);
        let footer = damaged(footer, &damage);
        let len = (footer.len() as u32).to_le_bytes();
        read("footer", &[(path, [body, &footer, &len, b"PAR1"].concat())]);
    }

    #[test]
    fn a_damaged_image(damage in damage(), which in any::<Index>()) {
        let jpegs = &VALID.spec.jpegs;
        let jpeg = &jpegs[which.index(jpegs.len())];
        let _ = decode_jpeg(&damaged(jpeg, &damage), None);
        let _ = decode_jpeg(&damaged(jpeg, &damage), Some((96, 96)));
    }

    #[test]
    fn any_bytes_for_an_image(bytes: Vec<u8>) {
        let _ = decode_jpeg(&bytes, None);
        let _ = decode_jpeg(&[&[0xff, 0xd8, 0xff][..], &bytes].concat(), None);
    }
}

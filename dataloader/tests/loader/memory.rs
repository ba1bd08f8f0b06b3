//! Memory is a contract: what row groups take is counted, not timed.

use std::sync::Arc;

use bytesize::ByteSize;
use pollen_core::Seed;

use crate::support::{GLOBAL_BATCH, Spec, config, demo_jpegs, loader, open, runtime, take};

const NAMES: [&str; 12] = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"];

fn specs() -> Vec<Spec> {
    let jpegs = Arc::new(demo_jpegs());
    let spec = |name| Spec {
        rows_per_group: 5,
        episodes_per_file: 2,
        // Every other one with pages that are decompressed in memory.
        snappy: NAMES.iter().position(|n| *n == name).unwrap() % 2 == 0,
        ..Spec::new(name, &jpegs)
    };
    NAMES.map(spec).to_vec()
}

#[test]
fn the_cap_holds_with_any_number_of_datasets() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let specs = specs();
    for spec in &specs {
        spec.write(dir.path());
    }
    let mut small = config(dir.path(), &specs);
    small.cameras.truncate(1);
    // Several micro-batches of four row groups, but fewer than are to be made ahead.
    small.cache_bytes = ByteSize::kib(768);
    small.prefetch_batches = 12;
    let data = open(&runtime, &small).unwrap();
    let mut loader_of_small = loader(&runtime, &data, (0, 1), 0);
    let mut batches = Vec::new();
    for _ in 0..40 {
        batches.extend(take(&mut loader_of_small, 1));
        let (groups, footers) = data.held_bytes();
        let peak = groups.peak + footers.peak;
        assert!(peak <= small.cache_bytes.as_u64(), "{groups:?} {footers:?}");
    }
    let (groups, footers) = data.held_bytes();
    assert!(groups.peak > small.cache_bytes.as_u64() / 2, "{groups:?}");
    assert!(footers.peak > 0);
    let files = data.datasets().iter().flat_map(|d| &d.sidecar().files);
    let all: u64 = files.map(|file| file.bytes).sum();
    assert!(all > 4 * small.cache_bytes.as_u64(), "{all} bytes in all");
    // The same samples as with room for everything.
    let mut roomy = small.clone();
    roomy.cache_bytes = ByteSize::mib(64);
    let roomy = open(&runtime, &roomy).unwrap();
    assert_eq!(take(&mut loader(&runtime, &roomy, (0, 1), 0), 40), batches);
    assert!(roomy.held_bytes().0.peak > groups.peak);
}

#[test]
fn a_cap_below_a_micro_batch_holds_one_micro_batch() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let specs = &specs()[..3];
    for spec in specs {
        spec.write(dir.path());
    }
    let mut config = config(dir.path(), specs);
    config.cache_bytes = ByteSize(1);
    config.prefetch_batches = 6;
    let data = open(&runtime, &config).unwrap();
    let steps = 8;
    take(&mut loader(&runtime, &data, (0, 1), 0), steps);
    let mixture = data.mixture(Seed::new(11)).unwrap();
    // The loader may have begun with the micro-batches of later steps.
    let slices = (0..steps as u64 + 12).map(|step| mixture.rank_slice(step, GLOBAL_BATCH, 0, 1));
    let largest = slices
        .flat_map(|slice| {
            let micro_batches = slice.chunks(4).map(|samples| {
                let mut groups: Vec<(u32, u32)> = samples
                    .iter()
                    .map(|(_, s)| (s.dataset, s.row_group))
                    .collect();
                groups.dedup();
                let bytes = |&(d, g): &(u32, u32)| {
                    let stored = data.datasets()[d as usize].frames(false)[g as usize].bytes;
                    // Columns and unpacked pages take a little more than what is stored.
                    stored * 11 / 10 + 2000
                };
                groups.iter().map(bytes).sum::<u64>()
            });
            micro_batches.collect::<Vec<_>>()
        })
        .max();
    let (held, _) = data.held_bytes();
    assert!(held.peak <= largest.unwrap(), "{held:?}, {largest:?}");
    assert!(held.peak > largest.unwrap() / 4);
}

/// Proportional set size of this process in bytes.
fn pss() -> u64 {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = rollup
        .lines()
        .find(|line| line.starts_with("Pss:"))
        .unwrap();
    let kib = line.split_whitespace().nth(1).unwrap();
    1024 * kib.parse::<u64>().unwrap()
}

/// Bytes that are allocated: PSS less what the allocator keeps free, code and stacks.
fn allocated() -> u64 {
    // SAFETY: it takes no argument and returns plain numbers.
    let info = unsafe { libc::mallinfo2() };
    (info.uordblks + info.hblkhd) as u64
}

/// `make bench-memory`; prints its figures for docs/benchmarks.md.
#[test]
#[ignore = "a million samples take many minutes"]
#[expect(clippy::print_stdout, reason = "the figures of a measurement")]
fn a_million_samples_leave_memory_flat() {
    const SAMPLES: usize = 1_000_000;
    const BATCH: usize = 80;
    const STOPS: usize = 20;
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let longer = |spec| Spec {
        rows_per_group: 25,
        episodes: vec![120; 20],
        episodes_per_file: 4,
        ..spec
    };
    let specs: Vec<Spec> = specs().into_iter().map(longer).collect();
    for spec in &specs {
        spec.write(dir.path());
    }
    let mut small = config(dir.path(), &specs);
    small.cameras.truncate(1);
    small.image_size = 16;
    small.cache_bytes = ByteSize::mib(8);
    small.prefetch_batches = 4;
    let data = open(&runtime, &small).unwrap();
    let files = data.datasets().iter().flat_map(|d| &d.sidecar().files);
    let all: u64 = files.map(|file| file.bytes).sum();
    assert!(all > 10 * small.cache_bytes.as_u64(), "{all} bytes in all");
    let seed = Seed::new(11);
    let args = pollen_dataloader::LoaderArgs {
        mixture: Arc::new(data.mixture(seed).unwrap()),
        data: Arc::clone(&data),
        seed,
        rank: 0,
        world_size: 1,
        global_batch: BATCH,
        micro_batch: BATCH,
        first_sample: 0,
    };
    let mut loader = pollen_dataloader::Loader::start(args, runtime.handle()).unwrap();
    let (mut seen, mut in_use) = (Vec::new(), Vec::new());
    for stop in 0..STOPS {
        for _ in 0..SAMPLES / STOPS / BATCH {
            let batch = loader.next_micro_batch().unwrap();
            assert!(batch.bad.is_empty(), "{:?}", batch.bad);
        }
        seen.push(pss());
        in_use.push(allocated());
        let (groups, footers) = data.held_bytes();
        let held = groups.peak + footers.peak;
        assert!(held <= small.cache_bytes.as_u64(), "{groups:?} {footers:?}");
        println!(
            "{} samples: PSS {:.1} MB, allocated {:.2} MB, row groups and footers at most {:.2} of {:.2} MB",
            (stop + 1) * SAMPLES / STOPS,
            seen[stop] as f64 / 1e6,
            in_use[stop] as f64 / 1e6,
            held as f64 / 1e6,
            small.cache_bytes.as_u64() as f64 / 1e6
        );
    }
    println!(
        "data: {:.0} MB in {} datasets",
        all as f64 / 1e6,
        specs.len()
    );
    // Threads, their stacks and the allocator's arenas come first and slowly; a loader that kept a
    // hundred bytes of each sample would gain 50 MB here.
    let early = seen[..STOPS / 2].iter().max().unwrap();
    let late = seen[STOPS / 2..].iter().max().unwrap();
    assert!(
        *late <= early + (4 << 20),
        "{early} bytes of PSS became {late}"
    );
}

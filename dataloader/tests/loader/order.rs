//! The order of samples through real loaders: worlds, restarts, epochs.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::support::{GLOBAL_BATCH, Spec, config, demo_jpegs, loader, open, runtime, take};
use pollen_dataloader::{Data, HostBatch, SampleRef, Summary};
use tokio::runtime::Runtime;

fn two_datasets(root: &std::path::Path, runtime: &Runtime) -> (Vec<Spec>, Arc<Data>) {
    let jpegs = Arc::new(demo_jpegs());
    let one = Spec::new("alpha", &jpegs);
    let two = Spec {
        episodes: vec![19, 44, 8, 27, 33],
        action_dim: 14,
        snappy: true,
        ..Spec::new("beta", &jpegs)
    };
    let specs = vec![one, two];
    for spec in &specs {
        spec.write(root);
    }
    let data = open(runtime, &config(root, &specs)).unwrap();
    (specs, data)
}

/// What every rank of a world got for each step, sorted by sample.
fn by_step(
    runtime: &Runtime,
    data: &Arc<Data>,
    world_size: usize,
    steps: usize,
) -> Vec<Vec<(u64, SampleRef)>> {
    let mut all = vec![Vec::new(); steps];
    for rank in 0..world_size {
        let mut loader = loader(runtime, data, (rank, world_size), 0);
        let per_step = loader.micro_batches_per_step();
        for (i, batch) in take(&mut loader, steps).into_iter().enumerate() {
            let pairs = batch.sample_indices.into_iter().zip(batch.samples);
            all[i / per_step].extend(pairs);
        }
    }
    for step in &mut all {
        step.sort_unstable();
    }
    all
}

#[test]
fn every_world_sees_the_same_global_batches() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let (specs, data) = two_datasets(dir.path(), &runtime);
    let steps = 20;
    let mixture = data.mixture(pollen_core::Seed::new(11)).unwrap();
    let summary = Summary::new(&data, &mixture);
    for (dataset, spec) in summary.datasets.iter().zip(&specs) {
        assert!(dataset.windows >= 4, "{} windows", dataset.windows);
        assert_eq!(dataset.frames, spec.num_frames() - spec.episodes[2]);
        assert_eq!(dataset.episodes, spec.episodes.len());
    }
    let expected: Vec<_> = (0..steps)
        .map(|step| mixture.global_batch(step as u64, GLOBAL_BATCH))
        .collect();
    for world_size in [1, 2, 3] {
        assert_eq!(
            by_step(&runtime, &data, world_size, steps),
            expected,
            "{world_size}"
        );
    }
    // Held-out episodes never appear.
    assert!(
        expected
            .iter()
            .flatten()
            .all(|(_, sample)| sample.episode != 2)
    );
}

#[test]
fn resuming_gives_the_rest_of_the_stream_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let (_, data) = two_datasets(dir.path(), &runtime);
    let whole = take(&mut loader(&runtime, &data, (1, 2), 0), 16);
    let per_step = whole.len() / 16;
    // A process of its own opens the data anew.
    let again = open(&runtime, data.config()).unwrap();
    for step in [1, 5, 7, 15] {
        let first = (step * GLOBAL_BATCH) as u64;
        let rest = take(&mut loader(&runtime, &again, (1, 2), first), 16 - step);
        assert_eq!(rest, whole[step * per_step..], "from step {step}");
    }
    // Between two global batches of the interrupted run: the same samples in other batches.
    let mut later = loader(&runtime, &again, (0, 1), 7);
    let mut ids: Vec<u64> = take(&mut later, 2)
        .into_iter()
        .flat_map(|batch| batch.sample_indices)
        .collect();
    ids.sort_unstable();
    assert_eq!(ids, (7..7 + 2 * GLOBAL_BATCH as u64).collect::<Vec<_>>());
}

#[test]
fn a_sample_does_not_depend_on_the_rank_or_the_threads() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let (specs, data) = two_datasets(dir.path(), &runtime);
    let mut serial = config(dir.path(), &specs);
    serial.decode_threads = 1;
    serial.prefetch_batches = 1;
    let serial = open(&runtime, &serial).unwrap();
    let one = take(&mut loader(&runtime, &serial, (0, 1), 0), 4);
    let three: Vec<HostBatch> = (0..3)
        .flat_map(|rank| take(&mut loader(&runtime, &data, (rank, 3), 0), 4))
        .collect();
    assert_eq!(samples(&one), samples(&three));
}

/// Index, images, actions, valid entries, token ids and proprioception.
type Tensors = (u64, Vec<u8>, Vec<u32>, Vec<u8>, Vec<i64>, Vec<u32>);

/// All tensors of each sample, by sample.
fn samples(batches: &[HostBatch]) -> Vec<Tensors> {
    let mut all = Vec::new();
    for batch in batches {
        let (n, bits) = (batch.dims.batch, |v: &[f32]| {
            v.iter().map(|x| x.to_bits()).collect()
        });
        for i in 0..n {
            let part = |len: usize| i * len / n..(i + 1) * len / n;
            all.push((
                batch.sample_indices[i],
                batch.images[part(batch.images.len())].to_vec(),
                bits(&batch.actions[part(batch.actions.len())]),
                batch.valid[part(batch.valid.len())].to_vec(),
                batch.input_ids[part(batch.input_ids.len())].to_vec(),
                bits(&batch.proprio[part(batch.proprio.len())]),
            ));
        }
    }
    all.sort_unstable();
    all
}

#[test]
fn a_row_group_is_opened_by_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let specs = [Spec::new("alpha", &Arc::new(demo_jpegs()))];
    specs[0].write(dir.path());
    let data = open(&runtime, &config(dir.path(), &specs)).unwrap();
    let (world_size, steps) = (3, 6);
    // Room for everything: what a rank holds in the end is what it fetched.
    let mut roomy = config(dir.path(), &specs);
    roomy.cache_bytes = bytesize::ByteSize::mib(64);
    roomy.prefetch_batches = 1;
    let mut fetched = 0;
    for rank in 0..world_size {
        let data = open(&runtime, &roomy).unwrap();
        take(&mut loader(&runtime, &data, (rank, world_size), 0), steps);
        fetched += data.held_bytes().0.now;
    }
    // The same batches, handed out in the order of their samples.
    let mixture = data.mixture(pollen_core::Seed::new(11)).unwrap();
    let mut opened = vec![BTreeSet::new(); world_size];
    let share = GLOBAL_BATCH / world_size;
    for step in 0..steps {
        let batch = mixture.global_batch(step as u64, GLOBAL_BATCH);
        for (rank, slice) in batch.chunks(share).enumerate() {
            opened[rank].extend(slice.iter().map(|(_, s)| (s.dataset, s.row_group)));
        }
    }
    let bytes = |&(dataset, group): &(u32, u32)| {
        data.datasets()[dataset as usize].frames(false)[group as usize].bytes
    };
    let unsorted: u64 = opened.iter().flatten().map(bytes).sum();
    assert!(
        fetched * 4 < unsorted * 3,
        "sorted {fetched} bytes, unsorted {unsorted}"
    );
}

//! What is in a batch.

use std::sync::Arc;

use crate::support::{SHAPE, Spec, config, demo_jpegs, loader, open, runtime, spaces, take};
use pollen_dataloader::decode::decode_jpeg;
use pollen_dataloader::{Augment, Data, HoldoutLoader, HostBatch};
use pollen_processing::{Normalizer, Resizer, Tokenizer};

fn setup(
    mask_padding: bool,
) -> (
    tempfile::TempDir,
    tokio::runtime::Runtime,
    Vec<Spec>,
    Arc<Data>,
) {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let jpegs = Arc::new(demo_jpegs());
    let specs = vec![
        Spec::new("alpha", &jpegs),
        Spec {
            action_dim: 14,
            task: "hand the hammer over",
            ..Spec::new("beta", &jpegs)
        },
    ];
    for spec in &specs {
        spec.write(dir.path());
    }
    let mut config = config(dir.path(), &specs);
    config.mask_padding = mask_padding;
    config.augment = Augment::None;
    // The model's second camera is one that `beta` does not have.
    config
        .datasets
        .get_mut("beta")
        .unwrap()
        .cameras
        .remove("wrist");
    let data = open(&runtime, &config).unwrap();
    (dir, runtime, specs, data)
}

/// The last global row of the episode that holds `row`.
fn last_row(spec: &Spec, row: u64) -> u64 {
    let mut end = 0;
    for length in &spec.episodes {
        end += length;
        if row < end {
            break;
        }
    }
    end - 1
}

fn check(batch: &HostBatch, specs: &[Spec], data: &Data, mask_padding: bool) {
    let resizer = Resizer::new(data.config().resize, data.config().image_size);
    let tokenizer = Tokenizer::from_file(&data.config().tokenizer).unwrap();
    let spaces = spaces();
    let (h, a, s, t) = (SHAPE.action_horizon, SHAPE.action_width, 32, 50);
    let mut valid_entries = 0;
    for (i, sample) in batch.samples.iter().enumerate() {
        let spec = &specs[sample.dataset as usize];
        let last = last_row(spec, sample.frame);
        let space = &spaces[batch.spaces[i] as usize];
        assert_eq!(space.name, spec.config().embodiment);
        let stats = &data.datasets()[sample.dataset as usize].sidecar().action;
        let normalizer = Normalizer::for_actions(stats, space).unwrap();
        for step in 0..h {
            let mut action = spec.action((sample.frame + step as u64).min(last));
            normalizer.normalize(&mut action);
            action.resize(a, 0.0);
            let at = (i * h + step) * a;
            assert_eq!(batch.actions[at..at + a], action);
            let counts = !mask_padding || sample.frame + step as u64 <= last;
            for dim in 0..a {
                let expected = u8::from(counts && dim < spec.action_dim);
                assert_eq!(batch.valid[at + dim], expected);
            }
        }
        valid_entries += data.valid_entries(*sample);
        for camera in 0..2 {
            let present = spec.name == "alpha" || camera == 0;
            assert_eq!(batch.camera_present[2 * i + camera], present);
            let image = &batch.images[(2 * i + camera) * 3 * s * s..][..3 * s * s];
            if present {
                let number = (sample.frame + 5 * camera as u64) % spec.jpegs.len() as u64;
                let decoded = decode_jpeg(&spec.jpegs[number as usize], Some((96, 96))).unwrap();
                let expected = resizer.resize_square(decoded).unwrap();
                assert_eq!(image, expected.planes());
            } else {
                assert!(image.iter().all(|&byte| byte == 0));
            }
        }
        let prompt = format!(
            "Agent Type: 1-arm Panda, Action Space: Delta End-Effector,  Task Instruction: {}",
            spec.task
        );
        let mut ids: Vec<i64> = tokenizer
            .encode(&prompt, t)
            .unwrap()
            .into_iter()
            .map(i64::from)
            .collect();
        let length = ids.len();
        ids.resize(t, 1);
        assert_eq!(batch.input_ids[i * t..(i + 1) * t], ids);
        let mask = &batch.text_mask[i * t..(i + 1) * t];
        assert!((0..t).all(|j| mask[j] == u8::from(j < length)));
        assert_eq!(batch.frequency_hz[i], 10.0);
        let proprio = &batch.proprio[3 * i..3 * i + 3];
        if spec.name == "alpha" {
            assert!(proprio.iter().all(|x| x.abs() <= 1.0) && proprio[2].abs() == 1.0);
        } else {
            assert_eq!(proprio, [0.0; 3]);
        }
    }
    assert_eq!(batch.num_valid(), valid_entries);
}

#[test]
fn a_batch_holds_what_the_files_hold() {
    for mask_padding in [false, true] {
        let (_dir, runtime, specs, data) = setup(mask_padding);
        for batch in take(&mut loader(&runtime, &data, (0, 1), 0), 8) {
            check(&batch, &specs, &data, mask_padding);
        }
    }
}

#[test]
fn held_out_episodes_come_in_order_and_end() {
    let (_dir, runtime, specs, data) = setup(false);
    let samples = data.holdout(1);
    assert_eq!(
        samples.len() as u64,
        specs[0].episodes[2] + specs[1].episodes[2]
    );
    let loader = HoldoutLoader::start(Arc::clone(&data), samples.clone(), 8, runtime.handle());
    let mut seen = Vec::new();
    for batch in loader {
        let batch = batch.unwrap();
        check(&batch, &specs, &data, false);
        seen.extend(batch.sample_indices.into_iter().zip(batch.samples));
    }
    assert_eq!(seen, samples);
    let strided: Vec<_> = data
        .holdout(5)
        .into_iter()
        .map(|(_, sample)| sample)
        .collect();
    let expected: Vec<_> = samples
        .iter()
        .step_by(5)
        .map(|(_, sample)| *sample)
        .collect();
    assert_eq!(strided, expected);
}

#[test]
fn augmentation_is_a_function_of_the_sample() {
    let (_dir, runtime, _, plain) = setup(false);
    let mut config = plain.config().clone();
    config.augment = Augment::RandomShift {
        pads: [("primary".to_owned(), 4)].into(),
    };
    let shifted = open(&runtime, &config).unwrap();
    let a = take(&mut loader(&runtime, &plain, (0, 1), 0), 2);
    let b = take(&mut loader(&runtime, &shifted, (0, 1), 0), 2);
    let again = take(&mut loader(&runtime, &shifted, (0, 1), 0), 2);
    assert_eq!(b, again);
    let image = 3 * 32 * 32;
    let (mut changed, mut total) = (0, 0);
    for (a, b) in a.iter().zip(&b) {
        for i in 0..a.dims.batch {
            let camera =
                |batch: &HostBatch, c: usize| batch.images[(2 * i + c) * image..][..image].to_vec();
            changed += usize::from(camera(a, 0) != camera(b, 0));
            total += 1;
            assert_eq!(
                camera(a, 1),
                camera(b, 1),
                "only the primary camera is shifted"
            );
        }
    }
    assert!(changed > total * 3 / 4, "{changed} of {total}");
}

#[test]
fn the_mean_chunk_is_the_mean_of_what_is_trained_on() {
    let (_dir, runtime, specs, data) = setup(false);
    let mixture = data.mixture(pollen_core::Seed::new(1)).unwrap();
    let means = runtime.block_on(data.mean_chunks(&mixture)).unwrap();
    let spaces = spaces();
    for (d, spec) in specs.iter().enumerate() {
        let dataset = &data.datasets()[d];
        let space = &spaces[dataset.space_index() as usize];
        let normalizer = Normalizer::for_actions(&dataset.sidecar().action, space).unwrap();
        let mean = means[dataset.space_index() as usize].as_ref().unwrap();
        let (mut start, mut count) = (0, 0);
        let mut sums = vec![0.0_f64; SHAPE.action_horizon * SHAPE.action_width];
        for (e, length) in spec.episodes.iter().enumerate() {
            for row in start..start + length {
                if e == 2 {
                    continue;
                }
                count += 1;
                for step in 0..SHAPE.action_horizon {
                    let mut action = spec.action((row + step as u64).min(start + length - 1));
                    normalizer.normalize(&mut action);
                    for (dim, value) in action.into_iter().enumerate() {
                        sums[step * SHAPE.action_width + dim] += f64::from(value);
                    }
                }
            }
            start += length;
        }
        for (mean, sum) in mean.iter().zip(sums) {
            assert!((f64::from(*mean) - sum / f64::from(count)).abs() < 1e-5);
        }
    }
}

#[test]
fn the_contract_says_how_the_batches_were_made() {
    let (_dir, _runtime, _, data) = setup(false);
    let contract = data.contract();
    assert!(contract.faults().is_empty(), "{:?}", contract.faults());
    assert_eq!(contract.cameras, ["primary", "wrist"]);
    assert_eq!(contract.datasets["alpha"].action_space.name, "one");
    assert!(contract.datasets["alpha"].proprio_stats.is_some());
    assert!(contract.datasets["beta"].proprio_stats.is_none());
}

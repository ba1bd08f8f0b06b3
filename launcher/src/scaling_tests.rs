#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;

/// 947M parameters, 636.5 GFLOP a sample at 40 % of 989 TFLOP/s, batch 1024 in one micro-batch.
fn full_size() -> ScalingModel {
    ScalingModel {
        workload: Workload {
            steps: 360_000,
            global_batch: 1024,
            micro_batch: 1024,
            trained_parameters: 947_000_000,
            gradient_value_bytes: 4,
            overlap: true,
            shard_optimizer: false,
        },
        measured: Measured {
            sample_s: 636.5e9 / (0.4 * 989e12),
            optimizer_s: 0.0,
            jitter: 0.01,
            micro_batch: 1024,
            source: "derived".into(),
        },
        link: Link::parse("h100-ndr").unwrap(),
    }
}

fn with(edit: impl Fn(&mut Workload)) -> ScalingModel {
    let mut model = full_size();
    edit(&mut model.workload);
    model
}

#[track_caller]
fn close(what: &str, actual: f64, expected: f64, most: f64) {
    assert!(
        (actual - expected).abs() <= most,
        "{what}: {actual:.3}, expected {expected}"
    );
}

/// Strong scaling at batch 1024: GPUs, ms of compute, efficiency in percent without overlap, with it
/// in f32, with it in bf16, hours of 360,000 steps, GPU-hours.
#[test]
fn the_table_of_the_cost_model_comes_out() {
    #[rustfmt::skip]
    let table = [
        (1, 1648.0, 100.0, 100.0, 100.0, 164.8, 164.8),
        (4, 412.0, 95.6, 97.4, 97.4, 42.3, 169.0),
        (8, 206.0, 91.9, 96.2, 96.2, 21.4, 171.0),
        (16, 103.0, 82.7, 94.1, 94.1, 10.9, 175.0),
        (32, 51.0, 68.6, 89.4, 90.6, 5.8, 184.0),
        (64, 26.0, 52.5, 53.5, 82.7, 4.8, 308.0),
        (128, 13.0, 35.8, 29.7, 49.1, 4.3, 554.0),
    ];
    let serial = with(|work| work.overlap = false);
    let bf16 = with(|work| work.gradient_value_bytes = 2);
    for (gpus, compute, none, f32, half, hours, gpu_hours) in table {
        let row = full_size().predict(gpus).unwrap();
        let percent = |model: &ScalingModel| 100.0 * model.predict(gpus).unwrap().efficiency;
        close("compute", 1e3 * row.compute_s, compute, 0.5);
        close("no overlap", percent(&serial), none, 0.1);
        close("f32", percent(&full_size()), f32, 0.1);
        close("bf16", percent(&bf16), half, 0.1);
        close("hours", row.hours, hours, 0.06);
        close("GPU-hours", row.gpu_hours, gpu_hours, 1.5);
    }
    for gpus in [256, 512] {
        let percent = |model: &ScalingModel| 100.0 * model.predict(gpus).unwrap().efficiency;
        assert!(percent(&serial) < 22.0 && percent(&full_size()) < 16.0);
        assert!(percent(&bf16) < 27.2, "{}", percent(&bf16));
        assert!(full_size().predict(gpus).unwrap().gpu_hours > 1000.0);
    }
}

/// 128 samples a GPU: percent with overlap, and without.
#[test]
fn weak_scaling_is_that_of_the_cost_model() {
    for (gpus, overlapped, serial) in [(8, 96.2, 91.9), (64, 95.4, 87.9), (1024, 94.6, 87.1)] {
        let percent = |overlap| {
            let model = with(|work| {
                work.overlap = overlap;
                work.global_batch = 128 * u64::from(gpus);
                work.micro_batch = 128;
            });
            100.0 * model.predict(gpus).unwrap().efficiency
        };
        close("overlapped", percent(true), overlapped, 0.1);
        close("serial", percent(false), serial, 0.1);
    }
}

#[test]
fn only_the_last_micro_batch_hides_communication() {
    let whole = full_size().predict(16).unwrap();
    let small = with(|work| work.micro_batch = 8).predict(16).unwrap();
    assert_eq!((whole.micro_batch, whole.accumulation), (64, 1));
    assert_eq!((small.micro_batch, small.accumulation), (8, 8));
    assert_eq!(whole.compute_s, small.compute_s);
    let reduce_s = small.reduce_s / small_link().bucket_efficiency;
    let hidden_s = 0.95 * 2.0 / 3.0 * small.compute_s / 8.0;
    let expected_s = reduce_s - hidden_s + small_link().tail_s;
    close("exposed", small.exposed_s, expected_s, 1e-9);
    assert!(small.exposed_s > whole.exposed_s);
}

fn small_link() -> Link {
    full_size().link
}

#[test]
fn a_sharded_optimizer_moves_the_same_bytes_and_updates_a_part() {
    let mut model = with(|work| work.overlap = false);
    model.measured.optimizer_s = 0.0095;
    let whole = model.predict(8).unwrap();
    model.workload.shard_optimizer = true;
    let shards = model.predict(8).unwrap();
    let moved = |row: &Prediction| row.exposed_s + row.gather_s;
    close("bytes", moved(&shards), moved(&whole), 1e-12);
    close("update", shards.optimizer_s, 0.0095 / 8.0, 1e-12);
    assert!(shards.step_s < whole.step_s);
}

#[test]
fn a_tiny_gradient_has_no_tail_longer_than_itself() {
    let tiny = with(|work| work.trained_parameters = 1000);
    let row = tiny.predict(8).unwrap();
    assert!(row.exposed_s < 1e-6, "{}", row.exposed_s);
    assert_eq!(full_size().predict(1).unwrap().exposed_s, 0.0);
}

#[test]
fn a_number_of_devices_that_cannot_share_the_batch_is_refused() {
    let model = with(|work| work.micro_batch = 16);
    let error = model.predict(48).unwrap_err().to_string();
    assert!(error.contains("1, 2, 4, 8, 16, 32, 64"), "{error}");
    assert!(model.predict(0).is_err());
    let error = model.predict(96).unwrap_err().to_string();
    assert!(error.contains("32, 64, 128, 256"), "{error}");
    // Beyond 64 devices the micro-batch shrinks.
    assert_eq!(model.predict(128).unwrap().micro_batch, 8);
    assert_eq!(model.predict(1024).unwrap().micro_batch, 1);
    assert!(model.predict(2048).is_err());
    assert_eq!(model.usual_sizes(10), [1, 2, 4, 8]);
    assert_eq!(model.usual_sizes(4096).last(), Some(&1024));
}

#[test]
fn a_budget_that_holds_needs_no_remedy() {
    let advice = full_size().advise(32, 200.0).unwrap();
    assert_eq!((advice.cause, advice.remedies.len()), (None, 0));
}

#[test]
fn past_32_gpus_the_all_reduce_breaks_the_budget_and_bf16_mends_it() {
    let advice = full_size().advise(64, 200.0).unwrap();
    assert_eq!(advice.cause, Some("all-reduce"));
    close("over by", advice.gpu_hours, 308.0, 1.0);
    assert!(advice.cause_gpu_hours > 100.0 && advice.compute_gpu_hours < 165.0);
    let find = |part: &str| {
        let found = advice.remedies.iter().find(|r| r.change.contains(part));
        found.unwrap_or_else(|| panic!("no {part} in {:?}", advice.remedies))
    };
    // bf16 at 82.7 % is 199.3 GPU-hours.
    assert!(find("bf16").fits);
    assert!(find("global_batch = 2048 with train.steps = 180000").fits);
    assert!(find("32 GPUs").fits);
    let hours: Vec<f64> = advice.remedies.iter().map(|r| r.gpu_hours).collect();
    assert!(hours.is_sorted());
    assert!(hours.iter().all(|hours| *hours < advice.gpu_hours));
    for remedy in &advice.remedies {
        assert_eq!(remedy.fits, remedy.gpu_hours <= 200.0, "{remedy:?}");
    }
    close(
        "steps",
        advice.affordable_steps as f64,
        360e3 * 200.0 / advice.gpu_hours,
        1.0,
    );
}

#[test]
fn compute_that_is_too_much_alone_is_said_so() {
    let mut model = full_size();
    // 34 % of the peak is just enough for 200 GPU-hours, 25 % is not.
    model.measured.sample_s *= 0.40 / 0.25;
    let advice = model.advise(8, 200.0).unwrap();
    assert_eq!(advice.cause, Some("compute"));
    close("compute", advice.compute_gpu_hours, 263.6, 0.5);
    assert!(advice.remedies.iter().all(|remedy| !remedy.fits));
}

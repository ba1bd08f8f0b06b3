#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;

fn input() -> PlanInput {
    PlanInput {
        recipe: "oxe".into(),
        parameters: 947_000_000,
        device: "cuda".into(),
        world_size: 8,
        global_batch: 1024,
        micro_batch: 16,
        worker_bytes: 16 * 947_000_000,
        first_step: 0,
        steps: 360_000,
        step_time: Some(StepTime {
            seconds: 0.25,
            source: "measured in this run".into(),
        }),
        max_gpu_hours: Some(100.0),
        gpu_hours_before: 0.0,
        usd_per_gpu_hour: Some(2.5),
    }
}

#[test]
fn the_plan_reads_as_intended() {
    let plan = Plan::new(input()).unwrap();
    let expected = "\
plan for oxe
  model   947,000,000 parameters, 3.5 GiB in f32, 14.1 GiB a worker with gradients and optimizer state
  batch   1,024 samples a step = 16 a micro-batch x 8 workers x 8 accumulated
  steps   360,000, 368,640,000 samples
  time    about 1d 01h at 250ms a step (measured in this run)
  cost    about 200 GPU-hours, 500.00 USD, capped at 100 GPU-hours
  note    the cap ends the run at about step 180,000, before its last
";
    assert_eq!(plan.render(), expected);
}

#[test]
fn a_first_run_knows_no_time() {
    let plan = Plan::new(PlanInput {
        step_time: None,
        max_gpu_hours: None,
        device: "cpu".into(),
        world_size: 1,
        ..input()
    })
    .unwrap();
    let text = plan.render();
    assert!(text.contains("time    unknown"), "{text}");
    assert!(text.contains("cost    no cap"), "{text}");
    assert!(text.contains("x 1 worker x 64 accumulated"), "{text}");
    let Event::Plan(event) = plan.event() else {
        panic!("not a plan");
    };
    assert_eq!(
        (event.expected_s, event.gpu_hours, event.cost_usd),
        (None, None, None)
    );
    assert_eq!((event.accumulation, event.samples), (64, 368_640_000));
}

#[test]
fn a_continued_run_costs_only_the_rest() {
    let plan = Plan::new(PlanInput {
        first_step: 180_000,
        gpu_hours_before: 99.0,
        ..input()
    })
    .unwrap();
    assert_eq!(plan.gpu_hours(), Some(100.0));
    assert_eq!(plan.cost_usd(), Some(250.0));
    // One GPU-hour is left: 8 GPUs do 1800 steps in it.
    assert_eq!(plan.cut_at_step(), Some(181_800));
    let done = Plan::new(PlanInput {
        first_step: 400_000,
        ..input()
    })
    .unwrap();
    assert_eq!(done.expected_s(), Some(0.0));
    assert!(done.render().contains("all done"));
}

#[test]
fn accumulation_is_exact_or_refused() {
    assert_eq!(accumulation(8, 2, 2).unwrap(), 2);
    assert_eq!(accumulation(8, 8, 1).unwrap(), 1);
    let text = accumulation(48, 4, 5).unwrap_err().to_string();
    assert!(
        text.ends_with("world sizes that fit are 1, 2, 3, 4, 6, 12"),
        "{text}"
    );
    let text = accumulation(48, 5, 1).unwrap_err().to_string();
    assert!(
        text.ends_with("micro-batches that fit are 4, 3, 2"),
        "{text}"
    );
    let text = accumulation(8, 2, 0).unwrap_err().to_string();
    assert!(text.contains("0 workers"), "{text}");
}

#[test]
fn every_named_world_size_fits_and_no_other_does() {
    for (global_batch, micro_batch) in [(1024, 16), (48, 4), (7, 1), (9, 3), (10, 4)] {
        let fit = world_sizes(global_batch, micro_batch);
        for size in 1..=64 {
            let works = accumulation(global_batch, micro_batch, size)
                .is_ok_and(|passes| passes * micro_batch * u64::from(size) == global_batch);
            assert_eq!(
                fit.contains(&size),
                works,
                "{global_batch} {micro_batch} {size}"
            );
        }
    }
}

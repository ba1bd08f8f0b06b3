//! What the loaders of all ranks deliver is checked against the sample order, and how much each
//! dataset gave against the recipe's weights.

#![allow(clippy::unwrap_used, reason = "tests")]

mod lab;

use lab::{Lab, saved_steps};
use pollen_observe::{Event, MixtureShare};
use std::collections::BTreeMap;

/// Sample 17 belongs to step 3 (16 to 23) and to one of the two ranks; both say they had it.
const TWICE: &str = "repeat@rank=0,step=3,sample=17;repeat@rank=1,step=3,sample=17";

#[test]
fn a_duplicate_sample_ends_the_run_and_is_named() {
    let lab = Lab::folder();
    let run = lab.launch("twice", 2).fault(TWICE).run().expect(93);
    for part in [
        "step 3:",
        "delivered more than once: 17 (by ranks 0 and",
        "and 1",
        "missing: ",
    ] {
        assert!(run.stderr.contains(part), "{part}: {}", run.stderr);
    }
    let events = run.events();
    let steps = events.iter().filter_map(|record| match &record.event {
        Event::Step(step) => Some(step.step),
        _ => None,
    });
    assert_eq!(steps.max(), Some(2), "the third step changed nothing");
    assert!(run.restores().is_empty(), "nothing is started again");
    // Both ranks end by themselves, with the same reason.
    let ends: Vec<(Option<u32>, i32)> = events
        .iter()
        .filter_map(|record| match &record.event {
            Event::End { exit_code, reason } if reason.contains("17 (by ranks") => {
                Some((record.rank, *exit_code))
            }
            _ => None,
        })
        .collect();
    assert!(
        ends.contains(&(Some(0), 93)) && ends.contains(&(Some(1), 93)),
        "{ends:?}"
    );
    assert!(saved_steps(&run.run_dir()).iter().all(|step| *step <= 2));
}

#[test]
fn the_audit_ends_after_as_many_steps_as_the_recipe_says() {
    let lab = Lab::folder();
    let sets = ["train.audit_steps=2"];
    let run = lab
        .launch("after", 2)
        .set(&sets)
        .fault(TWICE)
        .run()
        .expect(0);
    assert_eq!(run.audits().into_keys().collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn shares_of_the_mixture_stand_beside_their_targets() {
    let lab = Lab::folder();
    let run = lab.launch("shares", 2).run().expect(0);
    let mut given: BTreeMap<String, u64> = BTreeMap::new();
    let mut mixtures = Vec::new();
    for record in run.events() {
        match record.event {
            Event::Step(step) => {
                for (name, samples) in step.datasets {
                    *given.entry(name).or_default() += samples;
                }
            }
            Event::Mixture {
                step,
                samples,
                datasets,
            } => mixtures.push((step, samples, datasets)),
            _ => {}
        }
    }
    let steps: Vec<u64> = mixtures.iter().map(|(step, _, _)| *step).collect();
    assert_eq!(steps, [2, 4, 6, 8], "with every checkpoint");
    let (_, samples, datasets) = mixtures.pop().unwrap();
    assert_eq!(samples, 64);
    assert!(datasets.len() >= 2);
    let sum = |of: fn(&MixtureShare) -> f64| datasets.values().map(of).sum::<f64>();
    assert!((sum(|share| share.target) - 1.0).abs() < 1e-9);
    assert!((sum(|share| share.share) - 1.0).abs() < 1e-9);
    for (name, share) in &datasets {
        // What the steps say they took.
        assert_eq!(share.samples, given[name], "{name}");
        // A block of 64 samples is dealt exactly, to one sample.
        assert!(
            (share.share - share.target).abs() <= 1.0 / 64.0,
            "{name}: {share:?}"
        );
        assert!(run.stdout.contains(name), "{}", run.stdout);
    }
    let line = "mixture of 64 samples, share (target):";
    assert!(run.stdout.contains(line), "{}", run.stdout);
}

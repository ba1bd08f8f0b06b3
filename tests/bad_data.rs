//! Data that went bad in the store: named, left out of the loss, and counted against a cap.

#![allow(clippy::unwrap_used, reason = "tests")]

mod lab;

use lab::Lab;
use pollen_observe::Event;

fn bad_samples(events: &[pollen_observe::Record]) -> Vec<(String, u64, u64)> {
    let named = events.iter().filter_map(|record| match &record.event {
        Event::BadSample {
            dataset,
            episode,
            frame,
            reason,
        } => {
            assert!(reason.contains("crc32c"), "{reason}");
            Some((dataset.clone(), *episode, *frame))
        }
        _ => None,
    });
    named.collect()
}

#[test]
fn a_corrupt_row_group_is_left_out_until_the_cap() {
    let lab = Lab::folder();
    // Uploads the data and their index.
    lab.launch("first", 1)
        .set(&["train.steps=1"])
        .run()
        .expect(0);
    let data = lab.path("bucket/datasets/lift/data/chunk-000/file-000.parquet");
    let mut bytes = std::fs::read(&data).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&data, bytes).unwrap();

    let mut seen = Vec::new();
    for (name, workers) in [("one", 1), ("two", 2)] {
        let run = lab
            .launch(name, workers)
            .set(&["train.steps=12"])
            .run()
            .expect(0);
        let mut bad = bad_samples(&run.events());
        bad.sort_unstable();
        assert!(!bad.is_empty() && bad.len() < 12 * 8, "{bad:?}");
        seen.push(bad);
    }
    assert_eq!(
        seen[0], seen[1],
        "the same samples for any number of workers"
    );

    let capped = lab
        .launch("capped", 2)
        .set(&["train.steps=12", "data.max_bad_samples=0"])
        .run()
        .expect(93);
    let said = capped.stderr + &capped.stdout;
    assert!(said.contains("data.max_bad_samples = 0"), "{said}");
}

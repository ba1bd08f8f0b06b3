//! A loss that is not finite on one rank is skipped by all, counted, and can be looked at.

#![allow(clippy::unwrap_used, reason = "tests")]

mod lab;

use lab::{Finished, Lab};
use pollen_observe::Event;
use serde_json::Value;

/// Step, count, samples and sheet of each `non_finite` event.
fn non_finite(run: &Finished) -> Vec<(u64, u64, Vec<u64>, String)> {
    let events = run.events().into_iter();
    events
        .filter_map(|record| match record.event {
            Event::NonFinite {
                step,
                count,
                samples,
                contact_sheet,
            } => Some((step, count, samples, contact_sheet.unwrap())),
            _ => None,
        })
        .collect()
}

#[test]
fn all_ranks_skip_the_step_and_the_sample_is_shown() {
    let lab = Lab::folder();
    let fault = "poison@rank=1,step=3";
    let run = lab.launch("poisoned", 2).fault(fault).run().expect(0);
    let events = non_finite(&run);
    let [(3, 1, samples, sheet)] = &events[..] else {
        panic!("one event, of step 3: {events:?}")
    };
    assert_eq!(*samples, (16..24).collect::<Vec<u64>>());
    let manifest = run.manifest(&lab, 8);
    assert_eq!(
        (&manifest["step"], &manifest["updates"]),
        (&8.into(), &7.into())
    );
    let losses = run.losses();
    let bad: Vec<u64> = losses
        .iter()
        .filter(|(_, loss)| !loss.is_finite())
        .map(|(step, _)| *step)
        .collect();
    assert_eq!(bad, [3], "the weights stayed whole: {losses:?}");

    // The poisoned sample of each micro-batch is marked, on the rank that had it and only there.
    let folder = run.run_dir().join(sheet);
    let mut shown = Vec::new();
    for rank in 0..2 {
        let text = std::fs::read(folder.join(format!("rank-{rank}.json"))).unwrap();
        let text: Value = serde_json::from_slice(&text).unwrap();
        let picture = std::fs::File::open(folder.join(format!("rank-{rank}.png"))).unwrap();
        let mut picture = png::Decoder::new(std::io::BufReader::new(picture))
            .read_info()
            .unwrap();
        let mut pixels = vec![0; picture.output_buffer_size().unwrap()];
        picture.next_frame(&mut pixels).unwrap();
        let width = picture.info().width as usize;
        let tile = |i: usize| text["tile"][i].as_u64().unwrap() as usize;
        let samples = text["samples"].as_array().unwrap();
        assert_eq!(samples.len(), 4);
        for (number, sample) in samples.iter().enumerate() {
            let at = |key: &str| sample[key].as_u64().unwrap() as usize;
            let pixel = 3 * (at("row") * tile(1) * width + at("column") * tile(0));
            let marked = pixels[pixel..pixel + 3] == [255, 0, 0];
            let poisoned = rank == 1 && number % 2 == 0;
            assert_eq!((marked, sample["loss"].is_null()), (poisoned, poisoned));
            assert!(sample["dataset"].is_string() && sample["episode"].is_number());
            shown.push(sample["sample"].as_u64().unwrap());
        }
        // More than the frame: there are pictures in it.
        let colors: std::collections::BTreeSet<&[u8]> = pixels.chunks(3).collect();
        assert!(colors.len() > 50, "{}", colors.len());
    }
    shown.sort_unstable();
    assert_eq!(shown, *samples, "every sample of the step is shown once");
}

#[test]
fn the_count_survives_a_kill_and_the_cap_stops_the_run_for_good() {
    let lab = Lab::folder();
    // At step 5 the checkpoint of step 2 is there, that of step 4 is or is not.
    let fault = "poison@step=2;poison@step=5;kill@generation=1,step=5,place=data";
    let run = lab
        .launch("capped", 1)
        .set(&["train.max_non_finite_steps=1", "checkpoint.every_steps=2"])
        .fault(fault)
        .run()
        .expect(93);
    assert!(
        run.stderr.contains("train.max_non_finite_steps = 1"),
        "{}",
        run.stderr
    );
    let events = non_finite(&run);
    let last = events.last().unwrap();
    assert_eq!((last.0, last.1), (5, 2), "{events:?}");
    assert_eq!(run.restores().len(), 1);
}

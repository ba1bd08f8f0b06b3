#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::{Arc, Mutex};

use super::*;
use crate::events::{StartEvent, StepEvent};

#[derive(Clone, Default)]
struct Page(Arc<Mutex<Vec<u8>>>);

impl Write for Page {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Page {
    fn lines(&self) -> Vec<String> {
        let bytes = self.0.lock().unwrap().clone();
        let text = String::from_utf8(bytes).unwrap();
        text.lines().map(str::to_owned).collect()
    }
}

fn at(second: u64, event: Event) -> Record {
    Record {
        time: SystemTime::UNIX_EPOCH + Duration::from_secs(second),
        run: "r".into(),
        generation: 1,
        rank: Some(0),
        event,
    }
}

fn start(step: u64, device: &str) -> Event {
    Event::Start(StartEvent {
        world_size: 2,
        step,
        steps: 1000,
        device: device.into(),
        communicator: "gloo".into(),
        max_gpu_hours: Some(2.0),
        ..StartEvent::default()
    })
}

fn step(step: u64) -> Event {
    Event::Step(StepEvent {
        step,
        loss: 0.5,
        samples_per_s: 12.34,
        data_wait: 0.031,
        ..StepEvent::default()
    })
}

#[test]
fn the_line_says_all_that_matters() {
    let view = RunView::of(&[at(0, start(0, "cuda")), at(900, step(1)), at(1800, step(2))]);
    assert_eq!(
        line(&view),
        "step 2/1,000  loss 0.5000  12.3 samples/s  data wait 3%  1.00 of 2.00 GPU-hours  \
         10d 09h left"
    );
}

#[test]
fn plain_lines_come_at_the_configured_pace_and_at_the_end() {
    let page = Page::default();
    let mut progress = Progress::plain(&Config::default(), Box::new(page.clone()));
    progress.update(&[at(0, start(0, "cpu"))]);
    for second in 1..=25 {
        progress.update(&[at(second, step(second))]);
    }
    progress.update(&[at(26, step(1000))]);
    let lines = page.lines();
    let steps: Vec<&str> = lines
        .iter()
        .skip(1)
        .map(|l| l.split("  ").next().unwrap())
        .collect();
    assert_eq!(
        steps,
        [
            "step 1/1,000",
            "step 11/1,000",
            "step 21/1,000",
            "step 1,000/1,000"
        ]
    );
    assert_eq!(
        lines[0],
        "start: generation 1, 2 workers (cpu, gloo), step 0 of 1,000"
    );
    assert!(lines[1].contains("of 2.00 worker-hours"), "{}", lines[1]);
}

#[test]
fn a_restart_is_told_and_its_first_step_shown_at_once() {
    let page = Page::default();
    let mut progress = Progress::plain(&Config::default(), Box::new(page.clone()));
    progress.update(&[
        at(0, start(0, "cpu")),
        at(1, step(50)),
        at(
            2,
            Event::Restart {
                reason: "rank 1 was killed by signal 9".into(),
                exit_codes: vec![143, 137],
                pause_s: 1.0,
            },
        ),
        at(3, start(40, "cpu")),
        at(4, step(41)),
    ]);
    let lines = page.lines();
    assert_eq!(lines[2], "restart: rank 1 was killed by signal 9, in 1.0s");
    assert!(lines[4].starts_with("step 41/1,000"), "{lines:?}");
}

#[test]
fn a_flood_of_bad_samples_does_not_flood_the_terminal() {
    let page = Page::default();
    let mut progress = Progress::plain(&Config::default(), Box::new(page.clone()));
    for frame in 0..500 {
        progress.update(&[at(
            1,
            Event::BadSample {
                dataset: "lift".into(),
                episode: 1,
                frame,
                reason: "not a JPEG".into(),
            },
        )]);
    }
    assert_eq!(page.lines().len(), 5);
    assert_eq!(progress.view().num_bad_samples, 500);
}

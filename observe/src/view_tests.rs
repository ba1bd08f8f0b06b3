#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use super::*;

pub(crate) fn at(second: u64, rank: Option<u32>, event: Event) -> Record {
    Record {
        time: SystemTime::UNIX_EPOCH + Duration::from_secs(second),
        run: "r".into(),
        generation: 1,
        rank,
        event,
    }
}

fn step(step: u64) -> Event {
    Event::Step(StepEvent {
        step,
        samples: step * 8,
        phases: BTreeMap::from([("forward".into(), 3.0), ("data".into(), 1.0)]),
        ..StepEvent::default()
    })
}

fn start(step: u64, before: f64) -> Event {
    Event::Start(StartEvent {
        world_size: 2,
        step,
        steps: 100,
        gpu_hours_before: before,
        ..StartEvent::default()
    })
}

#[test]
fn the_pace_and_the_time_left_come_from_this_generation() {
    let view = RunView::of(&[
        at(0, Some(0), start(0, 0.0)),
        at(100, Some(0), step(1)),
        at(1000, Some(0), start(10, 1.0)),
        at(1004, Some(0), step(11)),
        at(1008, Some(0), step(12)),
    ]);
    assert_eq!(view.seconds_per_step(), Some(4.0));
    assert_eq!(view.seconds_left(), Some(88.0 * 4.0));
    assert_eq!(view.gpu_hours(), Some(1.0 + 2.0 * 8.0 / 3600.0));
    assert_eq!(view.phase_shares(), vec![("forward", 0.75), ("data", 0.25)]);
}

#[test]
fn other_ranks_do_not_count_twice() {
    let view = RunView::of(&[
        at(0, Some(0), start(0, 0.0)),
        at(0, Some(1), start(0, 0.0)),
        at(4, Some(0), step(1)),
        at(5, Some(1), step(1)),
        at(
            6,
            Some(1),
            Event::BadSample {
                dataset: "d".into(),
                episode: 0,
                frame: 0,
                reason: "x".into(),
            },
        ),
    ]);
    assert_eq!(view.phases["forward"], 3.0);
    assert_eq!(view.seconds_per_step(), Some(4.0));
    assert_eq!(view.num_bad_samples, 1);
}

#[test]
fn the_launcher_has_the_last_word_and_a_restart_takes_it_back() {
    let end = |rank, exit_code| {
        at(
            1,
            rank,
            Event::End {
                exit_code,
                reason: "x".into(),
            },
        )
    };
    let mut view = RunView::of(&[end(Some(1), 75), end(Some(0), 70), end(None, 1)]);
    assert_eq!(view.end.as_ref().unwrap().0, 1);
    view.apply(&end(Some(0), 70));
    assert_eq!(view.end.as_ref().unwrap().0, 1);
    view.apply(&at(
        2,
        None,
        Event::Restart {
            reason: "rank 1".into(),
            exit_codes: vec![143, 137],
            pause_s: 1.0,
        },
    ));
    assert_eq!(view.end, None);
    assert_eq!(view.num_restarts, 1);
}

#[test]
fn an_exchange_is_proved_by_different_own_and_equal_reduced_gradients() {
    let exchange = |rank, own: &str, reduced: &str| {
        at(
            1,
            Some(rank),
            Event::GradientExchange {
                step: 3,
                own_hash: own.into(),
                reduced_hash: reduced.into(),
            },
        )
    };
    let proved = |records: &[Record]| RunView::of(records).exchange_proved();
    assert_eq!(
        proved(&[exchange(0, "a", "s"), exchange(1, "b", "s")]),
        Some((3, 2))
    );
    assert_eq!(
        proved(&[exchange(0, "a", "s"), exchange(1, "a", "s")]),
        None
    );
    assert_eq!(
        proved(&[exchange(0, "a", "s"), exchange(1, "b", "t")]),
        None
    );
    assert_eq!(proved(&[exchange(0, "a", "s")]), None);
}

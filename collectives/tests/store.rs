//! The store as its users see it.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use pollen_collectives::{
    Absence, Deadline, Error, Event, Member, MemberState, Store, StoreServer, Swap,
};
use pollen_core::ErrorClass;

fn long() -> Deadline {
    Deadline::after(Duration::from_mins(1))
}

fn short() -> Deadline {
    Deadline::after(Duration::from_millis(20))
}

fn start() -> (StoreServer, Store) {
    let server = StoreServer::bind("127.0.0.1:0").unwrap();
    let store = Store::connect(&server.address().to_string(), long()).unwrap();
    (server, store)
}

#[test]
fn views_keep_generations_apart() {
    let (_server, store) = start();
    let (second, third) = (store.prefixed("g2/"), store.prefixed("g3/"));
    second.set("step", b"10").unwrap();
    assert_eq!(third.try_get("step").unwrap(), None);
    assert_eq!(store.get("g2/step", long()).unwrap(), b"10");
    assert_eq!(third.add("attempts", 2).unwrap(), 2);
    assert_eq!(third.add("attempts", -5).unwrap(), -3);
    assert_eq!(
        third.compare_and_set("leader", None, b"a").unwrap(),
        Swap::Done
    );
    let conflict = third.compare_and_set("leader", None, b"b").unwrap();
    assert_eq!(conflict, Swap::Conflict(Some(b"a".to_vec())));
    assert_eq!(store.delete_prefix("g3/").unwrap(), 2);
    assert_eq!(store.try_get("g2/step").unwrap(), Some(b"10".to_vec()));
}

#[test]
fn one_thread_can_wait_while_another_sets() {
    let (_server, store) = start();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| store.get("late", long()));
        store.set("late", b"value").unwrap();
        assert_eq!(waiting.join().unwrap().unwrap(), b"value");
    });
    let error = store.get("never", short()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("`never`") && text.contains("20ms"), "{text}");
}

#[test]
fn gather_gives_all_values_in_rank_order_to_all() {
    let (_server, store) = start();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..5_u8)
            .map(|rank| {
                let view = store.prefixed("g1/");
                scope.spawn(move || view.gather("sizes", rank.into(), 5, &[rank; 3], long()))
            })
            .collect();
        for rank in ranks {
            let values = rank.join().unwrap().unwrap();
            assert_eq!(values, (0..5).map(|rank| vec![rank; 3]).collect::<Vec<_>>());
        }
    });
}

#[test]
fn a_gather_that_lacks_ranks_names_them_and_their_hosts() {
    let (_server, store) = start();
    store.register_host(1, "node-b").unwrap();
    let view = store.prefixed("g7/").prefixed("checkpoint/");
    let error = view.gather("step 4", 0, 3, b"x", short()).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Retryable);
    let text = error.to_string();
    assert!(
        text.contains("`g7/checkpoint/step 4`: 2 of 3 ranks missing"),
        "{text}"
    );
    assert!(text.contains("rank 1 (node-b, never came)"), "{text}");
    assert!(text.contains("rank 2 (host unknown, never came)"), "{text}");
    assert_eq!(error.missing()[0].how, Absence::NeverCame);

    let again = view.barrier("step 4", 0, 3, short()).unwrap_err();
    assert!(
        matches!(again, Error::NameReused { rank: 0, .. }),
        "{again}"
    );
}

#[test]
fn the_others_hear_at_once_who_died_who_left_and_who_reported() {
    let (_server, store) = start();
    let watcher = store.join("ranks", 0, "node-a").unwrap();
    let leaver = store.join("ranks", 1, "node-b").unwrap();
    let victim = store.join("ranks", 2, "node-c").unwrap();

    leaver.report("out of disk").unwrap();
    let reported = Event::Reported {
        rank: 1,
        text: "out of disk".into(),
    };
    assert_eq!(watcher.next_event().unwrap(), Some(reported.clone()));
    leaver.leave().unwrap();
    let left = Event::Left { rank: 1 };
    assert_eq!(watcher.next_event().unwrap(), Some(left.clone()));
    drop(victim); // closes its connection without a good-bye, as a dying process does
    let lost = Event::Lost {
        rank: 2,
        host: "node-c".into(),
    };
    assert_eq!(watcher.next_event().unwrap(), Some(lost.clone()));

    let states: Vec<_> = store
        .members("ranks")
        .unwrap()
        .into_iter()
        .map(|m| m.state)
        .collect();
    assert_eq!(
        states,
        [MemberState::Present, MemberState::Left, MemberState::Lost]
    );
    // Who joins later hears what happened before.
    let late = store.join("ranks", 3, "node-d").unwrap();
    for event in [reported, left, lost] {
        assert_eq!(late.next_event().unwrap(), Some(event));
    }
}

#[test]
fn a_seat_is_taken_once() {
    let (_server, store) = start();
    let seat = store.join("ranks", 0, "node-a").unwrap();
    let text = store.join("ranks", 0, "node-b").unwrap_err().to_string();
    assert!(
        text.contains("rank 0 of `ranks` is taken by node-a"),
        "{text}"
    );
    seat.leave().unwrap();
    store.join("ranks", 0, "node-b").unwrap_err();
    // Only a group in which nobody is present can be forgotten.
    store.delete_prefix("ranks").unwrap();
    let seat = store.join("ranks", 0, "node-b").unwrap();
    store.delete_prefix("ranks").unwrap();
    let member = Member {
        rank: 0,
        host: "node-b".into(),
        state: MemberState::Present,
    };
    assert_eq!(store.members("ranks").unwrap(), [member]);
    drop(seat);
}

#[test]
fn leaving_ends_the_wait_for_events_on_another_thread() {
    let (_server, store) = start();
    let seat = store.join("ranks", 0, "node-a").unwrap();
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| seat.next_event());
        seat.leave().unwrap();
        assert_eq!(watching.join().unwrap().unwrap(), None);
    });
}

#[test]
fn an_unreachable_server_is_named() {
    let address = {
        let server = StoreServer::bind("127.0.0.1:0").unwrap();
        server.address().to_string()
    };
    let error = Store::connect(&address, short()).unwrap_err();
    assert!(error.to_string().contains(&address), "{error}");
    assert_eq!(error.class(), ErrorClass::Retryable);
}

#[test]
fn a_lost_server_is_named_and_retryable() {
    let (server, store) = start();
    let address = server.address().to_string();
    drop(server);
    let error = store.set("key", b"value").unwrap_err();
    assert!(error.to_string().contains(&address), "{error}");
    assert_eq!(error.class(), ErrorClass::Retryable);
}

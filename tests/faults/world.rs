//! What all cases share: a store, an undisturbed run, and what must be true after a fault.

use std::collections::{BTreeMap, BTreeSet};

use pollen_checkpoints::{Checkpoints, Restored, State};
use pollen_observe::{Event, Record};

use crate::cases::{Any, Case, Kind, STEPS, first_kill};
use crate::lab::{Finished, Lab, Launch, fetch, open, processes_of, wait_for};
use crate::places::{Group, Place, parse};
use crate::proxy::{Asked, Proxy};
use crate::store_cases::{REQUEST_TIMEOUT, StoreCase};

/// Six steps and three checkpoints, of which one is kept, so that saving deletes as well.
const SETS: &[&str] = &[
    "train.steps=6",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=1",
];

/// A beat every 0.1 s and silence from 3 s on: thirty beats may be late.
const WATCHFUL: &[&str] = &[
    "watchdog.interval=100ms",
    "watchdog.min_timeout=3s",
    "watchdog.max_timeout=3s",
];

/// The variable that leads S3 clients to a server.
const ENDPOINT: &str = "AWS_ENDPOINT_URL";

/// Where a run went.
pub(crate) struct Traced {
    pub places: Vec<Place>,
    pub requests: Vec<Asked>,
}

/// The store, the undisturbed run and the places that faults can strike.
pub(crate) struct World {
    lab: Lab,
    want: BTreeMap<String, String>,
    losses: BTreeMap<u64, f64>,
    pub calm: Traced,
    pub resumed: Traced,
    runtime: tokio::runtime::Runtime,
}

impl World {
    /// Starts SeaweedFS and trains undisturbed, then once more with one kill: both are traced.
    pub(crate) fn new() -> Self {
        let lab = Lab::s3();
        let trace = |name: &str| format!("trace@to={}", lab.path(name).display());
        let traced = |name: &str, proxy: &Proxy| Traced {
            places: parse(&std::fs::read_to_string(lab.path(name)).unwrap()),
            requests: proxy.seen(),
        };
        let proxy = Proxy::start(&lab.server().endpoint(), None);
        let running = launch(&lab, "calm")
            .env(ENDPOINT, &proxy.endpoint())
            .fault(&trace("calm.trace"))
            .spawn();
        // The look-out for orphans does see a run's processes.
        wait_for("the launcher and both workers", || {
            (processes_of(&lab.path("runs-calm")).len() == 3).then_some(())
        });
        let run = running.wait().expect(0);
        let calm = traced("calm.trace", &proxy);

        let proxy = Proxy::start(&lab.server().endpoint(), None);
        launch(&lab, "resumed")
            .env(ENDPOINT, &proxy.endpoint())
            .fault(&format!("{};{}", trace("resumed.trace"), first_kill()))
            .run()
            .expect(0);
        let resumed = traced("resumed.trace", &proxy);
        assert_read_from_store(&resumed.requests);
        let world = Self {
            want: run.state_hashes(&lab, STEPS),
            losses: run.losses(),
            calm,
            resumed,
            runtime: tokio::runtime::Runtime::new().unwrap(),
            lab,
        };
        world.assert_whole("calm", &run);
        world
    }

    /// Runs a case and panics where the run did not end as it must.
    pub(crate) fn check(&self, case: &Any) {
        match case {
            Any::Rank(case) => self.check_rank(case),
            Any::Store(case) => self.check_store(case),
        }
        let left = processes_of(&self.lab.path(&format!("runs-{}", case.name())));
        assert!(left.is_empty(), "processes are left: {left:?}");
    }

    /// The store's fault is outlived: nobody is started again for it.
    fn check_store(&self, case: &StoreCase) {
        let proxy = Proxy::start(&self.lab.server().endpoint(), Some(case.order.clone()));
        let mut launch = launch(&self.lab, &case.name)
            .set(&[REQUEST_TIMEOUT])
            .env(ENDPOINT, &proxy.endpoint());
        if case.resumed {
            launch = launch.fault(&first_kill());
        }
        let run = launch.run().expect(0);
        assert!(
            proxy.struck(),
            "the request did not come: {:?}",
            proxy.seen()
        );
        self.assert_whole(&case.name, &run);
        let last = run.events().iter().map(|record| record.generation).max();
        assert_eq!(last, Some(1 + u64::from(case.resumed)), "starts");
    }

    fn check_rank(&self, case: &Case) {
        let name = &case.name;
        let mark = |number: u64| self.lab.path(&format!("{name}.{number}"));
        let mut launch = launch(&self.lab, name).fault(&case.fault(mark));
        if case.kind == Kind::Freeze {
            launch = launch.set(WATCHFUL);
        }
        let run = launch.run().expect(0);
        for number in 1..=case.strikes() {
            let mark = mark(number);
            assert!(mark.exists(), "fault {number} did not strike");
        }
        self.assert_whole(name, &run);
        let events = run.events();
        let last = events.iter().map(|record| record.generation).max();
        assert_eq!(last, Some(case.strikes() + 1), "one start for each fault");
        if case.kind == Kind::Freeze {
            assert_named(case, &events);
        }
        assert_resumed(case, &events);
    }

    /// The weights are those of the undisturbed run, made by workers that exchanged gradients and
    /// had everything from the store; every committed checkpoint verifies and nothing else is left.
    fn assert_whole(&self, name: &str, run: &Finished) {
        let url = format!(
            "s3://pollen-test/runs-{name}/demo/{}/checkpoints",
            run.run_id()
        );
        let storage = open(&self.lab, &url);
        let checkpoints = Checkpoints::new(storage, self.runtime.handle().clone());
        let listed = checkpoints.list().unwrap();
        for one in &listed {
            if matches!(one.state, State::Published | State::Damaged) {
                checkpoints.verify(one.id).unwrap().unwrap();
            }
        }
        let restored = checkpoints.newest().unwrap().unwrap();
        let newest = restored.manifest.id();
        assert_eq!(newest.step, STEPS, "the last step is saved");
        assert_eq!(state(&restored), self.want, "weights and moments");
        assert_eq!(run.losses(), self.losses, "the losses");
        let events = run.events();
        assert_exchanged(&events);
        let config = run.config();
        assert!(
            config.data.root.starts_with("s3://"),
            "{}",
            config.data.root
        );

        // The log decides: whoever is killed right after an entry has told nobody of it.
        let last = events.iter().map(|record| record.generation).max();
        let saved = |record: &&Record| matches!(record.event, Event::Checkpoint { .. });
        let saver = events.iter().rfind(saved);
        if saver.map(|record| record.generation) == last {
            // Whoever saves last deletes what is not kept and what dead attempts left.
            let ids: Vec<_> = listed.iter().map(|one| (one.id, one.state)).collect();
            assert_eq!(ids, [(newest, State::Published)], "nothing else is left");
            let hint = String::from_utf8(fetch(&self.lab, &format!("{url}/LATEST"))).unwrap();
            assert_eq!(hint.trim_end(), newest.to_string());
        }
    }
}

/// SHA-256 of every weight and optimizer file.
fn state(restored: &Restored) -> BTreeMap<String, String> {
    let files = restored.manifest.files.iter();
    let tensors = files.filter(|file| file.name.ends_with(".safetensors"));
    tensors
        .map(|file| (file.name.clone(), file.sha256.clone()))
        .collect()
}

fn launch(lab: &Lab, name: &str) -> Launch {
    lab.launch(name, 2).set(SETS)
}

/// After a start claimed the run, its workers alone talk to the store: they read their data and the
/// checkpoint there.
fn assert_read_from_store(requests: &[Asked]) {
    let claim = |asked: &Asked| asked.method == "PUT" && asked.object == "log entry";
    let first = requests.iter().position(claim).unwrap();
    let reads = |object: &str| {
        let gets = requests[first..]
            .iter()
            .filter(|asked| asked.method == "GET");
        gets.filter(|asked| asked.object.starts_with(object))
            .count()
    };
    assert!(reads("data *.parquet") > 0, "{requests:?}");
    assert!(reads("model-") > 0 && reads("optim-") > 0, "{requests:?}");
}

/// The frozen rank was found to hang.
fn assert_named(case: &Case, events: &[Record]) {
    let named: Vec<Option<u32>> = events
        .iter()
        .filter_map(|record| match &record.event {
            Event::Hang { hung_rank, .. } => Some(*hung_rank),
            _ => None,
        })
        .collect();
    assert_eq!(named, [Some(case.place.rank)], "the rank that hangs");
}

/// In every start that trained, two workers had gradients of their own and the same sum.
fn assert_exchanged(events: &[Record]) {
    let mut seen: BTreeMap<u64, (BTreeSet<&str>, BTreeSet<&str>)> = BTreeMap::new();
    for record in events {
        if let Event::GradientExchange {
            own_hash,
            reduced_hash,
            ..
        } = &record.event
        {
            let (own, reduced) = seen.entry(record.generation).or_default();
            own.insert(own_hash);
            reduced.insert(reduced_hash);
        }
    }
    let whole = |(own, reduced): &(BTreeSet<&str>, BTreeSet<&str>)| {
        own.len() == 2 && reduced.len() == 1 && own.is_disjoint(reduced)
    };
    // The last start that trained went through its first step whole; one that was struck may not.
    let trained = seen.last_key_value().map(|(_, hashes)| hashes);
    assert!(trained.is_some_and(whole), "gradients exchanged: {seen:?}");
}

/// Every start went on from a checkpoint at least as new as the newest that was known to be saved;
/// a struck save counts from its entry in the log on.
fn assert_resumed(case: &Case, events: &[Record]) {
    let mut acknowledged = 0;
    let mut restored = BTreeMap::new();
    // By start: the newest step that was known to be saved before it.
    let mut known = BTreeMap::new();
    for record in events {
        match &record.event {
            Event::Checkpoint { step, .. } => acknowledged = acknowledged.max(*step),
            Event::Restore { step, url, skipped } => {
                assert!(url.starts_with("s3://"), "{url}");
                assert!(skipped.is_empty(), "{skipped:?}");
                assert!(*step >= acknowledged, "{step} {acknowledged}");
                restored.insert(record.generation, *step);
            }
            Event::Start(start) => {
                let from = restored.get(&record.generation).copied().unwrap_or(0);
                assert_eq!(start.step, from, "generation {}", record.generation);
                assert!(start.step >= acknowledged, "a checkpoint was lost");
                known.insert(record.generation, acknowledged);
            }
            _ => {}
        }
    }
    let last = case.strikes() + 1;
    match case.group {
        Group::Start => assert!(restored.is_empty(), "{restored:?}"),
        // Nothing waits for the first save until the second begins: a rank that is struck there may
        // take the first with it.
        Group::Step if case.place.name == "checkpoint" && known[&last] == 0 => {}
        Group::Step | Group::Restore => assert!(restored.contains_key(&last), "{restored:?}"),
        Group::Save => {
            let want = case.place.step - if case.committed { 0 } else { 2 };
            let first = restored.first_key_value().map(|(_, step)| *step);
            assert_eq!(first, Some(want), "the entry in the log is the commit");
            assert!(restored.contains_key(&last), "{restored:?}");
        }
    }
}

/// Returns today's number, which chooses the tenth that CI runs.
pub(crate) fn today() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.unwrap().as_secs() / 86_400
}

//! Real processes: this test binary starts itself as ranks, and kills one.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pollen_collectives::{
    Absence, Backend, Config, Deadline, ReduceOp, Store, StoreServer, rendezvous,
};

const ROLE: &str = "COLLECTIVES_TEST_ROLE";

fn patient() -> Deadline {
    Deadline::after(Duration::from_mins(2))
}

/// Processes that are killed, if need be, when the test ends.
struct Ranks(Vec<Child>);

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Starts `world` ranks that play `role`.
fn start(server: &StoreServer, role: &str, world: u32) -> Ranks {
    let rank = |rank: u32| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "one_rank", "--ignored", "--nocapture"])
            .env(ROLE, role)
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", world.to_string())
            .env("MASTER", server.address().to_string())
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    };
    Ranks((0..world).map(rank).collect())
}

fn connect(server: &StoreServer) -> Store {
    Store::connect(&server.address().to_string(), patient()).unwrap()
}

fn text(store: &Store, key: &str) -> String {
    String::from_utf8(store.get(key, patient()).unwrap()).unwrap()
}

/// Not a test: what the started processes run.
#[test]
#[ignore = "started by the other tests of this file"]
fn one_rank() {
    let variable = |name: &str| std::env::var(name).unwrap();
    let number = |name: &str| variable(name).parse::<u32>().unwrap();
    let (rank, world) = (number("RANK"), number("WORLD_SIZE"));
    let store = Store::connect(&variable("MASTER"), patient()).unwrap();
    let config = Config {
        backend: Backend::Gloo,
        // Far beyond the patience of the test: a survivor must not depend on it.
        timeout: Duration::from_hours(1),
        ..Config::default()
    };
    let comm = rendezvous::connect(&config, &store, rank, world, 1).unwrap();
    match variable(ROLE).as_str() {
        "sum" => {
            let own = vec![f64::from(rank + 1); 50_001];
            let handle = comm.all_reduce(own.into(), ReduceOp::Sum).unwrap();
            let sum: Vec<f64> = handle.wait().unwrap().try_into().unwrap();
            let least = sum.iter().copied().fold(f64::INFINITY, f64::min);
            let most = sum.iter().copied().fold(0.0, f64::max);
            let result = format!("{least} {most} {}", sum.len());
            store
                .set(&format!("result/{rank}"), result.as_bytes())
                .unwrap();
            // Ends without a barrier: a rank that is done must not disturb the others.
        }
        "idle victim" => {
            if rank == 1 {
                store.set("ready", b"").unwrap();
                // Never set: waits until it is killed.
                let _ = store.get("never", patient());
                return;
            }
            let big = vec![1.0_f32; 4 << 20];
            let handle = comm.all_reduce(big.into(), ReduceOp::Sum).unwrap();
            store.set(&format!("submitted/{rank}"), b"").unwrap();
            report(&store, rank, handle.wait());
        }
        "busy victim" => {
            // All ranks reduce without end; one of them is killed after a few rounds.
            for round in 0_u64.. {
                // Ends this process, too, should the test be killed: then the store is gone.
                store.set(&format!("round/{rank}"), b"").unwrap();
                let big = vec![1.0_f32; 4 << 20];
                let done = comm.all_reduce(big.into(), ReduceOp::Sum).unwrap().wait();
                if done.is_err() {
                    report(&store, rank, done);
                    // Further operations fail at once, and the communicator says why.
                    comm.barrier().unwrap_err();
                    comm.poll_error().unwrap();
                    store.set(&format!("poisoned/{rank}"), b"").unwrap();
                    return;
                }
                if rank == 1 && round == 3 {
                    store.set("ready", b"").unwrap();
                }
            }
        }
        other => panic!("unknown role {other}"),
    }
}

/// Tells the test how an operation failed.
fn report<T: std::fmt::Debug>(store: &Store, rank: u32, result: pollen_collectives::Result<T>) {
    let error = result.unwrap_err();
    let dead = error
        .missing()
        .iter()
        .filter(|absent| absent.how == Absence::Died);
    let dead: Vec<String> = dead.map(|absent| absent.rank.to_string()).collect();
    let verdict = format!("dead: {}; {error}", dead.join(" "));
    store
        .set(&format!("verdict/{rank}"), verdict.as_bytes())
        .unwrap();
}

#[test]
fn three_processes_add_up() {
    let server = StoreServer::bind("127.0.0.1:0").unwrap();
    let store = connect(&server);
    let mut ranks = start(&server, "sum", 3);
    for rank in 0..3 {
        assert_eq!(text(&store, &format!("result/{rank}")), "6 6 50001");
    }
    for child in &mut ranks.0 {
        assert!(child.wait().unwrap().success());
    }
}

#[test]
fn killing_a_rank_that_others_wait_for_names_it() {
    let server = StoreServer::bind("127.0.0.1:0").unwrap();
    let store = connect(&server);
    let mut ranks = start(&server, "idle victim", 3);
    for key in ["ready", "submitted/0", "submitted/2"] {
        store.get(key, patient()).unwrap();
    }
    ranks.0[1].kill().unwrap();
    for survivor in [0, 2] {
        let verdict = text(&store, &format!("verdict/{survivor}"));
        assert!(verdict.starts_with("dead: 1; "), "{verdict}");
        assert!(
            verdict.contains("rank 1 (") && verdict.contains(", died)"),
            "{verdict}"
        );
    }
}

#[test]
fn killing_a_rank_in_the_middle_of_transfers_ends_the_others() {
    let server = StoreServer::bind("127.0.0.1:0").unwrap();
    let store = connect(&server);
    let mut ranks = start(&server, "busy victim", 4);
    store.get("ready", patient()).unwrap();
    ranks.0[1].kill().unwrap();
    for survivor in [0, 2, 3] {
        let verdict = text(&store, &format!("verdict/{survivor}"));
        assert!(verdict.starts_with("dead: 1; "), "{verdict}");
        store
            .get(&format!("poisoned/{survivor}"), patient())
            .unwrap();
        assert!(ranks.0[survivor].wait().unwrap().success());
    }
}

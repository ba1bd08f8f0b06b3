use std::path::Path;
use std::process::Command;

use super::*;
use crate::config::{Backend, Config};
use crate::error::Absence;
use crate::ffi::id_of;
use crate::store::StoreServer;
use crate::{DType, HostBuffer, NcclCheck, rendezvous};

/// A library that does what NCCL and the driver do, compiled to behave in a certain way.
struct Fake {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Fake {
    fn new(defines: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("libfake.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_nvidia.cc");
        let built = Command::new(std::env::var("CXX").unwrap_or_else(|_| "c++".into()))
            .args(["-shared", "-fPIC", "-std=c++17", "-o"])
            .arg(&path)
            .arg(&source)
            .args(defines)
            .status()
            .expect("a C++ compiler");
        assert!(built.success(), "{}", source.display());
        Self { _dir: dir, path }
    }

    fn places(&self) -> Places {
        Places {
            nccl: vec!["/no/libnccl.so.2".into(), self.path.clone()],
            driver: vec![self.path.clone()],
        }
    }

    #[allow(unsafe_code, reason = "asks the library what was called")]
    fn count(&self, name: &str) -> i32 {
        // SAFETY: the test's own library, whose counters take nothing and return a number.
        unsafe {
            let library = libloading::Library::new(&self.path).expect("it is open already");
            let count = library.get::<unsafe extern "C" fn() -> i32>(name.as_bytes());
            count.expect("the fake has it")()
        }
    }
}

/// Runs `body` on every rank, one thread each, connected over Gloo and the fake.
fn run<T: Send>(
    fake: &Fake,
    world: u32,
    timeout: Duration,
    body: impl Fn(Result<Nccl>) -> T + Sync,
) -> Vec<T> {
    let server = StoreServer::bind("127.0.0.1:0").expect("a port");
    let address = server.address().to_string();
    let config = Config {
        backend: Backend::Gloo,
        ..Config::default()
    };
    let rank = |rank: u32| {
        let deadline = Deadline::after(Duration::from_mins(1));
        let store = Store::connect(&address, deadline).expect("the store");
        let gloo = rendezvous::connect_gloo(&config, &store, rank, world, 1).expect("gloo");
        let view = store.prefixed("g1/communicator/");
        let limits = (timeout, Deadline::after(timeout));
        body(Nccl::start(gloo, 0, &view, &fake.places(), limits))
    };
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world).map(|r| scope.spawn(move || rank(r))).collect();
        let ends = ranks.into_iter().map(std::thread::ScopedJoinHandle::join);
        ends.map(|end| end.expect("the rank did not panic"))
            .collect()
    })
}

const LONG: Duration = Duration::from_mins(10);

/// Names a vector's memory, which the fake takes for a GPU's.
#[allow(unsafe_code, reason = "tests name memory")]
fn device<T>(values: &mut [T], dtype: DType) -> Buffer {
    // SAFETY: callers wait for the operation while they hold the vector.
    Buffer::Device(unsafe { DeviceBuffer::new(values.as_mut_ptr() as u64, values.len(), dtype) })
}

#[test]
fn operations_work_on_device_memory_in_place_and_on_host_memory() {
    let fake = Fake::new(&[]);
    let results = run(&fake, 3, LONG, |nccl| {
        let nccl = nccl.expect("connected");
        let rank = nccl.rank();
        let mut sum = [rank as f32, 10.0];
        let wait = |handle: Result<Handle>| handle.expect("submitted").wait().expect("done");
        wait(nccl.all_reduce(device(&mut sum, DType::F32), ReduceOp::Sum));
        assert_eq!(sum, [3.0, 30.0]);
        let mut halves = [half::bf16::from_f32(rank as f32)];
        wait(nccl.all_reduce(device(&mut halves, DType::Bf16), ReduceOp::Sum));
        assert_eq!(halves[0].to_f32(), 3.0);
        let mut most = [i64::from(rank)];
        wait(nccl.all_reduce(device(&mut most, DType::I64), ReduceOp::Max));
        assert_eq!(most, [2]);
        let lossy = [
            nccl.all_reduce(device(&mut halves, DType::Bf16), ReduceOp::Max),
            nccl.reduce_scatter(device(&mut [0.0_f32; 3], DType::F32), ReduceOp::Min),
        ];
        for refused in lossy {
            let text = refused.expect_err("a NaN would be lost").to_string();
            assert!(text.contains("copy the buffer to the host"), "{text}");
        }

        let mut parts = [1_i64, 2, 3, 4, 5, 6];
        let part = wait(nccl.reduce_scatter(device(&mut parts, DType::I64), ReduceOp::Sum));
        let Buffer::Device(part) = part else {
            panic!("{part:?}")
        };
        let start = rank as usize * 2;
        assert_eq!(part.pointer(), (&raw const parts[start]) as u64);
        assert_eq!(part.len(), 2);
        assert_eq!(parts[start], 3 * (start as i64 + 1));

        let mut all = [0.0_f64; 3];
        all[rank as usize] = f64::from(rank) + 0.5;
        wait(nccl.all_gather(device(&mut all, DType::F64)));
        assert_eq!(all, [0.5, 1.5, 2.5]);
        let mut word = [rank as u8];
        wait(nccl.broadcast(device(&mut word, DType::U8), 2));
        assert_eq!(word, [2]);

        let host = wait(nccl.all_reduce(vec![1.0_f64].into(), ReduceOp::Sum));
        assert_eq!(
            host.into_host("test").expect("host"),
            HostBuffer::F64(vec![3.0])
        );
        nccl.barrier().expect("all are here");
        let uneven = nccl.reduce_scatter(device(&mut [0_u8; 4], DType::U8), ReduceOp::Sum);
        assert!(uneven.expect_err("4 in 3").to_string().contains("pad"));
        assert!(nccl.poll_error().is_none());
    });
    assert_eq!(results.len(), 3);
    let ends = (fake.count("fake_destroyed"), fake.count("fake_aborted"));
    assert_eq!(ends, (3, 0), "all closed in good order");
}

#[test]
fn libraries_that_do_not_fit_are_refused_with_the_reason() {
    let missing = Places {
        nccl: vec!["/no/libnccl.so.2".into(), "libnone-of-this-name.so".into()],
        driver: Vec::new(),
    };
    let error = Nvidia::open(&missing.nccl, &missing.driver).expect_err("absent");
    let text = error.to_string();
    for word in [
        "/no/libnccl.so.2 (no such file)",
        "libnone-of-this-name.so",
        "POLLEN_NCCL_LIBRARY",
    ] {
        assert!(text.contains(word), "{word} is not in {text}");
    }
    for (define, word) in [
        ("-DFAKE_VERSION=21403", "version 2.14.3; 2.18 or newer"),
        ("-DFAKE_LACKS_ABORT", "ncclCommAbort"),
    ] {
        let fake = Fake::new(&[define]);
        let places = fake.places();
        let error = Nvidia::open(&places.nccl, &places.driver).expect_err(word);
        assert!(error.to_string().contains(word), "{error}");
    }
    let fake = Fake::new(&[]);
    let places = fake.places();
    let driver = [PathBuf::from("/no/libcuda.so.1")];
    let error = Nvidia::open(&places.nccl, &driver).expect_err("no driver");
    assert!(error.to_string().contains("no NVIDIA driver"), "{error}");
}

#[test]
fn what_never_ends_is_aborted_at_the_deadline_and_says_what_it_was() {
    let short = Duration::from_millis(200);
    let fake = Fake::new(&["-DFAKE_STUCK"]);
    let errors = run(&fake, 2, short, |nccl| {
        let nccl = nccl.expect("connected");
        let mut values = [1.0_f32; 8];
        let handle = nccl.all_reduce(device(&mut values, DType::F32), ReduceOp::Sum);
        let error = handle.expect("submitted").wait().expect_err("it is stuck");
        let again = nccl.all_reduce(device(&mut values, DType::F32), ReduceOp::Sum);
        again
            .expect("submitted")
            .wait()
            .expect_err("of no further use");
        assert!(nccl.poll_error().is_some());
        error.to_string()
    });
    assert!(
        errors
            .iter()
            .any(|text| text.contains("timed out after 200ms")
                && text.contains("AllReduce(Sum) number 0 of 8 x f32")),
        "{errors:?}"
    );
    assert_eq!(fake.count("fake_aborted"), 2);

    let fake = Fake::new(&["-DFAKE_NEVER_READY"]);
    let errors = run(&fake, 1, short, |nccl| {
        nccl.expect_err("never ready").to_string()
    });
    assert!(errors[0].contains("connecting GPU 0"), "{errors:?}");
    assert_eq!(fake.count("fake_aborted"), 1);
}

#[test]
fn an_error_of_a_peer_ends_the_wait_at_once() {
    let fake = Fake::new(&["-DFAKE_ASYNC=6"]);
    let errors = run(&fake, 2, LONG, |nccl| {
        let nccl = nccl.expect("connected");
        let mut values = [1.0_f32];
        let handle = nccl.all_reduce(device(&mut values, DType::F32), ReduceOp::Sum);
        handle
            .expect("submitted")
            .wait()
            .expect_err("remote error")
            .to_string()
    });
    for text in &errors {
        assert!(text.contains("remote process exited"), "{errors:?}");
    }
    assert_eq!(fake.count("fake_aborted"), 2);
}

#[test]
fn an_abort_of_one_rank_ends_what_the_others_wait_for() {
    let fake = Fake::new(&[]);
    let errors = run(&fake, 2, LONG, |nccl| {
        let nccl = nccl.expect("connected");
        if nccl.rank() == 1 {
            nccl.abort();
            return nccl.poll_error().expect("aborted").to_string();
        }
        let mut values = [1.0_f32];
        let handle = nccl.all_reduce(device(&mut values, DType::F32), ReduceOp::Sum);
        handle
            .expect("submitted")
            .wait()
            .expect_err("rank 1 is gone")
            .to_string()
    });
    assert!(errors[0].contains("rank 1"), "{errors:?}");
    assert_eq!(fake.count("fake_aborted"), 2);
}

#[test]
fn a_check_holds_nccl_against_gloo_until_a_rank_is_gone() {
    let fake = Fake::new(&[]);
    let server = StoreServer::bind("127.0.0.1:0").expect("a port");
    let address = server.address().to_string();
    let rank = |rank: u32| {
        let store = Store::connect(&address, Deadline::after(LONG)).expect("the store");
        let check = NcclCheck::connect_with(&store, (rank, 2), 0, 1000, LONG, &fake.places());
        let check = check.expect("connected");
        let report = check.compare().expect("compared");
        assert_eq!((report.rank, report.values, report.wrong), (rank, 1000, 0));
        if rank == 1 {
            check.abort();
            return None;
        }
        Some(check.until_failure().to_string())
    };
    let errors = std::thread::scope(|scope| {
        let ranks = [0, 1].map(|r| scope.spawn(move || rank(r)));
        ranks.map(|rank| rank.join().expect("the rank did not panic"))
    });
    let error = errors[0].as_ref().expect("rank 0 saw rank 1 go");
    assert!(error.contains("rank 1"), "{error}");
}

const MASTER: &str = "COLLECTIVES_TEST_MASTER";
const LIBRARY: &str = "COLLECTIVES_TEST_LIBRARY";

fn patient() -> Deadline {
    Deadline::after(Duration::from_mins(2))
}

/// Joins one rank of two, each of which may be a process of its own.
fn join(address: &str, rank: u32, places: &Places) -> (Store, Nccl) {
    let config = Config {
        backend: Backend::Gloo,
        ..Config::default()
    };
    let store = Store::connect(address, patient()).expect("the store");
    let gloo = rendezvous::connect_gloo(&config, &store, rank, 2, 1).expect("gloo");
    let view = store.prefixed("g1/communicator/");
    let nccl = Nccl::start(gloo, 0, &view, places, (LONG, patient())).expect("connected");
    (store, nccl)
}

/// Not a test: the rank that is killed.
#[test]
#[ignore = "started by the test below"]
fn victim() {
    let variable = |name: &str| std::env::var(name).expect("given by the test");
    let library = vec![PathBuf::from(variable(LIBRARY))];
    let places = Places {
        nccl: library.clone(),
        driver: library,
    };
    let (store, _nccl) = join(&variable(MASTER), 1, &places);
    store.set("ready", b"").expect("the store");
    // Never set: waits until it is killed.
    let _ = store.get("never", patient());
}

#[test]
fn a_killed_peer_ends_the_wait_long_before_the_deadline() {
    let fake = Fake::new(&["-DFAKE_APART"]);
    let server = StoreServer::bind("127.0.0.1:0").expect("a port");
    let address = server.address().to_string();
    let mut victim = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "nccl::tests::victim", "--ignored", "--nocapture"])
        .env(MASTER, &address)
        .env(LIBRARY, &fake.path)
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("a second process");
    let (store, nccl) = join(&address, 0, &fake.places());
    store
        .get("ready", patient())
        .expect("the victim has joined");
    let mut values = [1.0_f32; 8];
    let handle = nccl.all_reduce(device(&mut values, DType::F32), ReduceOp::Sum);
    let handle = handle.expect("submitted");
    victim.kill().expect("it is alive");
    let killed = Instant::now();
    victim.wait().expect("it is a child");
    let error = handle.wait().expect_err("rank 1 will never come");
    let took = killed.elapsed();
    let dead: Vec<_> = error.missing().iter().map(|a| (a.rank, a.how)).collect();
    assert_eq!(dead, [(1, Absence::Died)], "{error}");
    // Milliseconds where it was written; the operation's own limit is minutes.
    assert!(took < Duration::from_secs(10), "{took:?}");
    drop(nccl);
    assert_eq!(fake.count("fake_aborted"), 1);
}

/// With the real library, which makes ids without a GPU: NCCL listens on a network interface.
#[test]
fn ids_of_the_real_library_reach_all_ranks_of_their_generation() {
    let Some(path) = std::env::var_os("POLLEN_NCCL_LIBRARY") else {
        say("POLLEN_NCCL_LIBRARY names no NCCL: nothing is tested with the real one");
        return;
    };
    let places = [PathBuf::from(path)];
    let make = || id_of(&places).map_err(|error| error.to_string());
    let server = StoreServer::bind("127.0.0.1:0").expect("a port");
    let address = server.address().to_string();
    let id = |generation: u64, rank: u32| {
        let store = Store::connect(&address, patient()).expect("the store");
        let view = store.prefixed(&format!("g{generation}/communicator/"));
        let id = exchange(make, rank, &view, patient());
        id.expect("the store answers").expect("NCCL makes it")
    };
    // Rank 1 asks first, in a thread of its own, and waits for what rank 0 makes.
    let generation = |number: u64| {
        std::thread::scope(|scope| {
            let other = scope.spawn(move || id(number, 1));
            let own = id(number, 0);
            assert_eq!(own, other.join().expect("rank 1 did not panic"));
            own
        })
    };
    let (first, second) = (generation(1), generation(2));
    assert_ne!(first, second);
    assert!(first.iter().any(|&byte| byte != 0));
}

#[allow(clippy::print_stderr, reason = "says why a test tests nothing")]
fn say(text: &str) {
    eprintln!("{text}");
}

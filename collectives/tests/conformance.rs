//! What every engine must do: the same tests for `local` and for Gloo with 2, 3 and 4 ranks.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::{Arc, Barrier};
use std::time::Duration;

use half::bf16;
use pollen_collectives::{
    Absence, Backend, Buffer, Communicator, Config, DType, Deadline, DeviceBuffer, Error,
    HostBuffer, ReduceOp, Store, StoreServer, rendezvous,
};
use pollen_core::{ErrorClass, Seed};

type Shared = Arc<dyn Communicator>;

fn config(backend: Backend) -> Config {
    Config {
        backend,
        // Tests that wait for a failure must not pass because of the timeout.
        timeout: Duration::from_mins(10),
        ..Config::default()
    }
}

/// Runs `body` on every rank of a fresh group, one thread each; returns what the ranks return.
fn run<T: Send>(config: &Config, world: u32, body: impl Fn(Shared) -> T + Sync) -> Vec<T> {
    let server = StoreServer::bind("127.0.0.1:0").unwrap();
    let address = server.address().to_string();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world)
            .map(|rank| {
                let (address, body) = (&address, &body);
                scope.spawn(move || {
                    let deadline = Deadline::after(Duration::from_mins(1));
                    let store = Store::connect(address, deadline).unwrap();
                    let joined = rendezvous::connect(config, &store, rank, world, 1);
                    body(joined.unwrap_or_else(|error| panic!("rank {rank}: {error}")))
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Returns `values` as a buffer of the given type.
fn buffer(dtype: DType, values: impl Iterator<Item = u8>) -> HostBuffer {
    match dtype {
        DType::F32 => HostBuffer::F32(values.map(f32::from).collect()),
        DType::F64 => HostBuffer::F64(values.map(f64::from).collect()),
        DType::Bf16 => HostBuffer::Bf16(values.map(bf16::from).collect()),
        DType::I64 => HostBuffer::I64(values.map(i64::from).collect()),
        DType::U8 => HostBuffer::U8(values.collect()),
    }
}

fn host(buffer: Buffer) -> HostBuffer {
    buffer.into_host("test").unwrap()
}

const DTYPES: [DType; 5] = [DType::F32, DType::F64, DType::Bf16, DType::I64, DType::U8];
/// Around the sizes at which Gloo's ring changes its segments, for one to four ranks.
const LENGTHS: [usize; 9] = [0, 1, 2, 3, 7, 8, 24, 1000, 300_000];
/// Sums over four ranks stay exact in every type.
fn value(rank: u32, index: usize) -> u8 {
    ((index * 7 + rank as usize * 13) % 50) as u8
}

fn combined(world: u32, op: ReduceOp, index: usize) -> u8 {
    let values = (0..world).map(|rank| value(rank, index));
    match op {
        ReduceOp::Sum => values.sum(),
        ReduceOp::Max => values.max().unwrap(),
        ReduceOp::Min => values.min().unwrap(),
    }
}

fn every_type_operator_and_length(backend: Backend, world: u32) {
    run(&config(backend), world, |comm| {
        let rank = comm.rank();
        assert_eq!(comm.world_size(), world);
        for dtype in DTYPES {
            for len in LENGTHS {
                let own = || Buffer::from(buffer(dtype, (0..len).map(|i| value(rank, i))));
                for op in [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min] {
                    let all = buffer(dtype, (0..len).map(|i| combined(world, op, i)));
                    assert_eq!(
                        host(comm.all_reduce(own(), op).unwrap().wait().unwrap()),
                        all
                    );

                    let part = len / world as usize;
                    if part * world as usize == len {
                        let mine = part * rank as usize..part * (rank as usize + 1);
                        let slice = buffer(dtype, mine.map(|i| combined(world, op, i)));
                        let got = comm.reduce_scatter(own(), op).unwrap().wait().unwrap();
                        assert_eq!(host(got), slice);
                    } else {
                        let error = comm.reduce_scatter(own(), op).unwrap_err();
                        assert!(error.to_string().contains("do not divide"), "{error}");
                    }
                }
                let joined = (0..world).flat_map(|rank| (0..len).map(move |i| value(rank, i)));
                let got = comm.all_gather(own()).unwrap().wait().unwrap();
                assert_eq!(host(got), buffer(dtype, joined));
                for root in 0..world {
                    let got = comm.broadcast(own(), root).unwrap().wait().unwrap();
                    assert_eq!(host(got), buffer(dtype, (0..len).map(|i| value(root, i))));
                }
            }
        }
        comm.barrier().unwrap();
        assert!(comm.poll_error().is_none());
    });
}

fn arguments_that_do_not_fit_are_refused(backend: Backend, world: u32) {
    run(&config(backend), world, |comm| {
        // SAFETY: no back end of this build touches device memory.
        let device = unsafe { DeviceBuffer::new(0x1000, 4, DType::F32) };
        let error = comm
            .all_reduce(Buffer::Device(device), ReduceOp::Sum)
            .unwrap_err();
        assert!(error.to_string().contains(comm.name()), "{error}");
        assert!(error.to_string().contains("host buffers only"), "{error}");
        let error = comm.broadcast(vec![1_u8].into(), world).unwrap_err();
        assert!(
            error.to_string().contains("not below the world size"),
            "{error}"
        );
        // Neither did any harm.
        comm.barrier().unwrap();
    });
}

fn handles_overlap_and_may_be_waited_for_in_any_order(backend: Backend, world: u32) {
    run(&config(backend), world, |comm| {
        let lengths = [5_usize, 100_000, 1, 70_000, 64];
        let submit = |len: &usize| {
            let values: Vec<i64> = (0..*len as i64)
                .map(|i| i * i64::from(comm.rank() + 1))
                .collect();
            comm.all_reduce(values.into(), ReduceOp::Sum).unwrap()
        };
        let mut handles: Vec<_> = lengths.iter().map(submit).collect();
        drop(handles.remove(2)); // not waiting for one does not disturb the others
        let factor = i64::from(world * (world + 1) / 2);
        for (handle, len) in handles.into_iter().zip([5, 100_000, 70_000, 64]).rev() {
            let sum: Vec<i64> = handle.wait().unwrap().try_into().unwrap();
            assert_eq!(sum, (0..len).map(|i| i * factor).collect::<Vec<_>>());
        }
    });
}

/// Sums of floats depend on their order: it must be the same on every rank and in every run.
fn sums_have_the_same_bits_everywhere_and_always(backend: Backend, world: u32) {
    let once = || {
        run(&config(backend), world, |comm| {
            let mut draws = Seed::new(1)
                .child("floats")
                .index(comm.rank().into())
                .draws();
            let mut random = || (draws.next_u64() as i64) as f64 / 2.0_f64.powi(40);
            let f64s: Vec<f64> = (0..100_003).map(|_| random()).collect();
            let f32s: Vec<f32> = f64s.iter().map(|v| *v as f32).collect();
            let bf16s: Vec<bf16> = f64s.iter().map(|v| bf16::from_f64(*v)).collect();
            let handles = [f64s.into(), f32s.into(), bf16s.into()]
                .map(|buffer: Buffer| comm.all_reduce(buffer, ReduceOp::Sum).unwrap());
            let [f64s, f32s, bf16s] = handles.map(|handle| handle.wait().unwrap());
            let f64s: Vec<f64> = f64s.try_into().unwrap();
            let f32s: Vec<f32> = f32s.try_into().unwrap();
            let bf16s: Vec<bf16> = bf16s.try_into().unwrap();
            let f64s = f64s.into_iter().map(f64::to_bits);
            let f32s = f32s.into_iter().map(|v| v.to_bits().into());
            let bf16s = bf16s.into_iter().map(|v| v.to_bits().into());
            f64s.chain(f32s).chain(bf16s).collect::<Vec<u64>>()
        })
    };
    let first = once();
    assert!(
        first.iter().all(|bits| *bits == first[0]),
        "the ranks differ"
    );
    for _ in 0..3 {
        assert!(once() == first, "the runs differ");
    }
}

/// 256 + 1 + 1 + 1: rounding after every addition would lose the ones.
fn bf16_is_rounded_once(backend: Backend, world: u32) {
    run(&config(backend), world, |comm| {
        let own = if comm.rank() == 0 { 256.0 } else { 1.0 };
        let values = vec![bf16::from_f32(own); 9];
        let sum = comm
            .all_reduce(values.into(), ReduceOp::Sum)
            .unwrap()
            .wait()
            .unwrap();
        let exact = 256.0 + (world - 1) as f32;
        assert_eq!(
            Vec::<bf16>::try_from(sum).unwrap(),
            [bf16::from_f32(exact); 9]
        );
    });
}

fn a_nan_on_one_rank_reaches_all(backend: Backend, world: u32) {
    run(&config(backend), world, |comm| {
        for op in [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min] {
            let own = if comm.rank() == world - 1 {
                f32::NAN
            } else {
                1.0
            };
            let got = comm
                .all_reduce(vec![own, 2.0].into(), op)
                .unwrap()
                .wait()
                .unwrap();
            let got: Vec<f32> = got.try_into().unwrap();
            assert!(got[0].is_nan() && !got[1].is_nan(), "{op}: {got:?}");
        }
    });
}

fn after_an_abort_everything_fails_at_once(backend: Backend, world: u32) {
    let aligned = Barrier::new(world as usize);
    run(&config(backend), world, |comm| {
        comm.barrier().unwrap();
        // Aborting resets connections: another rank may still be in the barrier.
        aligned.wait();
        comm.abort();
        assert!(comm.poll_error().is_some());
        let result = comm.all_reduce(vec![1.0_f32].into(), ReduceOp::Sum);
        let error = result
            .and_then(pollen_collectives::Handle::wait)
            .unwrap_err();
        assert!(matches!(error, Error::Aborted { .. }), "{error}");
        comm.barrier().unwrap_err();
    });
}

macro_rules! conformance {
    ($($module:ident: $backend:ident, $world:literal;)*) => {$(
        mod $module {
            use super::*;
            conformance!(@ $backend, $world:
                every_type_operator_and_length
                arguments_that_do_not_fit_are_refused
                handles_overlap_and_may_be_waited_for_in_any_order
                sums_have_the_same_bits_everywhere_and_always
                bf16_is_rounded_once
                a_nan_on_one_rank_reaches_all
                after_an_abort_everything_fails_at_once
            );
        }
    )*};
    (@ $backend:ident, $world:literal: $($test:ident)*) => {$(
        #[test]
        fn $test() {
            super::$test(Backend::$backend, $world);
        }
    )*};
}

conformance! {
    local: Local, 1;
    gloo_1: Gloo, 1;
    gloo_2: Gloo, 2;
    gloo_3: Gloo, 3;
    gloo_4: Gloo, 4;
}

#[test]
fn abort_unblocks_an_operation_that_the_others_never_join() {
    let submitted = Barrier::new(2);
    let errors = run(&config(Backend::Gloo), 2, |comm| {
        if comm.rank() == 0 {
            let big = vec![1.0_f32; 1 << 20];
            let handle = comm.all_reduce(big.into(), ReduceOp::Sum).unwrap();
            submitted.wait();
            comm.abort();
            handle.wait().unwrap_err()
        } else {
            submitted.wait();
            // The other rank's connections close, now or while this one waits.
            comm.barrier().unwrap_err()
        }
    });
    assert!(
        matches!(errors[0], Error::Aborted { rank: 0 }),
        "{}",
        errors[0]
    );
    let text = errors[1].to_string();
    assert!(text.contains("others report: rank 0: "), "{text}");
    assert!(text.contains("aborted on request"), "{text}");
    assert_eq!(errors[1].class(), ErrorClass::Retryable);
}

#[test]
fn ranks_that_disagree_are_told_what_the_others_were_doing() {
    let config = Config {
        timeout: Duration::from_secs(2),
        ..config(Backend::Gloo)
    };
    let connected = Barrier::new(3);
    let errors = run(&config, 3, |comm| {
        connected.wait();
        let len = if comm.rank() == 2 { 200 } else { 100 };
        let handle = comm
            .all_reduce(vec![0.0_f32; len].into(), ReduceOp::Sum)
            .unwrap();
        let error = handle.wait().unwrap_err();
        assert_eq!(
            comm.poll_error().map(|e| e.class()),
            Some(ErrorClass::Retryable)
        );
        error
    });
    let (first, last) = (errors[0].to_string(), errors[2].to_string());
    assert!(
        first.contains("rank 2: all-reduce (sum) number 0 of 200 x f32"),
        "{first}"
    );
    assert!(
        last.contains("rank 0: all-reduce (sum) number 0 of 100 x f32"),
        "{last}"
    );
}

#[test]
fn a_rank_that_left_is_named_by_those_that_go_on() {
    let errors = run(&config(Backend::Gloo), 3, |comm| {
        comm.barrier().unwrap();
        (comm.rank() != 1).then(|| comm.barrier().unwrap_err())
    });
    for error in errors.into_iter().flatten() {
        let left = error.missing().iter().find(|absent| absent.rank == 1);
        assert_eq!(
            left.map(|absent| absent.how),
            Some(Absence::Left),
            "{error}"
        );
    }
}

#[test]
fn joining_without_all_ranks_names_those_that_did_not_come() {
    let server = StoreServer::bind("127.0.0.1:0").unwrap();
    let deadline = Deadline::after(Duration::from_mins(1));
    let store = Store::connect(&server.address().to_string(), deadline).unwrap();
    store.register_host(2, "node-c").unwrap();
    let config = Config {
        join_timeout: Duration::from_millis(50),
        ..config(Backend::Auto)
    };
    let error = rendezvous::connect(&config, &store, 1, 3, 5).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("joining generation 5"), "{text}");
    assert!(text.contains("rank 0 (host unknown, never came)"), "{text}");
    assert!(text.contains("rank 2 (node-c, never came)"), "{text}");
    assert!(text.contains("communicator.join_timeout"), "{text}");
}

#[test]
fn backends_that_do_not_fit_are_refused_with_what_to_use() {
    let server = StoreServer::bind("127.0.0.1:0").unwrap();
    let deadline = Deadline::after(Duration::from_mins(1));
    let store = Store::connect(&server.address().to_string(), deadline).unwrap();
    for (backend, words) in [
        (Backend::Nccl, "use \"auto\" or \"gloo\""),
        (Backend::Local, "is for one rank, not 2"),
    ] {
        let error = rendezvous::connect(&config(backend), &store, 0, 2, 0).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(error.class(), ErrorClass::User);
    }
    let absent = Config {
        gloo_library: "/nowhere/libpollen_gloo.so".into(),
        ..config(Backend::Gloo)
    };
    let error = rendezvous::connect(&absent, &store, 0, 1, 0).unwrap_err();
    assert!(error.to_string().contains("run `make setup`"), "{error}");
    assert!(
        error.to_string().contains("/nowhere/libpollen_gloo.so"),
        "{error}"
    );
}

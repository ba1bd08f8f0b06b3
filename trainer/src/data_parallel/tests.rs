//! Two ranks whose gradients go through device memory, beside the same two over Gloo. The library
//! and the memory are stand-ins: no GPU is needed, and everything between them is real.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use pollen_collectives::{Backend, Config, Deadline, Store, StoreServer, rendezvous};
use pollen_core::ActionSpaceFile;
use pollen_model::Precision;

use super::*;
use crate::bench::Bench;
use crate::clip;
use crate::device_memory::tests::Pretended;
use crate::update::square_sums;

const WORLD: u32 = 2;
const PATIENCE: Duration = Duration::from_mins(5);

/// Returns what stands for NCCL and, by its name, for the driver that is opened after it; one for the
/// process, which would go on to use the first driver with a second library.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = LIBRARY.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../collectives/tests");
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("libfake.so");
        let built = Command::new(std::env::var("CXX").unwrap_or_else(|_| "c++".into()))
            .args([
                "-shared",
                "-fPIC",
                "-std=c++17",
                "-Wl,-soname,libcuda.so.1",
                "-o",
            ])
            .arg(&path)
            .arg(root.join("fake_nvidia.cc"))
            .status()
            .expect("a C++ compiler");
        assert!(built.success(), "{}", root.display());
        (dir, path)
    });
    path
}

fn bench(rank: u32) -> Bench {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    let read = |name: &str| std::fs::read_to_string(root.join(name)).expect("in the repository");
    let table: toml::Table = read("model/flower-tiny.toml").parse().expect("TOML");
    let config = table["model"].clone().try_into().expect("a model");
    let space = ActionSpaceFile::parse(&read("embodiments/eef_delta.toml"), "eef_delta");
    let spaces = [space.expect("an action space")];
    let bench = Bench::new(&config, &spaces, Precision::F32, 3, &Device::flex());
    let mut bench = bench.expect("fits together");
    // The same weights on all ranks, other noise on each.
    bench.step = u64::from(rank);
    bench
}

fn bits(tensors: impl IntoIterator<Item = Tensor<1>>) -> Vec<Vec<u32>> {
    let bits = |tensor| host(tensor).into_iter().map(f32::to_bits).collect();
    tensors.into_iter().map(bits).collect()
}

fn weights(bench: &Bench) -> Vec<Tensor<1>> {
    let all = bench.model.flat_parameters().into_iter();
    all.map(|(_, values)| values).collect()
}

/// One rank: two steps by either way. Returns its weights after each through device memory.
fn rank(rank: u32, address: &str, shard: Shard, dtype: ReduceDtype) -> Vec<Vec<u32>> {
    let store = Store::connect(address, Deadline::after(PATIENCE)).expect("the store");
    let connect = |backend, generation, gpu| {
        let config = Config {
            backend,
            timeout: PATIENCE,
            join_timeout: PATIENCE,
            nccl_library: library().to_owned(),
            ..Config::default()
        };
        rendezvous::connect_on(&config, &store, rank, WORLD, generation, gpu).expect("connected")
    };
    let gloo = connect(Backend::Gloo, 1, None);
    let nccl = connect(Backend::Nccl, 2, Some(0));
    let mut plain = bench(rank).exchanging(gloo, shard, dtype);
    let mut lent = bench(rank).exchanging(nccl, shard, dtype);
    lent.reduction.place = Place::Device(Arc::new(Pretended));
    let batch = plain.random_batch(1, 5, &[0]);
    let mut ends = Vec::new();
    for step in 0..2 {
        let (loss, through_host) = plain.gradients(&batch, &mut |_| {}).expect("a step");
        let (same, in_place) = lent.gradients(&batch, &mut |_| {}).expect("a step");
        assert_eq!(loss.to_bits(), same.to_bits(), "step {step}");
        assert_eq!(
            bits(in_place.clone()),
            bits(through_host.clone()),
            "step {step}"
        );
        let norm = |bench: &Bench, values: &[Tensor<1>]| {
            clip::norm(&square_sums(&bench.layout, &bench.reduction, values).expect("sums"))
        };
        let (in_f64, in_f32) = (norm(&plain, &through_host), norm(&lent, &in_place));
        assert!((in_f32 / in_f64 - 1.0).abs() < 1e-6, "{in_f32}, {in_f64}");
        // AdamW gets the same gradients and nearly the same clipping factor.
        plain.update(through_host, &batch).expect("an update");
        lent.update(in_place, &batch).expect("an update");
        for (a, b) in weights(&plain).into_iter().zip(weights(&lent)) {
            for (a, b) in host(a).into_iter().zip(host(b)) {
                assert!((a - b).abs() < 1e-6, "step {step}: {a}, {b}");
            }
        }
        ends.extend(bits(weights(&lent)));
        // The next step starts from the same bits again.
        lent.model = plain.model.clone();
    }
    ends
}

fn compare(sharded: bool, dtype: ReduceDtype) {
    let server = StoreServer::bind("127.0.0.1:0").expect("a port");
    let address = server.address().to_string();
    let shard = |part| {
        let parts = WORLD as usize;
        if sharded {
            Shard { part, parts }
        } else {
            Shard::WHOLE
        }
    };
    let ends = std::thread::scope(|scope| {
        let ranks = [0, 1].map(|number| {
            let address = &address;
            scope.spawn(move || rank(number, address, shard(number as usize), dtype))
        });
        ranks.map(|rank| rank.join().expect("the rank did not panic"))
    });
    assert!(ends[0] == ends[1], "the ranks' weights differ");
}

#[test]
fn whole_buckets_are_summed_where_they_lie() {
    compare(false, ReduceDtype::F32);
}

#[test]
fn shards_are_summed_and_gathered_where_they_lie() {
    compare(true, ReduceDtype::F32);
    compare(true, ReduceDtype::Bf16);
}

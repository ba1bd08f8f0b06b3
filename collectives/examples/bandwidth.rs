//! Prints the all-reduce bandwidth of two processes on this machine, beside that of memcpy.
//!
//! `cargo run -p pollen-collectives --example bandwidth [megabytes]`; GB/s are bytes of the buffer
//! per second (algorithm bandwidth), the median of ten.

use std::io::Write;
use std::process::Command;
use std::time::{Duration, Instant};

use pollen_collectives::{
    Backend, Config, Deadline, Error, ReduceOp, Store, StoreServer, rendezvous,
};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let megabytes: usize = arguments.next().unwrap_or("100".into()).parse()?;
    if let Some(address) = arguments.next() {
        measure(megabytes, &address, 1)?;
        return Ok(());
    }
    let server = StoreServer::bind("127.0.0.1:0")?;
    let address = server.address().to_string();
    let mut other = Command::new(std::env::current_exe()?)
        .args([megabytes.to_string(), address.clone()])
        .spawn()?;
    let reduce = measure(megabytes, &address, 0)?;
    other.wait()?;

    let source = vec![1.0_f32; megabytes * 250_000];
    let mut target = vec![0.0_f32; source.len()];
    let copy = median(|| {
        target.copy_from_slice(std::hint::black_box(&source));
        std::hint::black_box(&target);
        Ok(())
    })?;
    let rate = |time: Duration| megabytes as f64 / 1e3 / time.as_secs_f64();
    writeln!(
        std::io::stdout(),
        "{megabytes} MB of f32, 2 processes: all-reduce {:.2} GB/s, memcpy {:.2} GB/s",
        rate(reduce),
        rate(copy)
    )?;
    Ok(())
}

fn measure(megabytes: usize, address: &str, rank: u32) -> Result<Duration, Error> {
    let config = Config {
        backend: Backend::Gloo,
        ..Config::default()
    };
    let store = Store::connect(address, Deadline::after(config.join_timeout))?;
    let communicator = rendezvous::connect(&config, &store, rank, 2, 0)?;
    let mut values = vec![1.0_f32; megabytes * 250_000];
    median(|| {
        communicator.barrier()?;
        let buffer = std::mem::take(&mut values).into();
        values = communicator
            .all_reduce(buffer, ReduceOp::Sum)?
            .wait()?
            .try_into()?;
        Ok(())
    })
}

fn median(mut body: impl FnMut() -> Result<(), Error>) -> Result<Duration, Error> {
    let mut times = Vec::new();
    for _ in 0..10 {
        let start = Instant::now();
        body()?;
        times.push(start.elapsed());
    }
    times.sort();
    Ok(times[times.len() / 2])
}

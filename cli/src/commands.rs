//! One module per command.

pub(crate) mod bench;
mod bench_dump;
mod bench_operations;
pub(crate) mod checkpoint;
pub(crate) mod config;
pub(crate) mod convert;
pub(crate) mod data;
pub(crate) mod export;
pub(crate) mod gpu_check;
pub(crate) mod launch;
pub(crate) mod logs;
pub(crate) mod model;
pub(crate) mod plan;
pub(crate) mod ps;
mod simulate;
pub(crate) mod stop;
pub(crate) mod weights;
pub(crate) mod worker;

//! The loader as the trainer uses it, over datasets written here and over the committed demo.
#![allow(clippy::unwrap_used, reason = "tests")]

mod batches;
mod configs;
#[path = "../../../tests/damage/mod.rs"]
mod damage;
mod demo;
mod disk_cache;
mod faults;
mod golden;
mod hostile;
mod memory;
mod order;
mod order_properties;
mod support;
mod survey;
mod transform;
mod web;

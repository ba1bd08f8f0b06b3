//! Memory over many small training steps: a leak of a few bytes a step shows.

use pollen_model::Precision;
use serde_json::json;

use super::{Findings, Site, resident_bytes, trained_a_little};
use crate::device::DeviceKind;
use crate::error::Error;

/// Readings over the whole soak.
const READINGS: u64 = 40;
/// What the process may grow by in the second half: allocators keep some of what was freed.
const RESIDENT_SLACK: u64 = 32 << 20;
/// What the device's live allocations may grow by in the second half.
const LIVE_SLACK: u64 = 1 << 20;
/// What the device's reserved memory may grow by in the second half: a page or two.
const RESERVED_SLACK: u64 = 64 << 20;

struct Reading {
    step: u64,
    resident: Option<u64>,
    live: Option<u64>,
    reserved: Option<u64>,
}

pub(super) fn run(site: &Site, findings: &mut Findings) -> Result<(), Error> {
    let mut bench = trained_a_little(&site.small, Precision::F32, &site.device)?;
    let spaces: Vec<usize> = (0..site.small.spaces.len()).collect();
    let batch = bench.random_batch(1, 8, &spaces);
    let device = bench.device.clone().inner();
    let every = (site.soak_steps / READINGS).max(1);
    let mut readings = Vec::new();
    let (mut first, mut last) = (f64::NAN, f64::NAN);
    for step in 1..=site.soak_steps {
        (last, _) = bench.step(&batch, &mut |_| {})?;
        if step == 1 {
            first = last;
        }
        if step.is_multiple_of(every) {
            let usage = device.memory_pool_usage();
            readings.push(Reading {
                step,
                resident: resident_bytes(),
                live: usage.map(|usage| usage.bytes_in_use),
                reserved: usage.map(|usage| usage.bytes_reserved),
            });
        }
    }
    let grown = |what: fn(&Reading) -> Option<u64>| growth(&readings, what);
    if let Some(bytes) = grown(|reading| reading.resident) {
        let slack = match site.kind {
            DeviceKind::Cpu => RESIDENT_SLACK,
            // Drivers and compiled kernels live in the process too.
            DeviceKind::Cuda => 4 * RESIDENT_SLACK,
        };
        findings.at_most("growth of the process, bytes", bytes, slack as f64);
    }
    if let Some(bytes) = grown(|reading| reading.live) {
        findings.at_most(
            "growth of the device's live memory, bytes",
            bytes,
            LIVE_SLACK as f64,
        );
    } else if site.kind == DeviceKind::Cuda {
        findings.wrong("the device does not say how much memory it uses");
    }
    if let Some(bytes) = grown(|reading| reading.reserved) {
        let slack = RESERVED_SLACK as f64;
        findings.at_most(
            "growth of the device's reserved memory, bytes",
            bytes,
            slack,
        );
    }
    findings.at_most("loss of the last step over the first", last / first, 0.9);
    let readings: Vec<_> = readings
        .iter()
        .map(|r| json!({ "step": r.step, "resident": r.resident, "live": r.live, "reserved": r.reserved }))
        .collect();
    findings.measured("memory", readings);
    Ok(())
}

/// Returns how far the highest reading of the last quarter is above that of the second.
fn growth(readings: &[Reading], what: fn(&Reading) -> Option<u64>) -> Option<f64> {
    let quarter = readings.len() / 4;
    let highest = |part: &[Reading]| part.iter().filter_map(what).max();
    let before = highest(readings.get(quarter..2 * quarter)?)?;
    let after = highest(&readings[3 * quarter..])?;
    Some(after.saturating_sub(before) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leak_shows_and_a_saw_tooth_does_not() {
        let readings = |value: fn(u64) -> u64| -> Vec<Reading> {
            let reading = |step| Reading {
                step,
                resident: Some(value(step)),
                live: None,
                reserved: None,
            };
            (0..40).map(reading).collect()
        };
        let growth = |readings: &[Reading]| growth(readings, |reading| reading.resident);
        assert_eq!(growth(&readings(|step| 1000 + step)), Some(20.0));
        assert_eq!(growth(&readings(|step| 1000 + step % 5)), Some(0.0));
        // What the first steps take once is no leak.
        assert_eq!(growth(&readings(|step| 1000 + step.min(9))), Some(0.0));
        assert_eq!(growth(&[]), None);
    }
}

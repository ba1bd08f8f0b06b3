//! What one device was measured to do, from the events of a run.

use pollen_observe::{Event, Record, StartEvent, StepEvent};

use super::Measured;
use crate::error::Error;

/// Steps after a start that are left out: they fill caches and compile.
const WARM_UP: usize = 3;
/// Fewest steps that a median is taken of.
const FEWEST: usize = 5;
/// Factor from the median deviation to the standard deviation of a normal distribution.
const NORMAL: f64 = 1.4826;

impl Measured {
    /// Takes the medians of rank 0 over the steps of a run's latest start that made any, but for
    /// the first three. The run may have had any number of workers.
    ///
    /// # Errors
    /// When fewer than five steps are left.
    pub fn of_run(
        run: &str,
        records: &[Record],
        micro_batch: u64,
        shard_optimizer: bool,
    ) -> Result<Self, Error> {
        let (start, steps) = latest(records);
        let steps = steps.get(WARM_UP..).unwrap_or_default();
        let (Some(start), true) = (start, steps.len() >= FEWEST) else {
            return Err(Error::NotMeasured {
                run: run.to_owned(),
                steps: steps.len(),
                needed: FEWEST,
            });
        };
        let seconds = |step: &StepEvent, phase: &str| step.phases.get(phase).copied();
        let phase = |step: &StepEvent, phase: &str| seconds(step, phase).unwrap_or(0.0);
        let compute: Vec<f64> = steps
            .iter()
            .map(|step| phase(step, "forward") + phase(step, "backward"))
            .collect();
        let typical = median(compute.clone());
        let deviations = compute.iter().map(|s| (s - typical).abs()).collect();
        let samples = start.global_batch as f64 / f64::from(start.world_size);
        let parts = if shard_optimizer { start.world_size } else { 1 };
        let update = steps.iter().map(|step| phase(step, "optimizer")).collect();
        Ok(Self {
            sample_s: typical / samples,
            optimizer_s: median(update) * f64::from(parts),
            jitter: NORMAL * median(deviations) / typical,
            micro_batch,
            source: format!("median of {} steps of run {run}", steps.len()),
        })
    }
}

/// Returns the latest start that made steps, with them.
fn latest(records: &[Record]) -> (Option<&StartEvent>, Vec<&StepEvent>) {
    let (mut start, mut steps) = (None, Vec::new());
    let mut begun = None;
    for record in records {
        match &record.event {
            Event::Start(event) => begun = Some(event),
            Event::Step(event) => {
                if let Some(begun) = begun.take() {
                    (start, steps) = (Some(begun), Vec::new());
                }
                steps.push(event);
            }
            _ => {}
        }
    }
    (start, steps)
}

/// Returns the middle value of some.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) {
        f64::midpoint(values[middle - 1], values[middle])
    } else {
        values[middle]
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::collections::BTreeMap;
    use std::time::SystemTime;

    use super::*;

    fn record(event: Event) -> Record {
        Record {
            time: SystemTime::UNIX_EPOCH,
            run: "r".into(),
            generation: 1,
            rank: Some(0),
            event,
        }
    }

    fn start(world_size: u32) -> Record {
        record(Event::Start(StartEvent {
            world_size,
            global_batch: 64,
            ..StartEvent::default()
        }))
    }

    fn step(forward: f64, backward: f64, optimizer: f64) -> Record {
        let phases = [
            ("forward", forward),
            ("backward", backward),
            ("optimizer", optimizer),
            ("data", 100.0),
        ];
        let phases: BTreeMap<String, f64> = phases.map(|(name, s)| (name.into(), s)).into();
        record(Event::Step(StepEvent {
            phases,
            ..StepEvent::default()
        }))
    }

    #[test]
    fn medians_of_the_latest_start_are_taken() {
        let mut records = vec![start(1)];
        records.extend((0..20).map(|_| step(50.0, 50.0, 50.0)));
        records.push(start(4));
        // Three to warm up, then one that something else disturbed.
        records.extend((0..3).map(|_| step(9.0, 9.0, 9.0)));
        records.push(step(7.0, 7.0, 7.0));
        records.extend([1.0, 1.1, 0.9, 1.0, 1.1, 0.9].map(|s| step(s, 2.0 * s, 0.5)));
        // A start that ends before its first step.
        records.push(start(2));
        let measured = Measured::of_run("r", &records, 8, false).unwrap();
        assert!(
            (measured.sample_s - 3.0 / 16.0).abs() < 1e-9,
            "{measured:?}"
        );
        assert!((measured.optimizer_s - 0.5).abs() < 1e-9);
        assert!((measured.jitter - NORMAL * 0.3 / 3.0).abs() < 1e-9);
        assert_eq!(measured.micro_batch, 8);
        assert_eq!(measured.source, "median of 7 steps of run r");
        let shards = Measured::of_run("r", &records, 8, true).unwrap();
        assert!((shards.optimizer_s - 2.0).abs() < 1e-9);
    }

    #[test]
    fn too_few_steps_are_refused() {
        let mut records = vec![start(1)];
        records.extend((0..7).map(|_| step(1.0, 1.0, 1.0)));
        let error = Measured::of_run("r7", &records, 8, false).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("r7") && text.contains("4 steps"), "{text}");
        assert_eq!(error.class(), pollen_core::ErrorClass::User);
        assert!(Measured::of_run("r7", &[], 8, false).is_err());
    }
}

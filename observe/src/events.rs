//! The kinds of event, and the record around them.
//!
//! One JSON object a line, always with `time`, `run`, `generation`, `rank` and `event`. Readers
//! ignore fields they do not know, so that fields can be added. A number that is not finite is
//! written as `null` and read back as NaN, because JSON has neither.

use std::collections::BTreeMap;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

/// One line of `events.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Time of day, RFC 3339 with milliseconds, UTC.
    #[serde(with = "rfc3339_millis")]
    pub time: SystemTime,
    /// The run's id.
    pub run: String,
    /// Which start of the run: 1 for the first, one more after every restart.
    pub generation: u64,
    /// The worker that wrote it; none for the launcher.
    pub rank: Option<u32>,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// What the run is going to do, written before the first worker starts.
    Plan(PlanEvent),
    /// The workers have found each other and training begins or goes on.
    Start(StartEvent),
    /// One optimizer step.
    Step(StepEvent),
    /// A checkpoint is published.
    Checkpoint {
        /// Optimizer step it holds.
        step: u64,
        /// Where it lies.
        url: String,
        /// Size of all its files.
        bytes: u64,
        /// Time the training loop stood still for it.
        stall_s: f64,
        /// Time from the request until it was published.
        seconds: f64,
    },
    /// Training goes on from a checkpoint.
    Restore {
        /// Optimizer step it holds.
        step: u64,
        /// Where it lies.
        url: String,
        /// Newer checkpoints that were passed over.
        skipped: Vec<SkippedCheckpoint>,
    },
    /// A sample could not be used and was replaced.
    BadSample {
        /// Dataset name.
        dataset: String,
        /// Episode index.
        episode: u64,
        /// Frame index within the episode.
        frame: u64,
        /// What was wrong with it.
        reason: String,
    },
    /// A step gave a loss or gradient that is not finite; it was skipped.
    NonFinite {
        /// The step.
        step: u64,
        /// How many such steps this run has had, this one included.
        count: u64,
        /// Indices of the step's samples in the sample order.
        samples: Vec<u64>,
        /// Folder below the run's with a picture of each rank's batch and its captions, if they
        /// could be written.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        contact_sheet: Option<String>,
    },
    /// A worker makes no progress.
    Hang {
        /// The worker: rank and host.
        who: String,
        /// Its rank; `rank` is that of the process that noticed.
        #[serde(default)]
        hung_rank: Option<u32>,
        /// Its last step.
        step: u64,
        /// What it was doing: data, forward, backward, all-reduce, optimizer, checkpoint.
        phase: String,
        /// Seconds it has been doing it.
        since_s: f64,
    },
    /// The workers are started again.
    Restart {
        /// Why.
        reason: String,
        /// Exit code by rank; 128 + signal number for a killed worker.
        exit_codes: Vec<i32>,
        /// Seconds waited before that.
        #[serde(default)]
        pause_s: f64,
    },
    /// What the run has cost so far.
    Budget {
        /// World size times wall time, over all generations.
        gpu_hours: f64,
        /// The recipe's cap.
        max_gpu_hours: Option<f64>,
    },
    /// Held-out error.
    Eval {
        /// Optimizer step of the weights.
        step: u64,
        /// Result by action space.
        spaces: BTreeMap<String, SpaceError>,
    },
    /// A storage operation failed and is tried again.
    StoreRetry {
        /// get, put, list, head, delete.
        operation: String,
        /// Object path.
        path: String,
        /// Which try failed, from 1.
        attempt: u32,
        /// Seconds waited on this operation so far.
        waited_s: f64,
        /// What the storage said.
        error: String,
    },
    /// A storage operation that had been retried succeeded.
    StoreRecovered {
        /// get, put, list, head, delete.
        operation: String,
        /// Object path.
        path: String,
        /// Tries it took.
        attempts: u32,
        /// Seconds waited on this operation.
        waited_s: f64,
    },
    /// Proof that workers exchanged gradients: `own_hash` differs between ranks, `reduced_hash`
    /// is the same on all.
    GradientExchange {
        /// The step.
        step: u64,
        /// Hash of this rank's gradient before the all-reduce.
        own_hash: String,
        /// Hash of the gradient after it.
        reduced_hash: String,
    },
    /// The samples that all loaders together delivered in one step, gathered over the ranks: each
    /// sample of the global batch once.
    SampleAudit {
        /// The step.
        step: u64,
        /// Indices in the sample order, sorted.
        samples: Vec<u64>,
    },
    /// What the datasets have given so far against what the recipe wants, at every checkpoint.
    Mixture {
        /// Optimizer steps done.
        step: u64,
        /// Samples of the run so far, over all generations.
        samples: u64,
        /// By dataset.
        datasets: BTreeMap<String, MixtureShare>,
    },
    /// The run or this process ends.
    End {
        /// Exit code.
        exit_code: i32,
        /// Why, in words.
        reason: String,
    },
}

impl Event {
    /// Returns the `event` field as it stands in the file.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Plan(_) => "plan",
            Self::Start(_) => "start",
            Self::Step(_) => "step",
            Self::Checkpoint { .. } => "checkpoint",
            Self::Restore { .. } => "restore",
            Self::BadSample { .. } => "bad_sample",
            Self::NonFinite { .. } => "non_finite",
            Self::Hang { .. } => "hang",
            Self::Restart { .. } => "restart",
            Self::Budget { .. } => "budget",
            Self::Eval { .. } => "eval",
            Self::StoreRetry { .. } => "store_retry",
            Self::StoreRecovered { .. } => "store_recovered",
            Self::GradientExchange { .. } => "gradient_exchange",
            Self::SampleAudit { .. } => "sample_audit",
            Self::Mixture { .. } => "mixture",
            Self::End { .. } => "end",
        }
    }

    /// Returns whether the record must be on disk before the writer goes on.
    pub fn is_durable(&self) -> bool {
        matches!(self, Self::Checkpoint { .. } | Self::End { .. })
    }
}

/// What the run is going to do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PlanEvent {
    /// Number of workers.
    pub world_size: u32,
    /// Samples per optimizer step, over all workers.
    pub global_batch: u64,
    /// Samples per forward pass and worker.
    pub micro_batch: u64,
    /// Forward passes per optimizer step and worker.
    pub accumulation: u64,
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// Samples of the whole run.
    pub samples: u64,
    /// Model parameters.
    pub parameters: u64,
    /// Expected wall time in seconds, when a step time is known.
    pub expected_s: Option<f64>,
    /// Expected GPU-hours, when a step time is known.
    pub gpu_hours: Option<f64>,
    /// Expected price in US dollars, when a price is configured.
    pub cost_usd: Option<f64>,
}

/// The beginning of a generation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StartEvent {
    /// Number of workers.
    pub world_size: u32,
    /// Optimizer step training begins or goes on at.
    pub step: u64,
    /// Optimizer step it ends at.
    pub steps: u64,
    /// Samples per optimizer step, over all workers.
    pub global_batch: u64,
    /// nccl, gloo or local.
    pub communicator: String,
    /// Kind of device: cpu, cuda.
    pub device: String,
    /// GPU-hours that the checkpoint says were spent before.
    pub gpu_hours_before: f64,
    /// The recipe's cap.
    pub max_gpu_hours: Option<f64>,
}

/// One optimizer step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepEvent {
    /// Optimizer steps done, this one included.
    pub step: u64,
    /// Samples consumed, this step included.
    pub samples: u64,
    /// Velocity loss of the global batch.
    #[serde(with = "null_is_nan")]
    pub loss: f64,
    /// Global gradient norm before clipping.
    #[serde(with = "null_is_nan")]
    pub grad_norm: f64,
    /// Learning rate by optimizer group.
    pub learning_rate: BTreeMap<String, f64>,
    /// Samples per second over all workers.
    pub samples_per_s: f64,
    /// Share of the step spent waiting for data, 0 to 1.
    pub data_wait: f64,
    /// Seconds by phase: data, forward, backward, all-reduce, optimizer, checkpoint.
    pub phases: BTreeMap<String, f64>,
    /// Samples of this step by dataset.
    pub datasets: BTreeMap<String, u64>,
}

/// What one dataset has given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MixtureShare {
    /// Samples so far.
    pub samples: u64,
    /// Their share of all samples so far, 0 to 1.
    pub share: f64,
    /// The share that the recipe's weights ask for.
    pub target: f64,
}

/// A checkpoint that was passed over at restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedCheckpoint {
    /// Where it lies.
    pub url: String,
    /// Why it was not used.
    pub reason: String,
}

/// Held-out error of one action space.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SpaceError {
    /// Mean squared error, in normalised units, of the mean of the chunks sampled for an
    /// observation.
    #[serde(with = "null_is_nan")]
    pub error: f64,
    /// The same for single sampled chunks. A policy whose samples spread as the demonstrations do
    /// has about twice the error of its mean here.
    #[serde(default, with = "null_is_nan")]
    pub single_sample_error: f64,
    /// The same for a predictor that always answers the mean action.
    #[serde(with = "null_is_nan")]
    pub mean_predictor_error: f64,
    /// Error by horizon step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_horizon: Option<Vec<f64>>,
    /// Held-out episodes.
    pub episodes: u64,
    /// Held-out chunks.
    pub chunks: u64,
}

mod rfc3339_millis {
    use std::time::SystemTime;

    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(time: &SystemTime, out: S) -> Result<S::Ok, S::Error> {
        out.collect_str(&humantime::format_rfc3339_millis(*time))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<SystemTime, D::Error> {
        let text = String::deserialize(input)?;
        humantime::parse_rfc3339(&text)
            .map_err(|error| de::Error::custom(format!("`time` is not RFC 3339: {error}")))
    }
}

mod null_is_nan {
    use serde::{Deserialize, Deserializer, Serializer};

    #[allow(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde's `with` passes references"
    )]
    pub(super) fn serialize<S: Serializer>(value: &f64, out: S) -> Result<S::Ok, S::Error> {
        if value.is_finite() {
            out.serialize_f64(*value)
        } else {
            out.serialize_none()
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<f64, D::Error> {
        Ok(Option::<f64>::deserialize(input)?.unwrap_or(f64::NAN))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::time::Duration;

    use super::*;

    fn record(event: Event) -> Record {
        Record {
            time: SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
            run: "r1".into(),
            generation: 2,
            rank: Some(0),
            event,
        }
    }

    fn one_of_each() -> Vec<Event> {
        vec![
            Event::Plan(PlanEvent {
                world_size: 2,
                expected_s: Some(12.5),
                ..PlanEvent::default()
            }),
            Event::Start(StartEvent {
                communicator: "gloo".into(),
                max_gpu_hours: Some(1.0),
                ..StartEvent::default()
            }),
            Event::Step(StepEvent {
                step: 7,
                samples: 56,
                loss: 0.25,
                learning_rate: BTreeMap::from([("model".into(), 1e-4)]),
                phases: BTreeMap::from([("forward".into(), 0.5)]),
                datasets: BTreeMap::from([("lift".into(), 8)]),
                ..StepEvent::default()
            }),
            Event::Checkpoint {
                step: 7,
                url: "s3://b/step-7/g2".into(),
                bytes: u64::MAX,
                stall_s: 0.01,
                seconds: 1.5,
            },
            Event::Restore {
                step: 7,
                url: "s3://b/step-7/g2".into(),
                skipped: vec![SkippedCheckpoint {
                    url: "s3://b/step-9/g2".into(),
                    reason: "sha256 differs".into(),
                }],
            },
            Event::BadSample {
                dataset: "lift".into(),
                episode: 3,
                frame: 4,
                reason: "not a JPEG".into(),
            },
            Event::NonFinite {
                step: 8,
                count: 1,
                samples: vec![64, 65],
                contact_sheet: None,
            },
            Event::Hang {
                who: "rank 1 on n2".into(),
                hung_rank: Some(1),
                step: 8,
                phase: "all-reduce".into(),
                since_s: 61.0,
            },
            Event::Restart {
                reason: "rank 1 was killed by signal 9".into(),
                exit_codes: vec![143, 137],
                pause_s: 1.5,
            },
            Event::Budget {
                gpu_hours: 0.5,
                max_gpu_hours: None,
            },
            Event::Eval {
                step: 9,
                spaces: BTreeMap::from([(
                    "eef_delta".into(),
                    SpaceError {
                        error: 0.4,
                        single_sample_error: 0.7,
                        mean_predictor_error: 1.0,
                        per_horizon: Some(vec![0.1, 0.7]),
                        episodes: 2,
                        chunks: 90,
                    },
                )]),
            },
            Event::StoreRetry {
                operation: "get".into(),
                path: "data/f.parquet".into(),
                attempt: 1,
                waited_s: 0.2,
                error: "503".into(),
            },
            Event::StoreRecovered {
                operation: "get".into(),
                path: "data/f.parquet".into(),
                attempts: 2,
                waited_s: 0.4,
            },
            Event::GradientExchange {
                step: 1,
                own_hash: "ab".into(),
                reduced_hash: "cd".into(),
            },
            Event::Mixture {
                step: 9,
                samples: 72,
                datasets: BTreeMap::from([(
                    "lift".into(),
                    MixtureShare {
                        samples: 18,
                        share: 0.25,
                        target: 0.26,
                    },
                )]),
            },
            Event::End {
                exit_code: 85,
                reason: "preempted".into(),
            },
        ]
    }

    #[test]
    fn every_kind_round_trips_under_its_own_name() {
        let mut kinds = std::collections::BTreeSet::new();
        for event in one_of_each() {
            let before = record(event);
            let text = serde_json::to_string(&before).unwrap();
            let value: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(value["event"], before.event.kind());
            assert_eq!(value["time"], "2023-11-14T22:13:20.123Z");
            assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), before);
            kinds.insert(before.event.kind());
        }
        assert_eq!(kinds.len(), 16);
    }

    #[test]
    fn a_launcher_record_says_rank_null() {
        let mut launcher = record(Event::End {
            exit_code: 0,
            reason: "done".into(),
        });
        launcher.rank = None;
        let text = serde_json::to_string(&launcher).unwrap();
        assert!(text.contains("\"rank\":null"), "{text}");
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), launcher);
    }

    #[test]
    fn a_loss_that_is_not_a_number_survives() {
        let text = serde_json::to_string(&record(Event::Step(StepEvent {
            loss: f64::INFINITY,
            ..StepEvent::default()
        })))
        .unwrap();
        assert!(text.contains("\"loss\":null"), "{text}");
        let back: Record = serde_json::from_str(&text).unwrap();
        let Event::Step(step) = back.event else {
            panic!("{text}");
        };
        assert!(step.loss.is_nan());
    }

    #[test]
    fn unknown_fields_are_ignored_and_unknown_kinds_are_not() {
        let known = r#"{"time":"2026-01-02T03:04:05.006Z","run":"r","generation":1,"rank":0,"event":"end","exit_code":0,"reason":"done","later":1}"#;
        assert!(serde_json::from_str::<Record>(known).is_ok());
        let unknown = known.replace("\"end\"", "\"ende\"");
        let error = serde_json::from_str::<Record>(&unknown).unwrap_err();
        assert!(error.to_string().contains("ende"), "{error}");
    }
}

//! Events, the truth of a run, and their views: progress line, budget, end-of-run summary.
//!
//! Every process of a run appends whole JSON lines to one `events.jsonl`; everything a person sees
//! is computed from that file, so a view can be thrown away and made again.
//!
//! ```text
//! worker rank 0..n, launcher --EventLog--> runs/<recipe>/<id>/events.jsonl
//!                                              |
//!                          read_events | Tail --+--> RunView --> progress line, budget, summary
//! ```
//!
//! | module | job |
//! |---|---|
//! | [`config`] | recipe section `[observe]` |
//! | [`events`] | the kinds of event and the record around them |
//! | [`event_log`] | appends records; several processes share one file |
//! | [`reader`] | reads the file back, whole or as it grows |
//! | [`view`] | what the events say about the run so far |
//! | [`progress`] | one line on a terminal, plain lines elsewhere |
//! | [`budget`] | GPU-hours spent against GPU-hours allowed |
//! | [`mod@summary`] | the text at the end of a run |
//! | `threads` | what the threads of a process are doing, from `/proc` |
//! | [`units`] | durations, counts and sizes as people read them |
//!
//! ```
//! use pollen_observe::{Event, EventLog, read_events};
//! # let folder = tempfile::tempdir().unwrap();
//! # let path = folder.path().join("events.jsonl");
//! let log = EventLog::open(&path, "20260102-030405-a1b2c3d4", 1, Some(0))?;
//! log.append(Event::Budget { gpu_hours: 0.5, max_gpu_hours: Some(2.0) })?;
//! let records = read_events(&path)?;
//! assert_eq!(records[0].event.kind(), "budget");
//! # Ok::<(), pollen_observe::Error>(())
//! ```

#![forbid(unsafe_code)]

pub mod budget;
pub mod config;
pub mod error;
pub mod event_log;
pub mod events;
mod notices;
pub mod progress;
pub mod reader;
pub mod summary;
mod threads;
pub mod units;
pub mod view;

pub use budget::Budget;
pub use config::{Config, Sink};
pub use error::Error;
pub use event_log::EventLog;
pub use events::{
    Event, MixtureShare, PlanEvent, Record, SkippedCheckpoint, SpaceError, StartEvent, StepEvent,
};
pub use progress::Progress;
pub use reader::{Tail, read_events};
pub use summary::{NextCommand, summary};
pub use threads::threads_of;
pub use view::RunView;

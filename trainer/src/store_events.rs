//! Storage retries as events of the run.

use pollen_observe::{Event, EventLog};
use pollen_storage::{Observer, Recovered, Retry};

/// Writes storage retries into the run's events.
#[derive(Debug)]
pub(crate) struct StoreEvents(EventLog);

impl StoreEvents {
    pub(crate) fn new(events: EventLog) -> Self {
        Self(events)
    }
}

impl Observer for StoreEvents {
    fn retry(&self, retry: &Retry) {
        let event = Event::StoreRetry {
            operation: retry.operation.to_owned(),
            path: retry.path.clone(),
            attempt: retry.attempt,
            waited_s: retry.waited.as_secs_f64(),
            error: retry.error.clone(),
        };
        if let Err(error) = self.0.append(event) {
            tracing::warn!(%error, "a storage retry could not be recorded");
        }
    }

    fn recovered(&self, recovered: &Recovered) {
        let event = Event::StoreRecovered {
            operation: recovered.operation.to_owned(),
            path: recovered.path.clone(),
            attempts: recovered.attempts,
            waited_s: recovered.waited.as_secs_f64(),
        };
        if let Err(error) = self.0.append(event) {
            tracing::warn!(%error, "a storage recovery could not be recorded");
        }
    }
}

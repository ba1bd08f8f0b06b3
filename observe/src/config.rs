//! Recipe section `[observe]`.

use std::num::NonZeroU32;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Where a run's events go and how often a person hears of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Views that are kept up to date while the run goes on.
    pub sinks: Vec<Sink>,
    /// Shortest time between two redraws of the progress line on a terminal.
    #[serde(with = "humantime_serde")]
    pub refresh: Duration,
    /// Longest time between two plain lines when there is no terminal.
    #[serde(with = "humantime_serde")]
    pub plain_every: Duration,
    /// Steps between two `step` events.
    pub log_every: NonZeroU32,
}

/// One view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sink {
    /// `events.jsonl` in the run folder: the truth, cannot be left out.
    Events,
    /// Progress line on standard error.
    Progress,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            sinks: vec![Sink::Events, Sink::Progress],
            refresh: Duration::from_millis(200),
            plain_every: Duration::from_secs(10),
            log_every: NonZeroU32::MIN,
        }
    }
}

impl Config {
    /// Returns all faults at once; none means the section can be used.
    pub fn validate(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if !self.sinks.contains(&Sink::Events) {
            faults
                .push("`observe.sinks` lacks \"events\": every other view is made from it".into());
        }
        if self.refresh < Duration::from_millis(20) {
            faults.push("`observe.refresh` is below 20ms: give 200ms".into());
        }
        faults
    }

    /// Returns whether a view is asked for.
    pub fn has(&self, sink: Sink) -> bool {
        self.sinks.contains(&sink)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use pollen_core::Layered;

    use super::*;

    fn parse(text: &str) -> Result<Config, pollen_core::ConfigError> {
        Layered::from_text(text, "test").unwrap().parse()
    }

    #[test]
    fn an_empty_section_is_the_default() {
        assert_eq!(parse("").unwrap(), Config::default());
        assert!(Config::default().validate().is_empty());
    }

    #[test]
    fn keys_are_strict_and_faults_are_named() {
        let config = parse("sinks = [\"progress\"]\nrefresh = \"1ms\"").unwrap();
        assert_eq!(config.validate().len(), 2);
        let error = parse("refrsh = \"1s\"").unwrap_err().to_string();
        assert!(error.contains("refrsh"), "{error}");
        assert!(parse("log_every = 0").is_err());
    }
}

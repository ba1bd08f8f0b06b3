//! Recipe section `[launch]`.

use std::num::NonZeroU32;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Where the workers run and what happens when one of them fails.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// What starts the workers.
    pub engine: Engine,
    /// Number of workers, one per device.
    pub workers: NonZeroU32,
    /// Restarts after failures; counted anew after every checkpoint.
    pub max_restarts: u32,
    /// Pause before the first restart after a failure; doubled for each further one without a
    /// checkpoint in between. Between half and all of it is waited, by chance, so that many runs
    /// that failed together do not come back together.
    #[serde(with = "humantime_serde")]
    pub backoff: Duration,
    /// The longest such pause.
    #[serde(with = "humantime_serde")]
    pub max_backoff: Duration,
    /// Time that workers get to save and end once they are asked to.
    #[serde(with = "humantime_serde")]
    pub grace: Duration,
    /// Whether workers end when the launcher is killed.
    pub die_with_launcher: bool,
    /// `host:port` of a store that somebody else hosts; without it the launcher hosts one.
    pub store: Option<String>,
    /// S3 server that the launcher starts beside the workers.
    pub object_server: ObjectServerKind,
    /// Price of one worker's hour, for the plan.
    pub usd_per_gpu_hour: Option<f64>,
}

/// What starts the workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    /// Processes on this machine.
    Local,
    /// An sbatch job.
    Slurm,
    /// A Kubernetes JobSet.
    Jobset,
}

/// S3 server that the launcher starts beside the workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ObjectServerKind {
    /// None: the recipe's URLs lead to storage that is there already.
    None,
    /// SeaweedFS on this machine.
    Seaweedfs,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            engine: Engine::Local,
            workers: NonZeroU32::MIN,
            max_restarts: 3,
            backoff: Duration::from_secs(1),
            max_backoff: Duration::from_mins(1),
            grace: Duration::from_secs(30),
            die_with_launcher: true,
            store: None,
            object_server: ObjectServerKind::None,
            usd_per_gpu_hour: None,
        }
    }
}

impl Config {
    /// Returns all faults at once; none means the section can be used.
    pub fn validate(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.grace.is_zero() {
            faults.push("`launch.grace` is zero: give workers time to save, such as 30s".into());
        }
        if self.max_backoff < self.backoff {
            faults.push("`launch.max_backoff` is below `launch.backoff`".into());
        }
        if let Some(store) = &self.store
            && split_address(store).is_none()
        {
            faults.push(format!("`launch.store` is `{store}`: write host:port"));
        }
        if self
            .usd_per_gpu_hour
            .is_some_and(|price| !(price >= 0.0 && price.is_finite()))
        {
            faults.push("`launch.usd_per_gpu_hour` is not a price".into());
        }
        faults
    }

    /// Refuses a section that is faulty or asks for an engine that is not built yet.
    pub fn check(&self) -> Result<(), Error> {
        let faults = self.validate();
        if !faults.is_empty() {
            return Err(Error::Config { faults });
        }
        match self.engine {
            Engine::Local => Ok(()),
            Engine::Slurm => Err(Error::Engine { engine: "slurm" }),
            Engine::Jobset => Err(Error::Engine { engine: "jobset" }),
        }
    }
}

/// Splits `host:port`; an IPv6 host stands in brackets.
pub(crate) fn split_address(address: &str) -> Option<(String, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    if bare.is_empty() || (bare.contains(':') && bare.len() + 2 != host.len()) {
        return None;
    }
    Some((bare.to_owned(), port.parse().ok()?))
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
        Config::default().check().unwrap();
    }

    #[test]
    fn all_keys_are_read() {
        let config = parse(
            "engine = \"local\"\nworkers = 2\nmax_restarts = 0\nbackoff = \"2s\"\nmax_backoff = \"5m\"\ngrace = \"5s\"\n\
             die_with_launcher = false\nstore = \"n1:29500\"\nobject_server = \"seaweedfs\"\n\
             usd_per_gpu_hour = 2.5",
        )
        .unwrap();
        assert_eq!(config.workers.get(), 2);
        assert_eq!(config.grace, Duration::from_secs(5));
        assert_eq!(config.max_backoff, Duration::from_mins(5));
        assert_eq!(config.object_server, ObjectServerKind::Seaweedfs);
        config.check().unwrap();
    }

    #[test]
    fn other_engines_are_refused() {
        for engine in ["slurm", "jobset"] {
            let error = parse(&format!("engine = \"{engine}\""))
                .unwrap()
                .check()
                .unwrap_err();
            assert!(
                error.to_string().contains("not in this build yet"),
                "{error}"
            );
            assert_eq!(error.class(), pollen_core::ErrorClass::User);
        }
        assert!(parse("engine = \"ssh\"").is_err());
    }

    #[test]
    fn faults_come_all_at_once() {
        let config =
            parse("grace = \"0s\"\nbackoff = \"2m\"\nstore = \"n1\"\nusd_per_gpu_hour = -1.0")
                .unwrap();
        assert_eq!(config.validate().len(), 4);
        assert!(parse("worker = 2").is_err());
    }

    #[test]
    fn addresses_split_at_the_last_colon() {
        assert_eq!(split_address("n1:7"), Some(("n1".into(), 7)));
        assert_eq!(split_address("[::1]:7"), Some(("::1".into(), 7)));
        for wrong in ["n1", ":7", "n1:x", "::1:7", "n1:70000"] {
            assert_eq!(split_address(wrong), None, "{wrong}");
        }
    }
}

//! Section `[communicator]` of a recipe.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Which engine carries the collectives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// `local` for one rank; else `nccl` on GPUs and `gloo` on CPUs.
    #[default]
    Auto,
    /// Gloo over TCP, on the CPU.
    Gloo,
    /// One process only.
    Local,
    /// NCCL for what lies on NVIDIA GPUs, Gloo for the rest.
    Nccl,
}

/// How ranks are connected.
///
/// ```
/// use pollen_collectives::Config;
/// let config: Config = toml::from_str("backend = 'gloo'\ntimeout = '90s'").unwrap();
/// assert_eq!(config.timeout.as_secs(), 90);
/// assert!(toml::from_str::<Config>("timeuot = '90s'").is_err());
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The engine.
    pub backend: Backend,
    /// An operation in which nothing moves for so long fails; covers the slowest rank's lateness.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// How long all ranks together may take to appear.
    #[serde(with = "humantime_serde")]
    pub join_timeout: Duration,
    /// Network interface for the engine's connections, for example `eth0`; empty: not fixed.
    pub interface: String,
    /// Host name or address for the engine's connections. If this and `interface` are empty it is
    /// the address from which this process reaches the store, so loopback for a local one.
    pub hostname: String,
    /// Path of `libpollen_gloo.so`; empty: `POLLEN_GLOO_LIBRARY`, then the usual places.
    pub gloo_library: PathBuf,
    /// Path of `libnccl.so.2`; empty: `POLLEN_NCCL_LIBRARY`, then the usual places.
    pub nccl_library: PathBuf,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            backend: Backend::Auto,
            timeout: Duration::from_mins(1),
            join_timeout: Duration::from_mins(2),
            interface: String::new(),
            hostname: String::new(),
            gloo_library: PathBuf::new(),
            nccl_library: PathBuf::new(),
        }
    }
}

impl Config {
    /// Checks what the types cannot, and reports all faults at once.
    pub fn validate(&self) -> Result<()> {
        let mut faults = Vec::new();
        for (key, value) in [
            ("timeout", self.timeout),
            ("join_timeout", self.join_timeout),
        ] {
            if value < Duration::from_millis(1) {
                faults.push(format!("`{key}` must be at least 1ms, for example \"60s\""));
            }
        }
        if !self.interface.is_empty() && !self.hostname.is_empty() {
            faults.push("set `interface` or `hostname`, not both".to_owned());
        }
        for (key, value) in [("interface", &self.interface), ("hostname", &self.hostname)] {
            if value.contains(['\0', '\n']) {
                faults.push(format!("`{key}` holds a NUL byte or a line break"));
            }
        }
        if faults.is_empty() {
            Ok(())
        } else {
            Err(Error::Config { faults })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_round_trips_and_defaults_fill_the_rest() {
        let config: Config =
            toml::from_str("join_timeout = '5m'\ninterface = 'ib0'").expect("valid");
        assert_eq!(config.join_timeout, Duration::from_mins(5));
        assert_eq!(config.timeout, Config::default().timeout);
        let text = toml::to_string(&config).expect("serialises");
        assert_eq!(toml::from_str::<Config>(&text).expect("parses"), config);
    }

    #[test]
    fn all_faults_are_reported_at_once() {
        let config = Config {
            timeout: Duration::ZERO,
            interface: "eth0".into(),
            hostname: "node".into(),
            ..Config::default()
        };
        let text = config.validate().expect_err("two faults").to_string();
        assert!(text.contains("`timeout` must be"), "{text}");
        assert!(text.contains("not both"), "{text}");
        Config::default().validate().expect("defaults are valid");
    }
}

//! Signs of life: what a rank says about itself, and who concludes that it hangs.
//!
//! A thread of each rank stores a [`Beat`] at a fixed interval: where the training thread is and
//! how long that may take. The rank itself sets the limits, since it alone knows how long its
//! phases usually last and which of them wait for storage. A [`Watch`] compares: beats that stop
//! mean a frozen process or a dead node; beats that go on while the training thread stays where it
//! is mean a stuck one.
//!
//! A watch counts the time between its own looks with a cap, so that a watcher that was itself
//! stopped accuses nobody when it wakes up.

use std::fmt;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::store::{Store, Swap};

/// Section `[watchdog]` of a recipe.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct WatchdogConfig {
    /// Whether ranks watch each other. Switch it off to stop a rank in a debugger.
    pub enabled: bool,
    /// Time between two beats of a rank.
    #[serde(with = "humantime_serde")]
    pub interval: Duration,
    /// The shortest silence that counts as a hang.
    #[serde(with = "humantime_serde")]
    pub min_timeout: Duration,
    /// The longest silence that does not.
    #[serde(with = "humantime_serde")]
    pub max_timeout: Duration,
}

impl Default for WatchdogConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            interval: Duration::from_secs(1),
            min_timeout: Duration::from_secs(10),
            max_timeout: Duration::from_secs(30),
        }
    }
}

impl WatchdogConfig {
    /// Returns all faults at once; none means the section can be used.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.interval < Duration::from_millis(10) {
            faults.push("`watchdog.interval` must be at least 10ms, for example \"1s\"".to_owned());
        }
        if self.min_timeout < self.interval * 4 {
            faults.push(
                "`watchdog.min_timeout` must be at least four times `watchdog.interval`".to_owned(),
            );
        }
        if self.max_timeout < self.min_timeout {
            faults.push("`watchdog.max_timeout` is below `watchdog.min_timeout`".to_owned());
        }
        faults
    }
}

/// What a rank says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beat {
    /// Counts this rank's beats.
    pub number: u64,
    /// The host it runs on.
    pub host: String,
    /// Its process id there.
    pub pid: u32,
    /// The step it is in.
    pub step: u64,
    /// What it is doing.
    pub phase: String,
    /// For how long.
    pub in_phase: Duration,
    /// For how long it may; `None`: a wait that others bound.
    pub patience: Option<Duration>,
    /// Time of day there, for people; nothing is decided by it.
    pub sent: SystemTime,
    /// How long it may stay silent after this beat.
    pub silence: Duration,
    /// Whether it ends in order: no more beats will come.
    pub last: bool,
}

impl Beat {
    /// One value a line; the host and the phase come last because they are text.
    fn to_text(&self) -> String {
        format!(
            "{}\n{}\n{}\n{}\n{}\n{}\n{}\n{}\n{}\n{}",
            self.number,
            self.pid,
            self.step,
            self.in_phase.as_millis(),
            self.patience
                .map_or_else(|| "-".to_owned(), |limit| limit.as_millis().to_string()),
            self.sent
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default()
                .as_millis(),
            self.silence.as_millis(),
            u8::from(self.last),
            self.phase,
            self.host,
        )
    }

    fn from_text(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let millis = |text: &str| text.parse().ok().map(Duration::from_millis);
        Some(Self {
            number: lines.next()?.parse().ok()?,
            pid: lines.next()?.parse().ok()?,
            step: lines.next()?.parse().ok()?,
            in_phase: millis(lines.next()?)?,
            patience: match lines.next()? {
                "-" => None,
                text => Some(millis(text)?),
            },
            sent: SystemTime::UNIX_EPOCH + millis(lines.next()?)?,
            silence: millis(lines.next()?)?,
            last: lines.next()? == "1",
            phase: lines.next()?.to_owned(),
            host: lines.next()?.to_owned(),
        })
    }
}

/// How a rank hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HangKind {
    /// No sign of life: the process is stopped, swapped out or its node is gone.
    Silent,
    /// The process lives and its training thread does not move.
    Stuck,
}

/// A rank that makes no progress.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hang {
    /// The rank.
    pub rank: u32,
    /// The host it runs on.
    pub host: String,
    /// Its process id there.
    pub pid: u32,
    /// The step it is in.
    pub step: u64,
    /// What it was doing.
    pub phase: String,
    /// For how long.
    pub since: Duration,
    /// How it hangs.
    pub kind: HangKind,
}

impl Hang {
    fn to_text(&self) -> String {
        let kind = match self.kind {
            HangKind::Silent => "silent",
            HangKind::Stuck => "stuck",
        };
        format!(
            "{}\n{}\n{}\n{}\n{kind}\n{}\n{}",
            self.rank,
            self.pid,
            self.step,
            self.since.as_millis(),
            self.phase,
            self.host
        )
    }

    fn from_text(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        Some(Self {
            rank: lines.next()?.parse().ok()?,
            pid: lines.next()?.parse().ok()?,
            step: lines.next()?.parse().ok()?,
            since: Duration::from_millis(lines.next()?.parse().ok()?),
            kind: match lines.next()? {
                "silent" => HangKind::Silent,
                "stuck" => HangKind::Stuck,
                _ => return None,
            },
            phase: lines.next()?.to_owned(),
            host: lines.next()?.to_owned(),
        })
    }
}

impl fmt::Display for Hang {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            rank,
            host,
            pid,
            step,
            phase,
            ..
        } = self;
        let since = humantime::format_duration(Duration::from_secs(self.since.as_secs()));
        write!(
            f,
            "rank {rank} on {host} (process {pid}) hangs in {phase} of step {step} since {since}: "
        )?;
        f.write_str(match self.kind {
            HangKind::Silent => "stopped, swapped out or dead; that was its last sign of life",
            HangKind::Stuck => "it lives, its training thread does not move",
        })
    }
}

/// Watches one rank. Time comes in with each look.
#[derive(Debug)]
pub struct Watch {
    rank: u32,
    interval: Duration,
    seen: Option<Beat>,
    silent_for: Duration,
    looked: Option<Duration>,
}

impl Watch {
    /// Starts watching `rank`, which beats every `interval`.
    pub fn new(rank: u32, interval: Duration) -> Self {
        Self {
            rank,
            interval,
            seen: None,
            silent_for: Duration::ZERO,
            looked: None,
        }
    }

    /// Returns the rank that is watched.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Takes the newest beat at the monotonic time `now`, and returns whether the rank hangs. A
    /// rank that has never beaten is the concern of the join deadline, not of this.
    pub fn look(&mut self, now: Duration, newest: Option<Beat>) -> Option<Hang> {
        // What a late look did not see is not held against the rank.
        let passed = self.looked.map_or(Duration::ZERO, |before| {
            now.saturating_sub(before).min(self.interval * 2)
        });
        self.looked = Some(now);
        let beat = newest?;
        if self
            .seen
            .as_ref()
            .is_some_and(|seen| seen.number == beat.number)
        {
            self.silent_for += passed;
        } else {
            self.silent_for = Duration::ZERO;
        }
        let silent_for = self.silent_for;
        let kind = if beat.last {
            None
        } else if silent_for > beat.silence {
            Some(HangKind::Silent)
        } else if beat.patience.is_some_and(|limit| beat.in_phase > limit) {
            Some(HangKind::Stuck)
        } else {
            None
        };
        let hang = kind.map(|kind| Hang {
            rank: self.rank,
            host: beat.host.clone(),
            pid: beat.pid,
            step: beat.step,
            phase: beat.phase.clone(),
            since: beat.in_phase + silent_for,
            kind,
        });
        self.seen = Some(beat);
        hang
    }
}

impl Store {
    /// Stores a rank's beat.
    pub fn beat(&self, rank: u32, beat: &Beat) -> Result<()> {
        self.set(&format!("beat/{rank}"), beat.to_text().as_bytes())
    }

    /// Returns a rank's newest beat.
    pub fn newest_beat(&self, rank: u32) -> Result<Option<Beat>> {
        let value = self.try_get(&format!("beat/{rank}"))?;
        value
            .map(|bytes| {
                Beat::from_text(&String::from_utf8_lossy(&bytes)).ok_or_else(|| Error::Protocol {
                    address: self.address().to_owned(),
                    reason: format!("the beat of rank {rank} cannot be read"),
                })
            })
            .transpose()
    }

    /// Tells all ranks that one of them hangs. Returns whether this is the first to say so: one
    /// verdict stands for a generation.
    pub fn declare_hang(&self, hang: &Hang) -> Result<bool> {
        let swap = self.compare_and_set("hang", None, hang.to_text().as_bytes())?;
        Ok(swap == Swap::Done)
    }

    /// Returns the verdict of this generation, if there is one.
    pub fn declared_hang(&self) -> Result<Option<Hang>> {
        let value = self.try_get("hang")?;
        value
            .map(|bytes| {
                Hang::from_text(&String::from_utf8_lossy(&bytes)).ok_or_else(|| Error::Protocol {
                    address: self.address().to_owned(),
                    reason: "the verdict of a hang cannot be read".to_owned(),
                })
            })
            .transpose()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::deadline::Deadline;
    use crate::store::StoreServer;

    const SECOND: Duration = Duration::from_secs(1);

    fn beat(number: u64) -> Beat {
        Beat {
            number,
            host: "n2".into(),
            pid: 17,
            step: 8,
            phase: "forward".into(),
            in_phase: SECOND * 3,
            patience: None,
            sent: SystemTime::UNIX_EPOCH + SECOND * 1_700_000_000,
            silence: SECOND * 10,
            last: false,
        }
    }

    #[test]
    fn a_rank_that_stops_beating_is_named_after_its_own_limit() {
        let mut watch = Watch::new(1, SECOND);
        assert_eq!(watch.look(SECOND * 100, None), None, "it has not come yet");
        assert_eq!(watch.look(SECOND * 101, Some(beat(1))), None);
        for second in 102..=111 {
            assert_eq!(watch.look(SECOND * second, Some(beat(1))), None, "{second}");
        }
        let hang = watch.look(SECOND * 112, Some(beat(1))).unwrap();
        assert_eq!((hang.rank, hang.kind), (1, HangKind::Silent));
        assert_eq!(
            hang.since,
            SECOND * 14,
            "3 s at its last beat, 11 s since then"
        );
        let text = hang.to_string();
        assert_eq!(
            text,
            "rank 1 on n2 (process 17) hangs in forward of step 8 since 14s: stopped, swapped out or \
             dead; that was its last sign of life"
        );
        // Had it come back in time, nothing would be held against it.
        assert_eq!(watch.look(SECOND * 113, Some(beat(2))), None);
    }

    #[test]
    fn a_watcher_that_was_stopped_accuses_nobody() {
        let mut watch = Watch::new(1, SECOND);
        assert_eq!(watch.look(SECOND, Some(beat(1))), None);
        // Stopped together with the machine for an hour; the other rank needs a moment as well.
        assert_eq!(watch.look(SECOND * 3600, Some(beat(1))), None);
        assert_eq!(watch.look(SECOND * 3601, Some(beat(1))), None);
        assert_eq!(watch.look(SECOND * 3602, Some(beat(2))), None);
    }

    #[test]
    fn a_rank_that_beats_and_does_not_move_is_stuck() {
        let mut watch = Watch::new(0, SECOND);
        let stuck = |number, seconds| Beat {
            in_phase: SECOND * seconds,
            patience: Some(SECOND * 60),
            ..beat(number)
        };
        assert_eq!(watch.look(SECOND, Some(stuck(1, 60))), None);
        let hang = watch.look(SECOND * 2, Some(stuck(2, 61))).unwrap();
        assert_eq!(hang.kind, HangKind::Stuck);
        let waiting = Beat {
            in_phase: SECOND * 10_000,
            ..beat(3)
        };
        assert_eq!(
            watch.look(SECOND * 3, Some(waiting)),
            None,
            "a wait that others bound"
        );
    }

    #[test]
    fn a_rank_that_ended_in_order_may_be_silent() {
        let mut watch = Watch::new(1, SECOND);
        let last = Beat {
            last: true,
            ..beat(9)
        };
        for second in 1..100 {
            assert_eq!(watch.look(SECOND * second, Some(last.clone())), None);
        }
    }

    #[test]
    fn beats_and_one_verdict_go_through_the_store() {
        let server = StoreServer::bind("127.0.0.1:0").unwrap();
        let deadline = Deadline::after(SECOND * 60);
        let store = Store::connect(&server.address().to_string(), deadline)
            .unwrap()
            .prefixed("g3/");
        assert_eq!(store.newest_beat(1).unwrap(), None);
        let sent = Beat {
            patience: Some(SECOND * 5),
            ..beat(4)
        };
        store.beat(1, &sent).unwrap();
        assert_eq!(store.newest_beat(1).unwrap(), Some(sent));

        let hang = |rank, kind| Hang {
            rank,
            host: "n2".into(),
            pid: 1,
            step: 8,
            phase: "all_reduce".into(),
            since: SECOND * 14,
            kind,
        };
        assert_eq!(store.declared_hang().unwrap(), None);
        assert!(store.declare_hang(&hang(1, HangKind::Stuck)).unwrap());
        assert!(!store.declare_hang(&hang(0, HangKind::Silent)).unwrap());
        let verdict = Some(hang(1, HangKind::Stuck));
        assert_eq!(store.declared_hang().unwrap(), verdict);
        store.set("beat/2", b"1\nx").unwrap();
        let error = store.newest_beat(2).unwrap_err().to_string();
        assert!(error.contains("the beat of rank 2"), "{error}");
    }

    #[test]
    fn a_section_with_faults_names_them_all() {
        assert_eq!(WatchdogConfig::default().faults(), Vec::<String>::new());
        let config: WatchdogConfig =
            toml::from_str("interval = '1ms'\nmin_timeout = '1ms'\nmax_timeout = '0s'").unwrap();
        assert_eq!(config.faults().len(), 3);
        assert!(toml::from_str::<WatchdogConfig>("timeout = '1s'").is_err());
    }
}

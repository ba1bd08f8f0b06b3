//! Cases in which the store fails, made from the requests of undisturbed runs.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::proxy::{Asked, Order, Spoil};

/// How long a store is slow; requests may take [`REQUEST_TIMEOUT`].
const SLOW: Duration = Duration::from_millis(500);
/// The limit of one request in these runs.
pub(crate) const REQUEST_TIMEOUT: &str = "storage.request_timeout=2s";

impl Spoil {
    pub(crate) const ALL: [Self; 7] = [
        Self::Refused,
        Self::Silent,
        Self::Slow,
        Self::Truncated,
        Self::AnswerLost,
        Self::Conflict,
        Self::Down,
    ];

    /// The word in a case's name.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Refused => "500",
            Self::Silent => "timeout",
            Self::Slow => "slow",
            Self::Truncated => "truncated",
            Self::AnswerLost => "lost",
            Self::Conflict => "conflict",
            Self::Down => "down",
        }
    }

    fn fits(self, asked: &Asked) -> bool {
        let writes = matches!(asked.method.as_str(), "PUT" | "POST" | "DELETE");
        match self {
            Self::Refused | Self::Silent | Self::Slow | Self::Down => true,
            Self::Truncated => matches!(asked.method.as_str(), "GET" | "LIST"),
            Self::AnswerLost => writes,
            Self::Conflict => asked.conditional,
        }
    }
}

/// A run whose store fails once.
#[derive(Clone, Debug)]
pub(crate) struct StoreCase {
    pub name: String,
    pub order: Order,
    /// Whether the run is killed first, since only a restore asks for this.
    pub resumed: bool,
}

/// Makes all cases: each kind of request, spoilt in each way that fits.
pub(crate) fn all(calm: &[Asked], resumed: &[Asked]) -> Vec<StoreCase> {
    let count = |requests: &[Asked]| {
        let mut counts: BTreeMap<Asked, usize> = BTreeMap::new();
        for asked in requests {
            *counts.entry(asked.clone()).or_default() += 1;
        }
        counts
    };
    // The first run of all also uploads and indexes the data, which no other one does.
    let mut of_calm = count(calm);
    of_calm.retain(|asked, _| !(asked.method == "PUT" && asked.object.starts_with("data")));
    let mut of_resumed = count(resumed);
    of_resumed.retain(|asked, _| !of_calm.contains_key(asked));
    let mut cases = Vec::new();
    for (counts, resumed) in [(of_calm, false), (of_resumed, true)] {
        for (asked, times) in counts {
            for spoil in Spoil::ALL.into_iter().filter(|spoil| spoil.fits(&asked)) {
                let unless = if asked.conditional { "-new" } else { "" };
                let object = asked.object.replace("*.", "").replace(' ', "-");
                let method = asked.method.to_lowercase();
                cases.push(StoreCase {
                    name: format!("store-{}-{method}{unless}-{object}", spoil.word()),
                    order: Order {
                        asked: asked.clone(),
                        // The first one is often that of an empty run.
                        occurrence: times.min(2),
                        spoil,
                        pause: if spoil == Spoil::Down { down() } else { SLOW },
                    },
                    resumed,
                });
            }
        }
    }
    cases
}

/// How long the store is away: a short time, so that a case takes seconds.
fn down() -> Duration {
    let wanted = std::env::var("POLLEN_FAULTS_DOWN").ok();
    wanted.map_or(Duration::from_secs(3), |text| {
        humantime::parse_duration(&text).expect("POLLEN_FAULTS_DOWN is a time such as 60s")
    })
}

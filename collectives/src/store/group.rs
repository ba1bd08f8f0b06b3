//! Gather and barrier over the store: control traffic, not tensors.

use std::time::Duration;

use super::client::{Store, Swap};
use crate::deadline::Deadline;
use crate::error::{Absence, Absent, Error, Result};

/// How often a wait looks whether those it waits for are still there.
const LOOK: Duration = Duration::from_secs(1);

impl Store {
    /// Registers the host name of a rank, for error messages of this view and views below it.
    pub fn register_host(&self, rank: u32, host: &str) -> Result<()> {
        self.set(&format!("hosts/{rank}"), host.as_bytes())
    }

    /// Gives this rank's value and waits for those of all ranks, in rank order.
    ///
    /// A name serves once per view: put the step into it. The deadline's error names the missing
    /// ranks. The values stay until [`delete_prefix`](Store::delete_prefix).
    pub fn gather(
        &self,
        name: &str,
        rank: u32,
        world: u32,
        value: &[u8],
        deadline: Deadline,
    ) -> Result<Vec<Vec<u8>>> {
        self.gather_from_living(name, (rank, world), value, deadline, &Vec::new)
    }

    /// Like [`gather`](Store::gather), but waits for no rank that is `gone`.
    pub fn gather_from_living(
        &self,
        name: &str,
        (rank, world): (u32, u32),
        value: &[u8],
        deadline: Deadline,
        gone: &dyn Fn() -> Vec<Absent>,
    ) -> Result<Vec<Vec<u8>>> {
        if rank >= world {
            return Err(Error::Argument {
                rank,
                operation: "gather",
                reason: format!("the rank is not below the world size {world}"),
            });
        }
        let own = format!("{name}/{rank}");
        if self.compare_and_set(&own, None, value)? != Swap::Done {
            return Err(Error::NameReused {
                name: format!("{}{name}", self.prefix()),
                rank,
            });
        }
        let keys = format!("{name}/");
        loop {
            let look = Deadline::after(deadline.remaining().min(LOOK));
            let missing = match self.collect(&keys, world, look)? {
                Ok(values) => return Ok(values),
                Err(missing) => missing,
            };
            let gone: Vec<Absent> = gone()
                .into_iter()
                .filter(|absent| missing.contains(&absent.rank))
                .collect();
            let late = deadline.remaining().is_zero();
            if !late && gone.is_empty() {
                continue;
            }
            // Whoever is gone may have given its value just before.
            let Err(missing) = self.collect(&keys, world, Deadline::after(Duration::ZERO))? else {
                continue;
            };
            let find = |rank| gone.iter().find(|absent| absent.rank == rank).cloned();
            return Err(Error::Missing {
                what: format!("`{}{name}`", self.prefix()),
                world,
                waited: deadline.limit().saturating_sub(deadline.remaining()),
                missing: missing
                    .into_iter()
                    .map(|rank| {
                        find(rank).unwrap_or_else(|| Absent {
                            rank,
                            host: self.host_of(rank),
                            how: Absence::NeverCame,
                        })
                    })
                    .collect(),
            });
        }
    }

    /// Waits for a value that rank `from` of `world` gives, as long as that rank is not `gone`.
    pub fn get_from(
        &self,
        key: &str,
        (from, world): (u32, u32),
        deadline: Deadline,
        gone: &dyn Fn() -> Vec<Absent>,
    ) -> Result<Vec<u8>> {
        loop {
            let look = Deadline::after(deadline.remaining().min(LOOK));
            match self.get(key, look) {
                Err(Error::KeyTimeout { .. }) if !deadline.remaining().is_zero() => {}
                Err(Error::KeyTimeout { key, address, .. }) => {
                    return Err(Error::KeyTimeout {
                        key,
                        address,
                        waited: deadline.limit(),
                    });
                }
                answer => return answer,
            }
            let dead = gone().into_iter().find(|absent| absent.rank == from);
            if let Some(dead) = dead {
                if let Some(value) = self.try_get(key)? {
                    return Ok(value);
                }
                return Err(Error::Missing {
                    what: format!("`{}{key}`", self.prefix()),
                    world,
                    waited: deadline.limit().saturating_sub(deadline.remaining()),
                    missing: vec![dead],
                });
            }
        }
    }

    /// Waits until all ranks are here. Like [`gather`](Store::gather), a name serves once.
    pub fn barrier(&self, name: &str, rank: u32, world: u32, deadline: Deadline) -> Result<()> {
        self.gather(name, rank, world, &[], deadline).map(|_| ())
    }

    /// Looks the host of a rank up in this view, then in those above.
    fn host_of(&self, rank: u32) -> Option<String> {
        let mut prefix = self.prefix();
        loop {
            let found = self.with_prefix(prefix).try_get(&format!("hosts/{rank}"));
            if let Ok(Some(host)) = found {
                return Some(String::from_utf8_lossy(&host).into_owned());
            }
            if prefix.is_empty() {
                return None;
            }
            let above = prefix.trim_end_matches('/').rfind('/');
            prefix = above.map_or("", |slash| &prefix[..=slash]);
        }
    }
}

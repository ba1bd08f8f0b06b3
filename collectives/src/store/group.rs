//! Gather and barrier over the store: control traffic, not tensors.

use super::client::{Store, Swap};
use crate::deadline::Deadline;
use crate::error::{Absence, Absent, Error, Result};

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
        match self.collect(&format!("{name}/"), world, deadline)? {
            Ok(values) => Ok(values),
            Err(ranks) => Err(Error::Missing {
                what: format!("`{}{name}`", self.prefix()),
                world,
                waited: deadline.limit(),
                missing: ranks
                    .into_iter()
                    .map(|rank| Absent {
                        rank,
                        host: self.host_of(rank),
                        how: Absence::NeverCame,
                    })
                    .collect(),
            }),
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

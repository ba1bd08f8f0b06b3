//! Named stages, so that tests can stop a process at each of them or let it fail there.

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::error::{Error, Result};

/// Called with `before <stage>` and `after <stage>`: every object that is written, read or deleted
/// and every entry of the log is one. An error ends what was being done, as one of the system would.
pub type StageFn = Arc<dyn Fn(&str) -> io::Result<()> + Send + Sync>;

#[derive(Clone, Default)]
pub(crate) struct StageHook(Option<StageFn>);

impl StageHook {
    pub(crate) fn new(call: StageFn) -> Self {
        Self(Some(call))
    }

    pub(crate) fn before(&self, stage: &str) -> Result<()> {
        self.call("before", stage)
    }

    pub(crate) fn after(&self, stage: &str) -> Result<()> {
        self.call("after", stage)
    }

    fn call(&self, when: &str, stage: &str) -> Result<()> {
        match &self.0 {
            Some(call) => {
                call(&format!("{when} {stage}")).map_err(|source| Error::System { source })
            }
            None => Ok(()),
        }
    }
}

impl fmt::Debug for StageHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("StageHook").field(&self.0.is_some()).finish()
    }
}

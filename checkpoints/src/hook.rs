//! Named stages, so that tests can stop a process at each of them.

use std::fmt;
use std::sync::Arc;

/// Called with `before <object>` and `after <object>`.
pub type StageFn = Arc<dyn Fn(&str) + Send + Sync>;

#[derive(Clone, Default)]
pub(crate) struct StageHook(Option<StageFn>);

impl StageHook {
    pub(crate) fn new(call: StageFn) -> Self {
        Self(Some(call))
    }

    pub(crate) fn before(&self, object: &str) {
        self.call("before", object);
    }

    pub(crate) fn after(&self, object: &str) {
        self.call("after", object);
    }

    fn call(&self, when: &str, object: &str) {
        if let Some(call) = &self.0 {
            call(&format!("{when} {object}"));
        }
    }
}

impl fmt::Debug for StageHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("StageHook").field(&self.0.is_some()).finish()
    }
}

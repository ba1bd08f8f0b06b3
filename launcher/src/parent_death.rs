//! Ends a worker when its launcher is gone, however the launcher ended.

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

use crate::error::Error;

/// Variable that carries the launcher's process id to its workers.
pub const LAUNCHER_PID: &str = "POLLEN_LAUNCHER_PID";

/// Asks the kernel to kill this process when the process that started it ends.
///
/// A worker calls this first. It fails if `launcher` is not the parent any more: the launcher may
/// have been killed between starting the worker and this call, and then no signal would ever
/// come. The signal is SIGKILL: a worker that cannot be told to stop must not go on training
/// beside its successor; the last checkpoint stands.
pub fn die_with(launcher: u32) -> Result<(), Error> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|errno| Error::system("ask for a parent-death signal")(errno.into()))?;
    let parent = getppid().map_or(0, Pid::as_raw_pid);
    if i64::from(parent) == i64::from(launcher) {
        Ok(())
    } else {
        Err(Error::Orphan { launcher })
    }
}

/// Does what [`die_with`] does if the launcher asked for it through [`LAUNCHER_PID`].
pub fn die_with_launcher(lookup: impl Fn(&str) -> Option<String>) -> Result<(), Error> {
    match lookup(LAUNCHER_PID) {
        None => Ok(()),
        Some(text) => die_with(text.parse().map_err(|_| Error::Contract {
            reason: format!("{LAUNCHER_PID} is `{text}`, not a process id"),
        })?),
    }
}

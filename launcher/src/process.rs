//! Processes as the launcher sees them: how they ended, whether they still live, their groups.

use std::fmt;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use signal_hook::low_level::signal_name;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// Killed by this signal.
    Signal(i32),
}

impl Exit {
    /// Returns the code a shell would show: 128 + the signal's number for a killed process.
    pub fn code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }
}

impl From<std::process::ExitStatus> for Exit {
    fn from(status: std::process::ExitStatus) -> Self {
        use std::os::unix::process::ExitStatusExt;
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Code(code),
            (None, Some(signal)) => Self::Signal(signal),
            // A reaped process has one or the other.
            (None, None) => Self::Code(status.into_raw()),
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => match pollen_core::ExitCode::from_code(*code) {
                Some(exit) => write!(f, "ended: {exit}"),
                None => write!(f, "ended with exit code {code}"),
            },
            Self::Signal(signal) => match signal_name(*signal) {
                // Whoever reads this did not send it; most often the kernel did.
                Some("SIGKILL") => {
                    f.write_str("was killed by SIGKILL, as happens when memory runs out")
                }
                Some(name) => write!(f, "was killed by {name}"),
                None => write!(f, "was killed by signal {signal}"),
            },
        }
    }
}

/// A process that may not be our child, told from later ones with the same number by its start
/// time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ProcessId {
    /// Process id.
    pub pid: u32,
    /// Clock ticks between boot and the process's start.
    pub start_time: u64,
}

impl ProcessId {
    /// Returns the identity of a living process.
    pub fn of(pid: u32) -> Option<Self> {
        let start_time = start_time(pid)?;
        Some(Self { pid, start_time })
    }

    /// Returns whether it still runs; a zombie does not.
    pub fn is_alive(self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }

    /// Waits until it has ended; false means that it still lives after `limit`.
    pub fn wait_gone(self, limit: Duration) -> bool {
        poll_until(limit, || !self.is_alive())
    }
}

/// Sends a signal to all processes of a group; a group that is gone is none of our business.
pub(crate) fn signal_group(leader: u32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(leader as i32) {
        let _ = rustix::process::kill_process_group(pid, signal);
    }
}

/// Asks again every few milliseconds until `done` or until `limit` has passed.
pub(crate) fn poll_until(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses and may hold anything.
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X" | "x") {
        return None;
    }
    // Field 22 of proc(5); the state was field 3.
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_time() {
        let me = ProcessId::of(std::process::id()).unwrap();
        assert!(me.is_alive());
        let other = ProcessId {
            start_time: me.start_time + 1,
            ..me
        };
        assert!(!other.is_alive());
    }

    #[test]
    fn a_zombie_is_not_alive() {
        let mut child = Command::new("/bin/sh")
            .args(["-c", "exec sleep 600"])
            .spawn()
            .unwrap();
        let id = ProcessId::of(child.id()).unwrap();
        assert!(id.is_alive());
        child.kill().unwrap();
        assert!(
            id.wait_gone(Duration::from_mins(1)),
            "killed, not yet reaped"
        );
        assert_eq!(Exit::from(child.wait().unwrap()), Exit::Signal(9));
    }

    #[test]
    fn exits_read_as_sentences() {
        assert_eq!(
            Exit::Signal(9).to_string(),
            "was killed by SIGKILL, as happens when memory runs out"
        );
        assert_eq!(Exit::Signal(15).to_string(), "was killed by SIGTERM");
        assert_eq!(
            Exit::Code(75).to_string(),
            "ended: infrastructure fault (exit 75)"
        );
        assert_eq!(Exit::Code(101).to_string(), "ended with exit code 101");
        assert_eq!(Exit::Signal(9).code(), 137);
    }
}

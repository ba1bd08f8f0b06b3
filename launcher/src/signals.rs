//! Signals to the launcher, as messages.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use signal_hook::SigId;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};

use crate::decision::StopSignal;
use crate::error::Error;

/// SIGHUP (the terminal is gone) and SIGUSR1 (Slurm's early warning) mean what SIGTERM means.
const MEANINGS: [(i32, StopSignal); 4] = [
    (SIGINT, StopSignal::Interrupt),
    (SIGTERM, StopSignal::Terminate),
    (SIGHUP, StopSignal::Terminate),
    (SIGUSR1, StopSignal::Terminate),
];

/// Returns whether this process was started with a signal ignored; `status` is /proc/self/status.
fn is_ignored(status: &str, signal: i32) -> bool {
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// While this lives, signals to the process arrive as messages instead of ending it.
#[derive(Debug)]
pub(crate) struct SignalGuard {
    watches: Vec<(SigId, JoinHandle<()>)>,
}

impl SignalGuard {
    pub(crate) fn install<M: From<StopSignal> + Send + 'static>(
        tell: &Sender<M>,
    ) -> Result<Self, Error> {
        let mut guard = Self {
            watches: Vec::new(),
        };
        // `nohup pollen launch ...` asks to outlive the terminal.
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        for (signal, meaning) in MEANINGS {
            if signal == SIGHUP && is_ignored(&status, signal) {
                continue;
            }
            let (mut reader, writer) =
                UnixStream::pair().map_err(Error::system("open a signal pipe"))?;
            let id = signal_hook::low_level::pipe::register(signal, writer)
                .map_err(Error::system("handle signals"))?;
            let tell = tell.clone();
            let watch = std::thread::Builder::new()
                .name(format!("signal-{signal}"))
                .spawn(move || {
                    let mut byte = [0];
                    // Ends when the handler, and with it the writing end, is gone.
                    while let Ok(1) = reader.read(&mut byte) {
                        if tell.send(meaning.into()).is_err() {
                            return;
                        }
                    }
                })
                .map_err(|error| {
                    signal_hook::low_level::unregister(id);
                    Error::system("start a thread")(error)
                })?;
            guard.watches.push((id, watch));
        }
        Ok(guard)
    }
}

impl Drop for SignalGuard {
    fn drop(&mut self) {
        for (id, watch) in self.watches.drain(..) {
            signal_hook::low_level::unregister(id);
            let _ = watch.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_of_ignored_signals_is_read() {
        let status = "Name:\tpollen\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\n";
        assert!(is_ignored(status, SIGHUP));
        assert!(is_ignored(status, 13));
        assert!(!is_ignored(status, SIGINT));
        assert!(!is_ignored("", SIGHUP));
    }
}

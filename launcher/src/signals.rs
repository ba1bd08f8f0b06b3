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
        for (signal, meaning) in MEANINGS {
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

//! Stop signals: raised in a handler, agreed on by all ranks at the next step.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pollen_core::ExitCode;
use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};

/// Whether this process was asked to stop.
#[derive(Clone, Debug, Default)]
pub struct StopFlags {
    terminate: Arc<AtomicBool>,
    interrupt: Arc<AtomicBool>,
    /// Whether nothing has been trained yet.
    starting: Arc<AtomicBool>,
}

impl StopFlags {
    /// Installs handlers for SIGTERM and SIGINT; the second signal of a kind exits at once, and so
    /// does the first one until `first_step_done`: there is nothing to save, and a rank that
    /// waits for one that died at the start would not look at a flag.
    pub fn install() -> io::Result<Self> {
        let flags = Self::default();
        flags.starting.store(true, Ordering::Relaxed);
        for (signal, flag, exit) in [
            (SIGTERM, &flags.terminate, ExitCode::Preempted),
            (SIGINT, &flags.interrupt, ExitCode::Interrupted),
        ] {
            // Order matters: the exit is armed by the flag that the first signal raises.
            for condition in [&flags.starting, flag] {
                signal_hook::flag::register_conditional_shutdown(
                    signal,
                    i32::from(exit.code()),
                    Arc::clone(condition),
                )?;
            }
            signal_hook::flag::register(signal, Arc::clone(flag))?;
        }
        // A file above the limit of its size is an error of the write, which says so; by default it
        // ends the process without a word.
        signal_hook::flag::register(SIGXFSZ, Arc::default())?;
        Ok(flags)
    }

    /// From here on a signal is only noted: there are steps to save.
    pub(crate) fn first_step_done(&self) {
        self.starting.store(false, Ordering::Relaxed);
    }

    /// Returns whether SIGTERM came.
    pub fn terminate(&self) -> bool {
        self.terminate.load(Ordering::Relaxed)
    }

    /// Returns whether SIGINT came.
    pub fn interrupt(&self) -> bool {
        self.interrupt.load(Ordering::Relaxed)
    }
}

//! Stop signals: raised in a handler, agreed on by all ranks at the next step.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pollen_core::ExitCode;
use signal_hook::consts::{SIGINT, SIGTERM};

/// Whether this process was asked to stop.
#[derive(Clone, Debug, Default)]
pub struct StopFlags {
    terminate: Arc<AtomicBool>,
    interrupt: Arc<AtomicBool>,
}

impl StopFlags {
    /// Installs handlers for SIGTERM and SIGINT; the second signal of a kind exits at once.
    pub fn install() -> io::Result<Self> {
        let flags = Self::default();
        for (signal, flag, exit) in [
            (SIGTERM, &flags.terminate, ExitCode::Preempted),
            (SIGINT, &flags.interrupt, ExitCode::Interrupted),
        ] {
            // Order matters: the exit is armed by the flag that the first signal raises.
            signal_hook::flag::register_conditional_shutdown(
                signal,
                i32::from(exit.code()),
                Arc::clone(flag),
            )?;
            signal_hook::flag::register(signal, Arc::clone(flag))?;
        }
        Ok(flags)
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

//! The one place where errors become messages and exit codes.

use std::io::Write;

use anyhow::{Error, Result};
use pollen_core::{ConfigError, ErrorClass, ExitCode};

/// Prints an error in one line and returns the process's exit code.
pub(crate) fn report(result: Result<ExitCode>) -> std::process::ExitCode {
    let exit = match result {
        Ok(exit) => exit,
        Err(error) if is_broken_pipe(&error) => ExitCode::Done,
        Err(error) => {
            let mut text = describe(&error);
            if !error.is::<crate::commands::launch::WorkerFailed>() {
                text = text.split_whitespace().collect::<Vec<&str>>().join(" ");
            }
            // Nothing can be done when standard error is gone too.
            let _ = writeln!(std::io::stderr(), "error: {text}");
            code_of(&error)
        }
    };
    std::process::ExitCode::from(exit.code())
}

/// Returns the exit code of an error: each crate says what its errors mean.
pub(crate) fn code_of(error: &Error) -> ExitCode {
    for cause in error.chain() {
        if cause.is::<ConfigError>() {
            return ExitCode::Usage;
        }
        if let Some(failed) = cause.downcast_ref::<crate::commands::launch::WorkerFailed>() {
            return failed.exit;
        }
        if let Some(error) = cause.downcast_ref::<pollen_trainer::Error>() {
            return error.exit_code();
        }
        let class = class_of(cause);
        if let Some(class) = class {
            return class.into();
        }
    }
    ExitCode::Internal
}

fn class_of(cause: &(dyn std::error::Error + 'static)) -> Option<ErrorClass> {
    None.or_else(|| {
        cause
            .downcast_ref::<pollen_storage::Error>()
            .map(pollen_storage::Error::class)
    })
    .or_else(|| {
        cause
            .downcast_ref::<pollen_dataloader::Error>()
            .map(pollen_dataloader::Error::class)
    })
    .or_else(|| {
        cause
            .downcast_ref::<pollen_checkpoints::Error>()
            .map(pollen_checkpoints::Error::class)
    })
    .or_else(|| {
        cause
            .downcast_ref::<pollen_collectives::Error>()
            .map(pollen_collectives::Error::class)
    })
    .or_else(|| {
        cause
            .downcast_ref::<pollen_convert::Error>()
            .map(pollen_convert::Error::class)
    })
    .or_else(|| {
        cause
            .downcast_ref::<pollen_launcher::Error>()
            .map(pollen_launcher::Error::class)
    })
    .or_else(|| {
        cause
            .downcast_ref::<pollen_observe::Error>()
            .map(pollen_observe::Error::class)
    })
    .or_else(|| {
        cause
            .downcast_ref::<pollen_model::Error>()
            .map(pollen_model::Error::class)
    })
    .or_else(|| {
        cause
            .downcast_ref::<pollen_weights::Error>()
            .map(pollen_weights::Error::class)
    })
}

/// Returns an error with its causes, each once: many messages hold their cause already.
fn describe(error: &Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn is_broken_pipe(error: &Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

//! The loop around the step: log, save, stop.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pollen_core::{Clock, ExitCode};
use pollen_observe::{Budget, Event, EventLog, MixtureShare, SkippedCheckpoint, StepEvent};

use crate::error::Error;
use crate::phases::Phase;
use crate::recovery::Recovery;
use crate::step::{StepReport, Trainer};

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Exit code of the process.
    pub exit: ExitCode,
    /// Why, in words.
    pub reason: String,
}

/// What accompanies a trainer through a run.
#[derive(Debug)]
pub struct Session {
    pub(crate) events: Arc<EventLog>,
    /// The run's local folder.
    pub(crate) run_dir: PathBuf,
    pub(crate) recovery: Recovery,
    pub(crate) budget: Budget,
    pub(crate) clock: Arc<dyn Clock>,
}

/// Trains until the recipe's last step, or until all ranks agree to stop.
///
/// What ends a run waits until the last checkpoint is published.
pub fn train(trainer: &mut Trainer, session: &mut Session) -> Result<Outcome, Error> {
    let steps = trainer.config.train.steps;
    let every = trainer.config.checkpoint.every_steps;
    while trainer.step < steps {
        let began = session.clock.monotonic();
        trainer.over_budget = session.budget.is_spent(session.clock.wall());
        trainer.save_failed = session.recovery.has_failed();
        let report = trainer.train_step()?;
        trainer.stop.first_step_done();
        let elapsed = session.clock.monotonic().saturating_sub(began);
        log_step(trainer, session, &report, elapsed)?;

        let stop = stop_reason(trainer, &report);
        if stop.is_err() {
            // All ranks are alive and stop alike: what is in flight need not be lost.
            settle(trainer, session)?;
        }
        let stop = stop?;
        let evaluation = trainer.config.eval.every_steps;
        if stop.is_none() && evaluation.is_some_and(|every| trainer.step.is_multiple_of(every)) {
            evaluate(trainer, session)?;
        }
        if trainer.step.is_multiple_of(every) || trainer.step == steps || stop.is_some() {
            save(trainer, session)?;
        }
        if let Some(outcome) = stop {
            settle(trainer, session)?;
            return Ok(outcome);
        }
    }
    settle(trainer, session)?;
    Ok(Outcome {
        exit: ExitCode::Done,
        reason: format!("step {steps} of {steps}"),
    })
}

/// Decides from reduced values alone, so that all ranks decide alike.
fn stop_reason(trainer: &Trainer, report: &StepReport) -> Result<Option<Outcome>, Error> {
    if report.verdict.save_failed > 0.0 {
        return Err(Error::internal(
            "a checkpoint failed on another rank and this one was not told why",
        ));
    }
    let cap = trainer.config.train.max_non_finite_steps;
    if trainer.non_finite > cap {
        return Err(Error::NonFinite {
            count: trainer.non_finite,
            cap,
        });
    }
    let cap = trainer.config.data.max_bad_samples;
    if trainer.bad_samples > cap {
        return Err(Error::BadSamples {
            count: trainer.bad_samples,
            cap,
        });
    }
    let verdict = report.verdict;
    let step = trainer.step;
    let stop = |exit, why: &str| {
        Some(Outcome {
            exit,
            reason: format!("{why} at step {step}"),
        })
    };
    Ok(if verdict.interrupt > 0.0 {
        stop(ExitCode::Interrupted, "interrupted")
    } else if verdict.terminate > 0.0 {
        stop(ExitCode::Preempted, "asked to terminate")
    } else if verdict.over_budget > 0.0 {
        stop(ExitCode::DoNotRequeue, "budget.max_gpu_hours is spent")
    } else {
        None
    })
}

/// Starts a checkpoint with all ranks: training stands still for the copy from GPU to host memory,
/// and for the save before this one if that is not done yet.
fn save(trainer: &mut Trainer, session: &mut Session) -> Result<(), Error> {
    trainer.timer.begin_step(trainer.step);
    trainer.timer.enter(Phase::Checkpoint);
    let now = session.clock.wall();
    session.recovery.save(trainer, session.budget.spent(now))?;
    trainer.timer.close();
    if trainer.communicator.rank() == 0 {
        session.events.append(session.budget.event(now))?;
        session.events.append(mixture_event(trainer))?;
    }
    Ok(())
}

/// What the datasets have given so far, from the sample order, against their target.
fn mixture_event(trainer: &Trainer) -> Event {
    let samples = trainer.step * u64::from(trainer.config.train.global_batch);
    let counts = trainer.mixture.counts_before(samples);
    let shares = counts.iter().zip(trainer.mixture.shares());
    let datasets = trainer.mixture.names().iter().zip(shares);
    Event::Mixture {
        step: trainer.step,
        samples,
        datasets: datasets
            .map(|(name, (&count, target))| {
                let share = MixtureShare {
                    samples: count,
                    share: count as f64 / samples as f64,
                    target,
                };
                (name.clone(), share)
            })
            .collect(),
    }
}

/// Measures on held-out episodes with all ranks.
pub(crate) fn evaluate(trainer: &mut Trainer, session: &Session) -> Result<(), Error> {
    let spaces = trainer.evaluate()?;
    if trainer.communicator.rank() == 0 {
        session.events.append(Event::Eval {
            step: trainer.step,
            spaces,
        })?;
    }
    Ok(())
}

/// Waits for the save in flight.
fn settle(trainer: &mut Trainer, session: &mut Session) -> Result<(), Error> {
    trainer.timer.enter(Phase::Checkpoint);
    let settled = session.recovery.settle();
    trainer.timer.close();
    settled
}

fn log_step(
    trainer: &mut Trainer,
    session: &Session,
    report: &StepReport,
    elapsed: Duration,
) -> Result<(), Error> {
    if let Some((own_hash, reduced_hash)) = report.exchange.clone() {
        let step = trainer.step;
        session.events.append(Event::GradientExchange {
            step,
            own_hash,
            reduced_hash,
        })?;
        trainer.prove_exchange = false;
    }
    for bad in &report.bad {
        session.events.append(Event::BadSample {
            dataset: bad.dataset.clone(),
            episode: bad.episode,
            frame: bad.frame,
            reason: bad.reason.clone(),
        })?;
    }
    let sheet = report.skipped.then(|| contact_sheet(trainer, session));
    if trainer.communicator.rank() != 0 {
        return Ok(());
    }
    if let Some(samples) = report.audit.clone() {
        session.events.append(Event::SampleAudit {
            step: trainer.step,
            samples,
        })?;
    }
    let size = u64::from(trainer.config.train.global_batch);
    let done = trainer.step - 1;
    if let Some(sheet) = sheet {
        session.events.append(Event::NonFinite {
            step: trainer.step,
            count: trainer.non_finite,
            samples: (done * size..(done + 1) * size).collect(),
            contact_sheet: sheet.map(|folder| folder.display().to_string()),
        })?;
    }
    if !trainer
        .step
        .is_multiple_of(u64::from(trainer.config.observe.log_every.get()))
        && trainer.step != trainer.config.train.steps
    {
        return Ok(());
    }
    let mut datasets = BTreeMap::new();
    for (_, sample) in trainer.mixture.global_batch(done, size as usize) {
        let name = trainer.data.datasets()[sample.dataset as usize].name();
        *datasets.entry(name.to_owned()).or_insert(0) += 1;
    }
    let seconds = elapsed.as_secs_f64();
    session.events.append(Event::Step(StepEvent {
        step: trainer.step,
        samples: trainer.step * size,
        loss: report.verdict.loss,
        grad_norm: report.grad_norm,
        learning_rate: report
            .learning_rate
            .iter()
            .map(|(group, rate)| (group.name().to_owned(), *rate))
            .collect(),
        samples_per_s: size as f64 / seconds,
        data_wait: report.verdict.data_wait_s
            / f64::from(trainer.communicator.world_size())
            / seconds,
        phases: trainer.timer.seconds(),
        datasets,
    }))?;
    Ok(())
}

/// Writes this rank's pictures of the step; without them the run goes on as well.
fn contact_sheet(trainer: &mut Trainer, session: &Session) -> Option<PathBuf> {
    trainer.timer.enter(Phase::Eval);
    let sheet = crate::contact_sheet::write(trainer, trainer.step, &session.run_dir)
        .inspect_err(|error| tracing::warn!(%error, "no contact sheet"))
        .ok();
    trainer.timer.close();
    sheet
}

/// Turns what the checkpoint reader passed over into the event's form.
pub(crate) fn skipped(
    url: &str,
    skipped: &[pollen_checkpoints::Skipped],
) -> Vec<SkippedCheckpoint> {
    skipped
        .iter()
        .map(|skipped| SkippedCheckpoint {
            url: format!("{url}/step-{:08}/g{}", skipped.step, skipped.generation),
            reason: skipped.reason.clone(),
        })
        .collect()
}

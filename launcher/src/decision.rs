//! What to do when all workers of a generation have ended: a pure function of how they ended.

use pollen_core::ExitCode;

use crate::process::Exit;

/// How one worker ended; a list of these is in the order in which they ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankExit {
    /// The worker.
    pub rank: u32,
    /// How it ended.
    pub exit: Exit,
    /// Whether the launcher had asked it to end before it did.
    pub asked: bool,
}

/// A signal that asks the whole run to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopSignal {
    /// SIGINT: the user wants to stop.
    Interrupt,
    /// SIGTERM: somebody wants the machine back.
    Terminate,
}

/// What the launcher does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The run is complete.
    Done,
    /// Ends with this code.
    Stop(ExitCode),
    /// Starts the next generation.
    Restart,
    /// Ends with the last failure: the restart budget is used up.
    GiveUp,
}

/// A decision, why it was taken, and the worker whose log explains it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What to do.
    pub decision: Decision,
    /// Why, as a sentence for people.
    pub reason: String,
    /// The worker that failed first.
    pub culprit: Option<u32>,
}

/// Decides from the exits of all workers, whether a stop was asked for, and how many restarts are
/// left.
///
/// A definite "do not start again" (2, 93) beats everything. A requested stop comes next. Then a
/// failure that the launcher did not cause; then "saved and stopped" (85, 130); then success.
pub fn decide(exits: &[RankExit], stop: Option<StopSignal>, restarts_left: u32) -> Verdict {
    let definite = exits
        .iter()
        .find(|one| matches!(one.exit, Exit::Code(2 | 93)));
    if let Some(one) = definite {
        let code = exit_code(one.exit).unwrap_or(ExitCode::DoNotRequeue);
        return Verdict {
            decision: Decision::Stop(code),
            reason: format!("rank {} {}: starting again cannot help", one.rank, one.exit),
            culprit: Some(one.rank),
        };
    }
    if let Some(signal) = stop {
        return stopped(exits, signal);
    }
    let saved = exits
        .iter()
        .find(|one| matches!(one.exit, Exit::Code(85 | 130)));
    let failed = exits.iter().find(|one| !one.asked && !is_orderly(one.exit));
    // Without a save, a worker that had to be ended did not reach the last step either.
    let ended = || exits.iter().find(|one| !is_orderly(one.exit));
    if let Some(one) = failed.or_else(|| if saved.is_none() { ended() } else { None }) {
        let (decision, rest) = if restarts_left > 0 {
            let rest = match restarts_left {
                1 => "starting again for the last time".to_owned(),
                left => format!("starting again, {left} restarts left"),
            };
            (Decision::Restart, rest)
        } else {
            (Decision::GiveUp, "no restart is left".to_owned())
        };
        return Verdict {
            decision,
            reason: format!("rank {} {}; {rest}", one.rank, one.exit),
            culprit: Some(one.rank),
        };
    }
    if let Some(one) = saved {
        return Verdict {
            decision: Decision::Stop(exit_code(one.exit).unwrap_or(ExitCode::Preempted)),
            reason: format!("rank {} {}", one.rank, one.exit),
            culprit: None,
        };
    }
    Verdict {
        decision: Decision::Done,
        reason: "all workers reached the last step".into(),
        culprit: None,
    }
}

fn stopped(exits: &[RankExit], signal: StopSignal) -> Verdict {
    if exits.iter().all(|one| one.exit == Exit::Code(0)) {
        return Verdict {
            decision: Decision::Done,
            reason: "all workers reached the last step before the stop took effect".into(),
            culprit: None,
        };
    }
    if let Some(one) = exits.iter().find(|one| !is_orderly(one.exit)) {
        let code = match signal {
            StopSignal::Interrupt => ExitCode::Interrupted,
            // A scheduler must not take this for a saved run.
            StopSignal::Terminate => ExitCode::Infrastructure,
        };
        return Verdict {
            decision: Decision::Stop(code),
            reason: format!(
                "asked to stop, but rank {} {} before it had saved; the last checkpoint stands",
                one.rank, one.exit
            ),
            culprit: Some(one.rank),
        };
    }
    let (code, by) = match signal {
        StopSignal::Interrupt => (ExitCode::Interrupted, "interrupted"),
        StopSignal::Terminate => (ExitCode::Preempted, "preempted"),
    };
    Verdict {
        decision: Decision::Stop(code),
        reason: format!("{by}, and all workers ended in order"),
        culprit: None,
    }
}

/// Returns whether a worker ended the way workers end when nothing is wrong.
pub(crate) fn is_orderly(exit: Exit) -> bool {
    matches!(exit, Exit::Code(0 | 85 | 130))
}

fn exit_code(exit: Exit) -> Option<ExitCode> {
    match exit {
        Exit::Code(code) => ExitCode::from_code(code),
        Exit::Signal(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(rank: u32, code: i32) -> RankExit {
        RankExit {
            rank,
            exit: Exit::Code(code),
            asked: false,
        }
    }

    fn asked(rank: u32, exit: Exit) -> RankExit {
        RankExit {
            rank,
            exit,
            asked: true,
        }
    }

    const KILLED: Exit = Exit::Signal(9);

    #[test]
    fn without_a_stop() {
        let crash = RankExit {
            rank: 1,
            exit: KILLED,
            asked: false,
        };
        let cases: [(&[RankExit], u32, Decision); 14] = [
            (&[own(0, 0), own(1, 0)], 3, Decision::Done),
            (&[own(0, 2), own(1, 75)], 3, Decision::Stop(ExitCode::Usage)),
            (
                &[own(1, 75), own(0, 93)],
                3,
                Decision::Stop(ExitCode::DoNotRequeue),
            ),
            (
                &[own(0, 85), own(1, 85)],
                3,
                Decision::Stop(ExitCode::Preempted),
            ),
            (
                &[own(0, 130), own(1, 130)],
                0,
                Decision::Stop(ExitCode::Interrupted),
            ),
            (
                &[own(0, 0), own(1, 85)],
                3,
                Decision::Stop(ExitCode::Preempted),
            ),
            (&[crash, asked(0, Exit::Code(75))], 3, Decision::Restart),
            // The survivor obeyed the launcher's SIGTERM; that is no preemption.
            (&[crash, asked(0, Exit::Code(85))], 1, Decision::Restart),
            (&[crash, asked(0, KILLED)], 0, Decision::GiveUp),
            (&[own(0, 70), own(1, 0)], 1, Decision::Restart),
            // Nobody failed before the launcher ended it: it has not reached the last step.
            (&[asked(0, KILLED)], 3, Decision::Restart),
            (&[own(0, 0), asked(1, KILLED)], 0, Decision::GiveUp),
            (&[own(0, 101), own(1, 101)], 0, Decision::GiveUp),
            (
                &[own(0, 85), asked(1, KILLED)],
                3,
                Decision::Stop(ExitCode::Preempted),
            ),
        ];
        for (exits, left, expected) in cases {
            assert_eq!(decide(exits, None, left).decision, expected, "{exits:?}");
        }
    }

    #[test]
    fn with_a_stop() {
        use StopSignal::{Interrupt, Terminate};
        let cases: [(&[RankExit], StopSignal, Decision); 7] = [
            (
                &[asked(0, Exit::Code(85)), asked(1, Exit::Code(85))],
                Terminate,
                Decision::Stop(ExitCode::Preempted),
            ),
            (
                &[asked(0, Exit::Code(130)), asked(1, Exit::Code(130))],
                Interrupt,
                Decision::Stop(ExitCode::Interrupted),
            ),
            (
                &[asked(0, KILLED), asked(1, Exit::Code(85))],
                Terminate,
                Decision::Stop(ExitCode::Infrastructure),
            ),
            (
                &[asked(0, KILLED), asked(1, KILLED)],
                Interrupt,
                Decision::Stop(ExitCode::Interrupted),
            ),
            (
                &[asked(0, Exit::Code(0)), asked(1, Exit::Code(0))],
                Terminate,
                Decision::Done,
            ),
            (
                &[own(0, 0), asked(1, Exit::Code(85))],
                Terminate,
                Decision::Stop(ExitCode::Preempted),
            ),
            (
                &[asked(0, Exit::Code(93)), asked(1, KILLED)],
                Interrupt,
                Decision::Stop(ExitCode::DoNotRequeue),
            ),
        ];
        for (exits, stop, expected) in cases {
            let verdict = decide(exits, Some(stop), 3);
            assert_eq!(verdict.decision, expected, "{exits:?} {stop:?}");
        }
    }

    #[test]
    fn the_first_failure_is_the_culprit() {
        let exits = [
            own(0, 0),
            RankExit {
                rank: 2,
                exit: KILLED,
                asked: false,
            },
            own(1, 75),
        ];
        let verdict = decide(&exits, None, 2);
        assert_eq!(verdict.culprit, Some(2));
        assert_eq!(
            verdict.reason,
            "rank 2 was killed by SIGKILL, as happens when memory runs out; starting again, 2 \
             restarts left"
        );
    }
}

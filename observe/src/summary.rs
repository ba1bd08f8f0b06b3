//! The text at the end of a run: what came out, where the time went, what to do next.

use crate::events::MixtureShare;
use crate::notices::space_error;
use crate::units;
use crate::view::RunView;

/// Most datasets whose shares are listed.
const SHARES: usize = 6;

/// A command worth running next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NextCommand {
    /// What it is for, in a word or two.
    pub purpose: String,
    /// The whole command line.
    pub command: String,
}

/// Returns the summary of a run, ending in a line break.
pub fn summary(view: &RunView, next: &[NextCommand]) -> String {
    let mut lines = vec![headline(view)];
    lines.push(format!("  {}", extent(view)));
    held_out(view, &mut lines);
    if let Some(text) = time_shares(view) {
        lines.push(format!("  where the time went: {text}"));
    }
    mixture(view, &mut lines);
    if let Some((step, workers)) = view.exchange_proved() {
        lines.push(format!(
            "  workers: {workers} exchanged gradients (own ones differ, the reduced one is the \
             same on all; step {step})"
        ));
    }
    lines.push(format!("  storage: {}", storage(view)));
    if view.num_bad_samples + view.num_non_finite > 0 {
        lines.push(format!(
            "  data: {} replaced, {} skipped",
            units::counted(view.num_bad_samples, "bad sample", "bad samples"),
            units::counted(view.num_non_finite, "non-finite step", "non-finite steps")
        ));
    }
    lines.push(match &view.checkpoint {
        Some(checkpoint) => format!(
            "  checkpoint: {} (step {}, {})",
            checkpoint.url,
            units::count(checkpoint.step),
            units::bytes(checkpoint.bytes)
        ),
        None => "  checkpoint: none was saved".into(),
    });
    if !next.is_empty() {
        lines.push("next:".into());
        let width = next.iter().map(|one| one.purpose.len()).max().unwrap_or(0);
        for one in next {
            lines.push(format!("  {:width$}  {}", one.purpose, one.command));
        }
    }
    lines.join("\n") + "\n"
}

fn headline(view: &RunView) -> String {
    match &view.end {
        Some((code, reason)) => format!("run {}: {reason} (exit {code})", view.run),
        None => format!("run {}: not ended", view.run),
    }
}

fn extent(view: &RunView) -> String {
    let done = units::count(view.steps_done());
    let mut parts = vec![match view.steps_total() {
        Some(total) => format!("{done} of {} steps", units::count(total)),
        None => format!("{done} steps"),
    }];
    if let Some(step) = &view.step {
        parts.push(format!("{} samples", units::count(step.samples)));
        parts.push(format!("last loss {:.4}", step.loss));
    }
    if let (Some(first), Some(last)) = (view.first, view.last) {
        let wall = last.duration_since(first).unwrap_or_default();
        let wall = units::seconds(wall.as_secs_f64());
        parts.push(match view.generation {
            0 | 1 => wall,
            starts => format!("{wall} since the first of {starts} starts"),
        });
    }
    if let (Some(budget), Some(spent)) = (&view.budget, view.gpu_hours()) {
        let unit = units::worker_hours(view.device());
        parts.push(match budget.max() {
            Some(max) => format!("{} of {} {unit}", units::hours(spent), units::hours(max)),
            None => format!("{} {unit}", units::hours(spent)),
        });
    }
    parts.join(", ")
}

fn held_out(view: &RunView, lines: &mut Vec<String>) {
    let Some((step, spaces)) = &view.eval else {
        lines.push("  held-out error: not measured".into());
        return;
    };
    lines.push(format!("  held-out error at step {}:", units::count(*step)));
    let width = spaces.keys().map(String::len).max().unwrap_or(0);
    for (name, space) in spaces {
        let gain = 1.0 - space.error / space.mean_predictor_error;
        let verdict = if gain > 0.0 {
            format!(
                "{} better than always answering the mean",
                units::percent(gain)
            )
        } else if gain <= 0.0 {
            "no better than always answering the mean".into()
        } else {
            "not a number".into()
        };
        lines.push(format!(
            "    {name:width$}  {}: {verdict}; {}, {}",
            space_error(space),
            units::counted(space.episodes, "episode", "episodes"),
            units::counted(space.chunks, "chunk", "chunks")
        ));
    }
}

/// The datasets whose share is farthest from its target, at most [`SHARES`].
fn mixture(view: &RunView, lines: &mut Vec<String>) {
    let Some((samples, datasets)) = &view.mixture else {
        return;
    };
    let distance = |share: &MixtureShare| (share.share - share.target).abs();
    let mut farthest: Vec<_> = datasets.iter().collect();
    farthest.sort_by(|a, b| distance(b.1).total_cmp(&distance(a.1)));
    lines.push(format!(
        "  mixture of {}, share (target){}:",
        units::counted(*samples, "sample", "samples"),
        match datasets.len() {
            count if count > SHARES => format!(", {SHARES} of {count} datasets, farthest first"),
            _ => String::new(),
        }
    ));
    farthest.truncate(SHARES);
    let width = farthest.iter().map(|(name, _)| name.len()).max();
    let width = width.unwrap_or(0);
    for (name, share) in farthest {
        lines.push(format!(
            "    {name:width$}  {:.2}% ({:.2}%)",
            100.0 * share.share,
            100.0 * share.target
        ));
    }
}

fn time_shares(view: &RunView) -> Option<String> {
    let shares: Vec<String> = view
        .phase_shares()
        .into_iter()
        .map(|(phase, share)| format!("{phase} {}", units::percent(share)))
        .collect();
    (!shares.is_empty()).then(|| shares.join(", "))
}

fn storage(view: &RunView) -> String {
    if view.num_store_retries == 0 {
        return "no retries".into();
    }
    format!(
        "{}, {} recovered after {} of waiting",
        units::counted(view.num_store_retries, "retry", "retries"),
        units::counted(view.num_store_recovered, "operation", "operations"),
        units::seconds(view.store_waited_s)
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::events::{Event, Record, SpaceError, StartEvent, StepEvent};

    fn at(second: u64, event: Event) -> Record {
        Record {
            time: SystemTime::UNIX_EPOCH + Duration::from_secs(second),
            run: "20260102-030405-a1b2c3d4".into(),
            generation: 2,
            rank: if matches!(event, Event::End { .. }) {
                None
            } else {
                Some(0)
            },
            event,
        }
    }

    fn share(samples: u64, target: f64) -> MixtureShare {
        MixtureShare {
            samples,
            share: samples as f64 / 1600.0,
            target,
        }
    }

    fn records() -> Vec<Record> {
        let space = |error| SpaceError {
            error,
            single_sample_error: 1.5,
            mean_predictor_error: 1.0,
            per_horizon: None,
            episodes: 2,
            chunks: 90,
        };
        vec![
            at(
                0,
                Event::Start(StartEvent {
                    world_size: 2,
                    steps: 200,
                    device: "cpu".into(),
                    max_gpu_hours: Some(1.0),
                    ..StartEvent::default()
                }),
            ),
            at(
                1,
                Event::StoreRetry {
                    operation: "get".into(),
                    path: "p".into(),
                    attempt: 1,
                    waited_s: 0.5,
                    error: "503".into(),
                },
            ),
            at(
                2,
                Event::StoreRecovered {
                    operation: "get".into(),
                    path: "p".into(),
                    attempts: 2,
                    waited_s: 1.25,
                },
            ),
            at(
                180,
                Event::Step(StepEvent {
                    step: 200,
                    samples: 1600,
                    loss: 0.4321,
                    phases: BTreeMap::from([
                        ("forward".into(), 60.0),
                        ("backward".into(), 30.0),
                        ("data".into(), 10.0),
                    ]),
                    ..StepEvent::default()
                }),
            ),
            at(
                185,
                Event::Checkpoint {
                    step: 200,
                    url: "s3://pollen/demo/checkpoints/step-00000200/g2".into(),
                    bytes: 3 << 20,
                    stall_s: 0.1,
                    seconds: 2.0,
                },
            ),
            at(
                190,
                Event::Eval {
                    step: 200,
                    spaces: BTreeMap::from([
                        ("lift".into(), space(0.41)),
                        ("stack_long".into(), space(1.02)),
                    ]),
                },
            ),
            at(
                191,
                Event::Mixture {
                    step: 200,
                    samples: 1600,
                    datasets: BTreeMap::from([
                        ("lift".into(), share(1199, 0.75)),
                        ("stack_long".into(), share(401, 0.25)),
                    ]),
                },
            ),
            at(
                192,
                Event::End {
                    exit_code: 0,
                    reason: "done".into(),
                },
            ),
        ]
    }

    #[test]
    fn the_summary_reads_as_intended() {
        let next = [
            NextCommand {
                purpose: "look".into(),
                command: "pollen report runs/demo".into(),
            },
            NextCommand {
                purpose: "go on".into(),
                command: "make pretrain SET=\"train.steps=400\"".into(),
            },
        ];
        let expected = "\
run 20260102-030405-a1b2c3d4: done (exit 0)
  200 of 200 steps, 1,600 samples, last loss 0.4321, 3m 12s since the first of 2 starts, 0.11 of 1.00 worker-hours
  held-out error at step 200:
    lift        0.4100 (mean predictor 1.0000, single samples 1.5000): 59% better than always answering the mean; 2 episodes, 90 chunks
    stack_long  1.0200 (mean predictor 1.0000, single samples 1.5000): no better than always answering the mean; 2 episodes, 90 chunks
  where the time went: forward 60%, backward 30%, data 10%
  mixture of 1,600 samples, share (target):
    lift        74.94% (75.00%)
    stack_long  25.06% (25.00%)
  storage: 1 retry, 1 operation recovered after 1.2s of waiting
  checkpoint: s3://pollen/demo/checkpoints/step-00000200/g2 (step 200, 3.0 MiB)
next:
  look   pollen report runs/demo
  go on  make pretrain SET=\"train.steps=400\"
";
        assert_eq!(summary(&RunView::of(&records()), &next), expected);
    }

    #[test]
    fn of_many_datasets_those_off_their_target_are_named() {
        let mut view = RunView::default();
        let datasets = (0..9).map(|i| (format!("d{i}"), share(100 + 20 * (i % 5), 0.1)));
        view.mixture = Some((1600, datasets.collect()));
        let text = summary(&view, &[]);
        assert!(text.contains("6 of 9 datasets, farthest first"), "{text}");
        let first = text.lines().find(|line| line.contains("    d"));
        assert_eq!(first, Some("    d0  6.25% (10.00%)"), "{text}");
        assert_eq!(text.matches("(10.00%)").count(), 6);
    }

    #[test]
    fn a_run_that_did_nothing_says_so() {
        let text = summary(&RunView::of(&[]), &[]);
        assert!(text.contains("not ended"), "{text}");
        assert!(text.contains("held-out error: not measured"), "{text}");
        assert!(text.contains("checkpoint: none was saved"), "{text}");
        assert!(text.contains("storage: no retries"), "{text}");
    }
}

//! One sentence for each event that a person should see go by.

use crate::events::{Event, Record, SpaceError};
use crate::units;

/// Returns the sentence for a record, or nothing for those that only feed the progress line.
pub(crate) fn notice(record: &Record) -> Option<String> {
    let rank = record
        .rank
        .map_or_else(|| "launcher".into(), |rank| format!("rank {rank}"));
    let text = match &record.event {
        Event::Plan(_)
        | Event::Step(_)
        | Event::Budget { .. }
        | Event::GradientExchange { .. }
        | Event::SampleAudit { .. }
        | Event::Mixture { .. } => return None,
        Event::Start(start) => {
            if record.rank.is_some_and(|rank| rank != 0) {
                return None;
            }
            format!(
                "start: generation {}, {} workers ({}, {}), step {} of {}",
                record.generation,
                start.world_size,
                start.device,
                start.communicator,
                units::count(start.step),
                units::count(start.steps)
            )
        }
        Event::Checkpoint {
            step,
            url,
            bytes,
            stall_s,
            seconds,
        } => format!(
            "checkpoint: step {} in {url}, {} in {}, training stood still {}",
            units::count(*step),
            units::bytes(*bytes),
            units::seconds(*seconds),
            units::seconds(*stall_s)
        ),
        Event::Restore { step, url, skipped } => {
            let passed: String = skipped
                .iter()
                .map(|one| ["; passed over ", &one.url, " (", &one.reason, ")"].concat())
                .collect();
            format!("resume: step {} from {url}{passed}", units::count(*step))
        }
        Event::BadSample {
            dataset,
            episode,
            frame,
            reason,
        } => format!("bad sample: {dataset} episode {episode} frame {frame}: {reason}"),
        Event::NonFinite { step, count, .. } => {
            format!("non-finite: step {step} skipped, {count} so far")
        }
        Event::Hang {
            who,
            step,
            phase,
            since_s,
            ..
        } => format!(
            "hang: {who} has been in {phase} of step {step} for {}",
            units::seconds(*since_s)
        ),
        Event::Restart {
            reason, pause_s, ..
        } => format!("restart: {reason}, in {}", units::seconds(*pause_s)),
        Event::Eval { step, spaces } => {
            let errors: Vec<String> = spaces
                .iter()
                .map(|(name, space)| format!("{name} {}", space_error(space)))
                .collect();
            format!("held-out error at step {step}: {}", errors.join(", "))
        }
        Event::StoreRetry {
            operation,
            path,
            attempt,
            error,
            ..
        } => format!("storage: {rank}: {operation} {path} failed (try {attempt}): {error}"),
        Event::StoreRecovered {
            operation,
            path,
            attempts,
            waited_s,
        } => format!(
            "storage: {rank}: {operation} {path} worked at try {attempts} after {}",
            units::seconds(*waited_s)
        ),
        Event::End { exit_code, reason } => {
            if record.rank.is_some() && *exit_code == 0 {
                return None;
            }
            format!("end: {rank}: {reason} (exit {exit_code})")
        }
    };
    Some(text)
}

/// Returns an error beside the mean predictor's.
pub(crate) fn space_error(space: &SpaceError) -> String {
    format!(
        "{:.4} (mean predictor {:.4}, single samples {:.4})",
        space.error, space.mean_predictor_error, space.single_sample_error
    )
}

/// Returns whether the `count`-th event of a frequent kind is worth a line: the first three, then
/// every power of ten.
pub(crate) fn worth_a_line(count: u64) -> bool {
    count <= 3 || 10u64.pow(count.ilog10()) == count
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::events::SkippedCheckpoint;

    #[test]
    fn a_resume_names_what_it_passed_over() {
        let text = notice(&Record {
            time: std::time::SystemTime::UNIX_EPOCH,
            run: "r".into(),
            generation: 1,
            rank: Some(0),
            event: Event::Restore {
                step: 1200,
                url: "s3://b/step-1200".into(),
                skipped: vec![SkippedCheckpoint {
                    url: "s3://b/step-1300".into(),
                    reason: "sha256 of model-00001 differs".into(),
                }],
            },
        })
        .unwrap();
        assert_eq!(
            text,
            "resume: step 1,200 from s3://b/step-1200; passed over s3://b/step-1300 (sha256 of \
             model-00001 differs)"
        );
    }

    #[test]
    fn frequent_events_get_rarer() {
        let shown: Vec<u64> = (1..=1000).filter(|count| worth_a_line(*count)).collect();
        assert_eq!(shown, vec![1, 2, 3, 10, 100, 1000]);
    }
}

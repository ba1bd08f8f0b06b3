//! The launcher's view of a run that goes on: one line that is redrawn on a terminal, plain lines
//! in a file or a pipe.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, SystemTime};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::config::Config;
use crate::events::{Event, Record};
use crate::notices::{notice, worth_a_line};
use crate::units;
use crate::view::RunView;

/// Draws a run. Feed it the records of a [`crate::Tail`].
///
/// A view may fail without hurting the run: errors of the terminal are ignored.
pub struct Progress {
    view: RunView,
    plain_every: Duration,
    last_plain: Option<(u64, SystemTime)>,
    surface: Surface,
}

enum Surface {
    Terminal(ProgressBar),
    Plain(Box<dyn Write + Send>),
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Progress")
            .field("view", &self.view)
            .field("terminal", &matches!(self.surface, Surface::Terminal(_)))
            .finish_non_exhaustive()
    }
}

impl Progress {
    /// Draws on standard error: a redrawn line if it is a terminal, else plain lines.
    pub fn stderr(config: &Config) -> Self {
        if !io::stderr().is_terminal() {
            return Self::plain(config, Box::new(io::stderr()));
        }
        let redraws_per_s = 1000 / config.refresh.as_millis().clamp(20, 1000);
        let bar = ProgressBar::with_draw_target(
            None,
            ProgressDrawTarget::stderr_with_hz(redraws_per_s as u8),
        );
        bar.set_style(
            ProgressStyle::with_template("waiting for the workers {spinner} {elapsed}")
                .expect("the template's keys are indicatif's own"),
        );
        bar.enable_steady_tick(config.refresh);
        Self::new(config, Surface::Terminal(bar))
    }

    /// Writes plain lines to `out`.
    pub fn plain(config: &Config, out: Box<dyn Write + Send>) -> Self {
        Self::new(config, Surface::Plain(out))
    }

    fn new(config: &Config, surface: Surface) -> Self {
        Self {
            view: RunView::default(),
            plain_every: config.plain_every,
            last_plain: None,
            surface,
        }
    }

    /// Takes records in that are only history, without drawing them.
    pub fn replay(&mut self, records: &[Record]) {
        for record in records {
            self.view.apply(record);
        }
    }

    /// Takes new records in and draws what they change.
    pub fn update(&mut self, records: &[Record]) {
        for record in records {
            self.view.apply(record);
            let shown = match &record.event {
                Event::BadSample { .. } => worth_a_line(self.view.num_bad_samples),
                Event::StoreRetry { .. } => worth_a_line(self.view.num_store_retries),
                Event::StoreRecovered { .. } => worth_a_line(self.view.num_store_recovered),
                _ => true,
            };
            if let Some(text) = notice(record).filter(|_| shown) {
                self.say(&text);
            }
            if matches!(record.event, Event::Step(_)) {
                self.draw(record.time);
            }
        }
    }

    /// Writes a line above the progress line.
    pub fn say(&mut self, text: &str) {
        match &mut self.surface {
            Surface::Terminal(bar) => bar.println(text),
            Surface::Plain(out) => {
                let _ = writeln!(out, "{text}").and_then(|()| out.flush());
            }
        }
    }

    /// Takes the progress line off the terminal, so that a summary can follow.
    pub fn finish(&mut self) {
        if let Surface::Terminal(bar) = &self.surface {
            bar.finish_and_clear();
        }
    }

    /// Returns the state that is drawn.
    pub fn view(&self) -> &RunView {
        &self.view
    }

    fn draw(&mut self, now: SystemTime) {
        let done = self.view.steps_done();
        let total = self.view.steps_total();
        match &mut self.surface {
            Surface::Terminal(bar) => {
                if let Some(total) = total.filter(|total| bar.length() != Some(*total)) {
                    bar.set_length(total);
                    bar.set_style(bar_style());
                }
                bar.set_position(done);
                bar.set_message(figures(&self.view));
            }
            Surface::Plain(_) => {
                let due = self.last_plain.is_none_or(|(step, at)| {
                    // A restart goes back: say where it is at once.
                    done < step
                        || now.duration_since(at).unwrap_or(Duration::MAX) >= self.plain_every
                });
                if due || total == Some(done) {
                    self.last_plain = Some((done, now));
                    self.say(&line(&self.view));
                }
            }
        }
    }
}

fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template("{wide_bar:.cyan/blue} {human_pos}/{human_len}  {msg}")
        .expect("the template's keys are indicatif's own")
        .progress_chars("=> ")
}

/// Returns the plain progress line.
pub fn line(view: &RunView) -> String {
    let total = view.steps_total().map_or("?".into(), units::count);
    format!(
        "step {}/{total}  {}",
        units::count(view.steps_done()),
        figures(view)
    )
}

fn figures(view: &RunView) -> String {
    let mut parts = Vec::new();
    if let Some(step) = &view.step {
        parts.push(format!("loss {:.4}", step.loss));
        parts.push(format!("{:.1} samples/s", step.samples_per_s));
        parts.push(format!("data wait {}", units::percent(step.data_wait)));
    }
    if let (Some(budget), Some(spent)) = (&view.budget, view.gpu_hours()) {
        let unit = units::worker_hours(view.device());
        parts.push(match budget.max() {
            Some(max) => format!("{} of {} {unit}", units::hours(spent), units::hours(max)),
            None => format!("{} {unit}", units::hours(spent)),
        });
    }
    if let Some(left) = view.seconds_left() {
        parts.push(format!("{} left", units::seconds(left)));
    }
    parts.join("  ")
}

#[cfg(test)]
#[path = "progress_tests.rs"]
mod tests;

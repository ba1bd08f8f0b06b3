//! What a dataset's columns say about themselves: gripper polarity, delta or absolute, duplicates,
//! language, idle frames. `pollen data add` asks before anybody has declared anything.

use std::collections::{BTreeSet, HashMap};

use sha2::{Digest, Sha256};

use crate::columns::Columns;
use crate::correlation::Moments;
use crate::dataset_config::Motion;
use crate::dimension_check::{Dimension, Finding};
use crate::filter::{FrameFilter, Idle};

/// A correlation below this says nothing.
const CLEAR: f64 = 0.3;
/// Seconds by which a gripper may follow its command.
const GRIPPER_LAG_S: f64 = 0.5;
const MAX_LAG: usize = 15;
/// Root mean square distance to the next state, in deviations of the action, below which actions are
/// targets.
const NEAR: f64 = 0.3;
/// Correlation with the state's change above which actions are changes.
const FOLLOWED: f64 = 0.5;
/// Relative distance of the slope to the control rate within which actions are changes per second.
const RATE_TOLERANCE: f64 = 0.3;
/// Motion below which a frame is idle, in the unit of each dimension.
pub const IDLE_BELOW: f32 = 1e-3;
/// Share of idle frames worth leaving out.
const MANY_IDLE: f64 = 0.1;
/// Named in a finding at most.
const MAX_NAMED: usize = 5;

/// Collects a dataset's stored columns, file by file.
#[derive(Debug)]
pub struct DatasetCheck<'a> {
    actions: &'a [Dimension],
    states: &'a [Dimension],
    fps: f64,
    tasks: &'a [String],
    grippers: Vec<usize>,
    /// [gripper, state, lag].
    gripper_moments: Vec<Moments>,
    max_lag: usize,
    /// Per gripper: frames at -1, between and at 1.
    commands: Vec<[u64; 3]>,
    /// [action, state]: with the next state and with the change to it.
    absolute: Vec<Moments>,
    delta: Vec<Moments>,
    state_max: Vec<f32>,
    state_min: Vec<f32>,
    episodes: HashMap<[u8; 32], u64>,
    copies: Vec<(u64, u64)>,
    num_episodes: u64,
    labelled_episodes: u64,
    used_tasks: BTreeSet<u64>,
    frames: u64,
    idle: [u64; 2],
}

/// What the columns say.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// What the actions are; `None` where the states do not tell.
    pub motion: Option<Motion>,
    /// Per action dimension: the state dimension that it moves, if one does clearly.
    pub followed_by: Vec<Option<usize>>,
    /// Per gripper dimension of the action: what it needs to be 1 = open.
    pub grippers: Vec<GripperVerdict>,
    /// Share of episodes with an instruction.
    pub labelled: f64,
    /// Share of frames in which nothing moves.
    pub idle: f64,
    /// (original, copy).
    pub copies: Vec<(u64, u64)>,
    /// All of it in words.
    pub findings: Vec<Finding>,
}

/// What one gripper dimension is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GripperVerdict {
    /// Dimension of the action.
    pub dim: usize,
    /// Whether its number grows as the gripper closes; `None` where the state does not tell.
    pub inverted: Option<bool>,
    /// Whether it reaches below 0.
    pub signed: bool,
    /// Whether most commands are 0 = stay as it is.
    pub relative: bool,
}

impl<'a> DatasetCheck<'a> {
    /// Starts over dimensions as they are stored; `tasks` are the instructions by number.
    pub fn new(
        actions: &'a [Dimension],
        states: &'a [Dimension],
        fps: f64,
        tasks: &'a [String],
    ) -> Self {
        let grippers: Vec<usize> = grippers(actions);
        let max_lag = ((GRIPPER_LAG_S * fps).ceil() as usize).clamp(1, MAX_LAG);
        let pairs = actions.len() * states.len();
        Self {
            gripper_moments: vec![
                Moments::default();
                grippers.len() * states.len() * (max_lag + 1)
            ],
            commands: vec![[0; 3]; grippers.len()],
            absolute: vec![Moments::default(); pairs],
            delta: vec![Moments::default(); pairs],
            state_max: vec![f32::NEG_INFINITY; states.len()],
            state_min: vec![f32::INFINITY; states.len()],
            episodes: HashMap::new(),
            copies: Vec::new(),
            num_episodes: 0,
            labelled_episodes: 0,
            used_tasks: BTreeSet::new(),
            frames: 0,
            idle: [0; 2],
            actions,
            states,
            fps,
            tasks,
            grippers,
            max_lag,
        }
    }

    /// Adds the stored columns of a file; episodes are whole.
    pub fn push(&mut self, columns: &Columns) {
        for (number, absolute) in [false, true].into_iter().enumerate() {
            let idle = Idle {
                below: IDLE_BELOW,
                absolute,
                grippers: self.grippers.clone(),
            };
            let filter = FrameFilter {
                unlabelled: false,
                idle: Some(idle),
            };
            let left_out = filter.left_out(columns, self.tasks, 0);
            self.idle[number] += left_out.iter().map(|(_, rows)| rows).sum::<u64>();
        }
        let mut start = 0;
        for run in columns.episode.chunk_by(|a, b| a == b) {
            self.episode(columns, start, start + run.len());
            start += run.len();
        }
        self.frames += start as u64;
    }

    fn episode(&mut self, columns: &Columns, start: usize, end: usize) {
        let number = columns.episode[start];
        self.num_episodes += 1;
        let mut hash = Sha256::new();
        for row in start..end {
            for &value in columns.action.row(row) {
                hash.update(value.to_le_bytes());
            }
            if columns.state.width > 0 {
                for &value in columns.state.row(row) {
                    hash.update(value.to_le_bytes());
                }
            }
        }
        let first = *self
            .episodes
            .entry(hash.finalize().into())
            .or_insert(number);
        if first != number {
            self.copies.push((first, number));
        }
        let has_text = |task: &u64| {
            let text = self.tasks.get(*task as usize);
            text.is_some_and(|text| !text.trim().is_empty())
        };
        let tasks = &columns.task[start..end];
        self.labelled_episodes += u64::from(tasks.iter().any(has_text));
        self.used_tasks
            .extend(tasks.iter().filter(|task| has_text(task)));
        if columns.action.width != self.actions.len() || columns.state.width != self.states.len() {
            return;
        }
        self.pairs(columns, start, end);
    }

    fn pairs(&mut self, columns: &Columns, start: usize, end: usize) {
        let width = self.states.len();
        for row in start..end {
            let action = columns.action.row(row);
            for (at, &dim) in self.grippers.iter().enumerate() {
                let value = action[dim];
                let kind = usize::from(value > -0.5) + usize::from(value >= 0.5);
                self.commands[at][kind] += 1;
                for lag in 0..=self.max_lag.min(end - 1 - row) {
                    let state = if width > 0 {
                        columns.state.row(row + lag)
                    } else {
                        &[]
                    };
                    for (s, &state) in state.iter().enumerate() {
                        let pair = (at * width + s) * (self.max_lag + 1) + lag;
                        self.gripper_moments[pair].push(value.into(), state.into());
                    }
                }
            }
            if width == 0 {
                continue;
            }
            let state = columns.state.row(row);
            for (s, &value) in state.iter().enumerate() {
                self.state_max[s] = self.state_max[s].max(value);
                self.state_min[s] = self.state_min[s].min(value);
            }
            if row + 1 == end {
                continue;
            }
            let next = columns.state.row(row + 1);
            for (a, &action) in action.iter().enumerate() {
                for s in 0..width {
                    let change = next[s] - state[s];
                    self.absolute[a * width + s].push(action.into(), next[s].into());
                    self.delta[a * width + s].push(action.into(), change.into());
                }
            }
        }
    }

    /// Returns what all of them say.
    pub fn finish(self) -> Verdict {
        let mut findings = Vec::new();
        let (motion, followed_by) = self.motion(&mut findings);
        let grippers = self.polarity(&mut findings);
        self.duplicates(&mut findings);
        let labelled = self.language(&mut findings);
        let idle = self.idle(motion, &mut findings);
        Verdict {
            motion,
            followed_by,
            grippers,
            labelled,
            idle,
            copies: self.copies,
            findings,
        }
    }

    fn motion(&self, findings: &mut Vec<Finding>) -> (Option<Motion>, Vec<Option<usize>>) {
        let width = self.states.len();
        let arm: Vec<usize> = (0..self.actions.len())
            .filter(|dim| !self.grippers.contains(dim))
            .collect();
        let mut followed = vec![None; self.actions.len()];
        let mut votes = [0; 3];
        let mut seen = Vec::new();
        for &a in &arm {
            let pairs = || (0..width).map(|s| (s, a * width + s));
            let nearest = pairs()
                .filter_map(|(s, pair)| Some((s, self.absolute[pair].distance()?)))
                .min_by(|x, y| x.1.total_cmp(&y.1));
            let moved = pairs()
                .filter_map(|(s, pair)| {
                    let moments = &self.delta[pair];
                    Some((s, moments.correlation()?, moments.slope()?))
                })
                .max_by(|x, y| x.1.abs().total_cmp(&y.1.abs()));
            let name = &self.actions[a].name;
            if let Some((s, distance)) = nearest.filter(|(_, distance)| *distance < NEAR) {
                votes[0] += 1;
                followed[a] = Some(s);
                seen.push(format!(
                    "`{name}` is the next state's `{}` to within {distance:.2} deviations",
                    self.states[s].name
                ));
            } else if let Some((s, r, slope)) = moved.filter(|(_, r, _)| r.abs() > FOLLOWED) {
                let per_second = (slope / self.fps - 1.0).abs() < RATE_TOLERANCE && self.fps >= 3.0;
                votes[if per_second { 2 } else { 1 }] += 1;
                followed[a] = Some(s);
                seen.push(format!(
                    "`{name}` goes with the change of `{}`, r = {r:.2}, {slope:.2} times as large",
                    self.states[s].name
                ));
            }
        }
        let told = votes.iter().sum::<usize>();
        let motions = [Motion::Absolute, Motion::Delta, Motion::Velocity];
        let most = (0..3)
            .max_by_key(|&kind| (votes[kind], 3 - kind))
            .unwrap_or(0);
        let motion = (told > 0 && 2 * votes[most] > told).then(|| motions[most]);
        let word = match motion {
            Some(Motion::Absolute) => "absolute",
            Some(Motion::Delta) => "delta",
            Some(Motion::Velocity) => "velocity",
            None => "not told",
        };
        let evidence = match seen.len() {
            0 => "no dimension of the action is near a state or goes with its change".into(),
            _ => format!(
                "{word} by {told} of {} dimensions: {}",
                arm.len(),
                listed(&seen)
            ),
        };
        let fix = match motion {
            Some(_) => String::new(),
            None => {
                "look at `pollen data inspect` and set motion, and transform.action if it must \
                     become another"
                    .into()
            }
        };
        findings.push(Finding {
            check: "motion",
            subject: String::new(),
            evidence,
            fix,
        });
        (motion, followed)
    }

    /// Compares each gripper's command with what opens and closes after it.
    fn polarity(&self, findings: &mut Vec<Finding>) -> Vec<GripperVerdict> {
        let width = self.states.len();
        let named: Vec<usize> = (0..width)
            .filter(|&s| {
                let name = self.states[s].name.to_lowercase();
                self.states[s].is_gripper() || name.contains("finger")
            })
            .collect();
        // Without names, grippers stand last.
        let unnamed = width.saturating_sub(2)..width;
        let openings = if named.is_empty() {
            unnamed.collect()
        } else {
            named
        };
        let mut verdicts = Vec::new();
        for (at, &dim) in self.grippers.iter().enumerate() {
            let lags = self.max_lag + 1;
            let best = openings
                .iter()
                .flat_map(|&s| (0..lags).map(move |lag| (s, lag)))
                .filter_map(|(s, lag)| {
                    let moments = &self.gripper_moments[(at * width + s) * lags + lag];
                    Some((s, lag, moments.correlation()?))
                })
                .max_by(|x, y| x.2.abs().total_cmp(&y.2.abs()));
            let [low, middle, high] = self.commands[at];
            let mut verdict = GripperVerdict {
                dim,
                inverted: None,
                signed: low > 0,
                relative: low > 0 && high > 0 && middle > low + high,
            };
            let subject = format!("action {dim} `{}`", self.actions[dim].name);
            let Some((s, lag, r)) = best.filter(|(_, _, r)| r.abs() > CLEAR) else {
                let evidence = match best {
                    Some((s, _, r)) => format!(
                        "it hardly goes with any gripper of the state (best `{}`, r = {r:.2})",
                        self.states[s].name
                    ),
                    None => "the state shows no gripper that moves".into(),
                };
                findings.push(Finding {
                    check: "gripper_polarity",
                    subject,
                    evidence,
                    fix: "look at `pollen data inspect`; gripper = \"unverified\" until somebody \
                          has, and { kind = \"invert\" } if 1 is closed"
                        .into(),
                });
                verdicts.push(verdict);
                continue;
            };
            // The second finger of a pair opens towards negative numbers.
            let mirrored = self.state_max[s] <= 1e-3 && self.state_min[s] < -1e-3;
            let r = if mirrored { -r } else { r };
            verdict.inverted = Some(r < 0.0);
            findings.push(Finding {
                check: "gripper_polarity",
                subject,
                evidence: format!(
                    "r = {r:.2} with the opening `{}` of the state, {:.2} s later: 1 is {}",
                    self.states[s].name,
                    lag as f64 / self.fps,
                    if r < 0.0 { "closed" } else { "open" },
                ),
                fix: if r < 0.0 {
                    "{ kind = \"invert\" } in its part of transform.action makes 1 open; if the \
                     state's own number grows as the gripper closes, it must stay as it is"
                        .into()
                } else {
                    String::new()
                },
            });
            verdicts.push(verdict);
        }
        verdicts
    }

    fn duplicates(&self, findings: &mut Vec<Finding>) {
        let pairs: Vec<String> = self
            .copies
            .iter()
            .map(|(first, copy)| format!("episode {copy} is episode {first} again"))
            .collect();
        findings.push(Finding {
            check: "duplicates",
            subject: String::new(),
            evidence: match pairs.len() {
                0 => format!(
                    "none of {} episodes has the numbers of another",
                    self.num_episodes
                ),
                copies => format!(
                    "{copies} of {} episodes have the very numbers of another: {}",
                    self.num_episodes,
                    listed(&pairs)
                ),
            },
            fix: match pairs.len() {
                0 => String::new(),
                _ => "leave the copies out when converting; one of a pair in holdout_episodes \
                      would be trained on through the other"
                    .into(),
            },
        });
    }

    fn language(&self, findings: &mut Vec<Finding>) -> f64 {
        let share = self.labelled_episodes as f64 / self.num_episodes.max(1) as f64;
        findings.push(Finding {
            check: "language",
            subject: String::new(),
            evidence: format!(
                "{} of {} episodes have an instruction ({:.0} %), {} different ones",
                self.labelled_episodes,
                self.num_episodes,
                100.0 * share,
                self.used_tasks.len()
            ),
            fix: if self.labelled_episodes == 0 {
                "instruction = \"empty\" trains without words; or convert again with --task or \
                 --instruction"
                    .into()
            } else if share < 1.0 {
                "filters.unlabelled = true leaves the others out".into()
            } else {
                String::new()
            },
        });
        share
    }

    fn idle(&self, motion: Option<Motion>, findings: &mut Vec<Finding>) -> f64 {
        let idle = self.idle[usize::from(motion == Some(Motion::Absolute))];
        let share = idle as f64 / self.frames.max(1) as f64;
        findings.push(Finding {
            check: "idle",
            subject: String::new(),
            evidence: format!(
                "in {idle} of {} frames ({:.0} %) nothing moves by more than {IDLE_BELOW}",
                self.frames,
                100.0 * share
            ),
            fix: if share > MANY_IDLE {
                format!("filters.idle_below = {IDLE_BELOW} leaves them out")
            } else {
                String::new()
            },
        });
        share
    }
}

/// Returns the grippers among the dimensions: by name, or the last one where none has a name.
fn grippers(dims: &[Dimension]) -> Vec<usize> {
    let named: Vec<usize> = (0..dims.len())
        .filter(|&dim| dims[dim].is_gripper())
        .collect();
    let numbered = dims.iter().all(|dim| dim.name.parse::<usize>().is_ok());
    match dims.len().checked_sub(1) {
        Some(last) if named.is_empty() && numbered => vec![last],
        _ => named,
    }
}

fn listed(items: &[String]) -> String {
    let text = items[..items.len().min(MAX_NAMED)].join("; ");
    match items.len().saturating_sub(MAX_NAMED) {
        0 => text,
        more => format!("{text}; and {more} more"),
    }
}

#[cfg(test)]
#[path = "dataset_check_tests.rs"]
mod tests;

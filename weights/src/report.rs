//! What became of every key and every parameter.

use std::fmt;

/// What became of a key or of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Taken as it is.
    Loaded,
    /// Taken in another shape or computed.
    Reshaped,
    /// Known, and not part of the model.
    Unused,
    /// Unknown to the model.
    Unexpected,
    /// A parameter that the source does not have.
    Missing,
    /// A tensor that cannot be taken.
    Unfit,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Loaded => "loaded",
            Self::Reshaped => "reshaped",
            Self::Unused => "unused",
            Self::Unexpected => "unexpected",
            Self::Missing => "missing",
            Self::Unfit => "unfit",
        })
    }
}

/// One line of a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// What happened.
    pub outcome: Outcome,
    /// Key of the source, or name of a missing parameter.
    pub key: String,
    /// The parameter it becomes, or nothing.
    pub name: String,
    /// Why, if there is something to say.
    pub reason: String,
}

/// What became of every key of a source and of every parameter of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    lines: Vec<Line>,
}

impl Report {
    pub(crate) fn add(&mut self, outcome: Outcome, key: &str, name: &str, reason: &str) {
        self.lines.push(Line {
            outcome,
            key: key.into(),
            name: name.into(),
            reason: reason.into(),
        });
    }

    /// Returns the lines in the order of their keys.
    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    pub(crate) fn sort(&mut self) {
        self.lines.sort_by(|a, b| a.key.cmp(&b.key));
    }

    /// Returns how many lines have this outcome.
    pub fn count(&self, outcome: Outcome) -> usize {
        let lines = self.lines.iter();
        lines.filter(|line| line.outcome == outcome).count()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.lines {
            write!(f, "{:<10} {}", line.outcome, line.key)?;
            if !line.name.is_empty() && line.name != line.key {
                write!(f, " -> {}", line.name)?;
            }
            if !line.reason.is_empty() {
                write!(f, ": {}", line.reason)?;
            }
            writeln!(f)?;
        }
        let outcomes = [
            Outcome::Loaded,
            Outcome::Reshaped,
            Outcome::Unused,
            Outcome::Unexpected,
            Outcome::Missing,
            Outcome::Unfit,
        ];
        let counts: Vec<String> = outcomes
            .iter()
            .map(|&outcome| format!("{} {outcome}", self.count(outcome)))
            .collect();
        write!(f, "{}", counts.join(", "))
    }
}

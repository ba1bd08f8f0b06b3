//! The places where a fault can strike, as a run itself wrote them down.

/// A place that a trace shows: see `trace` in `trainer/src/faults.rs`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub generation: u64,
    pub rank: u32,
    pub step: u64,
    /// Whether the thread that saves was there, not the one that trains.
    pub saving: bool,
    pub name: String,
}

/// Reads a trace: `generation rank step thread place`, one a line.
pub(crate) fn parse(trace: &str) -> Vec<Place> {
    let place = |line: &str| {
        let mut words = line.splitn(5, ' ');
        let mut number = || words.next()?.parse::<u64>().ok();
        Some(Place {
            generation: number()?,
            rank: u32::try_from(number()?).ok()?,
            step: number()?,
            saving: match words.next()? {
                "saving" => true,
                "training" => false,
                _ => return None,
            },
            name: words.next()?.to_owned(),
        })
    };
    let lines = trace.lines();
    lines
        .map(|line| place(line).unwrap_or_else(|| panic!("trace: `{line}`")))
        .collect()
}

/// When in a run a place is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Group {
    /// Before the first step of the first start.
    Start,
    /// In the training thread, between two checkpoints or at one.
    Step,
    /// In the thread that saves.
    Save,
    /// Before the first step of the second start.
    Restore,
}

impl Group {
    pub(crate) const ALL: [Self; 4] = [Self::Start, Self::Step, Self::Save, Self::Restore];

    /// The word in a case's name.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Step => "step",
            Self::Save => "save",
            Self::Restore => "restore",
        }
    }
}

/// Returns each place of a group once for each rank, in the order in which the rank gets there.
///
/// Steps and saves are looked at where most can go wrong: `step` lies between two checkpoints, the
/// save at `saved` deletes an older one. What no such step reaches, as the evaluation at the end, is
/// taken where it is reached first after the start.
pub(crate) fn of_group(trace: &[Place], group: Group, step: u64, saved: u64) -> Vec<Place> {
    let of_start = |place: &&Place| match group {
        Group::Restore => place.generation == 2,
        _ => place.generation == 1,
    };
    let member = |place: &&Place| match group {
        Group::Start | Group::Restore => place.step == 0 && !place.saving,
        Group::Step => place.step > 0 && !place.saving,
        Group::Save => place.step == saved && place.saving,
    };
    let mut chosen: Vec<Place> = Vec::new();
    let all: Vec<&Place> = trace.iter().filter(of_start).filter(member).collect();
    let preferred = all.iter().filter(|place| place.step == step);
    let later = all.iter().filter(|place| place.step >= saved);
    for place in preferred.chain(later).chain(&all) {
        let known = |other: &Place| (other.rank, &other.name) == (place.rank, &place.name);
        if !chosen.iter().any(known) {
            chosen.push((*place).clone());
        }
    }
    // The optimizer's file is written beside the model's, now sooner, now later: model first here.
    let part = |place: &Place| match (group, &place.name) {
        (Group::Save, name) if name.contains(" model-") => 0,
        (Group::Save, name) if name.contains(" optim-") => 1,
        _ => 2,
    };
    chosen.sort_by_key(|place| (place.rank, part(place)));
    chosen
}

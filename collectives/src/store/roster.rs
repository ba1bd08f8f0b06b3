//! Who joined a group, and how they went. A member is a connection: when it breaks without a
//! good-bye, the others are told at once.

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard};

use super::frame::{self, Event, Member, MemberState, Reply};

/// A connection that several threads may write whole frames to.
pub(super) type Line = Arc<Mutex<TcpStream>>;

/// All groups.
#[derive(Debug, Default)]
pub(super) struct Roster {
    groups: Mutex<BTreeMap<String, Group>>,
}

#[derive(Debug, Default)]
struct Group {
    seats: BTreeMap<u32, Seat>,
    /// In order, for those who join later.
    events: Vec<Event>,
}

#[derive(Debug)]
struct Seat {
    host: String,
    state: MemberState,
    /// Open while present.
    line: Option<Line>,
}

/// What a connection that joined is known as.
#[derive(Clone, Debug)]
pub(super) struct Name {
    pub(super) group: String,
    pub(super) rank: u32,
}

impl Roster {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Group>> {
        self.groups
            .lock()
            .expect("no code panics while it holds the roster")
    }

    /// Takes a seat and answers on `line`, followed by the events so far.
    pub(super) fn join(&self, name: &Name, host: String, line: &Line) -> Result<(), String> {
        // Held across both steps, so that no later event overtakes the answer.
        let mut stream = lock(line);
        let past = {
            let mut groups = self.lock();
            let group = groups.entry(name.group.clone()).or_default();
            if let Some(seat) = group.seats.get(&name.rank) {
                return Err(format!(
                    "rank {} of `{}` is taken by {}: use a new generation",
                    name.rank, name.group, seat.host
                ));
            }
            let seat = Seat {
                host,
                state: MemberState::Present,
                line: Some(Arc::clone(line)),
            };
            group.seats.insert(name.rank, seat);
            group.events.clone()
        };
        for reply in std::iter::once(Reply::Done).chain(past.into_iter().map(Reply::Event)) {
            // A broken line is noticed by the thread that reads from it.
            let _ = frame::write(&mut *stream, &reply);
        }
        Ok(())
    }

    /// Marks the seat as given up in good order.
    pub(super) fn leave(&self, name: &Name) {
        self.part(name, MemberState::Left);
    }

    /// Marks the seat as lost, if it has not been given up.
    pub(super) fn lose(&self, name: &Name) {
        self.part(name, MemberState::Lost);
    }

    /// Passes a member's words on to the others.
    pub(super) fn report(&self, name: &Name, text: String) {
        let rank = name.rank;
        self.tell_others(name, Event::Reported { rank, text }, |_| true);
    }

    pub(super) fn members(&self, group: &str) -> Vec<Member> {
        let groups = self.lock();
        let seats = groups.get(group).into_iter().flat_map(|group| &group.seats);
        seats
            .map(|(rank, seat)| Member {
                rank: *rank,
                host: seat.host.clone(),
                state: seat.state,
            })
            .collect()
    }

    /// Forgets the groups below `prefix` in which nobody is present.
    pub(super) fn forget_prefix(&self, prefix: &str) {
        self.lock().retain(|name, group| {
            let empty = group.seats.values().all(|seat| seat.line.is_none());
            !(empty && name.starts_with(prefix))
        });
    }

    fn part(&self, name: &Name, state: MemberState) {
        let rank = name.rank;
        let host = {
            let groups = self.lock();
            let seat = groups
                .get(&name.group)
                .and_then(|group| group.seats.get(&rank));
            seat.map_or_else(String::new, |seat| seat.host.clone())
        };
        let event = match state {
            MemberState::Lost => Event::Lost { rank, host },
            _ => Event::Left { rank },
        };
        self.tell_others(name, event, |seat| {
            seat.state = state;
            seat.line.take().is_some()
        });
    }

    /// Changes a seat and, if `change` says so, tells the other members.
    fn tell_others(&self, name: &Name, event: Event, change: impl FnOnce(&mut Seat) -> bool) {
        let lines: Vec<Line> = {
            let mut groups = self.lock();
            let Some(group) = groups.get_mut(&name.group) else {
                return;
            };
            let present = group
                .seats
                .get_mut(&name.rank)
                .filter(|seat| seat.line.is_some());
            if !present.is_some_and(change) {
                return;
            }
            group.events.push(event.clone());
            let others = group.seats.iter().filter(|(rank, _)| **rank != name.rank);
            others.filter_map(|(_, seat)| seat.line.clone()).collect()
        };
        let reply = Reply::Event(event);
        for line in lines {
            // A broken line is noticed by the thread that reads from it.
            let _ = frame::write(&mut *lock(&line), &reply);
        }
    }
}

/// Locks a line for one frame.
pub(super) fn lock(line: &Line) -> MutexGuard<'_, TcpStream> {
    line.lock().expect("no code panics while it writes a frame")
}

//! The wire format: `version u8, tag u8, length u32 LE, body`. Fields are fixed-width little-endian
//! numbers and length-prefixed byte strings; every length is capped and nothing is trusted.

use std::io::{self, Read, Write};
use std::time::Duration;

/// The version in every frame.
pub(super) const VERSION: u8 = 1;
/// The longest key, in bytes.
pub const MAX_KEY: usize = 1024;
/// The longest value, in bytes.
pub const MAX_VALUE: usize = 16 << 20;
/// The longest body: a gather of many values.
pub(super) const MAX_BODY: usize = 256 << 20;
/// The most ranks that one gather may name.
const MAX_RANKS: usize = 1 << 20;

/// Why a frame could not be read.
#[derive(Debug)]
pub(super) enum FrameError {
    Io(io::Error),
    Malformed(String),
}

impl From<io::Error> for FrameError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn malformed<T>(reason: impl Into<String>) -> Result<T, FrameError> {
    Err(FrameError::Malformed(reason.into()))
}

/// How a member of a group stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberState {
    /// Its connection is open.
    Present,
    /// It said good-bye.
    Left,
    /// Its connection broke.
    Lost,
}

/// A member of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its rank.
    pub rank: u32,
    /// The host name it gave.
    pub host: String,
    /// How it stands.
    pub state: MemberState,
}

/// What happened to another member of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Its connection broke: the process or node is dead.
    Lost {
        /// Its rank.
        rank: u32,
        /// The host name it gave.
        host: String,
    },
    /// It said good-bye.
    Left {
        /// Its rank.
        rank: u32,
    },
    /// It has something to say, usually why it failed.
    Reported {
        /// Its rank.
        rank: u32,
        /// Its words.
        text: String,
    },
}

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Set {
        key: String,
        value: Vec<u8>,
    },
    /// Waits until the key is present, up to `wait`.
    Get {
        key: String,
        wait: Duration,
    },
    Add {
        key: String,
        by: i64,
    },
    CompareAndSet {
        key: String,
        expected: Option<Vec<u8>>,
        value: Vec<u8>,
    },
    DeletePrefix {
        prefix: String,
    },
    /// Waits for the keys `prefix` + rank of all ranks below `world`.
    Collect {
        prefix: String,
        world: u32,
        wait: Duration,
    },
    /// Turns the connection into a seat in a group.
    Join {
        group: String,
        rank: u32,
        host: String,
    },
    Report {
        text: String,
    },
    Leave,
    Members {
        group: String,
    },
}

/// What the server answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    Done,
    Value(Vec<u8>),
    Absent,
    Number(i64),
    Values(Vec<Vec<u8>>),
    MissingRanks(Vec<u32>),
    Members(Vec<Member>),
    Event(Event),
    Refused(String),
}

/// Something that travels in a frame.
pub(super) trait Message: Sized {
    fn encode(&self) -> Fields;
    fn decode(tag: u8, body: &[u8]) -> Result<Self, FrameError>;
}

/// Writes one frame.
pub(super) fn write(stream: &mut impl Write, message: &impl Message) -> io::Result<()> {
    let fields = message.encode();
    let length = u32::try_from(fields.body.len())
        .ok()
        .filter(|length| *length as usize <= MAX_BODY)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "message too large"))?;
    let mut frame = Vec::with_capacity(fields.body.len() + 6);
    frame.extend([VERSION, fields.tag]);
    frame.extend(length.to_le_bytes());
    frame.extend(&fields.body);
    stream.write_all(&frame)
}

/// Reads one frame; `None` if the peer closed the connection between two frames.
pub(super) fn read<M: Message>(stream: &mut impl Read) -> Result<Option<M>, FrameError> {
    let mut version = [0; 1];
    loop {
        match stream.read(&mut version) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    if version[0] != VERSION {
        return malformed(format!("version {} instead of {VERSION}", version[0]));
    }
    let mut header = [0; 5];
    stream.read_exact(&mut header)?;
    let [tag, length @ ..] = header;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_BODY {
        return malformed(format!("{length} bytes, above the cap of {MAX_BODY}"));
    }
    // Grows as bytes arrive: a length alone allocates nothing.
    let mut body = Vec::with_capacity(length.min(64 << 10));
    stream.take(length as u64).read_to_end(&mut body)?;
    if body.len() < length {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    M::decode(tag, &body).map(Some)
}

impl Message for Request {
    fn encode(&self) -> Fields {
        match self {
            Self::Set { key, value } => Fields::new(1).text(key).bytes(value),
            Self::Get { key, wait } => Fields::new(2).text(key).wait(*wait),
            Self::Add { key, by } => Fields::new(3).text(key).number(*by),
            Self::CompareAndSet {
                key,
                expected,
                value,
            } => Fields::new(4)
                .text(key)
                .optional(expected.as_deref())
                .bytes(value),
            Self::DeletePrefix { prefix } => Fields::new(5).text(prefix),
            Self::Collect {
                prefix,
                world,
                wait,
            } => Fields::new(6).text(prefix).word(*world).wait(*wait),
            Self::Join { group, rank, host } => Fields::new(7).text(group).word(*rank).text(host),
            Self::Report { text } => Fields::new(8).text(text),
            Self::Leave => Fields::new(9),
            Self::Members { group } => Fields::new(10).text(group),
        }
    }

    fn decode(tag: u8, body: &[u8]) -> Result<Self, FrameError> {
        let mut rest = Rest(body);
        let request = match tag {
            1 => Self::Set {
                key: rest.key()?,
                value: rest.bytes(MAX_VALUE)?,
            },
            2 => Self::Get {
                key: rest.key()?,
                wait: rest.wait()?,
            },
            3 => Self::Add {
                key: rest.key()?,
                by: rest.number()?,
            },
            4 => Self::CompareAndSet {
                key: rest.key()?,
                expected: rest.optional()?,
                value: rest.bytes(MAX_VALUE)?,
            },
            5 => Self::DeletePrefix {
                prefix: rest.key()?,
            },
            6 => Self::Collect {
                prefix: rest.key()?,
                world: rest.word()?,
                wait: rest.wait()?,
            },
            7 => Self::Join {
                group: rest.key()?,
                rank: rest.word()?,
                host: rest.key()?,
            },
            8 => Self::Report {
                text: rest.text(MAX_VALUE)?,
            },
            9 => Self::Leave,
            10 => Self::Members { group: rest.key()? },
            _ => return malformed(format!("unknown request {tag}")),
        };
        if let Self::Collect { world, .. } = request
            && world as usize > MAX_RANKS
        {
            return malformed(format!("a world of {world} ranks"));
        }
        rest.end()?;
        Ok(request)
    }
}

impl Message for Reply {
    fn encode(&self) -> Fields {
        match self {
            Self::Done => Fields::new(1),
            Self::Value(value) => Fields::new(2).bytes(value),
            Self::Absent => Fields::new(3),
            Self::Number(number) => Fields::new(4).number(*number),
            Self::Values(values) => values
                .iter()
                .fold(Fields::new(5).word(values.len() as u32), |fields, value| {
                    fields.bytes(value)
                }),
            Self::MissingRanks(ranks) => ranks
                .iter()
                .fold(Fields::new(6).word(ranks.len() as u32), |fields, rank| {
                    fields.word(*rank)
                }),
            Self::Members(members) => members.iter().fold(
                Fields::new(7).word(members.len() as u32),
                |fields, member| {
                    let state = match member.state {
                        MemberState::Present => 0,
                        MemberState::Left => 1,
                        MemberState::Lost => 2,
                    };
                    fields.word(member.rank).text(&member.host).word(state)
                },
            ),
            Self::Event(Event::Lost { rank, host }) => Fields::new(8).word(*rank).text(host),
            Self::Event(Event::Left { rank }) => Fields::new(9).word(*rank),
            Self::Event(Event::Reported { rank, text }) => Fields::new(10).word(*rank).text(text),
            Self::Refused(reason) => Fields::new(11).text(reason),
        }
    }

    fn decode(tag: u8, body: &[u8]) -> Result<Self, FrameError> {
        let mut rest = Rest(body);
        let reply = match tag {
            1 => Self::Done,
            2 => Self::Value(rest.bytes(MAX_VALUE)?),
            3 => Self::Absent,
            4 => Self::Number(rest.number()?),
            5 => Self::Values(rest.list(|rest| rest.bytes(MAX_VALUE))?),
            6 => Self::MissingRanks(rest.list(Rest::word)?),
            7 => Self::Members(rest.list(|rest| {
                let (rank, host) = (rest.word()?, rest.key()?);
                let state = match rest.word()? {
                    0 => MemberState::Present,
                    1 => MemberState::Left,
                    2 => MemberState::Lost,
                    other => return malformed(format!("unknown member state {other}")),
                };
                Ok(Member { rank, host, state })
            })?),
            8 => Self::Event(Event::Lost {
                rank: rest.word()?,
                host: rest.key()?,
            }),
            9 => Self::Event(Event::Left { rank: rest.word()? }),
            10 => Self::Event(Event::Reported {
                rank: rest.word()?,
                text: rest.text(MAX_VALUE)?,
            }),
            11 => Self::Refused(rest.text(MAX_VALUE)?),
            _ => return malformed(format!("unknown reply {tag}")),
        };
        rest.end()?;
        Ok(reply)
    }
}

/// A body under construction.
#[derive(Debug)]
pub(super) struct Fields {
    tag: u8,
    body: Vec<u8>,
}

impl Fields {
    fn new(tag: u8) -> Self {
        Self {
            tag,
            body: Vec::new(),
        }
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.body.extend((bytes.len() as u32).to_le_bytes());
        self.body.extend(bytes);
        self
    }

    fn text(self, text: &str) -> Self {
        self.bytes(text.as_bytes())
    }

    fn word(mut self, word: u32) -> Self {
        self.body.extend(word.to_le_bytes());
        self
    }

    fn number(mut self, number: i64) -> Self {
        self.body.extend(number.to_le_bytes());
        self
    }

    fn wait(self, wait: Duration) -> Self {
        self.number(i64::try_from(wait.as_millis()).unwrap_or(i64::MAX))
    }

    fn optional(mut self, bytes: Option<&[u8]>) -> Self {
        self.body.push(u8::from(bytes.is_some()));
        match bytes {
            Some(bytes) => self.bytes(bytes),
            None => self,
        }
    }
}

/// The part of a body that is not parsed yet.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        match self.0.split_first_chunk() {
            Some((first, rest)) => {
                self.0 = rest;
                Ok(*first)
            }
            None => malformed("body too short"),
        }
    }

    fn word(&mut self) -> Result<u32, FrameError> {
        self.take().map(u32::from_le_bytes)
    }

    fn number(&mut self) -> Result<i64, FrameError> {
        self.take().map(i64::from_le_bytes)
    }

    fn wait(&mut self) -> Result<Duration, FrameError> {
        match u64::try_from(self.number()?) {
            Ok(millis) => Ok(Duration::from_millis(millis)),
            Err(_) => malformed("negative wait"),
        }
    }

    fn bytes(&mut self, cap: usize) -> Result<Vec<u8>, FrameError> {
        let length = self.word()? as usize;
        if length > cap {
            return malformed(format!("a field of {length} bytes, above the cap of {cap}"));
        }
        match self.0.split_at_checked(length) {
            Some((field, rest)) => {
                self.0 = rest;
                Ok(field.to_vec())
            }
            None => malformed("field runs past the end"),
        }
    }

    fn text(&mut self, cap: usize) -> Result<String, FrameError> {
        match String::from_utf8(self.bytes(cap)?) {
            Ok(text) => Ok(text),
            Err(_) => malformed("text is not UTF-8"),
        }
    }

    fn key(&mut self) -> Result<String, FrameError> {
        self.text(MAX_KEY)
    }

    fn optional(&mut self) -> Result<Option<Vec<u8>>, FrameError> {
        match self.take::<1>()? {
            [0] => Ok(None),
            [1] => self.bytes(MAX_VALUE).map(Some),
            [other] => malformed(format!("unknown marker {other}")),
        }
    }

    fn list<T>(
        &mut self,
        mut item: impl FnMut(&mut Self) -> Result<T, FrameError>,
    ) -> Result<Vec<T>, FrameError> {
        let count = self.word()? as usize;
        if count > MAX_RANKS {
            return malformed(format!("a list of {count}"));
        }
        (0..count).map(|_| item(self)).collect()
    }

    fn end(&self) -> Result<(), FrameError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            malformed(format!("{} bytes too many", self.0.len()))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn round_trip<M: Message + PartialEq + std::fmt::Debug>(message: &M) {
        let mut frame = Vec::new();
        write(&mut frame, message).expect("writes");
        let back: M = read(&mut frame.as_slice())
            .expect("reads")
            .expect("present");
        assert_eq!(back, *message);
        for cut in 1..frame.len() {
            read::<M>(&mut &frame[..cut]).expect_err("a truncated frame is an error");
        }
        assert!(read::<M>(&mut &frame[..0]).expect("clean end").is_none());
    }

    proptest! {
        #[test]
        fn requests_round_trip_and_no_prefix_of_one_parses(
            key in ".{0,20}",
            value in prop::collection::vec(any::<u8>(), 0..40),
            expected in prop::option::of(prop::collection::vec(any::<u8>(), 0..8)),
            by: i64,
            rank in 0..=MAX_RANKS as u32,
            millis in 0..u64::from(u32::MAX),
        ) {
            let wait = Duration::from_millis(millis);
            round_trip(&Request::Set { key: key.clone(), value: value.clone() });
            round_trip(&Request::Get { key: key.clone(), wait });
            round_trip(&Request::Add { key: key.clone(), by });
            round_trip(&Request::CompareAndSet { key: key.clone(), expected, value });
            round_trip(&Request::DeletePrefix { prefix: key.clone() });
            round_trip(&Request::Collect { prefix: key.clone(), world: rank, wait });
            round_trip(&Request::Join { group: key.clone(), rank, host: key.clone() });
            round_trip(&Request::Report { text: key.clone() });
            round_trip(&Request::Leave);
            round_trip(&Request::Members { group: key });
        }

        #[test]
        fn replies_round_trip_and_no_prefix_of_one_parses(
            text in ".{0,20}",
            values in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9), 0..5),
            ranks in prop::collection::vec(any::<u32>(), 0..5),
            number: i64,
        ) {
            round_trip(&Reply::Done);
            round_trip(&Reply::Absent);
            round_trip(&Reply::Number(number));
            round_trip(&Reply::Value(text.clone().into_bytes()));
            round_trip(&Reply::Values(values));
            round_trip(&Reply::Refused(text.clone()));
            let states = [MemberState::Present, MemberState::Left, MemberState::Lost];
            let members = ranks.iter().zip(states).map(|(rank, state)| {
                Member { rank: *rank, host: text.clone(), state }
            });
            round_trip(&Reply::Members(members.collect()));
            for rank in &ranks {
                round_trip(&Reply::Event(Event::Lost { rank: *rank, host: text.clone() }));
                round_trip(&Reply::Event(Event::Left { rank: *rank }));
                round_trip(&Reply::Event(Event::Reported { rank: *rank, text: text.clone() }));
            }
            round_trip(&Reply::MissingRanks(ranks));
        }

        #[test]
        fn no_bytes_make_the_parser_panic(
            mut bytes in prop::collection::vec(any::<u8>(), 0..200),
            tag: u8,
            sound_header: bool,
        ) {
            if sound_header {
                let length = (bytes.len() as u32).to_le_bytes();
                bytes.splice(0..0, [VERSION, tag].into_iter().chain(length));
            }
            let _ = read::<Request>(&mut bytes.as_slice());
            let _ = read::<Reply>(&mut bytes.as_slice());
        }
    }

    #[test]
    fn lengths_above_the_caps_are_refused_before_anything_is_allocated() {
        let mut frame = vec![VERSION, 1];
        frame.extend(u32::MAX.to_le_bytes());
        let error = read::<Request>(&mut frame.as_slice()).expect_err("too long");
        assert!(matches!(error, FrameError::Malformed(reason) if reason.contains("above the cap")));

        let mut body = (MAX_KEY as u32 + 1).to_le_bytes().to_vec();
        body.resize(MAX_KEY + 5, b'k');
        let error = Request::decode(5, &body).expect_err("key too long");
        assert!(matches!(error, FrameError::Malformed(reason) if reason.contains("1025 bytes")));
    }
}

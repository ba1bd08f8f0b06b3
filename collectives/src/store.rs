//! A key-value server that ranks meet through, and its client. TCP, blocking, no runtime.
//!
//! Keys are text, values bytes. [`Store::prefixed`] gives a view below a prefix such as `g3/`, so
//! that each generation of a run has its own keys. Every wait has a deadline and its error names
//! who is missing. Connections that break are not mended: a lost server is an error.
//!
//! There is no authentication: bind the server to a trusted network.
//!
//! | module | job |
//! |---|---|
//! | `frame` | what goes over the wire, parsed without trust |
//! | `table` | entries, waiting, counters |
//! | `roster` | who joined a group and how they went |
//! | `server` | connections and threads |
//! | `client` | [`Store`] |
//! | `group` | gather and barrier |
//! | `presence` | a seat in a group, given up when the process dies |

mod client;
mod frame;
mod group;
mod presence;
mod roster;
mod server;
mod table;

pub use client::{Store, Swap};
pub use frame::{Event, MAX_KEY, MAX_VALUE, Member, MemberState};
pub use presence::Presence;
pub use server::StoreServer;

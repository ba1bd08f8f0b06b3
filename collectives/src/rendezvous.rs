//! From a store, a rank and a generation to a communicator.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use crate::backend::Communicator;
use crate::config::{Backend, Config};
use crate::deadline::Deadline;
use crate::error::{Absence, Absent, Error, Result};
use crate::ffi::{Bind, Engine};
use crate::gloo::Gloo;
use crate::library::Surroundings;
use crate::local::Local;
use crate::nccl::Nccl;
use crate::store::{MemberState, Store};

/// Connects this rank with the `world - 1` others that use the same store and generation.
///
/// The keys live below `g<generation>/communicator/` of the given view, so a restart uses the next
/// generation and a second communicator of the same ranks needs a view of its own. The error of
/// [`Config::join_timeout`] names who did not come.
pub fn connect(
    config: &Config,
    store: &Store,
    rank: u32,
    world: u32,
    generation: u64,
) -> Result<Arc<dyn Communicator>> {
    connect_on(config, store, rank, world, generation, None)
}

/// As [`connect`], for a rank that computes on GPU number `gpu` of its process, if it does.
pub fn connect_on(
    config: &Config,
    store: &Store,
    rank: u32,
    world: u32,
    generation: u64,
    gpu: Option<usize>,
) -> Result<Arc<dyn Communicator>> {
    config.validate()?;
    let mut faults = Vec::new();
    if rank >= world {
        faults.push(format!("rank {rank} is not below the world size {world}"));
    }
    match config.backend {
        Backend::Nccl if gpu.is_none() => faults.push(
            "backend \"nccl\" is for ranks that compute on a GPU, and this one computes on the \
             CPU: use \"auto\" or \"gloo\""
                .to_owned(),
        ),
        Backend::Local if world > 1 => faults.push(format!(
            "backend \"local\" is for one rank, not {world}: use \"auto\" or \"gloo\""
        )),
        _ => {}
    }
    if !faults.is_empty() {
        return Err(Error::Config { faults });
    }
    if config.backend == Backend::Local || (config.backend == Backend::Auto && world == 1) {
        return Ok(Arc::new(Local::default()));
    }
    let gloo = connect_gloo(config, store, rank, world, generation)?;
    match gpu.filter(|_| config.backend != Backend::Gloo) {
        None => Ok(Arc::new(gloo)),
        Some(gpu) => {
            let view = store.prefixed(&format!("g{generation}/communicator/"));
            let limits = (config.timeout, Deadline::after(config.join_timeout));
            let places = crate::library::nccl_places(&config.nccl_library);
            let nccl = Nccl::start(gloo, gpu, &view, &places, limits)?;
            Ok(Arc::new(nccl))
        }
    }
}

pub(crate) fn connect_gloo(
    config: &Config,
    store: &Store,
    rank: u32,
    world: u32,
    generation: u64,
) -> Result<Gloo> {
    let deadline = Deadline::after(config.join_timeout);
    let surroundings = Surroundings::of_this_process(&config.gloo_library);
    let view = view(store, generation);
    let host = host_name();
    let bind = bind_address(config, store);

    view.register_host(rank, &host)?;
    let presence = view.join("ranks", rank, &host)?;
    let card = format!("{world}\n{host}\n{}\n{}", bind.interface, bind.hostname);
    let cards = view
        .gather("join", rank, world, card.as_bytes(), deadline)
        .map_err(|error| with_deaths(error, &view, generation))?;
    let hosts = compare(&cards, world)?;

    let gloo_keys = view.prefixed("gloo/");
    let connected = Engine::connect(&surroundings, rank, world, &bind, &gloo_keys, deadline)?;
    let engine = connected.map_err(|reason| Error::Collective {
        rank,
        world,
        operation: format!("connecting {} of generation {generation}", describe(&bind)),
        reason,
        missing: gone(&view),
        reports: Vec::new(),
    })?;
    tracing::info!(
        rank,
        world,
        generation,
        from = describe(&bind),
        "gloo is connected"
    );
    Gloo::start(rank, hosts, config.timeout, engine, presence)
}

/// Says which generation was being joined, and which of the missing are known to be dead.
fn with_deaths(error: Error, view: &Store, generation: u64) -> Error {
    let Error::Missing {
        world,
        waited,
        mut missing,
        ..
    } = error
    else {
        return error;
    };
    let gone = gone(view);
    for absent in &mut missing {
        if let Some(dead) = gone.iter().find(|dead| dead.rank == absent.rank) {
            absent.how = dead.how;
        }
    }
    Error::Missing {
        what: format!("joining generation {generation} (limit: communicator.join_timeout)"),
        world,
        waited,
        missing,
    }
}

/// Returns the ranks of a generation that were connected by [`connect`] and are not present any
/// more, as far as the store can be asked; `store` is the view that was given there.
pub fn gone_ranks(store: &Store, generation: u64) -> Vec<Absent> {
    gone(&view(store, generation))
}

fn view(store: &Store, generation: u64) -> Store {
    store.prefixed(&format!("g{generation}/communicator/"))
}

/// Returns who has joined and is not present any more, as far as the store can be asked.
fn gone(view: &Store) -> Vec<Absent> {
    let members = view.members("ranks").unwrap_or_default();
    let gone = members.into_iter().filter_map(|member| {
        let how = match member.state {
            MemberState::Present => return None,
            MemberState::Left => Absence::Left,
            MemberState::Lost => Absence::Died,
        };
        Some(Absent {
            rank: member.rank,
            host: Some(member.host),
            how,
        })
    });
    gone.collect()
}

/// Checks that the ranks agree and can reach each other; returns their host names.
fn compare(cards: &[Vec<u8>], world: u32) -> Result<Vec<String>> {
    let mut hosts = Vec::new();
    let mut loopback = Vec::new();
    let mut faults = Vec::new();
    for (rank, card) in cards.iter().enumerate() {
        let card = String::from_utf8_lossy(card);
        let mut lines = card.lines();
        let mut field = || lines.next().unwrap_or_default().to_owned();
        let (theirs, host, interface, address) = (field(), field(), field(), field());
        if theirs != world.to_string() {
            faults.push(format!(
                "rank {rank} on {host} has world size {theirs}, others {world}"
            ));
        }
        let is_loopback = interface == "lo"
            || interface.is_empty()
                && (address == "localhost"
                    || address.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()));
        loopback.push(is_loopback);
        hosts.push(host);
    }
    if let (Some(inside), Some(outside)) = (
        loopback.iter().position(|is| *is),
        loopback.iter().position(|is| !*is),
    ) {
        faults.push(format!(
            "rank {inside} on {} would listen on loopback, out of reach of rank {outside} on {}: \
             set `communicator.interface` or `communicator.hostname`",
            hosts[inside], hosts[outside]
        ));
    }
    if faults.is_empty() {
        Ok(hosts)
    } else {
        Err(Error::Config { faults })
    }
}

fn bind_address(config: &Config, store: &Store) -> Bind {
    let hostname = if config.interface.is_empty() && config.hostname.is_empty() {
        store.local_ip().to_string()
    } else {
        config.hostname.clone()
    };
    Bind {
        hostname,
        interface: config.interface.clone(),
    }
}

fn describe(bind: &Bind) -> String {
    if bind.interface.is_empty() {
        format!("from address {}", bind.hostname)
    } else {
        format!("from interface {}", bind.interface)
    }
}

/// Returns this machine's name, as error messages use it.
pub fn host_name() -> String {
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned()
}

/// Checks that the Gloo library can be opened, without connecting anything.
pub fn check_gloo(library: &Path) -> Result<()> {
    Engine::check(&Surroundings::of_this_process(library))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cards(cards: &[&str]) -> Vec<Vec<u8>> {
        cards.iter().map(|card| card.as_bytes().to_vec()).collect()
    }

    #[test]
    fn ranks_that_agree_give_their_hosts() {
        let hosts = compare(&cards(&["2\na\n\n10.0.0.1", "2\nb\neth0\n"]), 2).expect("fine");
        assert_eq!(hosts, ["a", "b"]);
        compare(&cards(&["2\na\n\n127.0.0.1", "2\na\nlo\n"]), 2).expect("both are on loopback");
    }

    #[test]
    fn a_rank_on_loopback_among_others_is_named() {
        let error = compare(&cards(&["2\na\n\n10.0.0.1", "2\nb\n\n127.0.0.1"]), 2);
        let text = error.expect_err("rank 1 cannot be reached").to_string();
        assert!(
            text.contains("rank 1 on b would listen on loopback"),
            "{text}"
        );
        assert!(text.contains("communicator.interface"), "{text}");
    }

    #[test]
    fn different_world_sizes_are_named() {
        let error = compare(&cards(&["2\na\n\n127.0.0.1", "3\nb\n\n127.0.0.1"]), 2);
        let text = error.expect_err("they disagree").to_string();
        assert!(
            text.contains("rank 1 on b has world size 3, others 2"),
            "{text}"
        );
    }
}

//! Which worker am I? The environment contract, both ways.
//!
//! RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, NODE_RANK, MASTER_ADDR and MASTER_PORT are
//! torchrun's names, so a worker also runs under torchrun. What Open MPI, Slurm, PMIx and
//! Kubernetes indexed Jobs set is understood. Flags beat the environment; nothing is guessed: what
//! is missing is named.

use crate::error::Error;
use crate::hostlist;

/// Variable that carries the generation.
pub const GENERATION: &str = "POLLEN_GENERATION";

/// One worker's place among the workers, and where they meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerEnv {
    /// Index among all workers.
    pub rank: u32,
    /// Index among the workers of this node.
    pub local_rank: u32,
    /// Number of workers.
    pub world_size: u32,
    /// Number of workers on this node.
    pub local_world_size: u32,
    /// Index of this node.
    pub node_rank: u32,
    /// Host of the store through which the workers meet.
    pub master_addr: String,
    /// Port of that store.
    pub master_port: u16,
    /// Which start of the run this is, from 1.
    pub generation: u64,
    /// Where the rank came from, for people.
    pub source: String,
}

/// What the command line says; each value given here beats the environment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkerFlags {
    /// `--rank`
    pub rank: Option<u32>,
    /// `--local-rank`
    pub local_rank: Option<u32>,
    /// `--world-size`
    pub world_size: Option<u32>,
    /// `--local-world-size`
    pub local_world_size: Option<u32>,
    /// `--node-rank`
    pub node_rank: Option<u32>,
    /// `--master-addr`
    pub master_addr: Option<String>,
    /// `--master-port`
    pub master_port: Option<u16>,
    /// `--generation`
    pub generation: Option<u64>,
}

/// One starter's names for the same things, each list in order of preference.
struct Starter {
    name: &'static str,
    rank: &'static str,
    world_size: &'static [&'static str],
    local_rank: &'static [&'static str],
    local_world_size: &'static [&'static str],
    node_rank: &'static [&'static str],
}

/// The first whose rank variable is set wins. Open MPI stands before Slurm because mpirun inside
/// a Slurm job leaves the job's own SLURM_PROCID in place.
const STARTERS: [Starter; 5] = [
    Starter {
        name: "torchrun's variables",
        rank: "RANK",
        world_size: &["WORLD_SIZE"],
        local_rank: &["LOCAL_RANK"],
        local_world_size: &["LOCAL_WORLD_SIZE"],
        node_rank: &["NODE_RANK", "GROUP_RANK"],
    },
    Starter {
        name: "Open MPI",
        rank: "OMPI_COMM_WORLD_RANK",
        world_size: &["OMPI_COMM_WORLD_SIZE"],
        local_rank: &["OMPI_COMM_WORLD_LOCAL_RANK"],
        local_world_size: &["OMPI_COMM_WORLD_LOCAL_SIZE"],
        // OMPI_COMM_WORLD_NODE_RANK is an index within the node, not of it.
        node_rank: &["NODE_RANK"],
    },
    Starter {
        name: "Slurm",
        rank: "SLURM_PROCID",
        world_size: &["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "WORLD_SIZE"],
        local_rank: &["SLURM_LOCALID"],
        local_world_size: &["SLURM_NTASKS_PER_NODE", "LOCAL_WORLD_SIZE"],
        node_rank: &["SLURM_NODEID"],
    },
    Starter {
        name: "PMIx",
        rank: "PMIX_RANK",
        world_size: &["WORLD_SIZE"],
        local_rank: &["LOCAL_RANK"],
        local_world_size: &["LOCAL_WORLD_SIZE"],
        node_rank: &["NODE_RANK"],
    },
    Starter {
        name: "a Kubernetes indexed Job",
        rank: "JOB_COMPLETION_INDEX",
        world_size: &["WORLD_SIZE"],
        local_rank: &["LOCAL_RANK"],
        local_world_size: &["LOCAL_WORLD_SIZE"],
        node_rank: &["JOB_COMPLETION_INDEX"],
    },
];

impl WorkerEnv {
    /// Finds this worker's place; `lookup` reads the environment.
    ///
    /// Without any rank, in flags or environment, this is a run of one worker.
    pub fn detect(
        lookup: impl Fn(&str) -> Option<String>,
        flags: &WorkerFlags,
    ) -> Result<Self, Error> {
        let reader = Reader { lookup: &lookup };
        let starter = STARTERS
            .iter()
            .find(|starter| reader.text(starter.rank).is_some());
        let Some(starter) = starter.or(flags.rank.map(|_| &STARTERS[0])) else {
            return Self::alone(&reader, flags);
        };
        let needed = |flag: &str, names: &[&str]| Error::Contract {
            reason: format!(
                "{} is set but {} is not: set it or pass --{flag}",
                if flags.rank.is_some() {
                    "--rank"
                } else {
                    starter.rank
                },
                names.join(" or ")
            ),
        };

        let world_size = flags
            .world_size
            .map_or_else(|| reader.first(starter.world_size), |size| Ok(Some(size)))?
            .ok_or_else(|| needed("world-size", starter.world_size))?;
        let one_per_node = starter.rank == "JOB_COMPLETION_INDEX" || world_size == 1;
        let local_rank = flags
            .local_rank
            .map_or_else(|| reader.first(starter.local_rank), |rank| Ok(Some(rank)))?
            .or(one_per_node.then_some(0))
            .ok_or_else(|| needed("local-rank", starter.local_rank))?;
        let local_world_size = flags
            .local_world_size
            .map_or_else(|| local_world_size(&reader, starter), |size| Ok(Some(size)))?
            .or(one_per_node.then_some(1))
            .ok_or_else(|| needed("local-world-size", starter.local_world_size))?;
        let index: Option<u32> = reader.number(starter.rank)?;
        let index = match index {
            // The index counts pods; a pod may hold several workers.
            Some(pod) if starter.rank == "JOB_COMPLETION_INDEX" => pod
                .saturating_mul(local_world_size)
                .saturating_add(local_rank),
            Some(rank) => rank,
            None => 0,
        };
        let rank = flags.rank.unwrap_or(index);
        let node_rank = flags
            .node_rank
            .map_or_else(|| reader.first(starter.node_rank), |rank| Ok(Some(rank)))?
            .unwrap_or(rank / local_world_size.max(1));
        let (master_addr, master_port) = meeting_point(&reader, flags, starter, world_size)?;
        let source = match (flags.rank, reader.text(starter.rank)) {
            (Some(_), Some(_)) => format!("--rank, which beats {}", starter.rank),
            (Some(_), None) => "--rank".into(),
            _ => format!("{} ({})", starter.rank, starter.name),
        };
        Self {
            rank,
            local_rank,
            world_size,
            local_world_size,
            node_rank,
            master_addr,
            master_port,
            generation: generation(&reader, flags)?,
            source,
        }
        .checked()
    }

    fn alone(reader: &Reader<'_>, flags: &WorkerFlags) -> Result<Self, Error> {
        if let Some(size) = flags.world_size.filter(|size| *size != 1) {
            return Err(Error::Contract {
                reason: format!("--world-size {size} needs a rank: pass --rank or set RANK"),
            });
        }
        Ok(Self {
            rank: 0,
            local_rank: flags.local_rank.unwrap_or(0),
            world_size: 1,
            local_world_size: 1,
            node_rank: 0,
            master_addr: flags
                .master_addr
                .clone()
                .unwrap_or_else(|| "127.0.0.1".into()),
            master_port: flags.master_port.unwrap_or(0),
            generation: generation(reader, flags)?,
            source: "no rank in flags or environment: a run of one worker".into(),
        })
    }

    fn checked(self) -> Result<Self, Error> {
        let fault = if self.rank >= self.world_size {
            format!(
                "rank {} is outside world size {}",
                self.rank, self.world_size
            )
        } else if self.local_rank >= self.local_world_size {
            format!(
                "local rank {} is outside local world size {}",
                self.local_rank, self.local_world_size
            )
        } else if self.local_world_size > self.world_size {
            format!(
                "local world size {} is larger than world size {}",
                self.local_world_size, self.world_size
            )
        } else {
            return Ok(self);
        };
        Err(Error::Contract {
            reason: format!("{fault} (from {})", self.source),
        })
    }

    /// Returns the variables that give a child this place.
    pub fn to_env(&self) -> Vec<(String, String)> {
        [
            ("RANK", self.rank.to_string()),
            ("LOCAL_RANK", self.local_rank.to_string()),
            ("WORLD_SIZE", self.world_size.to_string()),
            ("LOCAL_WORLD_SIZE", self.local_world_size.to_string()),
            ("NODE_RANK", self.node_rank.to_string()),
            ("GROUP_RANK", self.node_rank.to_string()),
            ("MASTER_ADDR", self.master_addr.clone()),
            ("MASTER_PORT", self.master_port.to_string()),
            (GENERATION, self.generation.to_string()),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
    }

    /// Returns one line that says which worker this is and why.
    pub fn describe(&self) -> String {
        format!(
            "rank {} of {} (local rank {} of {}, node {}, generation {}), meeting at {}:{}; from {}",
            self.rank,
            self.world_size,
            self.local_rank,
            self.local_world_size,
            self.node_rank,
            self.generation,
            self.master_addr,
            self.master_port,
            self.source
        )
    }
}

struct Reader<'a> {
    lookup: &'a dyn Fn(&str) -> Option<String>,
}

impl Reader<'_> {
    fn text(&self, name: &str) -> Option<String> {
        (self.lookup)(name).filter(|text| !text.is_empty())
    }

    fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, Error> {
        self.text(name)
            .map(|text| {
                text.trim().parse().map_err(|_| Error::Contract {
                    reason: format!("{name} is `{text}`, not a number in range"),
                })
            })
            .transpose()
    }

    fn first(&self, names: &[&str]) -> Result<Option<u32>, Error> {
        for name in names {
            if let Some(value) = self.number(name)? {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }
}

fn local_world_size(reader: &Reader<'_>, starter: &Starter) -> Result<Option<u32>, Error> {
    if starter.rank == "SLURM_PROCID"
        && let Some(counts) = reader.text("SLURM_STEP_TASKS_PER_NODE")
    {
        let node = reader.number("SLURM_NODEID")?.unwrap_or(0);
        return match hostlist::tasks_on_node(&counts, node) {
            Some(count) => Ok(Some(count)),
            None => Err(Error::Contract {
                reason: format!(
                    "SLURM_STEP_TASKS_PER_NODE is `{counts}`: no count for node {node}"
                ),
            }),
        };
    }
    reader.first(starter.local_world_size)
}

fn meeting_point(
    reader: &Reader<'_>,
    flags: &WorkerFlags,
    starter: &Starter,
    world_size: u32,
) -> Result<(String, u16), Error> {
    let slurm = starter.rank == "SLURM_PROCID";
    let first_host = || {
        let list = reader
            .text("SLURM_STEP_NODELIST")
            .or_else(|| reader.text("SLURM_JOB_NODELIST"))?;
        hostlist::first_host(&list)
    };
    let host = flags
        .master_addr
        .clone()
        .or_else(|| reader.text("MASTER_ADDR"))
        .or_else(|| slurm.then(first_host).flatten())
        .or_else(|| (world_size == 1).then(|| "127.0.0.1".into()))
        .ok_or_else(|| Error::Contract {
            reason: "MASTER_ADDR is not set: set it to the host of rank 0 or pass --master-addr"
                .into(),
        })?;
    let given = flags
        .master_port
        .map_or_else(|| reader.number("MASTER_PORT"), |port| Ok(Some(port)))?;
    let port = match given {
        Some(port) => port,
        None if world_size == 1 => 0,
        None => match reader.number::<u32>("SLURM_JOB_ID")?.filter(|_| slurm) {
            // Below the ephemeral ports, the same on all nodes, different between jobs.
            Some(job) => 20_000 + (job % 10_000) as u16,
            None => {
                return Err(Error::Contract {
                    reason: "MASTER_PORT is not set: set it to a free port of MASTER_ADDR or \
                             pass --master-port"
                        .into(),
                });
            }
        },
    };
    Ok((host, port))
}

fn generation(reader: &Reader<'_>, flags: &WorkerFlags) -> Result<u64, Error> {
    if let Some(generation) = flags.generation {
        return Ok(generation);
    }
    if let Some(generation) = reader.number(GENERATION)? {
        return Ok(generation);
    }
    // Both count restarts from 0.
    for restarts in ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"] {
        if let Some(count) = reader.number::<u64>(restarts)? {
            return Ok(count + 1);
        }
    }
    Ok(1)
}

#[cfg(test)]
#[path = "contract_tests.rs"]
mod tests;

//! How fast the devices of a cluster sum up what each of them has.

use serde::Serialize;

use crate::error::Error;

/// Giga, as makers of networks count.
const GIGA: f64 = 1e9;

/// Rates of an all-reduce.
///
/// Bus bandwidth as `nccl-tests` defines it: the bytes that each device must send and receive in
/// the best algorithm, 2 (n - 1) / n of the buffer, over the time it took.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Link {
    /// Name or description, as it was asked for.
    pub name: String,
    /// Devices of one node.
    pub gpus_per_node: u32,
    /// Bus bandwidth inside a node, bytes a second.
    pub inside: f64,
    /// Bus bandwidth of a node's share in an all-reduce between nodes, bytes a second, by number
    /// of nodes, ascending. Between two entries it changes with the logarithm of that number,
    /// beyond the last one it stays.
    pub between: Vec<(u32, f64)>,
    /// Share of the bus bandwidth that is left when one bucket is sent at a time.
    pub bucket_efficiency: f64,
    /// Longest time that the last bucket takes after the backward pass has ended, seconds.
    pub tail_s: f64,
}

/// The known links by name, with what each is.
///
/// Rates: NVIDIA/nccl-tests issue 290 (8 H100 with NVLink SHARP 476 GB/s; 46 to 48 GB/s a 400 Gb/s
/// NIC), issue 212 (370 GB/s with the ring algorithm), Voltage Park's 331 GB/s on 4 nodes of 8 H100
/// with 3.2 Tb/s, NVIDIA/nccl issue 1161 (115 GB/s over an NVLink bridge). Gloo on loopback: 100 MB
/// of f32 between two processes.
const KNOWN: [Known; 4] = [
    Known {
        name: "h100-ndr",
        meaning: "8 H100 SXM a node, NVLink SHARP, 8 x 400 Gb/s between nodes",
        gpus_per_node: 8,
        inside: 476.0,
        between: &[(2, 372.0), (4, 331.0)],
    },
    Known {
        name: "h100-ring",
        meaning: "the same with the ring algorithm inside a node",
        gpus_per_node: 8,
        inside: 370.0,
        between: &[(2, 370.0), (4, 331.0)],
    },
    Known {
        name: "h100-bridge",
        meaning: "pairs of H100 PCIe on an NVLink bridge, one 400 Gb/s NIC a node",
        gpus_per_node: 2,
        inside: 115.0,
        between: &[(2, 46.0)],
    },
    Known {
        name: "loopback",
        meaning: "Gloo between processes of one machine",
        gpus_per_node: u32::MAX,
        inside: 1.05,
        between: &[],
    },
];

/// A link known by name; rates in GB/s.
struct Known {
    name: &'static str,
    meaning: &'static str,
    gpus_per_node: u32,
    inside: f64,
    between: &'static [(u32, f64)],
}

impl Link {
    /// Reads a name of [`Link::known`], or rates in GB/s such as
    /// `gpus=8,inside=476,between=331`; `between` may be left out for a single node.
    ///
    /// # Errors
    /// When the text is neither, or a rate is not positive.
    pub fn parse(text: &str) -> Result<Self, Error> {
        if let Some(known) = KNOWN.iter().find(|known| known.name == text) {
            let between = known.between.iter();
            let between = between.map(|(nodes, rate)| (*nodes, rate * GIGA)).collect();
            let inside = known.inside * GIGA;
            return Ok(Self::new(text, known.gpus_per_node, inside, between));
        }
        let refuse = |reason: String| Error::Link {
            text: text.to_owned(),
            reason,
        };
        let (mut gpus, mut inside, mut between) = (None, None, None);
        for pair in text.split(',') {
            let (key, value) = pair
                .split_once('=')
                .ok_or_else(|| refuse(format!("`{pair}` is no name and not KEY=VALUE")))?;
            let rate = || match value.parse::<f64>() {
                Ok(rate) if rate > 0.0 && rate.is_finite() => Ok(rate * GIGA),
                _ => Err(refuse(format!("`{pair}` is not a rate in GB/s"))),
            };
            match key {
                "gpus" => {
                    let number = value.parse::<std::num::NonZeroU32>();
                    gpus = Some(number.map_err(|_| refuse(format!("`{pair}` is not a number")))?);
                }
                "inside" => inside = Some(rate()?),
                "between" => between = Some(rate()?),
                _ => {
                    return Err(refuse(format!(
                        "`{key}` is not one of gpus, inside, between"
                    )));
                }
            }
        }
        let inside = inside.ok_or_else(|| refuse("`inside` is missing".into()))?;
        let between = between.map(|rate| (2, rate)).into_iter().collect();
        let gpus = gpus.map_or(u32::MAX, std::num::NonZeroU32::get);
        Ok(Self::new(text, gpus, inside, between))
    }

    /// Returns the names of the known links, for messages.
    pub(crate) fn names() -> String {
        KNOWN.map(|known| known.name).join(", ")
    }

    /// Returns name and meaning of the links known by name.
    pub fn known() -> impl Iterator<Item = (&'static str, &'static str)> {
        KNOWN.iter().map(|known| (known.name, known.meaning))
    }

    fn new(name: &str, gpus_per_node: u32, inside: f64, between: Vec<(u32, f64)>) -> Self {
        Self {
            name: name.to_owned(),
            gpus_per_node,
            inside,
            between,
            bucket_efficiency: 0.665,
            tail_s: 0.004,
        }
    }

    /// Returns the bus bandwidth of an all-reduce over `gpus` devices, bytes a second.
    ///
    /// # Errors
    /// When they need several nodes and the rate between nodes is not known.
    pub fn bus_rate(&self, gpus: u32) -> Result<f64, Error> {
        let nodes = gpus.div_ceil(self.gpus_per_node);
        if nodes <= 1 {
            return Ok(self.inside);
        }
        let Some(first) = self.between.first() else {
            return Err(Error::Link {
                text: self.name.clone(),
                reason: format!(
                    "{gpus} GPUs are {nodes} nodes of {}, and the rate between nodes is missing",
                    self.gpus_per_node
                ),
            });
        };
        let above = self.between.iter().find(|(count, _)| *count >= nodes);
        let below = self.between.iter().rev().find(|(count, _)| *count <= nodes);
        let rate = match (below.unwrap_or(first), above) {
            ((few, low), Some((many, high))) if few < many => {
                let log = |count: u32| f64::from(count).ln();
                let place = (log(nodes) - log(*few)) / (log(*many) - log(*few));
                low + (high - low) * place
            }
            ((_, rate), None) | (_, Some((_, rate))) => *rate,
        };
        Ok(rate.min(self.inside))
    }

    /// Returns the seconds of an all-reduce of `bytes` over `gpus` devices: bytes x 2 (n - 1) / n /
    /// bus bandwidth. A reduce-scatter or an all-gather takes half of it.
    ///
    /// # Errors
    /// As [`Link::bus_rate`].
    pub fn all_reduce_s(&self, bytes: f64, gpus: u32) -> Result<f64, Error> {
        let count = f64::from(gpus);
        Ok(bytes * 2.0 * (count - 1.0) / count / self.bus_rate(gpus)?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn every_known_link_is_found_by_its_name() {
        for (name, _) in Link::known() {
            let link = Link::parse(name).unwrap();
            assert_eq!(link.name, name);
            assert!(link.bus_rate(2).unwrap() > 0.0);
        }
    }

    #[test]
    fn own_rates_are_read_and_faults_name_what_is_wrong() {
        let link = Link::parse("gpus=4,inside=100,between=25").unwrap();
        assert_eq!(link.gpus_per_node, 4);
        assert_eq!(link.bus_rate(4).unwrap(), 100e9);
        assert_eq!(link.bus_rate(5).unwrap(), 25e9);
        assert_eq!(link.bus_rate(4000).unwrap(), 25e9);
        for (text, part) in [
            ("h200", "h100-ndr"),
            ("inside=0", "inside=0"),
            ("inside=5,gpus=0", "gpus=0"),
            ("gpus=8", "`inside` is missing"),
            ("inside=1,speed=2", "speed"),
        ] {
            let error = Link::parse(text).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
            assert_eq!(error.class(), pollen_core::ErrorClass::User);
        }
        let single = Link::parse("gpus=8,inside=476").unwrap();
        let error = single.bus_rate(9).unwrap_err().to_string();
        assert!(error.contains("9 GPUs are 2 nodes of 8"), "{error}");
    }

    #[test]
    fn rates_between_nodes_fall_from_entry_to_entry() {
        let link = Link::parse("h100-ndr").unwrap();
        let rates: Vec<f64> = [8, 16, 24, 32, 1024]
            .map(|gpus| link.bus_rate(gpus).unwrap() / GIGA)
            .to_vec();
        assert_eq!(rates[0], 476.0);
        assert_eq!(rates[1], 372.0);
        assert!(rates[1] > rates[2] && rates[2] > rates[3]);
        assert_eq!(rates[3..], [331.0, 331.0]);
    }

    /// Milliseconds of 3.79 GB, as the cost model's sources give them.
    #[test]
    fn an_all_reduce_of_the_full_gradient_takes_what_was_published() {
        let link = Link::parse("h100-ndr").unwrap();
        for (gpus, expected) in [(8, 13.9), (16, 19.1), (32, 22.2), (1024, 22.9)] {
            let milliseconds = 1e3 * link.all_reduce_s(3.788e9, gpus).unwrap();
            assert!(
                (milliseconds - expected).abs() < 0.06,
                "{gpus}: {milliseconds}"
            );
        }
        assert_eq!(link.all_reduce_s(3.788e9, 1).unwrap(), 0.0);
    }
}

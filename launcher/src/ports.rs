//! Free loopback ports for all listeners of the object server.

use std::net::{Ipv4Addr, TcpListener};

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// SeaweedFS's own distance between a server's HTTP and gRPC port. Its built-in worker dials the
/// admin server at this distance whatever the flags say.
const GRPC_OFFSET: u16 = 10_000;

/// One port per listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ports {
    pub(crate) s3: u16,
    s3_grpc: u16,
    pub(crate) filer: u16,
    filer_grpc: u16,
    volume: u16,
    volume_grpc: u16,
    master: u16,
    master_grpc: u16,
    admin: u16,
}

impl Ports {
    /// Finds ports that are free now.
    pub(crate) fn find() -> Result<Self, Error> {
        // Held together, so that no port is found twice.
        let mut held = Vec::new();
        let mut next = || -> Result<u16, Error> {
            let listener = listen(0).map_err(Error::system("find a free port"))?;
            let port = listener
                .local_addr()
                .map_err(Error::system("find a free port"))?
                .port();
            held.push(listener);
            Ok(port)
        };
        let mut ports = Self {
            s3: next()?,
            s3_grpc: next()?,
            filer: next()?,
            filer_grpc: next()?,
            volume: next()?,
            volume_grpc: next()?,
            master: next()?,
            master_grpc: next()?,
            admin: 0,
        };
        for _ in 0..1000 {
            let admin = next()?;
            if admin
                .checked_add(GRPC_OFFSET)
                .is_some_and(|grpc| listen(grpc).is_ok())
            {
                ports.admin = admin;
                return Ok(ports);
            }
        }
        Err(Error::system("find a free port")(std::io::Error::other(
            "no free pair at the distance that SeaweedFS needs",
        )))
    }

    /// Returns whether all of them are free now.
    pub(crate) fn are_free(&self) -> bool {
        let listeners: Vec<_> = self
            .flags()
            .iter()
            .map_while(|(_, port)| listen(*port).ok())
            .collect();
        listeners.len() == self.flags().len()
    }

    /// Returns the flags of `weed mini` with their ports.
    pub(crate) fn flags(&self) -> [(&'static str, u16); 10] {
        [
            ("s3.port", self.s3),
            ("s3.port.grpc", self.s3_grpc),
            ("filer.port", self.filer),
            ("filer.port.grpc", self.filer_grpc),
            ("volume.port", self.volume),
            ("volume.port.grpc", self.volume_grpc),
            ("master.port", self.master),
            ("master.port.grpc", self.master_grpc),
            ("admin.port", self.admin),
            ("admin.port.grpc", self.admin.saturating_add(GRPC_OFFSET)),
        ]
    }
}

fn listen(port: u16) -> std::io::Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn found_ports_are_free_and_all_different() {
        let ports = Ports::find().unwrap();
        let mut numbers: Vec<u16> = ports.flags().iter().map(|(_, port)| *port).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), 10);
        let _taken = listen(ports.admin + GRPC_OFFSET).unwrap();
        assert!(!ports.are_free());
    }
}

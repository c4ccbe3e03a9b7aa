// SPDX-License-Identifier: GPL-2.0

//! Where agent and collector meet: an address of AF_VSOCK, or a Unix socket, which is what a device that bridges
//! connections to Unix sockets shows the host of a guest's connection.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result};
use socket2::{Domain, SockAddr, Socket, Type};

/// How many connections may wait to be accepted.
const BACKLOG: i32 = 16;

/// `VMADDR_CID_ANY`.
const CID_ANY: u32 = u32::MAX;

/// An address, as `vsock:CID:PORT`, `vsock:PORT` for any CID of a listener's own, or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Vsock { cid: u32, port: u32 },
    Unix(PathBuf),
}

impl Endpoint {
    fn socket(&self) -> Result<(Socket, SockAddr)> {
        let (domain, address) = match self {
            Self::Vsock { cid, port } => (Domain::VSOCK, SockAddr::vsock(*cid, *port)),
            Self::Unix(path) => (Domain::UNIX, SockAddr::unix(path)?),
        };
        Ok((Socket::new(domain, Type::STREAM, None)?, address))
    }

    pub fn connect(&self) -> Result<Socket> {
        let connect = || -> Result<_> {
            let (socket, address) = self.socket()?;
            socket.connect(&address)?;
            Ok(socket)
        };
        connect().with_context(|| format!("connecting to {self}"))
    }

    pub fn listen(&self) -> Result<Socket> {
        let listen = || -> Result<_> {
            if let Self::Unix(path) = self {
                // One of a program that has ended.
                let _ = std::fs::remove_file(path);
            }
            let (socket, address) = self.socket()?;
            socket.bind(&address)?;
            socket.listen(BACKLOG)?;
            Ok(socket)
        };
        listen().with_context(|| format!("listening at {self}"))
    }
}

impl FromStr for Endpoint {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = |text: &str| {
            text.parse()
                .with_context(|| format!("{text:?} is no number from 0 to 4294967295"))
        };
        match text.split(':').collect::<Vec<_>>()[..] {
            ["vsock", port] => Ok(Self::Vsock {
                cid: CID_ANY,
                port: number(port)?,
            }),
            ["vsock", cid, port] => Ok(Self::Vsock {
                cid: number(cid)?,
                port: number(port)?,
            }),
            ["unix", path, ..] if !path.is_empty() => {
                Ok(Self::Unix(text.trim_start_matches("unix:").into()))
            }
            _ => anyhow::bail!("it is none of vsock:CID:PORT, vsock:PORT, unix:PATH"),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vsock { cid: CID_ANY, port } => write!(f, "vsock:{port}"),
            Self::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_and_written() {
        for text in [
            "vsock:2:9000",
            "vsock:9000",
            "unix:/run/guest.sock_9000",
            "unix:a:b",
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint.to_string(), text);
        }
        for text in [
            "",
            "9000",
            "vsock:",
            "vsock:2:x",
            "vsock:1:2:3",
            "unix:",
            "tcp:1",
        ] {
            assert!(text.parse::<Endpoint>().is_err(), "{text:?}");
        }
    }
}

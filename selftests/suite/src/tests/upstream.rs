// SPDX-License-Identifier: GPL-2.0

//! Upstream's test programs between two guests, both with the driver under test: server and client at once, and without a
//! nested host, so that it is fast enough for kernels that watch memory, locks and races.

use std::time::Duration;

use anyhow::{anyhow, ensure, Result};

use crate::lab::{network_address, Guest, Lab, GUEST_CID};
use crate::machine::Plug;
use crate::upstream::{self, Pair, Side};

/// How long a program may take. It takes half a minute, and ten times that on a kernel with KASAN.
const LIMIT: Duration = Duration::from_secs(1200);

/// The TCP port over which the two sides of a program keep in step.
const CONTROL_PORT: u32 = 5000;

/// Two guests, the server's first.
fn guests(lab: &Lab) -> Result<(Guest, Guest)> {
    let server = lab.guest_for_upstream(GUEST_CID, Plug::First)?;
    let client = lab.guest_for_upstream(GUEST_CID + 1, Plug::Second)?;
    Ok((server, client))
}

fn side<'a>(name: &'static str, guest: &'a Guest) -> Side<'a> {
    Side {
        name,
        agent: &guest.machine.agent,
        cid: guest.cid,
    }
}

/// Runs something on the two guests.
fn with_pair<T>(server: &Guest, client: &Guest, run: impl FnOnce(&Pair) -> T) -> T {
    run(&Pair {
        server: side("server", server),
        client: side("client", client),
        control_host: &network_address(server.cid),
        control_port: CONTROL_PORT,
        limit: LIMIT,
    })
}

/// All tests of `vsock_test`.
pub fn vsock_test(lab: &Lab) -> Result<()> {
    let tests = upstream::tests(lab.env)?;
    let (server, client) = guests(lab)?;
    let (failed, _) = with_pair(&server, &client, |pair| {
        pair.run_tests(&tests.iter().collect::<Vec<_>>())
    });
    let said: Vec<_> = tests
        .iter()
        .filter_map(|test| Some(format!("{}: {}", test.name, failed.get(&test.id)?)))
        .collect();
    ensure!(said.is_empty(), "{}", said.join("\n"));
    Ok(())
}

/// `vsock_diag_test`.
pub fn vsock_diag_test(lab: &Lab) -> Result<()> {
    run_all_of(lab, "vsock_diag_test")
}

/// `vsock_uring_test`.
pub fn vsock_uring_test(lab: &Lab) -> Result<()> {
    run_all_of(lab, "vsock_uring_test")
}

fn run_all_of(lab: &Lab, program: &str) -> Result<()> {
    let (server, client) = guests(lab)?;
    with_pair(&server, &client, |pair| pair.run_all_of(program)).map_err(|why| anyhow!(why))
}

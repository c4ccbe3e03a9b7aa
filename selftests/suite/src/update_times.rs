// SPDX-License-Identifier: GPL-2.0

//! How long an update of CIDs takes, from the event to the last answer, by how many connections go on.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use serde_json::json;
use vsock_device::packet::TYPE_STREAM;
use vsock_device::update::FEATURE_CHECKPOINT;
use vsock_device::{Op, Tuple, Update};

use crate::lab::{Guest, Lab, Peer, GUEST_CID, LIMIT, PORT};
use crate::machine::{Env, Hardware};
use crate::Driver;

/// How many connections there are; the last are those that the driver is made for.
const COUNTS: [u32; 5] = [100, 300, 1000, 3000, 10_000];

/// How many connections are made at a time. The guest's backlog has room for them.
const AT_ONCE: u32 = 100;

const HOST_CID: u64 = 100;
const HOST_PORT: u32 = 10_000;

/// The updates of so many connections.
struct Row {
    count: u32,
    times: Vec<Duration>,
}

/// All updates of a benchmark; printed, it is a table.
pub struct Times(Vec<Row>);

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:>11}  {:<28}us for each, by the median",
            "connections", "ms, median (from, to)"
        )?;
        for Row { count, times } in &self.0 {
            let mut ms: Vec<_> = times.iter().map(|time| time.as_secs_f64() * 1e3).collect();
            ms.sort_by(f64::total_cmp);
            let (Some(from), Some(to)) = (ms.first(), ms.last()) else {
                continue;
            };
            let median = ms[ms.len() / 2];
            let spread = format!("{median:.1} ({from:.1}, {to:.1})");
            let each = median * 1e3 / f64::from(*count);
            writeln!(f, "{count:>11}  {spread:<28}{each:.1}")?;
        }
        Ok(())
    }
}

/// Makes connections and updates all of them, `runs` times for each of [`COUNTS`].
pub fn bench(env: &Env, runs: u32) -> Result<Times> {
    let lab = Lab::new(env, Driver::Rs, "update_times")?;
    let guest = lab.guest_on(&Hardware {
        features: FEATURE_CHECKPOINT,
        ..Hardware::default()
    })?;
    let listener = guest.listener(PORT)?;
    let mut peer = Peer::watch(&guest);
    let (mut connected, mut guest_cid) = (0, u64::from(GUEST_CID));
    let mut rows = Vec::new();
    for count in COUNTS {
        peer.set_cids(HOST_CID, guest_cid);
        while connected < count {
            let more = AT_ONCE.min(count - connected);
            connect(&guest, &mut peer, listener, connected..connected + more)
                .with_context(|| format!("connections behind {connected} of {count}"))?;
            connected += more;
        }
        let mut times = Vec::new();
        for _ in 0..runs {
            let time = update(&peer, &guest.device, count, guest_cid)?;
            eprintln!("  {count} connections: {:.1} ms", time.as_secs_f64() * 1e3);
            times.push(time);
            guest_cid += 1;
        }
        rows.push(Row { count, times });
    }
    ensure!(
        guest.counter("resets_by_transport")? == 0 && guest.counter("refused_updates")? == 0,
        "connections were reset"
    );
    lab.remove_files();
    Ok(Times(rows))
}

/// Makes connections to [`PORT`], by their numbers.
fn connect(guest: &Guest, peer: &mut Peer<'_>, listener: i32, numbers: Range<u32>) -> Result<()> {
    let count = numbers.len();
    for at in numbers {
        peer.set_ports(HOST_PORT + at, PORT);
        peer.send(Op::REQUEST);
    }
    for _ in 0..count {
        peer.expect(Op::RESPONSE)?;
    }
    guest
        .start("accept_many", json!({"fd": listener, "count": count}))
        .wait::<Vec<i32>>(LIMIT)
        .context("accept()")?;
    Ok(())
}

/// Updates all connections; returns the time from the event to the last answer.
fn update(
    peer: &Peer<'_>,
    device: &vsock_device::Device,
    count: u32,
    guest_cid: u64,
) -> Result<Duration> {
    let tuples = (0..count).map(|at| Tuple {
        host_old_cid: HOST_CID,
        host_new_cid: HOST_CID,
        host_port: HOST_PORT + at,
        guest_port: PORT,
        socket_type: TYPE_STREAM,
    });
    let update = Update {
        generation: guest_cid as u32,
        old_guest_cid: guest_cid,
        new_guest_cid: guest_cid + 1,
        tuples: tuples.collect(),
    };
    let began = Instant::now();
    device.update_cids(&update);
    let mut answered = HashSet::new();
    for _ in 0..count {
        let answer = peer.expect(Op::CREDIT_REQUEST)?;
        ensure!(answer.src_cid == guest_cid + 1, "{answer:?}");
        answered.insert(answer.dst_port);
    }
    let time = began.elapsed();
    ensure!(
        answered.len() == count as usize,
        "a connection was answered twice"
    );
    Ok(time)
}

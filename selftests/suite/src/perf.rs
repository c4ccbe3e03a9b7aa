// SPDX-License-Identifier: GPL-2.0

//! Upstream's `vsock_perf`, which sends or receives as fast as it can.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::agent::{sh_ok, Agent};

/// How long one transfer may take. It takes a few seconds.
const TRANSFER_LIMIT: Duration = Duration::from_secs(300);

/// How long the agent may take to say that a transfer has ended.
const ANSWER_LIMIT: Duration = Duration::from_secs(TRANSFER_LIMIT.as_secs() + 60);

/// The port that the receiver listens at.
pub const PORT: u32 = 5555;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    HostToGuest,
    GuestToHost,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Direction::HostToGuest => "host to guest",
            Direction::GuestToHost => "guest to host",
        })
    }
}

/// A receiver that was started on a machine.
pub struct Receiver<'a>(&'a Agent);

impl<'a> Receiver<'a> {
    /// Starts one that reads `call` bytes at a time and has a socket's buffer of `buffer` bytes. Nothing tells when it listens;
    /// until then it refuses connections.
    pub fn start(agent: &'a Agent, call: u64, buffer: u64) -> Result<Self> {
        let limit = TRANSFER_LIMIT.as_secs();
        let start = format!(
            "rm -f /tmp/receiver.*
            (timeout -s KILL {limit} vsock_perf --port {PORT} --buf-size {call} --vsk-size {buffer} \
                >/tmp/receiver.output 2>&1; echo $? >/tmp/receiver.status) </dev/null >/dev/null 2>&1 &"
        );
        sh_ok(agent, &start, ANSWER_LIMIT).context("starting the receiver")?;
        Ok(Self(agent))
    }

    /// Waits until it has ended, and gives what it has printed.
    pub fn wait(self) -> Result<Report> {
        let wait = "until [ -e /tmp/receiver.status ]; do sleep 0.1; done
            cat /tmp/receiver.output
            exit $(cat /tmp/receiver.status)";
        let said = sh_ok(self.0, wait, ANSWER_LIMIT).context("receiving")?;
        Ok(Report(said))
    }
}

/// Sends `bytes` to the receiver at `cid`, `call` bytes at a time, as soon as that listens.
pub fn send(agent: &Agent, cid: u32, bytes: u64, call: u64) -> Result<()> {
    let limit = TRANSFER_LIMIT.as_secs();
    let send = format!(
        "send() {{
            vsock_perf --sender {cid} --port {PORT} --bytes {bytes} --buf-size {call} >/tmp/sender.output 2>&1
        }}
        end=$(($(date +%s) + {limit}))
        until send; do
            grep -q '^connect: ' /tmp/sender.output && [ $(date +%s) -lt $end ] || {{ cat /tmp/sender.output; exit 1; }}
            sleep 0.1
        done"
    );
    sh_ok(agent, &send, ANSWER_LIMIT).context("sending")?;
    Ok(())
}

/// What a receiver printed.
pub struct Report(pub String);

impl Report {
    /// How many bytes were received. The receiver ends as soon as it hears of the sender's shutdown, even when there is more to
    /// read.
    pub fn received(&self) -> Result<u64> {
        self.field("total bytes received:")?
            .parse()
            .context("total bytes received")
    }

    /// The rate in Gbit/s.
    pub fn rate(&self) -> Result<f64> {
        self.field("rx performance:")?
            .parse()
            .context("rx performance")
    }

    fn field(&self, name: &str) -> Result<&str> {
        let Self(said) = self;
        said.lines()
            .find_map(|line| line.strip_prefix(name)?.split_whitespace().next())
            .with_context(|| format!("vsock_perf printed no {name:?}: {said}"))
    }
}

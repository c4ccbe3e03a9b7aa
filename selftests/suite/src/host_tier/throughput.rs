// SPDX-License-Identifier: GPL-2.0

//! Throughput of the Rust driver beside the C driver: upstream's `vsock_perf` between the host and two guests on it
//! that differ in the driver, in turn, so that whatever else the machine does meets both.

use std::fmt;
use std::time::Duration;

use anyhow::{bail, Context, Result};

use super::nested::{GuestSpec, NestedGuest, NestedHost};
use crate::agent::{sh_ok, Agent};
use crate::machine::Env;
use crate::Driver;

/// How long one transfer may take. It takes a few seconds.
const TRANSFER_LIMIT: Duration = Duration::from_secs(300);

const BYTES: u64 = 128 << 20;
const BUFFER: &str = "64K";
const SOCKET_BUFFER: &str = "4M";
const PORT: u32 = 5555;
const HOST_CID: u32 = 2;

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

/// One transfer, as its receiver measured it.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    pub driver: Driver,
    pub direction: Direction,
    pub gbits_per_s: f64,
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let driver = match self.driver {
            Driver::Rs => "Rust driver",
            Driver::C => "C driver",
        };
        write!(
            f,
            "{}, {driver}: {:.2} Gbit/s",
            self.direction, self.gbits_per_s
        )
    }
}

/// All transfers of a benchmark; printed, it is a table.
#[derive(Clone, Debug, Default)]
pub struct Throughput {
    pub samples: Vec<Sample>,
}

impl Throughput {
    /// Lowest, median and highest figure.
    fn spread(&self, driver: Driver, direction: Direction) -> Option<(f64, f64, f64)> {
        let mut figures = self
            .samples
            .iter()
            .filter(|sample| sample.driver == driver && sample.direction == direction)
            .map(|sample| sample.gbits_per_s)
            .collect::<Vec<_>>();
        figures.sort_by(f64::total_cmp);
        let (low, high) = (*figures.first()?, *figures.last()?);
        let middle = figures.len() / 2;
        let median = match figures.len() % 2 {
            0 => (figures[middle - 1] + figures[middle]) / 2.0,
            _ => figures[middle],
        };
        Some((low, median, high))
    }

    /// The median of the Rust driver over that of the C driver.
    pub fn ratio(&self, direction: Direction) -> Option<f64> {
        let (_, rs, _) = self.spread(Driver::Rs, direction)?;
        let (_, c, _) = self.spread(Driver::C, direction)?;
        Some(rs / c)
    }
}

impl fmt::Display for Throughput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cell = |driver, direction| match self.spread(driver, direction) {
            Some((low, median, high)) => format!("{median:.2} ({low:.2} to {high:.2})"),
            None => "-".to_owned(),
        };
        writeln!(
            f,
            "{:<16}{:<24}{:<24}Rust / C",
            "Gbit/s", "Rust driver", "C driver"
        )?;
        for direction in [Direction::HostToGuest, Direction::GuestToHost] {
            writeln!(
                f,
                "{direction:<16}{:<24}{:<24}{}",
                cell(Driver::Rs, direction),
                cell(Driver::C, direction),
                self.ratio(direction)
                    .map_or("-".to_owned(), |ratio| format!("{ratio:.2}"))
            )?;
        }
        Ok(())
    }
}

/// Measures both drivers `runs` times in each direction; `progress` hears of each transfer.
pub fn bench(env: &Env, runs: u32, progress: &mut dyn FnMut(&Sample)) -> Result<Throughput> {
    let specs = [(3, Driver::Rs), (4, Driver::C)].map(|(cid, driver)| GuestSpec {
        cid,
        other_cid: None,
        driver,
    });
    let dir = env.run_dir("bench")?;
    let mut host = NestedHost::boot(env, &specs, &dir)?;
    let mut guests = Vec::new();
    for spec in specs {
        guests.push(host.start_guest(spec)?);
    }
    let mut throughput = Throughput::default();
    for _ in 0..runs {
        for direction in [Direction::HostToGuest, Direction::GuestToHost] {
            for guest in &mut guests {
                let driver = guest.spec.driver;
                let gbits_per_s = transfer(&host.machine.agent, guest, direction)
                    .with_context(|| format!("{direction}, {driver:?}"))?;
                let sample = Sample {
                    driver,
                    direction,
                    gbits_per_s,
                };
                progress(&sample);
                throughput.samples.push(sample);
            }
        }
    }
    drop(host);
    Ok(throughput)
}

/// Sends [`BYTES`] and gives the receiver's rate in Gbit/s.
fn transfer(host: &Agent, guest: &mut NestedGuest, direction: Direction) -> Result<f64> {
    let (receiver, sender, receiver_cid) = match direction {
        Direction::HostToGuest => (&guest.agent, host, guest.spec.cid),
        Direction::GuestToHost => (host, &guest.agent, HOST_CID),
    };
    let limit = TRANSFER_LIMIT.as_secs();
    let answer_limit = TRANSFER_LIMIT + Duration::from_secs(60);
    let receive = format!(
        "rm -f /tmp/receiver.*
        (timeout -s KILL {limit} vsock_perf --port {PORT} --buf-size {BUFFER} --vsk-size {SOCKET_BUFFER} \
            >/tmp/receiver.output 2>&1; echo $? >/tmp/receiver.status) </dev/null >/dev/null 2>&1 &"
    );
    // Nothing tells when vsock_perf listens; until then, connect() is refused.
    let send = format!(
        "send() {{
            vsock_perf --sender {receiver_cid} --port {PORT} --bytes {BYTES} --buf-size {BUFFER} >/tmp/sender.output 2>&1
        }}
        end=$(($(date +%s) + {limit}))
        until send; do
            grep -q '^connect: ' /tmp/sender.output && [ $(date +%s) -lt $end ] || {{ cat /tmp/sender.output; exit 1; }}
            sleep 0.1
        done"
    );
    let await_receiver = "until [ -e /tmp/receiver.status ]; do sleep 0.1; done
        cat /tmp/receiver.output
        exit $(cat /tmp/receiver.status)";
    sh_ok(receiver, &receive, answer_limit).context("starting the receiver")?;
    sh_ok(sender, &send, answer_limit).context("sending")?;
    let said = sh_ok(receiver, await_receiver, answer_limit).context("receiving")?;
    parse_rate(&said)
}

/// Reads what the receiver printed.
fn parse_rate(output: &str) -> Result<f64> {
    let field = |name: &str| {
        output
            .lines()
            .find_map(|line| line.strip_prefix(name)?.split_whitespace().next())
            .with_context(|| format!("vsock_perf printed no {name:?}: {output}"))
    };
    let received: u64 = field("total bytes received:")?
        .parse()
        .context("total bytes received")?;
    // The receiver ends as soon as it hears of the sender's shutdown, even when there is more to read.
    if received < BYTES / 10 * 9 {
        bail!("only {received} of {BYTES} bytes were received");
    }
    field("rx performance:")?.parse().context("rx performance")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(driver: Driver, gbits_per_s: f64) -> Sample {
        Sample {
            driver,
            direction: Direction::HostToGuest,
            gbits_per_s,
        }
    }

    #[test]
    fn the_table_has_medians_and_their_ratio() {
        let throughput = Throughput {
            samples: vec![
                sample(Driver::Rs, 1.0),
                sample(Driver::C, 0.4),
                sample(Driver::Rs, 3.0),
                sample(Driver::C, 0.6),
                sample(Driver::Rs, 1.5),
            ],
        };
        assert_eq!(throughput.ratio(Direction::HostToGuest), Some(3.0));
        assert_eq!(throughput.ratio(Direction::GuestToHost), None);
        let table = throughput.to_string();
        assert!(table.contains("1.50 (1.00 to 3.00)"), "{table}");
        assert!(table.contains("0.50 (0.40 to 0.60)"), "{table}");
    }

    #[test]
    fn a_transfer_cut_short_has_no_rate() {
        let said = |bytes: u64| {
            format!("Run as receiver\ntotal bytes received: {bytes}\nrx performance: 0.480000 Gbits/s\n")
        };
        assert_eq!(parse_rate(&said(BYTES)).unwrap(), 0.48);
        assert!(parse_rate(&said(BYTES / 2)).is_err());
        assert!(parse_rate("accept: Connection reset by peer").is_err());
    }
}

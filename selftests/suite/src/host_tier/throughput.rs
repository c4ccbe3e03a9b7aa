// SPDX-License-Identifier: GPL-2.0

//! Throughput of the Rust driver beside the C driver: upstream's `vsock_perf` between the host and two guests on it
//! that differ in the driver, in turn, so that whatever else the machine does meets both.

use std::fmt;

use anyhow::{bail, Context, Result};

use super::nested::{GuestSpec, NestedGuest, NestedHost};
use crate::agent::Agent;
use crate::machine::Env;
use crate::perf::{self, Direction, Receiver, Report};
use crate::Driver;

const BYTES: u64 = 128 << 20;
/// Length of each send() and recv().
const CALL: u64 = 64 << 10;
const SOCKET_BUFFER: u64 = 4 << 20;
const HOST_CID: u32 = 2;

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
    let receiver = Receiver::start(receiver, CALL, SOCKET_BUFFER)?;
    perf::send(sender, receiver_cid, BYTES, CALL)?;
    rate_of_whole(&receiver.wait()?)
}

/// The rate of a transfer of [`BYTES`].
fn rate_of_whole(report: &Report) -> Result<f64> {
    let received = report.received()?;
    if received < BYTES / 10 * 9 {
        bail!("only {received} of {BYTES} bytes were received");
    }
    report.rate()
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
        let rate = |said: &str| rate_of_whole(&Report(said.to_owned()));
        let said = |bytes: u64| {
            format!("Run as receiver\ntotal bytes received: {bytes}\nrx performance: 0.480000 Gbits/s\n")
        };
        assert_eq!(rate(&said(BYTES)).unwrap(), 0.48);
        assert!(rate(&said(BYTES / 2)).is_err());
        assert!(rate("accept: Connection reset by peer").is_err());
    }
}

// SPDX-License-Identifier: GPL-2.0

//! A program that lives with migrations (examples/vsock-forwarder): its agent forwards what is written in the guest to its
//! collector on the host, over the bridge, and says what it has decided after each failure.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{ensure, Context, Result};
use serde::Deserialize;
use serde_json::json;
use vsock_device::HOST_CID;

use crate::lab::{expect_eq, host_socket, wait_for, Guest, Lab, GUEST_CID, LIMIT};

/// The port of the host where the collector listens.
pub const COLLECTOR_PORT: u32 = 9000;

/// The port of the guest where the agent answers requests.
const STATUS_PORT: u32 = 9001;

/// How often the guest is reset before and after its reboot.
const RESETS: u32 = 50;

/// The first numbers that are written in the guest before and after its reboot.
const FIRST_NUMBERS: [u32; 2] = [1, 5_000_000];

/// A collector that runs. Dropping it kills it.
pub struct Collector {
    child: Child,
    store: PathBuf,
}

impl Drop for Collector {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Collector {
    /// Starts one for a guest and waits until it listens.
    pub fn start(lab: &Lab, guest: &Guest) -> Result<Self> {
        Self::start_at(lab, &host_socket(&guest.uds, COLLECTOR_PORT))
    }

    /// Starts one that listens on a Unix socket.
    pub fn start_at(lab: &Lab, socket: &Path) -> Result<Self> {
        let store = lab.file("store");
        let log = fs::File::create(lab.file("collector.log")).context("making collector.log")?;
        let mut child = Command::new(&lab.env.forwarder)
            .args(["collect", "--listen"])
            .arg(format!("unix:{}", socket.display()))
            .arg("--store")
            .arg(&store)
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("starting the collector")?;
        let said = child.stdout.take().context("the collector has no output")?;
        let this = Self { child, store };
        let mut line = String::new();
        BufReader::new(said).read_line(&mut line)?;
        ensure!(
            line.starts_with("listening"),
            "the collector says {line:?} and no more"
        );
        Ok(this)
    }

    /// What is stored of a stream of one boot of the guest.
    pub fn stored(&self, stream: &str, boot: &str) -> Result<Vec<u8>> {
        let path = self.store.join(stream).join(format!("{boot}.data"));
        fs::read(&path).with_context(|| format!("reading {}", path.display()))
    }
}

/// What the agent answers.
#[derive(Debug, Deserialize)]
pub struct Status {
    pub boot: String,
    generation: Option<u64>,
    pub connected: bool,
    pub acknowledged: u64,
    pub retries: Retries,
    pub starts: Starts,
}

#[derive(Debug, Deserialize, PartialEq)]
pub struct Retries {
    pub at_once: u64,
    pub after_a_wait: u64,
}

#[derive(Debug, Deserialize, PartialEq)]
pub struct Starts {
    pub new: u64,
    pub resume: u64,
    pub after_reboot: u64,
}

pub fn status(guest: &Guest) -> Result<Status> {
    let mut stream = guest.connect_from_host(STATUS_PORT)?;
    stream.write_all(b"status\n")?;
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .context("waiting for the agent's answer")?;
    serde_json::from_str(&answer).with_context(|| format!("the agent's answer {answer:?}"))
}

/// Waits until the agent's status is as it should be; says what it was where it is not.
pub fn wait_status(guest: &Guest, what: &str, is: impl Fn(&Status) -> bool) -> Result<Status> {
    let mut last = None;
    wait_for(what, || {
        let status = status(guest)?;
        let holds = is(&status);
        last = Some(status);
        Ok(holds)
    })
    .with_context(|| {
        let said = guest.sh("tail -n 5 /tmp/agent.log");
        format!("{last:?}; the agent says {said:?}")
    })?;
    last.context("there was no status")
}

pub fn wait_for_file(guest: &Guest, path: &str) -> Result<()> {
    wait_for(path, || {
        let found = guest.sh(&format!("[ -e {path} ] && echo yes || echo no"))?;
        Ok(found.trim() == "yes")
    })
}

/// Starts the agent, which also answers requests, and waits for that.
pub fn start_agent(guest: &Guest, input: &str, source: &str) -> Result<()> {
    run_agent(guest, HOST_CID, input, source)?;
    wait_for("the agent to answer requests", || Ok(status(guest).is_ok()))
}

/// Runs the agent for a collector at a CID. When it has ended `/tmp/agent.status` says how.
fn run_agent(guest: &Guest, cid: u64, input: &str, source: &str) -> Result<()> {
    guest.sh(&format!(
        "({input} vsock-forwarder agent --to vsock:{cid}:{COLLECTOR_PORT} --status vsock:{STATUS_PORT} \
         --stream log {source}; echo $? >/tmp/agent.ended; mv /tmp/agent.ended /tmp/agent.status) >/tmp/agent.log 2>&1 </dev/null &"
    ))
    .map(drop)
}

/// Boots the guest with an agent, and a file that grows from a first number on.
fn boot(lab: &Lab, cid: u32, first: u32) -> Result<(Guest, Collector)> {
    let guest = lab.guest_with_program(cid, &lab.env.forwarder)?;
    let collector = Collector::start(lab, &guest)?;
    begin_growing(&guest, first, 20)?;
    start_agent(&guest, "", "/tmp/log")?;
    Ok((guest, collector))
}

/// Lets a file grow in a guest, `/tmp/log`, from a first number on, by so many numbers each time.
pub fn begin_growing(guest: &Guest, first: u32, by: u32) -> Result<()> {
    guest.sh(&format!(
        "(n={first}; while [ ! -e /tmp/stop ]; do seq $n $((n+{by}-1)); n=$((n+{by})); usleep 1000; done >/tmp/log; \
         touch /tmp/stopped) >/dev/null 2>&1 </dev/null &"
    ))?;
    wait_for_file(guest, "/tmp/log")
}

/// Lets it grow no more, waits until all is acknowledged, and returns it.
pub fn end_growing(guest: &Guest) -> Result<Vec<u8>> {
    guest.sh("touch /tmp/stop")?;
    wait_for_file(guest, "/tmp/stopped")?;
    let file = guest.sh("cat /tmp/log")?.into_bytes();
    wait_status(guest, "all to be acknowledged", |is| {
        is.acknowledged == file.len() as u64
    })?;
    Ok(file)
}

/// What `seq` writes.
fn seq(first: u32, last: u32) -> Vec<u8> {
    (first..=last)
        .flat_map(|number| format!("{number}\n").into_bytes())
        .collect()
}

/// So many bytes of what is written from a first number on.
pub fn growing_file(first: u32, len: usize) -> Vec<u8> {
    // No line is shorter than two bytes.
    let mut text = seq(first, first + len as u32 / 2);
    text.truncate(len);
    text
}

/// Resets the guest again and again, each time to another CID and when the agent is connected again.
fn reset_repeatedly(guest: &Guest) -> Result<Status> {
    wait_status(guest, "the agent to be connected", |is| is.connected)?;
    for generation in 1..=u64::from(RESETS) {
        let cid = u64::from(guest.cid) + 1 + generation % 7;
        guest.device.transport_reset(cid);
        let what = format!("the agent to be connected again after reset {generation}");
        wait_status(guest, &what, |is| {
            is.connected && is.generation == Some(generation)
        })?;
    }
    status(guest)
}

/// That the agent has taken each reset for what it is. It may have to wait, too, where an attempt that it makes at once takes
/// longer than the kernel's 2 s.
fn expect_retries_at_once(status: &Status) -> Result<()> {
    expect_eq("retries at once", status.retries.at_once, RESETS.into())
}

/// A hundred resets to other CIDs, with a reboot of the guest and a crash of the collector in the middle of one, while a
/// file grows: the agent always connects again at once, nothing acknowledged is lost, and in the end all is there.
pub fn resets_and_a_reboot(lab: &Lab) -> Result<()> {
    let (guest, collector) = boot(lab, GUEST_CID, FIRST_NUMBERS[0])?;
    let before = reset_repeatedly(&guest)?;
    expect_retries_at_once(&before)?;
    let starts = Starts {
        new: 1,
        resume: u64::from(RESETS),
        after_reboot: 0,
    };
    expect_eq("the agent's starts", &before.starts, &starts)?;
    // In the middle of a reset, which the guest does not learn of, it reboots.
    guest.device.hold_events(true);
    guest.device.transport_reset(u64::from(GUEST_CID + 20));
    guest.start("sh", json!({"script": "reboot -f"}));
    guest.machine.wait_off(LIMIT)?;
    drop(collector);

    let (guest, collector) = boot(lab, GUEST_CID + 20, FIRST_NUMBERS[1])?;
    let after = reset_repeatedly(&guest)?;
    expect_retries_at_once(&after)?;
    let starts = Starts {
        new: 0,
        resume: u64::from(RESETS),
        after_reboot: 1,
    };
    expect_eq("the agent's starts", &after.starts, &starts)?;
    ensure!(before.boot != after.boot, "it was no reboot: {after:?}");

    let file = end_growing(&guest)?;
    ensure!(
        collector.stored("log", &after.boot)? == file
            && file == growing_file(FIRST_NUMBERS[1], file.len()),
        "what is stored is not the file"
    );
    let stored = collector.stored("log", &before.boot)?;
    let (acknowledged, len) = (before.acknowledged, stored.len());
    ensure!(
        len as u64 >= acknowledged && acknowledged > 0,
        "{len} bytes are stored of {acknowledged} that were acknowledged before the reboot"
    );
    ensure!(
        stored == growing_file(FIRST_NUMBERS[0], len),
        "what is stored of before the reboot is not what was written"
    );
    Ok(())
}

/// The collector is killed in the middle of a stream: the agent waits between its attempts, but not after a migration, and
/// when the collector is there again all of it comes.
pub fn collector_dies(lab: &Lab) -> Result<()> {
    let guest = lab.guest_with_program(GUEST_CID, &lab.env.forwarder)?;
    let collector = Collector::start(lab, &guest)?;
    let input = "(seq 1 20000; until [ -e /tmp/more ]; do usleep 10000; done; seq 20001 40000) |";
    start_agent(&guest, input, "-")?;
    wait_status(&guest, "the first part to be acknowledged", |is| {
        is.acknowledged == seq(1, 20_000).len() as u64
    })?;
    drop(collector);
    guest.sh("touch /tmp/more")?;
    wait_status(&guest, "the agent to try in vain", |is| {
        is.retries.after_a_wait >= 3
    })?;
    let tried = status(&guest)?;
    expect_eq("retries at once", tried.retries.at_once, 0)?;
    // The guest has come to a host that may have one.
    guest.device.transport_reset(u64::from(GUEST_CID + 1));
    wait_status(&guest, "the agent to try at once", |is| {
        is.retries.at_once == 1
    })?;
    let collector = Collector::start(lab, &guest)?;
    wait_for_file(&guest, "/tmp/agent.status")?;
    let ended = guest.sh("cat /tmp/agent.status /tmp/agent.log")?;
    ensure!(ended.starts_with("0\n"), "the agent has failed: {ended}");
    ensure!(
        collector.stored("log", &tried.boot)? == seq(1, 40_000),
        "what is stored is not what was sent"
    );
    Ok(())
}

/// Agent and collector are in two guests, and meet over AF_VSOCK at both ends.
pub fn collector_in_a_guest(lab: &Lab) -> Result<()> {
    let guest = lab.guest_with_program(GUEST_CID, &lab.env.forwarder)?;
    let other = lab.guest_with_program(GUEST_CID + 1, &lab.env.forwarder)?;
    other.sh(&format!(
        "vsock-forwarder collect --listen vsock:{COLLECTOR_PORT} --store /tmp/store >/tmp/collector.log 2>&1 </dev/null &"
    ))?;
    wait_for("the collector to listen", || {
        Ok(other.sh("cat /tmp/collector.log")?.contains("listening"))
    })?;
    run_agent(&guest, u64::from(other.cid), "seq 1 50000 |", "-")?;
    wait_for_file(&guest, "/tmp/agent.status")?;
    let ended = guest.sh("cat /tmp/agent.status /tmp/agent.log")?;
    ensure!(ended.starts_with("0\n"), "the agent has failed: {ended}");
    let stored = other.sh("cat /tmp/store/log/*.data")?;
    ensure!(
        stored.as_bytes() == seq(1, 50_000),
        "what is stored is not what was sent"
    );
    Ok(())
}

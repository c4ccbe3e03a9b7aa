// SPDX-License-Identifier: GPL-2.0

//! Upstream's `vmtest.sh` (`tools/testing/selftests/vsock`), unmodified, on nested hosts: with guests that have this driver,
//! installed as `make install` does, and with guests that have the C driver.
//!
//! `vmtest.sh` boots its guests with virtme-ng, whose root is the host's, and runs `vsock_test` and `socat` in guests, on the
//! host and in network namespaces of it. The hosts have a [disk](crate::machine::Kind::NestedHost) with all that. What is
//! not as it would be on a developer's machine lies in `selftests/vmtest/`: the limits of time, and udev.

use std::fmt;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, ensure, Context, Result};
use serde_json::json;

use crate::agent::{sh, sh_ok, Ended};
use crate::initramfs::Initramfs;
use crate::machine::{check_log, Env, Kind, Machine, Port, BOOT_LIMIT, FIND_PORT};
use crate::runner::{tail, Reporter};
use crate::Driver;

/// How often it is looked at what there is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(2);

/// A guest that lives says so every few seconds. TCG now and then gives a guest an interrupt that it has disabled, and its
/// kernel hangs in it for ever, without a word: see the host tier. A test that was not ok and in which nothing was said
/// for so long is run once more, on another host.
const SILENCE: Duration = Duration::from_secs(90);

/// Or QEMU in the host stops the guest with this, and vmtest.sh would wait for its SSH server for an hour.
const EMULATION_FAILED: &str = "KVM internal error";

/// After so long a silence the host is given up.
const LONG_SILENCE: Duration = Duration::from_secs(400);

/// How often a test is run in which guests hang, at most.
const ATTEMPTS: u32 = 6;

/// What a guest's kernel log says of its driver, by `selftests/vmtest/systemd-udevd`.
const DRIVER_NOTE: &str = "vmtest: the driver of the socket device is ";

/// What a program of the guest's user space says goes to the kernel's log too.
const USER_SPACE: &str = "virtme-ng-init: ";

/// Where `vmtest.sh` lies on the disk.
const SELFTEST: &str = "/usr/src/linux/tools/testing/selftests/vsock";

/// The ports of the host that it writes to.
const RESULTS: &str = "results";
const DETAILS: &str = "details";

/// What `vmtest.sh` says of one of its tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Ok,
    Skipped,
    NotOk,
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Said::Ok => "ok",
            Said::Skipped => "skipped",
            Said::NotOk => "not ok",
        })
    }
}

/// What a test came to with a driver.
struct Outcome {
    test: String,
    said: Said,
    /// How often a guest hung in it.
    hangs: usize,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.hangs {
            0 => self.said.fmt(f),
            hangs => write!(f, "{}, hung {hangs} x", self.said),
        }
    }
}

/// The tests in the output of `vmtest.sh`, in its order.
fn parse_results(output: &str) -> Vec<(String, Said)> {
    let parse = |line: &str| {
        let (ok, rest) = match line.strip_prefix("not ok ") {
            Some(rest) => (false, rest),
            None => (true, line.strip_prefix("ok ")?),
        };
        let mut words = rest.split_whitespace();
        let _number: u32 = words.next()?.parse().ok()?;
        let name = words.next()?.to_owned();
        let said = match (ok, rest.ends_with("# SKIP")) {
            (false, _) => Said::NotOk,
            (true, true) => Said::Skipped,
            (true, false) => Said::Ok,
        };
        Some((name, said))
    };
    output.lines().filter_map(parse).collect()
}

/// How many tests `vmtest.sh` has said that it will run.
fn parse_plan(output: &str) -> Option<usize> {
    output
        .lines()
        .find_map(|line| line.strip_prefix("1..")?.parse().ok())
}

/// Runs `tests`, or all, with each of the drivers, side by side; returns whether all were ok with the first. What they came
/// to with another stands beside that.
pub fn run(env: &Env, disk: &Path, drivers: &[Driver], tests: &[String]) -> Result<bool> {
    let begun = Instant::now();
    let lists = std::thread::scope(|scope| {
        let runs: Vec<_> = drivers
            .iter()
            .map(|driver| scope.spawn(|| run_with(env, disk, tests, *driver)))
            .collect();
        let lists = runs.into_iter().zip(drivers).map(|(run, driver)| {
            let list = run.join().map_err(|_| anyhow!("a thread panicked"));
            list.and_then(|list| list)
                .with_context(|| format!("vmtest.sh with {}", driver.module()))
        });
        // All are waited for, also when one has failed.
        lists.collect::<Vec<_>>()
    });
    let mut lists = lists.into_iter();
    let (first, driver) = match (lists.next(), drivers.first()) {
        (Some(first), Some(driver)) => (first?, driver),
        _ => bail!("no driver was given"),
    };
    // What stands beside is not under test: where it failed as a whole, it says of no test what it came to.
    let others = lists.map(|list| {
        list.unwrap_or_else(|error| {
            eprintln!("  {error:#}");
            Vec::new()
        })
    });
    let lists: Vec<_> = std::iter::once(first).chain(others).collect();

    let said = |list: &[Outcome], test: &str| {
        let found = list.iter().find(|outcome| outcome.test == test);
        found.map_or_else(|| "-".to_owned(), Outcome::to_string)
    };
    print!("\n{:50}", "vmtest.sh");
    for driver in drivers {
        print!("  {:26}", driver.module());
    }
    for Outcome { test, .. } in &lists[0] {
        print!("\n{test:50}");
        for list in &lists {
            print!("  {:26}", said(list, test));
        }
    }
    println!("\n");
    let reporter = Reporter::new(*driver, "make test-vmtest TESTS=");
    for outcome in &lists[0] {
        match outcome.said {
            Said::Ok => reporter.passed(&outcome.test, begun),
            _ => reporter.failed(&outcome.test, begun, &outcome.to_string()),
        }
    }
    let tally = reporter.tally();
    println!("{tally}");
    Ok(tally.failed == 0)
}

/// Runs `tests`, or all, in guests that have `driver`.
fn run_with(env: &Env, disk: &Path, tests: &[String], driver: Driver) -> Result<Vec<Outcome>> {
    let name = driver.module();
    let mut list: Vec<(String, Said)> = Vec::new();
    let mut hung = Vec::new();
    let mut remaining = tests.to_vec();
    for _ in 0..ATTEMPTS {
        let run = run_once(env, disk, &remaining, driver)?;
        for (test, said) in run.said {
            match list.iter_mut().find(|(of, _)| *of == test) {
                Some((_, before)) => *before = said,
                None => list.push((test, said)),
            }
        }
        remaining = run.to_run_again;
        if remaining.is_empty() {
            break;
        }
        eprintln!("  {name}: a guest hung in {}", run.hung.join(", "));
        hung.extend(run.hung);
    }
    // What was never run to an end counts as well.
    for test in remaining {
        if list.iter().all(|(of, _)| *of != test) {
            list.push((test, Said::NotOk));
        }
    }
    let outcome = |(test, said)| {
        let hangs = hung.iter().filter(|of| **of == test).count();
        Outcome { test, said, hangs }
    };
    Ok(list.into_iter().map(outcome).collect())
}

/// What one run of `vmtest.sh` came to.
struct Run {
    said: Vec<(String, Said)>,
    /// Tests in which a guest hung.
    hung: Vec<String>,
    /// These, and those that were not run because of it.
    to_run_again: Vec<String>,
}

/// How long nothing was said.
struct Silence {
    len: usize,
    since: Instant,
    longest: Duration,
}

impl Silence {
    fn new() -> Self {
        Self {
            len: 0,
            since: Instant::now(),
            longest: Duration::ZERO,
        }
    }

    /// Notes that what was said is so long now.
    fn note(&mut self, len: usize) {
        self.longest = self.longest.max(self.since.elapsed());
        if len != self.len {
            self.len = len;
            self.since = Instant::now();
        }
    }
}

/// Runs `tests`, or all, in guests that have `driver`, on a host of their own.
fn run_once(env: &Env, disk: &Path, tests: &[String], driver: Driver) -> Result<Run> {
    let dir = env.run_dir("vmtest")?;
    let host = boot_host(env, disk, driver, &dir)?;
    let (results, details) = (host.port_file(RESULTS), host.port_file(DETAILS));
    let tests = match tests {
        [] => all_names(&host)?,
        some => some.to_vec(),
    };
    let script = format!(
        "{FIND_PORT}
        cat <>/disk/dev/stdout >$(port {DETAILS}) 2>/dev/null &
        {} >$(port {RESULTS}) 2>/disk/dev/stdout",
        in_host(&format!("./vmtest.sh -v {}", tests.join(" "))),
    );
    let read =
        |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    let running = host.agent.start("sh", json!({ "script": script }));
    let mut said = Vec::new();
    let mut hung = Vec::new();
    let mut silence = Silence::new();
    let (ended, output, log) = loop {
        let ended: Option<Ended> = running.poll()?;
        let (output, log) = (read(&results), read(&details));
        silence.note(log.len());
        for (name, outcome) in parse_results(&output).into_iter().skip(said.len()) {
            eprintln!("  {}: {outcome} {name}", driver.module());
            if outcome != Said::Ok && silence.longest > SILENCE {
                hung.push(name.clone());
            }
            silence.longest = Duration::ZERO;
            said.push((name, outcome));
        }
        let is_over = ended.is_some()
            || silence.since.elapsed() > LONG_SILENCE
            || log.contains(EMULATION_FAILED);
        if is_over {
            break (ended, output, log);
        }
        std::thread::sleep(PROGRESS_INTERVAL);
    };

    let mut to_run_again = hung.clone();
    if ended.is_none() {
        let was_run = |name: &String| said.iter().any(|(of, _)| of == name);
        let not_run: Vec<_> = tests.into_iter().filter(|name| !was_run(name)).collect();
        hung.extend(not_run.first().cloned());
        to_run_again.extend(not_run);
    } else if parse_plan(&output) != Some(said.len()) || said.is_empty() {
        bail!("vmtest.sh ended early and said: {output}{}", tail(&details));
    }
    let drivers: Vec<_> = log
        .lines()
        .filter_map(|line| Some(line.split_once(DRIVER_NOTE)?.1.trim()))
        .collect();
    ensure!(
        drivers.iter().all(|name| *name == driver.module()),
        "guests had other drivers: {drivers:?}"
    );
    ensure!(
        !drivers.is_empty() || said.iter().all(|(name, _)| is_of_the_host(name)),
        "no guest said which driver it had: {}",
        details.display()
    );
    let by_kernels: Vec<_> = log
        .lines()
        .filter(|line| !line.contains(USER_SPACE))
        .collect();
    check_log("a guest", &by_kernels.join("\n"))?;
    check_log("the host", &host.log())?;
    Ok(Run {
        said,
        hung,
        to_run_again,
    })
}

/// The names of all tests, as `vmtest.sh` on a host says when it is asked for help.
fn all_names(host: &Machine) -> Result<Vec<String>> {
    let said = sh(&host.agent, &in_host("./vmtest.sh -h"), BOOT_LIMIT)?.output;
    let names: Vec<_> = said
        .lines()
        .filter_map(|line| line.strip_prefix('\t')?.split_whitespace().next())
        .map(str::to_owned)
        .collect();
    ensure!(!names.is_empty(), "vmtest.sh -h names no test: {said}");
    Ok(names)
}

/// A command of `vmtest.sh`'s folder, for the host's shell.
fn in_host(command: &str) -> String {
    format!(
        "chroot /disk /usr/bin/env -i HOME=/root USER=root LC_ALL=C.UTF-8 \
            PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin \
            bash -c 'cd {SELFTEST} && {command}' </dev/null"
    )
}

/// Whether a test of `vmtest.sh` boots no guest.
fn is_of_the_host(test: &str) -> bool {
    test.starts_with("ns_host_") || test.contains("loopback") && test.starts_with("ns_")
}

/// Boots a host with the disk at `/disk`, whose guests have `driver`.
fn boot_host(env: &Env, disk: &Path, driver: Driver, dir: &Path) -> Result<Machine> {
    let initramfs = dir.join("host.cpio");
    let mut host = Initramfs::new(env)?;
    host.modules(&["virtio_blk", "ext4"])?;
    host.modules(&["kvm-amd", "vhost_vsock", "vsock_diag", "vsock_loopback"])?;
    host.write(&initramfs)?;
    let ports = [RESULTS, DETAILS].map(|name| Port::File(name.to_owned()));
    let kind = Kind::NestedHost { disk: Some(disk) };
    let machine = Machine::boot(env, kind, "host", &initramfs, dir, &ports)?;
    // make install prefers this driver.
    let prefer = match driver {
        Driver::Rs => "",
        Driver::C => "echo blacklist virtio_vsock_rs >etc/modprobe.d/virtio_vsock_rs.conf",
    };
    // vmtest.sh and virtme-ng write their details to /dev/stdout, and the results to what is standard output.
    let script = format!(
        "mkdir /disk && mount -t ext4 /dev/vda /disk && cd /disk && ifconfig lo 127.0.0.1 up || exit 1
        {prefer}
        mount -t proc proc proc && mount -t sysfs sysfs sys && mount -t devtmpfs devtmpfs dev &&
            mkdir -p dev/pts dev/shm && mount -t devpts devpts dev/pts && mount -t tmpfs tmpfs dev/shm &&
            mount -t tmpfs tmpfs run && mount -t tmpfs -o mode=1777 tmpfs tmp &&
            ln -s /proc/self/fd dev/fd && mkfifo dev/stdout && test -c dev/kvm && test -c dev/vhost-vsock"
    );
    sh_ok(&machine.agent, &script, BOOT_LIMIT).context("setting up the nested host")?;
    Ok(machine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_of_a_result_counts() {
        let output = "1..4\nok 1 vm_loopback\nnot ok 2 ns_a # exit=1\nok 3 ns_b # SKIP\nSUMMARY: PASS=1 SKIP=1 FAIL=1\n";
        let expected = [
            ("vm_loopback", Said::Ok),
            ("ns_a", Said::NotOk),
            ("ns_b", Said::Skipped),
        ];
        assert_eq!(
            parse_results(output),
            expected.map(|(name, said)| (name.to_owned(), said))
        );
        assert_eq!(parse_plan(output), Some(4));
    }
}

// SPDX-License-Identifier: GPL-2.0

//! The host tier: the driver against the kernel's own `vhost_vsock`, by upstream's `vsock_test`, which knows nothing
//! of this project.
//!
//! One boot of a host and of a guest on it serves all tests. `vsock_test` runs in both, once with the guest as server
//! and once as client; each of its tests is one result of ours, in either role. `vsock_diag_test` and `vsock_uring_test`
//! are one result each. Then the guest is migrated live, some times, to another QEMU on the host and back. The kernel
//! logs of host and guest, and the removal of the driver afterwards, are results of their own.

mod live_migration;
mod nested;
mod throughput;
mod upstream;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::agent::{sh, sh_ok, Agent, Ended};
use crate::machine::{faults, Env};
use crate::Driver;
pub use live_migration::DEFAULT_MIGRATIONS;
use nested::{GuestSpec, NestedGuest, NestedHost, HOST_ADDRESS};
pub use throughput::bench;
use upstream::{parse_list, parse_output, verdict, Role, Said, Sayings, UpstreamTest, Verdict};

/// How long one run of all of upstream's tests may take. It takes 10 s when nothing else runs.
const RUN_LIMIT: Duration = Duration::from_secs(240);

/// How much longer the agents may take to say that it was stopped.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

const HOST_CID: u32 = 2;

/// The vsock ports of the first run of `vsock_test`, and how many it has.
const FIRST_PEER_PORT: u32 = 1234;
const PEER_PORTS: u32 = 2;

/// This test interrupts connect() over and over. Its last requests can still be on their way to its port when it ends,
/// and the listener of the next test there would accept them instead of that test's connection, with either driver.
/// Each run of `vsock_test` has ports of its own, and this test is the last of its run.
const LEAVES_REQUESTS: &str = "SOCK_STREAM transport change null-ptr-deref, lockdep warn";

/// How long the removal of the driver may take.
const REMOVAL_LIMIT: Duration = Duration::from_secs(60);

const LIVE_MIGRATION: &str = "host_tier::live_migration";
const HOST_KERNEL_LOG: &str = "host_tier::host_kernel_log";
const GUEST_KERNEL_LOG: &str = "host_tier::guest_kernel_log";
const DRIVER_REMOVAL: &str = "host_tier::driver_removal";

/// Upstream's other programs, which run all of their tests. The first wants that no other socket is there.
const OTHER_PROGRAMS: [&str; 2] = ["vsock_diag_test", "vsock_uring_test"];

fn other_name(program: &str, role: Role) -> String {
    format!("host_tier::{role}::{program}")
}

/// What to run.
pub struct Options<'a> {
    /// The guest's driver.
    pub driver: Driver,
    /// Whether a test of this name is wanted.
    pub wanted: &'a dyn Fn(&str) -> bool,
    /// How many times to run each of upstream's tests, to find those that fail now and then.
    pub repeat: u32,
    /// How many times in a row to migrate the guest.
    pub migrations: u32,
}

/// How often the nested host is booted in one run of all tests, at most.
const BOOT_ATTEMPTS: u32 = 2;

/// One more time for so many further runs.
const RUNS_BETWEEN_FORCED_INTERRUPTS: u32 = 5;

/// Whether TCG has given a guest's kernel an interrupt while these were disabled, by the trace of the processor that hangs
/// in it: the handler waits for its own processor's run queue, whose lock is held with interrupts disabled only.
///
/// Seen in one of some ten runs, with either number of processors.
fn has_forced_interrupt(console: &str) -> bool {
    let between = |from: &str, to: &str| {
        let (_, rest) = console.split_once(from)?;
        Some(rest.split_once(to)?.0)
    };
    let hangs_in = between("<NMI>", "</NMI>").unwrap_or_default();
    let handler = between("<IRQ>", "</IRQ>").unwrap_or_default();
    let waits_in = handler.lines().find(|line| line.contains("+0x"));
    hangs_in.contains("RIP: 0010:native_queued_spin_lock_slowpath")
        && waits_in.is_some_and(|line| line.contains("try_to_wake_up+0x"))
}

/// What one test came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It did what it should.
    Passed,
    /// What went wrong, for people.
    Failed(String),
}

/// The names of the host tier's tests, in the order in which they run.
pub fn list(env: &Env) -> Result<Vec<String>> {
    let tests = upstream_tests(env)?;
    let mut names = Vec::new();
    for role in Role::BOTH {
        names.extend(OTHER_PROGRAMS.map(|program| other_name(program, role)));
    }
    for role in Role::BOTH {
        names.extend(tests.iter().map(|test| test.full_name(role)));
    }
    names.extend(
        [
            LIVE_MIGRATION,
            GUEST_KERNEL_LOG,
            DRIVER_REMOVAL,
            HOST_KERNEL_LOG,
        ]
        .map(str::to_owned),
    );
    Ok(names)
}

/// Upstream's tests, as upstream's program names them. That much of it runs without a socket.
fn upstream_tests(env: &Env) -> Result<Vec<UpstreamTest>> {
    let program = env.upstream.join("vsock_test");
    let output = Command::new(&program)
        .arg("--list")
        .output()
        .with_context(|| format!("running {} --list", program.display()))?;
    parse_list(&String::from_utf8_lossy(&output.stdout))
}

/// Runs the wanted tests in machines that it boots, and tells `report` of each in the order of [`list`].
///
/// An error means that the machines could not be brought up, so that there is nothing to say about any test.
pub fn run(env: &Env, options: &Options, report: &mut dyn FnMut(&str, Outcome)) -> Result<()> {
    let tests = upstream_tests(env)?;
    let mut wanted = BTreeMap::new();
    for role in Role::BOTH {
        let ids = tests
            .iter()
            .filter(|test| (options.wanted)(&test.full_name(role)))
            .map(|test| test.id)
            .collect::<Vec<_>>();
        wanted.insert(role, ids);
    }

    let last_of_its_run = tests
        .iter()
        .find(|test| test.name == LEAVES_REQUESTS)
        .map(|test| test.id);

    let spec = GuestSpec {
        cid: 3,
        other_cid: Some(4),
        driver: options.driver,
    };
    let boot = || -> Result<(NestedHost, NestedGuest)> {
        let mut host = NestedHost::boot(env, &[spec], &env.run_dir("host_tier")?)?;
        let guest = host.start_guest(spec)?;
        Ok((host, guest))
    };
    let (mut host, mut guest) = boot()?;
    let mut boots = 1..BOOT_ATTEMPTS + options.repeat / RUNS_BETWEEN_FORCED_INTERRUPTS;

    for program in OTHER_PROGRAMS {
        for role in Role::BOTH {
            let name = other_name(program, role);
            if (options.wanted)(&name) {
                report(&name, run_other(&host.machine.agent, &guest, role, program));
            }
        }
    }

    let mut failures: BTreeMap<(Role, u32), Vec<String>> = BTreeMap::new();
    'rounds: for round in 1..=options.repeat {
        for (role, ids) in &wanted {
            if ids.is_empty() {
                continue;
            }
            let begun = Instant::now();
            let (failed, lost) = loop {
                let (failed, lost) =
                    run_upstream(&mut host, &mut guest, *role, ids, last_of_its_run);
                let is_forced = || {
                    let console = fs::read(&guest.console).unwrap_or_default();
                    has_forced_interrupt(&String::from_utf8_lossy(&console))
                };
                if !lost || !is_forced() || boots.next().is_none() {
                    break (failed, lost);
                }
                println!(
                    "note: TCG has given the guest an interrupt that was disabled; begun again"
                );
                drop((guest, host));
                (host, guest) = boot()?;
            };
            if options.repeat > 1 {
                eprintln!(
                    "run {round} of {}, {role}: {} of {} tests ok, {:.1} s",
                    options.repeat,
                    ids.len() - failed.len(),
                    ids.len(),
                    begun.elapsed().as_secs_f64()
                );
            }
            for (id, text) in failed {
                if options.repeat > 1 {
                    eprintln!("  test {id}: {}", text.replace('\n', "\n  "));
                }
                let text = match options.repeat {
                    1 => text,
                    _ => format!("run {round}: {text}"),
                };
                failures.entry((*role, id)).or_default().push(text);
            }
            if lost {
                break 'rounds;
            }
        }
    }
    for (role, ids) in &wanted {
        for test in tests.iter().filter(|test| ids.contains(&test.id)) {
            let outcome = match failures.get(&(*role, test.id)) {
                None => Outcome::Passed,
                Some(texts) if options.repeat == 1 => Outcome::Failed(texts.join("\n")),
                Some(texts) => Outcome::Failed(format!(
                    "{} of {} runs failed\n{}",
                    texts.len(),
                    options.repeat,
                    texts.join("\n")
                )),
            };
            report(&test.full_name(*role), outcome);
        }
    }

    if (options.wanted)(LIVE_MIGRATION) {
        report(LIVE_MIGRATION, migrate(&mut host, &mut guest, options));
    }

    let removal = remove_driver(&guest);
    let logs = [
        (GUEST_KERNEL_LOG, guest.console.clone()),
        (HOST_KERNEL_LOG, host.machine.console.clone()),
    ];
    report(DRIVER_REMOVAL, removal);
    for (name, console) in logs {
        report(name, kernel_log(&console)?);
    }
    drop(host);
    Ok(())
}

/// Runs the tests `ids` of `vsock_test`. Gives those that failed, with what was said of them, and whether a machine was
/// lost over them.
///
/// The first failure ends `vsock_test`, so the tests after it are run by another; and so are those after a test that
/// leaves packets behind.
fn run_upstream(
    host: &mut NestedHost,
    guest: &mut NestedGuest,
    role: Role,
    ids: &[u32],
    last_of_its_run: Option<u32>,
) -> (BTreeMap<u32, String>, bool) {
    let mut failed = BTreeMap::new();
    let mut remaining = ids.to_vec();
    let mut peer_port = FIRST_PEER_PORT;
    while !remaining.is_empty() {
        let end = remaining.iter().position(|id| Some(*id) == last_of_its_run);
        let now = &remaining[..end.map_or(remaining.len(), |end| end + 1)];
        let said = run_pair(&host.machine.agent, guest, role, now, peer_port);
        peer_port += PEER_PORTS;
        let mut done = Vec::new();
        for &id in now {
            match verdict(id, &said.host, &said.guest) {
                Verdict::Ok => (),
                Verdict::Failed(text) => {
                    failed.insert(id, format!("{text}{}", said.trouble));
                }
                Verdict::NotBegun => continue,
            }
            done.push(id);
        }
        if said.lost || done.is_empty() {
            let trouble = &said.trouble;
            for id in remaining.iter().filter(|id| !done.contains(id)) {
                failed.insert(*id, format!("did not come to its end{trouble}"));
            }
        }
        if said.lost {
            let state = host
                .dump(guest)
                .unwrap_or_else(|error| format!("{error:#}"));
            eprintln!("a machine does not answer; what QEMU says of the guest:\n{state}");
            return (failed, true);
        }
        if done.is_empty() {
            break;
        }
        remaining.retain(|id| !done.contains(id));
    }
    (failed, false)
}

/// What both sides of one run of `vsock_test` said.
#[derive(Default)]
struct PairSaid {
    host: Sayings,
    guest: Sayings,
    /// What went wrong beside the tests, a new line each.
    trouble: String,
    /// Whether a machine does not answer any more.
    lost: bool,
}

/// Runs the tests `ids` of `vsock_test` on both sides.
fn run_pair(
    host: &Agent,
    guest: &NestedGuest,
    role: Role,
    ids: &[u32],
    peer_port: u32,
) -> PairSaid {
    let picked: Vec<String> = ids.iter().map(|id| format!("--pick {id}")).collect();
    run_program(
        host,
        guest,
        role,
        "vsock_test",
        peer_port,
        &picked.join(" "),
    )
}

/// Runs all tests of another program of upstream's.
fn run_other(host: &Agent, guest: &NestedGuest, role: Role, program: &str) -> Outcome {
    let said = run_program(host, guest, role, program, FIRST_PEER_PORT, "");
    let are_ok = |said: &Sayings| !said.is_empty() && said.values().all(|said| *said == Said::Ok);
    if are_ok(&said.host) && are_ok(&said.guest) && said.host.len() == said.guest.len() {
        return Outcome::Passed;
    }
    Outcome::Failed(format!(
        "host: {:?}\nguest: {:?}{}",
        said.host, said.guest, said.trouble
    ))
}

/// Runs a program of upstream's on both sides.
fn run_program(
    host: &Agent,
    guest: &NestedGuest,
    role: Role,
    program: &str,
    peer_port: u32,
    arguments: &str,
) -> PairSaid {
    let port = match role {
        Role::GuestServer => guest.spec.forwarded_port(),
        Role::GuestClient => guest.spec.host_port(),
    };
    let command = |mode: &str, peer_cid: u32| {
        format!(
            "{program} --mode={mode} --control-port={port} --peer-cid={peer_cid} --peer-port={peer_port} {arguments}"
        )
    };
    let guest_cid = guest.spec.cid;
    let guest = &guest.agent;
    let mut said = PairSaid::default();
    let (server, client) = match role {
        Role::GuestServer => serve_and_connect(
            guest,
            &command("server", HOST_CID),
            host,
            &format!("{} --control-host=127.0.0.1", command("client", guest_cid)),
            port,
        ),
        Role::GuestClient => serve_and_connect(
            host,
            &command("server", guest_cid),
            guest,
            &format!(
                "{} --control-host={HOST_ADDRESS}",
                command("client", HOST_CID)
            ),
            port,
        ),
    };
    let (host_output, guest_output) = match role {
        Role::GuestServer => (client, server),
        Role::GuestClient => (server, client),
    };
    let mut read = |name: &str, output: Result<Ended>| match output {
        Ok(ended) => {
            let tests = parse_output(&ended.output);
            if tests.is_empty() {
                let (status, output) = (ended.status, ended.output.trim());
                said.trouble.push_str(&format!(
                    "\n{name}: {program} ended with status {status}: {output}"
                ));
            }
            Some(tests)
        }
        Err(error) => {
            said.trouble.push_str(&format!("\n{name}: {error:#}"));
            said.lost = true;
            None
        }
    };
    let host_said = read("host", host_output);
    let guest_said = read("guest", guest_output);
    // The sides wait for each other before each test: whoever began one has seen the other end the one before.
    let before_the_last = |sayings: &Sayings| {
        let last = sayings.keys().next_back().copied();
        let ended = sayings.iter().filter(|(id, _)| Some(**id) != last);
        ended
            .map(|(id, said)| (*id, said.clone()))
            .collect::<Sayings>()
    };
    said.guest = match (&guest_said, &host_said) {
        (None, Some(host)) => before_the_last(host),
        _ => guest_said.clone().unwrap_or_default(),
    };
    said.host = match (host_said, &guest_said) {
        (None, Some(guest)) => before_the_last(guest),
        (host, _) => host.unwrap_or_default(),
    };
    said
}

/// Runs a server on one side and, once it listens on the TCP port, a client on the other.
fn serve_and_connect(
    server: &Agent,
    server_command: &str,
    client: &Agent,
    client_command: &str,
    port: u32,
) -> (Result<Ended>, Result<Ended>) {
    let limit = RUN_LIMIT.as_secs();
    let answer_limit = RUN_LIMIT + ANSWER_LIMIT;
    let serve = format!(
        "rm -f /tmp/server.*
        (timeout -s KILL {limit} {server_command} >/tmp/server.output 2>&1; echo $? >/tmp/server.status) \
            </dev/null >/dev/null 2>&1 &
        until grep -q ':{port:04X} 00000000:0000 0A' /proc/net/tcp; do
            [ ! -e /tmp/server.status ] || {{ cat /tmp/server.output; exit 1; }}
            sleep 0.1
        done"
    );
    if let Err(error) = sh_ok(server, &serve, answer_limit) {
        let nothing = Ended {
            status: 0,
            output: String::new(),
        };
        return (
            Err(error.context("vsock_test as server does not listen")),
            Ok(nothing),
        );
    }
    let client_ended = sh(
        client,
        &format!("timeout -s KILL {limit} {client_command}"),
        answer_limit,
    );
    let server_ended = sh(
        server,
        "until [ -e /tmp/server.status ]; do sleep 0.1; done
        cat /tmp/server.output
        exit $(cat /tmp/server.status)",
        answer_limit,
    );
    (server_ended, client_ended)
}

/// Migrates the guest, and says what came of it where that was asked for.
fn migrate(host: &mut NestedHost, guest: &mut NestedGuest, options: &Options) -> Outcome {
    let migrations = options.migrations;
    let mut say = |text: &str| {
        if migrations != DEFAULT_MIGRATIONS {
            eprintln!("{text}");
        }
    };
    for _ in 0..options.repeat {
        match live_migration::run(host, guest, migrations, &mut say) {
            Ok(summary) => say(&summary.to_string()),
            Err(error) => return Outcome::Failed(format!("{error:#}")),
        }
    }
    Outcome::Passed
}

/// Removes the guest's driver, as an administrator would.
fn remove_driver(guest: &NestedGuest) -> Outcome {
    let module = guest.spec.driver.module();
    // A connection that both ends have closed may keep the module for another 8 s.
    let script = format!(
        "timeout {limit} sh -c 'until rmmod {module}; do sleep 0.5; done' 2>/tmp/rmmod.output && exit
        tail -n 1 /tmp/rmmod.output
        exit 1",
        limit = REMOVAL_LIMIT.as_secs()
    );
    match sh_ok(&guest.agent, &script, 2 * REMOVAL_LIMIT) {
        Ok(_) => Outcome::Passed,
        Err(error) => Outcome::Failed(format!("{error:#}")),
    }
}

/// The verdict of a machine's kernel on what happened in it.
fn kernel_log(console: &Path) -> Result<Outcome> {
    let text = fs::read(console).with_context(|| format!("reading {}", console.display()))?;
    let text = String::from_utf8_lossy(&text);
    let faults = faults(&text);
    if faults.is_empty() {
        return Ok(Outcome::Passed);
    }
    Ok(Outcome::Failed(format!(
        "{}\nin {}",
        faults.join("\n"),
        console.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::has_forced_interrupt;

    const FORCED: &str = "
        [  781.531674]  <NMI>
        [  781.671687]  end_repeat_nmi+0xf/0x53
        [  781.684564] RIP: 0010:native_queued_spin_lock_slowpath+0x74/0x2c0
        [  782.150718]  </NMI>
        [  782.169059]  <IRQ>
        [  782.180278]  try_to_wake_up+0x285/0x790
        [  782.206772]  __queue_work+0x148/0x520
        [  782.298388]  vring_interrupt+0x9e/0x140
        [  782.475409]  </IRQ>";

    #[test]
    fn an_interrupt_that_waits_for_its_run_queue_was_forced() {
        assert!(has_forced_interrupt(FORCED));
        // A lock of somebody else's, the driver's above all, is another matter.
        assert!(!has_forced_interrupt(&FORCED.replace(
            "try_to_wake_up+0x285/0x790",
            "vring_interrupt+0x1/0x2"
        )));
        assert!(!has_forced_interrupt(
            &FORCED.replace("native_queued_spin_lock_slowpath", "memcpy")
        ));
        assert!(!has_forced_interrupt("a kernel that said nothing"));
    }
}

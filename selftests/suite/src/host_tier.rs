// SPDX-License-Identifier: GPL-2.0

//! The host tier: the driver against the kernel's own `vhost_vsock`, by upstream's `vsock_test`, which knows nothing
//! of this project.
//!
//! One boot of a host and of a guest on it serves all tests, unless the emulation loses the guest. `vsock_test` runs in both,
//! once with the guest as server and once as client; each of its tests is one result of ours, in either role. `vsock_diag_test`
//! and `vsock_uring_test` are one result each. Then the guest is migrated live, some times, to another QEMU on the host and
//! back. The kernel logs of host and guest, and the removal of the driver afterwards, are results of their own.

mod live_migration;
mod nested;
mod throughput;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::agent::sh_ok;
use crate::machine::{boot_anew_if_bad, faults, read_log, BadBoot, Env, EXIT_DURING_DELIVERY};
use crate::upstream::{self, Pair, Role, Side, NOT_ENDED, OTHER_PROGRAMS};
use crate::Driver;
pub use live_migration::DEFAULT_MIGRATIONS;
use nested::{GuestSpec, NestedGuest, NestedHost, HOST_ADDRESS};
pub use throughput::bench;

/// How long one run of all of upstream's tests may take. It takes 10 s when nothing else runs.
const RUN_LIMIT: Duration = Duration::from_secs(240);

const HOST_CID: u32 = 2;

/// How long the removal of the driver may take.
const REMOVAL_LIMIT: Duration = Duration::from_secs(60);

const LIVE_MIGRATION: &str = "host_tier::live_migration";
const HOST_KERNEL_LOG: &str = "host_tier::host_kernel_log";
const GUEST_KERNEL_LOG: &str = "host_tier::guest_kernel_log";
const DRIVER_REMOVAL: &str = "host_tier::driver_removal";

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

/// How often the nested host is booted anew in one run of all tests because the emulation has lost the guest, at most.
const BOOTS_ANEW: u32 = 2;

/// One more time for so many further runs.
const RUNS_BETWEEN_LOST_GUESTS: u32 = 5;

/// How long a guest that lives may take to say so.
const SIGN_OF_LIFE_LIMIT: Duration = Duration::from_secs(60);

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

/// How the emulation has lost a guest that does not answer, where it has, by what QEMU in the nested host says and by the guest's
/// console after [`NestedHost::dump`].
fn emulation_failure(qemu_says: &str, console: &str) -> Option<BadBoot> {
    if qemu_says.contains(EXIT_DURING_DELIVERY) {
        Some(BadBoot::ExitDuringDelivery)
    } else {
        has_forced_interrupt(console).then_some(BadBoot::ForcedInterrupt)
    }
}

/// What one test came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It did what it should.
    Passed,
    /// What went wrong, for people.
    Failed(String),
}

/// Why the kernel cannot be the nested host's, where it cannot.
pub fn obstacle(env: &Env) -> Option<&'static str> {
    if !env.has_module("CONFIG_KVM_AMD") {
        return Some("it has no KVM for AMD's processors, which TCG emulates");
    }
    env.has_option("CONFIG_PREEMPT_RT").then_some(
        "KVM with PREEMPT_RT wants a processor that says that its TSC is constant, and TCG's does not",
    )
}

/// The names of the host tier's tests, in the order in which they run.
pub fn list(env: &Env) -> Result<Vec<String>> {
    let tests = upstream::tests(env)?;
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
            DRIVER_REMOVAL,
            GUEST_KERNEL_LOG,
            HOST_KERNEL_LOG,
        ]
        .map(str::to_owned),
    );
    Ok(names)
}

/// Runs the wanted tests in machines that it boots, and tells `report` of each in the order of [`list`].
///
/// An error means that the machines could not be brought up, so that there is nothing to say about the other tests.
pub fn run(env: &Env, options: &Options, report: &mut dyn FnMut(&str, Outcome)) -> Result<()> {
    let tests = upstream::tests(env)?;
    let mut wanted = BTreeMap::new();
    for role in Role::BOTH {
        let of_role = tests
            .iter()
            .filter(|test| (options.wanted)(&test.full_name(role)))
            .collect::<Vec<_>>();
        wanted.insert(role, of_role);
    }

    let mut machines = Machines::boot(env, options)?;
    for program in OTHER_PROGRAMS {
        for role in Role::BOTH {
            let name = other_name(program, role);
            if (options.wanted)(&name) {
                let ended = machines.attempt(
                    |host, guest| pair(host, guest, role).run_all_of(program),
                    Result::is_err,
                )?;
                report(
                    &name,
                    ended.map_or_else(Outcome::Failed, |()| Outcome::Passed),
                );
            }
        }
    }

    let mut failures: BTreeMap<(Role, u32), Vec<String>> = BTreeMap::new();
    let mut runs: BTreeMap<Role, u32> = BTreeMap::new();
    'rounds: for round in 1..=options.repeat {
        for (role, of_role) in &wanted {
            if of_role.is_empty() {
                continue;
            }
            let begun = Instant::now();
            let mut failed_before_loss = BTreeMap::new();
            let (mut failed, lost) = machines.attempt(
                |host, guest| {
                    let (failed, lost) = pair(host, guest, *role).run_tests(of_role);
                    let ended = failed.iter().filter(|(_, why)| !why.starts_with(NOT_ENDED));
                    failed_before_loss.extend(ended.map(|(id, why)| (*id, why.clone())));
                    (failed, lost)
                },
                |(_, lost)| *lost,
            )?;
            failed.extend(failed_before_loss);
            if options.repeat > 1 {
                eprintln!(
                    "run {round} of {}, {role}: {} of {} tests ok, {:.1} s",
                    options.repeat,
                    of_role.len() - failed.len(),
                    of_role.len(),
                    begun.elapsed().as_secs_f64()
                );
            }
            *runs.entry(*role).or_default() += 1;
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
    for (role, of_role) in &wanted {
        let runs = runs.get(role).copied().unwrap_or_default();
        for test in of_role {
            let outcome = match failures.get(&(*role, test.id)) {
                None if runs == options.repeat => Outcome::Passed,
                None => Outcome::Failed(format!(
                    "run {runs} of {} times: a machine was lost before",
                    options.repeat
                )),
                Some(texts) if options.repeat == 1 => Outcome::Failed(texts.join("\n")),
                Some(texts) => Outcome::Failed(format!(
                    "{} of {runs} runs failed\n{}",
                    texts.len(),
                    texts.join("\n")
                )),
            };
            report(&test.full_name(*role), outcome);
        }
    }

    if (options.wanted)(LIVE_MIGRATION) {
        let outcome = machines.attempt(
            |host, guest| migrate(host, guest, options),
            |outcome| *outcome != Outcome::Passed,
        )?;
        report(LIVE_MIGRATION, outcome);
    }

    let outcome = machines.attempt(
        |_, guest| remove_driver(guest),
        |outcome| *outcome != Outcome::Passed,
    )?;
    report(DRIVER_REMOVAL, outcome);
    for (name, faults) in machines.kernel_faults()? {
        let outcome = match faults.is_empty() {
            true => Outcome::Passed,
            false => Outcome::Failed(faults.join("\n")),
        };
        report(name, outcome);
    }
    Ok(())
}

/// The host and the guest, booted anew where the emulation of SVM has lost the guest.
struct Machines<'a> {
    env: &'a Env,
    spec: GuestSpec,
    host: NestedHost,
    guest: NestedGuest,
    boots_left: u32,
    /// What the kernels of machines that were given up had found, by the test that is their verdict.
    faults_of_lost: BTreeMap<&'static str, Vec<String>>,
}

impl<'a> Machines<'a> {
    fn boot(env: &'a Env, options: &Options) -> Result<Self> {
        let spec = GuestSpec {
            cid: 3,
            other_cid: Some(4),
            driver: options.driver,
        };
        let (host, guest) = boot_anew_if_bad(|| boot_once(env, spec))?;
        Ok(Self {
            env,
            spec,
            host,
            guest,
            boots_left: BOOTS_ANEW + options.repeat / RUNS_BETWEEN_LOST_GUESTS,
            faults_of_lost: BTreeMap::new(),
        })
    }

    /// Does something with them, and once more where it `has_failed` because the emulation has lost the guest.
    fn attempt<T>(
        &mut self,
        mut step: impl FnMut(&mut NestedHost, &mut NestedGuest) -> T,
        has_failed: impl Fn(&T) -> bool,
    ) -> Result<T> {
        loop {
            let result = step(&mut self.host, &mut self.guest);
            if !has_failed(&result) || !self.begin_anew_if_emulation_failed()? {
                return Ok(result);
            }
        }
    }

    /// Boots them anew if the guest does not answer, and QEMU or the guest's trace shows the emulation to be at fault; returns
    /// whether it did.
    fn begin_anew_if_emulation_failed(&mut self) -> Result<bool> {
        let answer = self.guest.agent.wait_ready(false, SIGN_OF_LIFE_LIMIT);
        if answer.is_ok() {
            return Ok(false);
        }
        let state = self.host.dump(&mut self.guest);
        let state = state.unwrap_or_else(|error| format!("{error:#}"));
        eprintln!("the guest does not answer; what QEMU says of it:\n{state}");
        let Some(why) = emulation_failure(&state, &read_log(&self.guest.console)) else {
            return Ok(false);
        };
        let Some(boots_left) = self.boots_left.checked_sub(1) else {
            return Ok(false);
        };
        println!("note: {why}; begun again");
        self.boots_left = boots_left;
        for (name, console) in consoles(&self.host, &self.guest) {
            let faults = kernel_faults(&console, without_hang)?;
            self.faults_of_lost.entry(name).or_default().extend(faults);
        }
        self.host.machine.switch_off();
        (self.host, self.guest) = boot_anew_if_bad(|| boot_once(self.env, self.spec))?;
        Ok(true)
    }

    /// What the kernels have found wrong, those that were given up included, by the test that is their verdict.
    fn kernel_faults(mut self) -> Result<Vec<(&'static str, Vec<String>)>> {
        let mut all_faults = Vec::new();
        for (name, console) in consoles(&self.host, &self.guest) {
            let mut faults = self.faults_of_lost.remove(name).unwrap_or_default();
            faults.extend(kernel_faults(&console, |log| log)?);
            all_faults.push((name, faults));
        }
        Ok(all_faults)
    }
}

fn boot_once(env: &Env, spec: GuestSpec) -> Result<(NestedHost, NestedGuest)> {
    let mut host = NestedHost::boot(env, &[spec], &env.run_dir("host_tier")?)?;
    let guest = host.start_guest(spec)?;
    Ok((host, guest))
}

/// The host and the guest, for a program of upstream's.
fn pair<'a>(host: &'a NestedHost, guest: &'a NestedGuest, role: Role) -> Pair<'a> {
    let host = Side {
        name: "host",
        agent: &host.machine.agent,
        cid: HOST_CID,
    };
    let spec = guest.spec;
    let guest = Side {
        name: "guest",
        agent: &guest.agent,
        cid: spec.cid,
    };
    match role {
        Role::GuestServer => Pair {
            server: guest,
            client: host,
            control_host: "127.0.0.1",
            control_port: spec.forwarded_port(),
            limit: RUN_LIMIT,
        },
        Role::GuestClient => Pair {
            server: host,
            client: guest,
            control_host: HOST_ADDRESS,
            control_port: spec.host_port(),
            limit: RUN_LIMIT,
        },
    }
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

/// The consoles of the machines, each with the test that is the verdict of its kernel.
fn consoles(host: &NestedHost, guest: &NestedGuest) -> [(&'static str, PathBuf); 2] {
    [
        (GUEST_KERNEL_LOG, guest.console.clone()),
        (HOST_KERNEL_LOG, host.machine.console.clone()),
    ]
}

/// What a machine's kernel has found wrong, in the part of its log that `part` takes.
fn kernel_faults(console: &Path, part: fn(&str) -> &str) -> Result<Vec<String>> {
    let text = fs::read(console).with_context(|| format!("reading {}", console.display()))?;
    let mut faults = faults(part(&String::from_utf8_lossy(&text)));
    if !faults.is_empty() {
        faults.push(format!("in {}", console.display()));
    }
    Ok(faults)
}

/// The log of before a processor hung: until others noticed, or the kernel was made to show where.
fn without_hang(log: &str) -> &str {
    const SIGNS: [&str; 3] = [
        "rcu: INFO:",
        "soft lockup",
        "Kernel panic - not syncing: NMI",
    ];
    let is_sign = |line: &&str| SIGNS.iter().any(|sign| line.contains(sign));
    let before = log.split_inclusive('\n').take_while(|line| !is_sign(line));
    &log[..before.map(str::len).sum()]
}

#[cfg(test)]
mod tests {
    use super::{has_forced_interrupt, without_hang};

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

    #[test]
    fn what_a_kernel_said_before_it_hung_counts() {
        for sign in [
            "watchdog: BUG: soft lockup - CPU#1 stuck for 26s!",
            "rcu: INFO: rcu_sched detected stalls on CPUs/tasks:",
            "Kernel panic - not syncing: NMI: Not continuing",
        ] {
            let log = format!("[ 1.0] WARNING: bad lock\n[ 2.0] {sign}\n[ 2.1] Call Trace:\n");
            assert_eq!(without_hang(&log), "[ 1.0] WARNING: bad lock\n");
        }
        assert_eq!(without_hang("nothing\nhangs"), "nothing\nhangs");
    }
}

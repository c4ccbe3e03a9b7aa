// SPDX-License-Identifier: GPL-2.0

//! vsock-selftest: boots machines with the driver and tests it as a user would.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`machine`] | a machine under QEMU |
//! | [`initramfs`] | what a machine boots into |
//! | [`systemd`] | systemd as a machine's process 1 |
//! | [`agent`], [`sockets`] | system calls in a machine |
//! | [`debugfs`] | what the driver counts in a machine |
//! | [`lab`] | what a test of the device tier works with |
//! | [`tests`] | the tests of the device tier: guests and a device in this process |
//! | [`host_tier`] | upstream's tests against the kernel's vhost-vsock, on a nested host |
//! | [`upstream`] | upstream's test programs on two machines |
//! | [`vmtest`] | upstream's vmtest.sh on a nested host |
//! | [`update_times`] | how long updates of CIDs take |
//! | [`instructions`] | how many instructions the guest executes for its data |
//! | [`perf`] | upstream's vsock_perf in a machine |
//! | [`qmp`] | QEMU's monitor |
//! | [`pattern`] | data that shows where it is from |
//! | [`runner`] | runs tests side by side and reports |
//! | [`demo`] | the main job, shown |

mod agent;
mod debugfs;
mod demo;
mod host_tier;
mod initramfs;
mod instructions;
mod lab;
mod machine;
#[path = "../../guest/src/pattern.rs"]
mod pattern;
mod perf;
mod qmp;
mod runner;
mod sockets;
mod systemd;
mod tests;
mod update_times;
mod upstream;
mod vmtest;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use anyhow::{ensure, Context, Result};
use clap::{Parser, Subcommand, ValueEnum};

use machine::Env;
use runner::Reporter;

/// Locks a mutex. What it guards stays consistent when a thread panics, so poison does not matter.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A driver of the socket device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Driver {
    /// virtio_vsock_rs
    Rs,
    /// vmw_vsock_virtio_transport, the kernel's
    C,
}

/// Boots machines with the driver and tests it as a user would.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The folder that set-up has filled
    #[arg(long, env = "VSOCK_CACHE")]
    cache: PathBuf,
    /// The release of the kernel; default: the only one in the cache
    #[arg(long, env = "KERNEL")]
    kernel: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Names all tests
    List,
    /// Runs tests
    Run {
        /// Run tests whose name has one of these in it; default: all
        filters: Vec<String>,
        /// How many tests of the device tier to run side by side
        #[arg(long, default_value_t = 2)]
        jobs: usize,
        /// The driver under test
        #[arg(long, value_enum, default_value_t = Driver::Rs)]
        driver: Driver,
        /// How many times to run each test
        #[arg(long, default_value_t = 1)]
        repeat: u32,
        /// How often a guest moves in the tests of migrations; default: a few times
        #[arg(long)]
        migrations: Option<u32>,
        /// What decides on random moments, as a test that failed has said; default: another one each time
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Runs upstream's vmtest.sh on nested hosts, one for each driver
    Vmtest {
        /// The drivers of the guests; the first is under test, others stand beside it
        #[arg(long = "driver", value_enum, default_values_t = [Driver::Rs, Driver::C])]
        drivers: Vec<Driver>,
        /// The hosts' disk, which `scripts/setup vmtest` makes
        #[arg(long)]
        disk: PathBuf,
        /// Tests of vmtest.sh; default: all
        tests: Vec<String>,
    },
    /// Shows the driver at work
    Demo,
    /// Compares the throughput of this driver with that of the C driver
    Bench {
        /// How many times to measure each
        #[arg(long, default_value_t = 3)]
        runs: u32,
    },
    /// Compares how many instructions a guest executes for its transfers with this driver and with the C driver
    BenchInstructions,
    /// Measures updates of the CIDs of up to 10,000 connections
    BenchUpdates {
        /// How many times to update so many
        #[arg(long, default_value_t = 5)]
        runs: u32,
    },
}

impl Arguments {
    fn env(&self) -> Result<Env> {
        let kernels = self.cache.join("kernel");
        let release = match &self.kernel {
            Some(release) if !release.is_empty() => release.clone(),
            _ => only_entry(&kernels)?,
        };
        let kernel = kernels.join(&release);
        ensure!(
            kernel.join("vmlinuz").exists(),
            "{} has no kernel; run make kernel-tree",
            kernel.display()
        );
        let programs = std::env::current_exe()?;
        let programs = programs.parent().context("this program is in no folder")?;
        let run = new_folder(&self.cache.join("run"), "")?;
        Ok(Env {
            vmlinuz: kernel.join("vmlinuz"),
            config: kernel.join("tree/.config"),
            modules: kernel.join("lib/modules").join(&release),
            upstream: kernel.join("upstream"),
            rs_module: kernel.join("module/virtio_vsock_rs.ko"),
            agent: programs.join("vsock-guest-agent"),
            device: programs.join("vsock-device"),
            forwarder: programs.join("vsock-forwarder"),
            run,
            accelerator: match std::env::var("VSOCK_ACCEL").as_deref() {
                Ok("kvm") => "kvm".to_owned(),
                _ => "tcg,thread=multi".to_owned(),
            },
            release,
            migrations: None,
            seed: fastrand::u64(..),
        })
    }
}

/// Makes a folder of a name that is not taken: `prefix` and a number.
///
/// The name is short because the path of a socket can have no more than 107 bytes.
fn new_folder(parent: &Path, prefix: &str) -> Result<PathBuf> {
    std::fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    for number in 1_u32.. {
        let folder = parent.join(format!("{prefix}{number}"));
        match std::fs::create_dir(&folder) {
            Ok(()) => return Ok(folder),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                return Err(error).with_context(|| format!("making {}", folder.display()))
            }
        }
    }
    anyhow::bail!("no number is left for a folder in {}", parent.display())
}

fn only_entry(folder: &Path) -> Result<String> {
    let entries = std::fs::read_dir(folder)
        .with_context(|| format!("looking for kernels in {}", folder.display()))?
        .collect::<std::io::Result<Vec<_>>>()?;
    ensure!(
        entries.len() == 1,
        "there are {} kernels in {}; say which with --kernel",
        entries.len(),
        folder.display()
    );
    Ok(entries[0].file_name().to_string_lossy().into_owned())
}

fn main() -> ExitCode {
    match carry_out(Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Does what was asked for; returns whether all went well.
fn carry_out(arguments: Arguments) -> Result<bool> {
    let mut env = arguments.env()?;
    let succeeded = match arguments.command {
        Command::List => {
            for test in tests::all(&env) {
                println!("{}", test.name);
            }
            if host_tier::obstacle(&env).is_none() {
                for name in host_tier::list(&env)? {
                    println!("{name}");
                }
            }
            true
        }
        Command::Run {
            filters,
            jobs,
            driver,
            repeat,
            migrations,
            seed,
        } => {
            env.migrations = migrations;
            env.seed = seed.unwrap_or(env.seed);
            run(&env, &filters, jobs, driver, repeat)?
        }
        Command::Vmtest {
            drivers,
            disk,
            tests,
        } => vmtest::run(&env, &disk, &drivers, &tests)?,
        Command::Demo => demo::run(&env)?,
        Command::Bench { runs } => {
            let table = host_tier::bench(&env, runs, &mut |progress| eprintln!("  {progress}"))?;
            println!("{table}");
            true
        }
        Command::BenchInstructions => {
            let counts = instructions::bench(&env, &mut |progress| eprintln!("  {progress}"))?;
            println!("{counts}");
            true
        }
        Command::BenchUpdates { runs } => {
            println!("{}", update_times::bench(&env, runs)?);
            true
        }
    };
    if succeeded {
        // What is of use is in the tests' output; after a failure the folders stay.
        let _ = std::fs::remove_dir_all(&env.run);
    }
    Ok(succeeded)
}

/// Runs the tests that match; returns whether all passed.
fn run(env: &Env, filters: &[String], jobs: usize, driver: Driver, repeat: u32) -> Result<bool> {
    let wanted = |name: &str| {
        filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()))
    };
    let reporter = Reporter::new(driver, "make test TESTS=");
    let mut selected = tests::all(env);
    selected.retain(|test| wanted(test.name));
    for _ in 0..repeat {
        runner::run(env, driver, &selected, jobs, &reporter);
    }
    let is_host_tier_wanted = host_tier::list(env)?.iter().any(|name| wanted(name));
    if let (true, Some(why)) = (is_host_tier_wanted, host_tier::obstacle(env)) {
        println!("note: no host tier on this kernel: {why}");
    } else if is_host_tier_wanted {
        let options = host_tier::Options {
            driver,
            wanted: &wanted,
            repeat,
            migrations: env.migrations.unwrap_or(host_tier::DEFAULT_MIGRATIONS),
        };
        run_host_tier(env, &options, &reporter);
    }
    let tally = reporter.tally();
    println!("{tally}");
    Ok(tally.failed == 0)
}

fn run_host_tier(env: &Env, options: &host_tier::Options, reporter: &Reporter) {
    let begun = Instant::now();
    let result = host_tier::run(env, options, &mut |name, outcome| match outcome {
        host_tier::Outcome::Passed => reporter.passed(name, begun),
        host_tier::Outcome::Failed(why) => reporter.failed(name, begun, &why),
    });
    if let Err(error) = result {
        reporter.failed("host_tier", begun, &format!("{error:#}"));
    }
}

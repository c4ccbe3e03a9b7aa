// SPDX-License-Identifier: GPL-2.0

//! Runs tests side by side and says what they came to.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{anyhow, Result};

use crate::lab::Lab;
use crate::machine::{check_log, Env};
use crate::Driver;

/// A test of the device tier: its name, and what it does.
pub struct Test {
    pub name: &'static str,
    pub run: fn(&Lab) -> Result<()>,
}

/// How many lines of a console are shown for a failure.
const CONSOLE_LINES: usize = 15;

/// Passed and failed tests.
#[derive(Clone, Copy, Default)]
pub struct Tally {
    pub passed: usize,
    pub failed: usize,
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

/// Says what tests came to, as they end.
pub struct Reporter {
    tally: Mutex<Tally>,
    driver: Driver,
    /// What runs a test whose name follows.
    command: &'static str,
}

impl Reporter {
    pub fn new(driver: Driver, command: &'static str) -> Self {
        Self {
            tally: Mutex::default(),
            driver,
            command,
        }
    }

    pub fn passed(&self, name: &str, begun: Instant) {
        crate::lock(&self.tally).passed += 1;
        println!("ok      {:6.1} s  {name}", begun.elapsed().as_secs_f64());
    }

    pub fn failed(&self, name: &str, begun: Instant, why: &str) {
        crate::lock(&self.tally).failed += 1;
        let driver = match self.driver {
            Driver::Rs => "",
            Driver::C => " (with the C driver)",
        };
        let why = why.replace('\n', "\n        ");
        println!(
            "FAILED  {:6.1} s  {name}{driver}\n        {why}\n        again: {}{name}",
            begun.elapsed().as_secs_f64(),
            self.command
        );
    }

    pub fn tally(&self) -> Tally {
        *crate::lock(&self.tally)
    }
}

/// Runs tests, `jobs` at a time.
pub fn run(env: &Env, driver: Driver, tests: &[&Test], jobs: usize, reporter: &Reporter) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                while let Some(test) = tests.get(next.fetch_add(1, Ordering::Relaxed)) {
                    run_one(env, driver, test, reporter);
                }
            });
        }
    });
}

fn run_one(env: &Env, driver: Driver, test: &Test, reporter: &Reporter) {
    let begun = Instant::now();
    let lab = match Lab::new(env, driver, test.name) {
        Ok(lab) => lab,
        Err(error) => return reporter.failed(test.name, begun, &format!("{error:#}")),
    };
    let result = catch_unwind(AssertUnwindSafe(|| (test.run)(&lab)))
        .unwrap_or_else(|panic| Err(anyhow!("the test panicked: {}", panic_text(&*panic))))
        .and_then(|()| lab.check_machines())
        .and_then(|()| check_logs(&lab));
    match result {
        Ok(()) => {
            lab.remove_files();
            reporter.passed(test.name, begun);
        }
        Err(error) => {
            let consoles = lab.consoles();
            let tails = consoles
                .iter()
                .map(|console| tail(console))
                .collect::<String>();
            reporter.failed(test.name, begun, &format!("{error:#}{tails}"));
        }
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("without a word")
}

/// The verdict of the machines' kernels.
fn check_logs(lab: &Lab) -> Result<()> {
    for console in lab.consoles() {
        let log = std::fs::read(&console)?;
        check_log(
            &console.display().to_string(),
            &String::from_utf8_lossy(&log),
        )?;
    }
    Ok(())
}

/// The last lines of a console, for a message.
pub fn tail(console: &Path) -> String {
    let log = std::fs::read(console).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<_> = log.lines().collect();
    let last = &lines[lines.len().saturating_sub(CONSOLE_LINES)..];
    format!(
        "\nthe end of {}:\n  {}",
        console.display(),
        last.join("\n  ")
    )
}

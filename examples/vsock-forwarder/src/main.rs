// SPDX-License-Identifier: GPL-2.0

//! vsock-forwarder: forwards what is appended to a guest's file, or comes from its journal, to a collector on its host.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`agent`] | the program in the guest: sends, and connects again |
//! | [`policy`] | when it connects again: at once after a migration, later each time where the collector is gone |
//! | [`migration`] | what the driver tells of migrations |
//! | [`outbox`] | what was read and is not acknowledged yet |
//! | [`source`] | the file, or standard input |
//! | [`status`] | what the agent answers to requests |
//! | [`collector`] | the program on the host: stores, then acknowledges |
//! | [`store`] | what it has stored |
//! | [`message`] | what they say to each other |
//! | [`endpoint`] | where, over AF_VSOCK or a Unix socket |

mod agent;
mod collector;
mod endpoint;
mod message;
mod migration;
mod outbox;
mod policy;
mod source;
mod status;
mod store;

use std::process::ExitCode;

use clap::Parser;

/// Forwards a guest's file or journal to its host over AF_VSOCK.
#[derive(Parser)]
#[command(version)]
enum Arguments {
    /// Runs in the guest: forwards a file that grows, or standard input
    Agent(agent::Options),
    /// Runs on the host: stores what agents send, and acknowledges what is safe on the disk
    Collect(collector::Options),
}

fn main() -> ExitCode {
    let result = match Arguments::parse() {
        Arguments::Agent(options) => agent::run(options),
        Arguments::Collect(options) => collector::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vsock-forwarder: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Locks a mutex. What it guards stays consistent when a thread panics, so poison does not matter.
fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

// SPDX-License-Identifier: GPL-2.0

//! What the agent answers to requests: a line `status` gets a line of JSON.

use std::io::{BufRead, BufReader, Read, Write};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use socket2::Socket;

use crate::lock;

/// The longest request, in bytes.
const MAX_REQUEST: u64 = 64;

/// How long a request may take to come, and its answer to go.
const LIMIT: Duration = Duration::from_secs(10);

/// How the agent is, and what it has decided so far.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Status {
    pub stream: String,
    pub boot: String,
    /// The driver's generation when the present connection was begun; `null` where the driver does not count.
    pub generation: Option<u64>,
    pub connected: bool,
    /// How much of the stream the collector has, in bytes.
    pub acknowledged: u64,
    /// How much was sent again after a failure, in bytes.
    pub resent: u64,
    pub retries: Retries,
    pub starts: Starts,
    pub last_failure: Option<String>,
}

/// How often the agent has decided what after a failure.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Retries {
    /// A migration: at once.
    pub at_once: u64,
    /// The collector is gone: later.
    pub after_a_wait: u64,
}

/// How often the agent has begun to send where.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Starts {
    pub new: u64,
    pub resume: u64,
    pub after_reboot: u64,
}

/// Answers requests for ever.
pub fn serve(listener: &Socket, status: &Arc<Mutex<Status>>) {
    loop {
        match listener.accept() {
            Ok((socket, _)) => {
                let status = status.clone();
                thread::spawn(move || {
                    if let Err(error) = answer(&socket, &status) {
                        eprintln!("vsock-forwarder: a request: {error:#}");
                    }
                });
            }
            Err(error) => {
                eprintln!("vsock-forwarder: waiting for requests: {error}");
                // Whatever is short may be there later.
                thread::sleep(Duration::from_secs(1));
            }
        }
    }
}

fn answer(mut socket: &Socket, status: &Mutex<Status>) -> Result<()> {
    socket.set_read_timeout(Some(LIMIT))?;
    socket.set_write_timeout(Some(LIMIT))?;
    let mut request = String::new();
    BufReader::new(socket.take(MAX_REQUEST))
        .read_line(&mut request)
        .context("reading it")?;
    let mut answer = match request.trim_end() {
        "status" => serde_json::to_string(&*lock(status))?,
        other => serde_json::json!({"error": format!("{other:?} is no request")}).to_string(),
    };
    answer.push('\n');
    socket.write_all(answer.as_bytes()).context("answering it")
}

// SPDX-License-Identifier: GPL-2.0

//! vsock-guest-agent: makes system calls in a guest, for tests outside of it.
//!
//! It reads requests from the virtio port that its argument names, a JSON object a line,
//! `{"id": 1, "method": "connect", "params": {...}}`, and answers each with `{"id": 1, "ok": ...}` or, where the system
//! call failed, `{"id": 1, "error": "ECONNRESET"}`. Each request has a thread of its own, so that one that blocks holds up
//! no other: a test can see that a call blocks, and what ends it. `calls.rs` has the methods.

mod calls;
mod messages;
mod observe;
mod pattern;
mod sender;
mod sys;
mod waiting;
mod zerocopy;

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{json, Value};

#[derive(Deserialize)]
struct Request {
    id: u64,
    method: String,
    #[serde(default)]
    params: Value,
}

fn main() -> Result<()> {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    // On a serial port what comes before the agent listens is lost, so there it says when it does.
    let announce = words.first().is_some_and(|word| word == "--announce");
    let path = words
        .drain(usize::from(announce)..)
        .next()
        .context("usage: vsock-guest-agent [--announce] PORT, the device of a port")?;
    let port = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("opening {path}"))?;
    let answers = Arc::new(Mutex::new(port.try_clone()?));
    if announce {
        writeln!(&port, "{}", json!({"ready": true})).context("saying that the agent is ready")?;
    }
    for line in BufReader::new(port).lines() {
        let line = line.context("reading a request")?;
        let request: Request =
            serde_json::from_str(&line).with_context(|| format!("the request {line:?}"))?;
        let answers = answers.clone();
        std::thread::Builder::new()
            .stack_size(256 * 1024)
            .spawn(move || answer(&request, &answers))
            .context("starting a thread")?;
    }
    Ok(())
}

fn answer(request: &Request, answers: &Mutex<File>) {
    let mut answer = match calls::call(&request.method, &request.params) {
        Ok(value) => json!({"id": request.id, "ok": value}),
        Err(error) => json!({"id": request.id, "error": sys::describe(&error)}),
    }
    .to_string();
    answer.push('\n');
    let mut port = answers
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    // Without the port there is nobody to tell.
    let _ = port.write_all(answer.as_bytes());
}

// SPDX-License-Identifier: GPL-2.0

//! Our end of the agent in a machine: system calls there, as calls here.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure, Context, Result};
use serde::de::DeserializeOwned;
use serde::Deserialize;
use serde_json::{json, Value};

use crate::lock;

/// Why a call has no result.
#[derive(Debug)]
pub enum CallError {
    /// The system call failed with this.
    Errno(String),
    /// There was no answer.
    Lost(anyhow::Error),
}

impl std::fmt::Display for CallError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CallError::Errno(name) => write!(f, "{name}"),
            CallError::Lost(error) => write!(f, "{error:#}"),
        }
    }
}

impl std::error::Error for CallError {}

/// What the agent says of a call: its result, or the name of an error.
type Answer = Result<Value, String>;

type Waiting = Arc<Mutex<HashMap<u64, Sender<Answer>>>>;

/// The id under which an agent's announcement is waited for; no call has it.
const READY: u64 = 0;

/// The id of the next call. No two calls have the same one: an agent of a machine that hibernated answers calls of before.
static NEXT_ID: AtomicU64 = AtomicU64::new(READY + 1);

/// The agent in a machine. Calls may run side by side.
pub struct Agent {
    port: Mutex<UnixStream>,
    waiting: Waiting,
    ready: Mutex<Pending>,
}

/// A call that was begun.
pub struct Pending {
    what: String,
    answer: Receiver<Answer>,
}

impl Pending {
    /// Waits for the result.
    pub fn wait<T: DeserializeOwned>(self, limit: Duration) -> Result<T, CallError> {
        let value = self.wait_for(limit)?;
        serde_json::from_value(value).map_err(|error| CallError::Lost(error.into()))
    }

    /// The result, where there is one yet.
    pub fn poll<T: DeserializeOwned>(&self) -> Result<Option<T>, CallError> {
        match self.answer.try_recv() {
            Ok(answer) => {
                let value = answer.map_err(CallError::Errno)?;
                serde_json::from_value(value)
                    .map(Some)
                    .map_err(|error| CallError::Lost(error.into()))
            }
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(CallError::Lost(anyhow!(
                "the machine went away during {}",
                self.what
            ))),
        }
    }

    fn wait_for(&self, limit: Duration) -> Result<Value, CallError> {
        let answer = self.answer.recv_timeout(limit).map_err(|error| {
            CallError::Lost(match error {
                RecvTimeoutError::Timeout => {
                    anyhow!("waited {} s for {}", limit.as_secs(), self.what)
                }
                RecvTimeoutError::Disconnected => {
                    anyhow!("the machine went away during {}", self.what)
                }
            })
        })?;
        answer.map_err(CallError::Errno)
    }

    /// That the call does not end for a while.
    pub fn expect_blocked(&self, time: Duration) -> Result<()> {
        match self.answer.recv_timeout(time) {
            Ok(answer) => Err(anyhow!(
                "{} ended with {answer:?} instead of blocking",
                self.what
            )),
            Err(RecvTimeoutError::Timeout) => Ok(()),
            Err(RecvTimeoutError::Disconnected) => {
                Err(anyhow!("the machine went away during {}", self.what))
            }
        }
    }
}

impl Agent {
    /// The name of the agent's virtio port.
    pub const PORT_NAME: &'static str = "agent";

    /// Connects to the socket of an agent's port, which QEMU may yet have to make; gives up when `check` fails.
    pub fn attach(
        socket: &Path,
        limit: Duration,
        mut check: impl FnMut() -> Result<()>,
    ) -> Result<Self> {
        let end = Instant::now() + limit;
        let port = loop {
            check()?;
            match UnixStream::connect(socket) {
                Ok(port) => break port,
                Err(error) if Instant::now() > end => {
                    return Err(error)
                        .with_context(|| format!("connecting to {}", socket.display()));
                }
                // There is no event to wait for: QEMU has not made the socket.
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        let waiting = Waiting::default();
        let (sender, answer) = channel();
        lock(&waiting).insert(READY, sender);
        let ready = Pending {
            what: "the agent to be ready".to_owned(),
            answer,
        };
        let (answers, reader) = (waiting.clone(), port.try_clone()?);
        std::thread::spawn(move || {
            for line in BufReader::new(reader).lines().map_while(Result::ok) {
                deliver(&line, &answers);
            }
            // Whoever waits learns that nothing comes any more.
            lock(&answers).clear();
        });
        Ok(Self {
            port: Mutex::new(port),
            waiting,
            ready: Mutex::new(ready),
        })
    }

    /// Waits until the agent answers; of one that announces itself, until it has.
    pub fn wait_ready(&self, announces: bool, limit: Duration) -> Result<()> {
        if announces {
            lock(&self.ready).wait_for(limit)?;
        } else {
            sh_ok(self, "true", limit)?;
        }
        Ok(())
    }

    /// Begins a call.
    pub fn start(&self, method: &str, params: Value) -> Pending {
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = channel();
        let what = format!("{method} {params}");
        let mut request = json!({"id": id, "method": method, "params": params}).to_string();
        request.push('\n');
        lock(&self.waiting).insert(id, sender);
        if lock(&self.port).write_all(request.as_bytes()).is_err() {
            // The machine is gone; waiting says so.
            lock(&self.waiting).remove(&id);
        }
        Pending { what, answer }
    }

    /// Makes a call and waits for its result.
    pub fn call<T: DeserializeOwned>(
        &self,
        method: &str,
        params: Value,
        limit: Duration,
    ) -> Result<T, CallError> {
        self.start(method, params).wait(limit)
    }
}

fn deliver(line: &str, waiting: &Waiting) {
    let Ok(mut answer) = serde_json::from_str::<Value>(line) else {
        return;
    };
    let id = match answer["id"].as_u64() {
        Some(id) => id,
        None if answer["ready"] == true => READY,
        None => return,
    };
    let result = match answer.get("error").and_then(Value::as_str) {
        Some(error) => Err(error.to_owned()),
        None => Ok(answer["ok"].take()),
    };
    if let Some(waiter) = lock(waiting).remove(&id) {
        // The waiter may have given up.
        let _ = waiter.send(result);
    }
}

/// What a script came to.
#[derive(Debug, Default, Deserialize)]
pub struct Ended {
    pub status: i32,
    pub output: String,
}

/// Runs a script in the machine's shell.
pub fn sh(agent: &Agent, script: &str, limit: Duration) -> Result<Ended> {
    Ok(agent.call("sh", json!({"script": script}), limit)?)
}

/// Runs a script that has to succeed, and gives what it printed.
pub fn sh_ok(agent: &Agent, script: &str, limit: Duration) -> Result<String> {
    let Ended { status, output } = sh(agent, script, limit)?;
    ensure!(
        status == 0,
        "{script:?} ended with status {status}: {output}"
    );
    Ok(output)
}

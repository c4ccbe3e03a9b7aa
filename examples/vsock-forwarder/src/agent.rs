// SPDX-License-Identifier: GPL-2.0

//! The program in the guest. One thread reads the source into the outbox; one sends what is there, and makes a connection
//! again and again; with each connection, one takes the acknowledgements.

use std::io::BufReader;
use std::net::Shutdown;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use anyhow::{anyhow, Context, Result};
use clap::Args;
use socket2::Socket;

use crate::endpoint::Endpoint;
use crate::lock;
use crate::message::{self, FromAgent, FromCollector, MAX_PAYLOAD};
use crate::migration::Migrations;
use crate::outbox::Outbox;
use crate::policy::{Generation, Policy, Retry, Start};
use crate::source::Source;
use crate::status::{self, Status};

/// The kernel's name for this boot of the guest.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

#[derive(Args)]
pub struct Options {
    /// The file to forward, or - for standard input; from its beginning, which does not change while the guest is up
    source: PathBuf,
    /// Where the collector listens: vsock:CID:PORT or unix:PATH
    #[arg(long, default_value = "vsock:2:9000")]
    to: Endpoint,
    /// The name under which the collector stores it: letters, digits, - and _
    #[arg(long)]
    stream: String,
    /// Where to answer requests for the status: vsock:PORT or unix:PATH; default: nowhere
    #[arg(long)]
    status: Option<Endpoint>,
    /// The driver's folder in sysfs, which tells of migrations
    #[arg(long, default_value = "/sys/bus/virtio/drivers/virtio_vsock_rs")]
    driver: PathBuf,
}

pub fn run(options: Options) -> Result<()> {
    let boot = std::fs::read_to_string(BOOT_ID).with_context(|| format!("reading {BOOT_ID}"))?;
    let boot = boot.trim().to_owned();
    let source = Source::open(&options.source)?;
    let status = Arc::new(Mutex::new(Status {
        stream: options.stream.clone(),
        boot: boot.clone(),
        ..Status::default()
    }));
    if let Some(endpoint) = &options.status {
        let (listener, status) = (endpoint.listen()?, status.clone());
        thread::spawn(move || status::serve(&listener, &status));
    }
    let migrations = Migrations::of(options.driver)?;
    let mut agent = Agent {
        to: options.to,
        stream: options.stream,
        boot,
        source: Some(source),
        shared: Arc::new(Shared {
            flow: Mutex::default(),
            changed: Condvar::new(),
            status,
        }),
    };
    let mut policy = Policy::default();
    loop {
        let begun = migrations.generation();
        let acknowledged = lock(&agent.shared.flow).outbox.acknowledged();
        let failure = match agent.session(begun) {
            Ok(()) => return Ok(()),
            Err(End::Fatal(error)) => return Err(error),
            Err(End::Lost(error)) => format!("{error:#}"),
        };
        if lock(&agent.shared.flow).outbox.acknowledged() > acknowledged {
            policy.encouraged();
        }
        let now = migrations.generation();
        let retry = policy.failed(begun, now, fastrand::f64());
        agent.shared.note_failure(&failure, retry);
        if let Retry::After(time) = retry {
            if migrations.wait(now, time)? {
                policy.encouraged();
                agent
                    .shared
                    .note_failure("waited until a migration", Retry::AtOnce);
            }
        }
    }
}

/// Why a connection is over.
enum End {
    /// It was lost, or could not be made: there can be another one.
    Lost(anyhow::Error),
    /// Another one would not help.
    Fatal(anyhow::Error),
}

struct Agent {
    to: Endpoint,
    stream: String,
    boot: String,
    /// Until the collector has said where it is to be read from.
    source: Option<Source>,
    shared: Arc<Shared>,
}

/// What the threads share.
struct Shared {
    flow: Mutex<Flow>,
    changed: Condvar,
    status: Arc<Mutex<Status>>,
}

#[derive(Default)]
struct Flow {
    outbox: Outbox,
    /// How reading the source has ended.
    source_end: Option<Result<()>>,
    /// How the present connection has ended.
    end: Option<End>,
}

impl Agent {
    /// Makes a connection and sends all that there is; ends well where the source has ended and all of it is acknowledged.
    fn session(&mut self, generation: Generation) -> Result<(), End> {
        let socket = self.to.connect().map_err(End::Lost)?;
        let mut answers = BufReader::new(
            socket
                .try_clone()
                .map_err(|error| End::Fatal(error.into()))?,
        );
        let hello = FromAgent::Hello {
            stream: self.stream.clone(),
            boot: self.boot.clone(),
        };
        message::write(&socket, &hello, &[]).map_err(End::Lost)?;
        let (boot, offset) = match message::read(&mut answers).map_err(End::Lost)? {
            Some(FromCollector::Welcome { boot, offset }) => (boot, offset),
            Some(other) => return Err(unexpected(other)),
            None => {
                return Err(End::Lost(anyhow!(
                    "the collector has closed the connection"
                )))
            }
        };
        self.begin(offset).map_err(End::Fatal)?;
        let start = Start::decide(&self.boot, boot.as_deref());
        self.shared.note_connected(generation, start);

        let shared = &*self.shared;
        thread::scope(|scope| {
            scope.spawn(move || shared.take_answers(&mut answers));
            let result = shared.send(&socket);
            // Ends the other thread.
            let _ = socket.shutdown(Shutdown::Both);
            result
        })
    }

    /// Begins or goes on where the collector's part of the stream ends.
    fn begin(&mut self, offset: u64) -> Result<()> {
        let mut flow = lock(&self.shared.flow);
        flow.end = None;
        let Some(mut source) = self.source.take() else {
            return flow.outbox.resume(offset);
        };
        source.skip(offset)?;
        flow.outbox = Outbox::starting_at(offset);
        let shared = self.shared.clone();
        thread::spawn(move || {
            let result = shared.read_source(&mut source);
            lock(&shared.flow).source_end = Some(result);
            shared.changed.notify_all();
        });
        Ok(())
    }
}

impl Shared {
    fn read_source(&self, source: &mut Source) -> Result<()> {
        let mut buffer = vec![0; MAX_PAYLOAD];
        loop {
            let room = self.wait(|flow| Some(flow.outbox.room()).filter(|room| *room > 0));
            let len = source.read(&mut buffer[..room.min(MAX_PAYLOAD)])?;
            if len == 0 {
                return Ok(());
            }
            lock(&self.flow).outbox.push(&buffer[..len]);
            self.changed.notify_all();
        }
    }

    fn send(&self, socket: &Socket) -> Result<(), End> {
        loop {
            let next = self.wait(|flow| {
                if let Some(end) = flow.end.take() {
                    return Some(Err(end));
                }
                let (offset, part) = flow.outbox.take(MAX_PAYLOAD);
                if !part.is_empty() {
                    return Some(Ok(Some((offset, part))));
                }
                match flow.source_end.take_if(|end| end.is_err()) {
                    Some(Err(error)) => return Some(Err(End::Fatal(error))),
                    _ if flow.source_end.is_none() => return None,
                    _ => {}
                }
                (flow.outbox.acknowledged() == flow.outbox.end()).then_some(Ok(None))
            });
            let Some((offset, part)) = next? else {
                return Ok(());
            };
            let len = part.len();
            message::write(socket, &FromAgent::Data { offset, len }, &part).map_err(End::Lost)?;
        }
    }

    /// Takes the acknowledgements of a connection until it ends.
    fn take_answers(&self, answers: &mut BufReader<Socket>) {
        let end = loop {
            match message::read(answers) {
                Ok(Some(FromCollector::Stored { offset })) => {
                    let acknowledged = lock(&self.flow).outbox.acknowledge(offset);
                    if let Err(error) = acknowledged {
                        break End::Fatal(error);
                    }
                    self.changed.notify_all();
                    self.show_progress();
                }
                Ok(Some(other)) => break unexpected(other),
                Ok(None) => break End::Lost(anyhow!("the collector has closed the connection")),
                Err(error) => break End::Lost(error),
            }
        };
        lock(&self.flow).end = Some(end);
        self.changed.notify_all();
    }

    /// Waits until there is something in the flow.
    fn wait<T>(&self, mut find: impl FnMut(&mut Flow) -> Option<T>) -> T {
        let mut flow = lock(&self.flow);
        loop {
            if let Some(found) = find(&mut flow) {
                return found;
            }
            flow = self
                .changed
                .wait(flow)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    fn show_progress(&self) {
        let flow = lock(&self.flow);
        let mut status = lock(&self.status);
        status.acknowledged = flow.outbox.acknowledged();
        status.resent = flow.outbox.resent();
    }

    fn note_connected(&self, generation: Generation, start: Start) {
        self.show_progress();
        let mut status = lock(&self.status);
        status.generation = generation;
        status.connected = true;
        match start {
            Start::New => status.starts.new += 1,
            Start::Resume => status.starts.resume += 1,
            Start::AfterReboot => status.starts.after_reboot += 1,
        }
        eprintln!(
            "vsock-forwarder: connected at generation {generation:?}: {start:?}, from byte {}",
            status.acknowledged
        );
    }

    fn note_failure(&self, failure: &str, retry: Retry) {
        let mut status = lock(&self.status);
        status.connected = false;
        status.last_failure = Some(failure.to_owned());
        match retry {
            Retry::AtOnce => {
                status.retries.at_once += 1;
                eprintln!("vsock-forwarder: {failure}; there was a migration: again at once");
            }
            Retry::After(time) => {
                status.retries.after_a_wait += 1;
                eprintln!(
                    "vsock-forwarder: {failure}; again in {} ms",
                    time.as_millis()
                );
            }
        }
    }
}

fn unexpected(answer: FromCollector) -> End {
    End::Lost(match answer {
        FromCollector::Refused { reason } => anyhow!("the collector refuses: {reason}"),
        other => anyhow!("the collector has answered {other:?}"),
    })
}

// SPDX-License-Identifier: GPL-2.0

//! A program of the host that stands between the device and one that knows nothing of migrations: the connections of the
//! guest to a port are passed on to its Unix socket, and carried over to another device when the guest moves.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use anyhow::{Context, Result};
use vsock_device::bridge;

use super::traffic::{is_stopped, Working};
use crate::lab::{host_listener, restore, Guest, LIMIT};

/// How much is passed on at once, in bytes.
const PART: usize = 32 * 1024;

/// Carries the connections to one port.
pub struct Carrier {
    port: u32,
    working: Option<Working<Desk>>,
}

/// What the carrier has to do with.
struct Desk {
    listener: UnixListener,
    /// The Unix socket of the program behind it.
    program: PathBuf,
    connections: Vec<Carried>,
}

/// A connection, and what was read of either end and not passed on yet.
struct Carried {
    guest_port: u32,
    of_guest: UnixStream,
    of_program: UnixStream,
    for_guest: Vec<u8>,
    for_program: Vec<u8>,
}

impl Carrier {
    /// Serves a port of the host to the guest of the device at `uds`, for the program that listens on `program`.
    pub fn start(uds: &Path, port: u32, program: &Path) -> Result<Self> {
        let desk = Desk {
            listener: host_listener(uds, port)?,
            program: program.to_owned(),
            connections: Vec::new(),
        };
        Ok(Self {
            port,
            working: Some(desk.begin()),
        })
    }

    /// Carries all connections over to the device at `uds`, after the guest's has stopped; returns how many they are.
    pub fn move_to(&mut self, guest: &Guest, uds: &Path) -> Result<usize> {
        let working = self.working.take().context("the carrier has ended")?;
        let mut desk = working.end()?;
        for connection in &mut desk.connections {
            connection.move_to(guest, uds, self.port)?;
        }
        let carried = desk.connections.len();
        desk.listener = host_listener(uds, self.port)?;
        self.working = Some(desk.begin());
        Ok(carried)
    }
}

impl Desk {
    fn begin(self) -> Working<Self> {
        Working::begin(move |stop| self.work(stop).context("the carrier"))
    }

    fn work(mut self, stop: &Receiver<()>) -> Result<Self> {
        self.listener.set_nonblocking(true)?;
        while !is_stopped(stop) {
            let mut was_idle = true;
            match self.listener.accept() {
                Ok((of_guest, _)) => {
                    self.connections
                        .push(Carried::new(of_guest, &self.program)?);
                    was_idle = false;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("waiting for the guest"),
            }
            // A connection that has ended at one end ends at the other one.
            self.connections.retain_mut(|connection| {
                let passed_on = connection.pass_on();
                was_idle &= !matches!(passed_on, Ok(true));
                passed_on.is_ok()
            });
            if was_idle {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(self)
    }
}

impl Carried {
    fn new(of_guest: UnixStream, program: &Path) -> Result<Self> {
        let guest_port = bridge::guest_port(&of_guest);
        let of_program = UnixStream::connect(program)
            .with_context(|| format!("connecting to {}", program.display()))?;
        of_guest.set_nonblocking(true)?;
        of_program.set_nonblocking(true)?;
        Ok(Self {
            guest_port: guest_port.context("the guest's connection has no port")?,
            of_guest,
            of_program,
            for_guest: Vec::new(),
            for_program: Vec::new(),
        })
    }

    /// Passes on what there is; returns whether there was something. An error where either end has ended.
    fn pass_on(&mut self) -> std::io::Result<bool> {
        let for_guest = pass_on(&self.of_program, &self.of_guest, &mut self.for_guest)?;
        let for_program = pass_on(&self.of_guest, &self.of_program, &mut self.for_program)?;
        Ok(for_guest || for_program)
    }

    /// Reads to the end of its socket, asks for the state, and goes on with another socket.
    fn move_to(&mut self, guest: &Guest, uds: &Path, port: u32) -> Result<()> {
        self.of_guest.set_nonblocking(false)?;
        self.of_guest.set_read_timeout(Some(LIMIT))?;
        let state = guest.checkpoint_while(port, self.guest_port, || {
            self.of_guest.read_to_end(&mut self.for_program)?;
            Ok(())
        })?;
        self.of_guest = restore(uds, &state)?;
        self.of_guest.set_nonblocking(true)?;
        Ok(())
    }
}

/// Passes on what `waiting` has and what comes from an end; returns whether there was something.
fn pass_on(
    mut from: &UnixStream,
    mut to: &UnixStream,
    waiting: &mut Vec<u8>,
) -> std::io::Result<bool> {
    if waiting.is_empty() {
        let mut buffer = [0; PART];
        match from.read(&mut buffer) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(len) => waiting.extend(&buffer[..len]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    match to.write(waiting) {
        Ok(len) => {
            waiting.drain(..len);
            Ok(len > 0)
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

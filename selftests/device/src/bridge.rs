// SPDX-License-Identifier: GPL-2.0

//! The host's side of connections, on Unix sockets.
//!
//! - A program of the host connects to `<path>` and writes `CONNECT <port>\n`. When the guest's listener has accepted it
//!   reads `OK <port of the host>\n`, and then the socket is the connection. Where nobody listens it is closed.
//! - A guest's connection to port P of CID 2 becomes one to `<path>_<P>`, and is refused where nobody listens there.
//!
//! Each connection has a thread for either direction, so that a slow one holds up nobody else.

use std::collections::{HashMap, VecDeque};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread;

use anyhow::{Context, Result};

use crate::device::{lock, Shared};
use crate::packet::{Op, Packet, SHUTDOWN_RCV, SHUTDOWN_SEND, TYPE_STREAM};
use crate::HOST_CID;

/// Receive buffer of each connection, in bytes.
const BUF_ALLOC: u32 = 256 * 1024;

/// The largest payload of a packet, in bytes.
const MAX_PAYLOAD: usize = 64 * 1024;

/// The first port that connections of the host are from.
const FIRST_PORT: u32 = 1 << 30;

/// The longest first line of a program of the host, in bytes.
const MAX_LINE: usize = 64;

/// Ports of a connection: the guest's, the host's.
type Key = (u32, u32);

/// The host, as one guest sees it.
pub struct Bridge {
    path: PathBuf,
    device: Weak<Shared>,
    connections: Mutex<Connections>,
    stopped: AtomicBool,
}

#[derive(Default)]
struct Connections {
    open: HashMap<Key, Arc<Connection>>,
    last_port: u32,
}

/// One connection.
struct Connection {
    key: Key,
    stream: UnixStream,
    state: Mutex<ConnectionState>,
    changed: Condvar,
}

#[derive(Default)]
struct ConnectionState {
    /// Whether the guest has accepted.
    established: bool,
    /// The connection is over for the guest.
    reset: bool,
    tx_cnt: u32,
    fwd_cnt: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    /// Payload of the guest that is not written yet.
    received: VecDeque<Vec<u8>>,
    received_bytes: usize,
    /// `SHUTDOWN_*` of the guest.
    guest_shutdown: u32,
    /// The host's program sends no more.
    host_finished: bool,
}

impl ConnectionState {
    fn credit(&self) -> usize {
        let in_flight = self.tx_cnt.wrapping_sub(self.peer_fwd_cnt);
        self.peer_buf_alloc.saturating_sub(in_flight) as usize
    }

    fn note_credit(&mut self, packet: &Packet) {
        self.peer_buf_alloc = packet.buf_alloc;
        self.peer_fwd_cnt = packet.fwd_cnt;
    }
}

impl Bridge {
    pub(crate) fn start(path: &Path, device: &Arc<Shared>) -> Result<Arc<Self>> {
        let _ = std::fs::remove_file(path);
        let listener =
            UnixListener::bind(path).with_context(|| format!("listening on {}", path.display()))?;
        let bridge = Arc::new(Self {
            path: path.to_owned(),
            device: Arc::downgrade(device),
            connections: Mutex::default(),
            stopped: AtomicBool::new(false),
        });
        let accepting = bridge.clone();
        thread::Builder::new()
            .name("vsock-bridge".to_owned())
            .spawn(move || accepting.accept(&listener))
            .context("starting the bridge's thread")?;
        Ok(bridge)
    }

    /// Takes no more connections of the host, and ends those that are open.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        // Lets `accept()` return.
        let _ = UnixStream::connect(&self.path);
        self.forget_all();
    }

    /// Ends all connections without a word to the guest.
    pub(crate) fn forget_all(&self) {
        let open = std::mem::take(&mut lock(&self.connections).open);
        for connection in open.values() {
            connection.reset();
        }
    }

    fn accept(self: Arc<Self>, listener: &UnixListener) {
        for stream in listener.incoming() {
            if self.stopped.load(Ordering::SeqCst) {
                return;
            }
            let Ok(stream) = stream else { continue };
            let bridge = self.clone();
            thread::spawn(move || {
                // What the program wrote was no request: it sees the socket closed.
                let _ = bridge.connect_from_host(stream);
            });
        }
    }

    /// Reads the request of a program of the host and asks the guest for the connection.
    fn connect_from_host(self: Arc<Self>, mut stream: UnixStream) -> Result<()> {
        let mut line = Vec::new();
        let mut byte = [0];
        while line.len() < MAX_LINE && stream.read(&mut byte)? == 1 && byte[0] != b'\n' {
            line.push(byte[0]);
        }
        let port: u32 = std::str::from_utf8(&line)?
            .strip_prefix("CONNECT ")
            .context("the first line is not CONNECT <port>")?
            .trim()
            .parse()?;
        let connection = {
            let mut connections = lock(&self.connections);
            let host_port = FIRST_PORT + connections.last_port;
            connections.last_port = (connections.last_port + 1) % FIRST_PORT;
            let connection = Connection::new((port, host_port), stream, ConnectionState::default());
            connections.open.insert(connection.key, connection.clone());
            connection
        };
        self.send(&connection, Op::REQUEST, 0, Vec::new());
        Ok(())
    }

    fn send(&self, connection: &Connection, op: Op, flags: u32, payload: Vec<u8>) {
        let Some(device) = self.device.upgrade() else {
            return;
        };
        let fwd_cnt = lock(&connection.state).fwd_cnt;
        device.send_to_guest(Packet {
            src_cid: HOST_CID,
            dst_cid: device.guest_cid(),
            src_port: connection.key.1,
            dst_port: connection.key.0,
            socket_type: TYPE_STREAM,
            op,
            flags,
            buf_alloc: BUF_ALLOC,
            fwd_cnt,
            payload,
        });
    }

    fn refuse(&self, packet: &Packet) {
        if packet.op == Op::RST {
            return;
        }
        if let Some(device) = self.device.upgrade() {
            device.send_to_guest(packet.reply(Op::RST));
        }
    }

    fn forget(&self, connection: &Connection) {
        lock(&self.connections).open.remove(&connection.key);
        connection.reset();
    }

    /// Ends a connection for both.
    fn abort(&self, connection: &Connection) {
        self.send(connection, Op::RST, 0, Vec::new());
        self.forget(connection);
    }

    /// Takes a packet of the guest.
    pub(crate) fn receive(self: &Arc<Self>, packet: Packet) {
        let key = (packet.src_port, packet.dst_port);
        let connection = lock(&self.connections).open.get(&key).cloned();
        match (connection, packet.op) {
            (None, Op::REQUEST) if packet.socket_type == TYPE_STREAM => {
                self.connect_to_host(&packet)
            }
            (None, _) => self.refuse(&packet),
            (Some(connection), op) => {
                lock(&connection.state).note_credit(&packet);
                self.receive_for(&connection, op, packet);
                connection.changed.notify_all();
            }
        }
    }

    fn connect_to_host(self: &Arc<Self>, packet: &Packet) {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", packet.dst_port));
        let Ok(stream) = UnixStream::connect(path) else {
            return self.refuse(packet);
        };
        let mut state = ConnectionState {
            established: true,
            ..ConnectionState::default()
        };
        state.note_credit(packet);
        let connection = Connection::new((packet.src_port, packet.dst_port), stream, state);
        lock(&self.connections)
            .open
            .insert(connection.key, connection.clone());
        self.send(&connection, Op::RESPONSE, 0, Vec::new());
        self.pump(&connection);
    }

    fn receive_for(self: &Arc<Self>, connection: &Arc<Connection>, op: Op, packet: Packet) {
        match op {
            Op::RESPONSE => {
                lock(&connection.state).established = true;
                let answer = format!("OK {}\n", connection.key.1);
                if (&connection.stream).write_all(answer.as_bytes()).is_err() {
                    return self.abort(connection);
                }
                self.pump(connection);
            }
            Op::RW => {
                let mut state = lock(&connection.state);
                state.received_bytes += packet.payload.len();
                if state.received_bytes > BUF_ALLOC as usize {
                    drop(state);
                    return self.abort(connection);
                }
                state.received.push_back(packet.payload);
            }
            Op::CREDIT_REQUEST => self.send(connection, Op::CREDIT_UPDATE, 0, Vec::new()),
            Op::CREDIT_UPDATE => {}
            Op::SHUTDOWN => {
                let mut state = lock(&connection.state);
                state.guest_shutdown |= packet.flags;
                if state.guest_shutdown & SHUTDOWN_RCV != 0 {
                    // The program learns when it writes.
                    let _ = connection.stream.shutdown(Shutdown::Read);
                }
            }
            Op::RST => self.forget(connection),
            _ => self.abort(connection),
        }
    }

    /// Starts moving data, both ways.
    fn pump(self: &Arc<Self>, connection: &Arc<Connection>) {
        let (bridge, reading) = (self.clone(), connection.clone());
        thread::spawn(move || bridge.pump_to_guest(&reading));
        let (bridge, writing) = (self.clone(), connection.clone());
        thread::spawn(move || bridge.pump_to_host(&writing));
    }

    fn pump_to_guest(&self, connection: &Connection) {
        let mut buffer = vec![0; MAX_PAYLOAD];
        loop {
            let room = connection
                .wait(|state| (state.reset || state.credit() > 0).then(|| state.credit()));
            if lock(&connection.state).reset {
                return;
            }
            let room = room.min(MAX_PAYLOAD);
            match (&connection.stream).read(&mut buffer[..room]) {
                Ok(0) | Err(_) => break,
                Ok(len) => {
                    let mut state = lock(&connection.state);
                    state.tx_cnt = state.tx_cnt.wrapping_add(len as u32);
                    drop(state);
                    self.send(connection, Op::RW, 0, buffer[..len].to_vec());
                }
            }
        }
        let finished = {
            let mut state = lock(&connection.state);
            state.host_finished = true;
            state.reset
        };
        if !finished {
            self.send(connection, Op::SHUTDOWN, SHUTDOWN_SEND, Vec::new());
        }
        connection.changed.notify_all();
    }

    fn pump_to_host(&self, connection: &Connection) {
        loop {
            let payload = connection.wait(|state| {
                if let Some(payload) = state.received.pop_front() {
                    return Some(Some(payload));
                }
                let ended = state.guest_shutdown & SHUTDOWN_SEND != 0;
                (state.reset || ended).then_some(None)
            });
            let Some(payload) = payload else { break };
            if (&connection.stream).write_all(&payload).is_err() {
                self.send(
                    connection,
                    Op::SHUTDOWN,
                    SHUTDOWN_RCV | SHUTDOWN_SEND,
                    Vec::new(),
                );
                break;
            }
            let wants_update = {
                let mut state = lock(&connection.state);
                state.received_bytes -= payload.len();
                state.fwd_cnt = state.fwd_cnt.wrapping_add(payload.len() as u32);
                !state.reset
            };
            if wants_update {
                self.send(connection, Op::CREDIT_UPDATE, 0, Vec::new());
            }
        }
        let _ = connection.stream.shutdown(Shutdown::Write);
        // When neither end sends any more, the host has the last word.
        connection.wait(|state| {
            let both = state.host_finished || state.guest_shutdown == SHUTDOWN_RCV | SHUTDOWN_SEND;
            (state.reset || both).then_some(())
        });
        if !lock(&connection.state).reset {
            self.abort(connection);
        }
    }
}

impl Connection {
    fn new(key: Key, stream: UnixStream, state: ConnectionState) -> Arc<Self> {
        Arc::new(Self {
            key,
            stream,
            state: Mutex::new(state),
            changed: Condvar::new(),
        })
    }

    /// Ends the connection for its threads and for the host's program.
    fn reset(&self) {
        let mut state = lock(&self.state);
        state.reset = true;
        let unread = !state.received.is_empty();
        drop(state);
        // What the guest has sent before it closed is still written.
        let _ = self.stream.shutdown(if unread {
            Shutdown::Read
        } else {
            Shutdown::Both
        });
        self.changed.notify_all();
    }

    fn wait<T>(&self, mut ready: impl FnMut(&mut ConnectionState) -> Option<T>) -> T {
        let mut state = lock(&self.state);
        loop {
            if let Some(result) = ready(&mut state) {
                return result;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }
}

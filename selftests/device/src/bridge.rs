// SPDX-License-Identifier: GPL-2.0

//! The host's side of connections, on Unix sockets.
//!
//! - A program of the host connects to `<path>` and writes `CONNECT <port>\n`. When the guest's listener has accepted it
//!   reads `OK <port of the host>\n`, and then the socket is the connection. Where nobody listens it is closed.
//! - Where it writes `CHECKPOINT <port of the host> <port of the guest>\n` instead, it asks for the state of a connection
//!   of its own. When the device has stopped, and all has been read from the connection's socket that the guest had sent,
//!   it reads `STATE <length>\n` and so many bytes ([`ConnectionBlob`]). The connection's socket is closed then.
//! - By `RESTORE <length>\n` and those bytes, written to the device that the guest has moved to and that has not begun,
//!   it reads `OK <port of the host>\n`, and then the socket is the connection, as if nothing had happened.
//! - Where something cannot be done it reads `REFUSED <reason>\n`.
//! - A guest's connection to port P of the host becomes one to `<path>_<P>`, and is refused where nobody listens there.
//!   The name of its Unix socket, in the abstract namespace, ends in `:<port of the guest>`; a program that accepts it and
//!   wants to ask for its state finds the port there ([`guest_port`]).
//!
//! The Unix sockets are of the type that the connection has. Those of type SOCK_SEQPACKET connect to `<path>.seqpacket`;
//! a request is a message then, and each message after it is one of the connection's, of 64 KiB at most.
//!
//! Each connection has a thread for either direction, so that a slow one holds up nobody else.

use std::collections::{HashMap, VecDeque};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread;

use anyhow::{ensure, Context, Result};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::blob::{self, ConnectionBlob, Part};
use crate::device::{lock, Shared};
use crate::packet::{
    Op, Packet, SEQ_EOM, SHUTDOWN_RCV, SHUTDOWN_SEND, TYPE_SEQPACKET, TYPE_STREAM,
};

/// Receive buffer of each connection, in bytes.
const BUF_ALLOC: u32 = 256 * 1024;

/// The largest payload of a packet, in bytes.
const MAX_PAYLOAD: usize = 64 * 1024;

/// The first port that connections of the host are from.
const FIRST_PORT: u32 = 1 << 30;

/// The longest first line of a program of the host, in bytes.
const MAX_LINE: usize = 64;

/// Ports of a connection: the guest's, the host's.
pub(crate) type Key = (u32, u32);

/// The host, as one guest sees it.
pub struct Bridge {
    path: PathBuf,
    device: Weak<Shared>,
    connections: Mutex<Connections>,
    stopped: AtomicBool,
}

struct Connections {
    open: HashMap<Key, Arc<Connection>>,
    /// Where the next connection of the host is from, above [`FIRST_PORT`].
    next_port: u32,
    /// Whether the guest was told of the connections that were restored.
    begun: bool,
}

impl Default for Connections {
    fn default() -> Self {
        Self {
            open: HashMap::new(),
            // A guest that comes from another device may still have packets of connections that began at the first ports,
            // and ended as it left (V8 of Documentation/checkpoint.md).
            next_port: fastrand::u32(..FIRST_PORT),
            begun: false,
        }
    }
}

/// One connection.
struct Connection {
    key: Key,
    /// `TYPE_*`.
    socket_type: u16,
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
    received: VecDeque<Part>,
    received_bytes: usize,
    /// Payload of the program that is not sent yet.
    unsent: VecDeque<Part>,
    /// `SHUTDOWN_*` of the guest.
    guest_shutdown: u32,
    /// The host's program sends no more.
    finishing: bool,
    /// The guest was told of that.
    host_finished: bool,
    /// The connection's state was asked for: nothing moves any more.
    moving: bool,
    /// The guest has not said yet that the connection goes on: nothing is sent to it.
    held: bool,
    /// How many threads move data.
    pumps: u32,
}

/// One for each direction.
const PUMPS: u32 = 2;

impl ConnectionState {
    fn credit(&self) -> usize {
        let in_flight = self.tx_cnt.wrapping_sub(self.peer_fwd_cnt);
        self.peer_buf_alloc.saturating_sub(in_flight) as usize
    }

    /// Takes what can be written for the program at once: a message, or any part of a stream.
    fn next_for_program(&mut self, socket_type: u16) -> Option<Vec<u8>> {
        if socket_type == TYPE_STREAM {
            return Some(self.received.pop_front()?.payload);
        }
        let last = self
            .received
            .iter()
            .position(|part| part.flags & SEQ_EOM != 0)?;
        Some(
            self.received
                .drain(..=last)
                .flat_map(|part| part.payload)
                .collect(),
        )
    }

    fn note_credit(&mut self, packet: &Packet) {
        self.peer_buf_alloc = packet.buf_alloc;
        self.peer_fwd_cnt = packet.fwd_cnt;
    }
}

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Where programs of the host connect to a bridge at `path`.
pub fn entrance(path: &Path, socket_type: u16) -> PathBuf {
    let mut entrance = path.as_os_str().to_owned();
    if socket_type == TYPE_SEQPACKET {
        entrance.push(".seqpacket");
    }
    entrance.into()
}

fn unix_socket(socket_type: u16) -> std::io::Result<Socket> {
    let kind = match socket_type {
        TYPE_SEQPACKET => Type::SEQPACKET,
        _ => Type::STREAM,
    };
    Socket::new(Domain::UNIX, kind, None)
}

/// Connects to a Unix socket of one of the types.
pub fn connect(path: &Path, socket_type: u16) -> std::io::Result<UnixStream> {
    let socket = unix_socket(socket_type)?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(OwnedFd::from(socket).into())
}

/// The same for a guest's connection from a port.
fn connect_for_guest(path: &Path, socket_type: u16, port: u32) -> std::io::Result<UnixStream> {
    static CONNECTIONS: AtomicU64 = AtomicU64::new(0);
    let number = CONNECTIONS.fetch_add(1, Ordering::Relaxed);
    let name = format!("\0vsock-device:{}:{number}:{port}", std::process::id());
    let socket = unix_socket(socket_type)?;
    socket.bind(&SockAddr::unix(name)?)?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(OwnedFd::from(socket).into())
}

/// The guest's port of a connection that a program of the host has accepted.
pub fn guest_port(accepted: &UnixStream) -> Option<u32> {
    let address = accepted.peer_addr().ok()?;
    let name = std::str::from_utf8(address.as_abstract_name()?).ok()?;
    name.rsplit_once(':')?.1.parse().ok()
}

fn listen(path: &Path, socket_type: u16) -> std::io::Result<UnixListener> {
    let _ = std::fs::remove_file(path);
    let socket = unix_socket(socket_type)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    Ok(OwnedFd::from(socket).into())
}

impl Bridge {
    pub(crate) fn start(path: &Path, device: &Arc<Shared>) -> Result<Arc<Self>> {
        let bridge = Arc::new(Self {
            path: path.to_owned(),
            device: Arc::downgrade(device),
            connections: Mutex::default(),
            stopped: AtomicBool::new(false),
        });
        for socket_type in [TYPE_STREAM, TYPE_SEQPACKET] {
            let path = entrance(path, socket_type);
            let listener = listen(&path, socket_type)
                .with_context(|| format!("listening on {}", path.display()))?;
            let accepting = bridge.clone();
            thread::Builder::new()
                .name("vsock-bridge".to_owned())
                .spawn(move || accepting.accept(&listener, socket_type))
                .context("starting the bridge's thread")?;
        }
        Ok(bridge)
    }

    /// Takes no more connections of the host, and ends those that are open.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        for socket_type in [TYPE_STREAM, TYPE_SEQPACKET] {
            // Lets `accept()` return.
            let _ = connect(&entrance(&self.path, socket_type), socket_type);
        }
        self.forget_all();
    }

    /// Ends all connections without a word to the guest.
    pub(crate) fn forget_all(&self) {
        let open = std::mem::take(&mut lock(&self.connections).open);
        for connection in open.values() {
            connection.reset();
        }
    }

    fn accept(self: Arc<Self>, listener: &UnixListener, socket_type: u16) {
        for stream in listener.incoming() {
            if self.stopped.load(Ordering::SeqCst) {
                return;
            }
            let Ok(stream) = stream else { continue };
            let bridge = self.clone();
            thread::spawn(move || {
                // What the program wrote was no request: it sees the socket closed.
                let _ = bridge.connect_from_host(stream, socket_type);
            });
        }
    }

    /// Reads the request of a program of the host and asks the guest for the connection.
    fn connect_from_host(self: Arc<Self>, mut stream: UnixStream, socket_type: u16) -> Result<()> {
        let mut line = Vec::new();
        // A message is read as a whole, of a stream not a byte more than the line has.
        let mut piece = if socket_type == TYPE_STREAM {
            vec![0]
        } else {
            vec![0; MAX_LINE]
        };
        while line.len() < MAX_LINE && line.last() != Some(&b'\n') {
            let len = stream.read(&mut piece)?;
            ensure!(len > 0, "the program has closed its socket");
            line.extend(&piece[..len]);
        }
        let line = std::str::from_utf8(&line)?.trim_end();
        let answer = match line.split(' ').collect::<Vec<_>>()[..] {
            ["CONNECT", port] => return self.request_of_host(stream, socket_type, port.parse()?),
            ["CHECKPOINT", host_port, guest_port] => {
                self.checkpoint((guest_port.parse()?, host_port.parse()?), &mut stream)
            }
            ["RESTORE", len] => self.restore(&mut stream, socket_type, len.parse()?),
            _ => Err(anyhow::anyhow!("{line:?} is no request")),
        };
        if let Err(reason) = answer {
            stream.write_all(format!("REFUSED {reason:#}\n").as_bytes())?;
        }
        Ok(())
    }

    fn request_of_host(
        self: Arc<Self>,
        stream: UnixStream,
        socket_type: u16,
        port: u32,
    ) -> Result<()> {
        let connection = {
            let mut connections = lock(&self.connections);
            // A connection that came from another device may have a port of this range.
            let key = loop {
                let host_port = FIRST_PORT + connections.next_port;
                connections.next_port = (connections.next_port + 1) % FIRST_PORT;
                if !connections.open.contains_key(&(port, host_port)) {
                    break (port, host_port);
                }
            };
            let connection = Connection::new(key, socket_type, stream, ConnectionState::default());
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
        let state = lock(&connection.state);
        self.send_locked(&device, connection, &state, op, flags, payload);
    }

    /// Sends with the connection's state locked, so that no migration comes between.
    fn send_locked(
        &self,
        device: &Shared,
        connection: &Connection,
        state: &ConnectionState,
        op: Op,
        flags: u32,
        payload: Vec<u8>,
    ) {
        if state.moving || state.held {
            return;
        }
        device.send_to_guest(Packet {
            src_cid: device.host_cid,
            dst_cid: device.guest_cid(),
            src_port: connection.key.1,
            dst_port: connection.key.0,
            socket_type: connection.socket_type,
            op,
            flags,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: state.fwd_cnt,
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
            (None, Op::REQUEST) if matches!(packet.socket_type, TYPE_STREAM | TYPE_SEQPACKET) => {
                self.connect_to_host(&packet)
            }
            (None, _) => self.refuse(&packet),
            (Some(connection), _) if connection.socket_type != packet.socket_type => {
                self.refuse(&packet);
            }
            (Some(connection), op) => {
                {
                    let mut state = lock(&connection.state);
                    state.note_credit(&packet);
                    // The first packet with the new addresses says that the connection goes on, or has ended.
                    state.held = false;
                }
                self.receive_for(&connection, op, packet);
                connection.changed.notify_all();
            }
        }
    }

    /// Takes a packet with the addresses of before a migration: it was on its way.
    pub(crate) fn receive_late(self: &Arc<Self>, packet: Packet) {
        let key = (packet.src_port, packet.dst_port);
        let connection = lock(&self.connections).open.get(&key).cloned();
        if let Some(connection) = connection.filter(|it| lock(&it.state).held) {
            lock(&connection.state).note_credit(&packet);
            self.receive_for(&connection, packet.op, packet);
            connection.changed.notify_all();
        }
    }

    /// Takes no more states of connections. Returns the connections that were restored.
    pub(crate) fn begin(&self) -> Vec<(Key, u16)> {
        let mut connections = lock(&self.connections);
        connections.begun = true;
        let held = |connection: &Arc<Connection>| lock(&connection.state).held;
        let restored = connections.open.iter().filter(|(_, open)| held(open));
        restored
            .map(|(key, connection)| (*key, connection.socket_type))
            .collect()
    }

    /// The connections that the guest knows.
    pub(crate) fn known(&self) -> Vec<(Key, u16)> {
        let connections = lock(&self.connections);
        let known = connections.open.iter();
        known
            .filter(|(_, connection)| lock(&connection.state).established)
            .map(|(key, connection)| (*key, connection.socket_type))
            .collect()
    }

    /// Ends a connection whose response the guest has not got; returns the guest's request.
    pub(crate) fn unaccept(&self, response: &Packet) -> Option<Packet> {
        let key = (response.dst_port, response.src_port);
        let connection = lock(&self.connections).open.remove(&key)?;
        connection.reset();
        let state = lock(&connection.state);
        Some(Packet {
            buf_alloc: state.peer_buf_alloc,
            fwd_cnt: state.peer_fwd_cnt,
            ..response.reply(Op::REQUEST)
        })
    }

    /// Gives the state of a connection to its program, and forgets it.
    fn checkpoint(&self, key: Key, stream: &mut UnixStream) -> Result<()> {
        let device = self.device.upgrade().context("the device is gone")?;
        device.wait_stopped();
        let connection = lock(&self.connections).open.get(&key).cloned();
        let connection = connection.with_context(|| {
            let (guest_port, host_port) = key;
            format!("there is no connection of port {host_port} to port {guest_port} of the guest")
        })?;
        ensure!(
            lock(&connection.state).established,
            "the guest has not accepted the connection yet"
        );
        lock(&connection.state).moving = true;
        // The reading thread gets what the program has written, and then an end.
        let _ = connection.stream.shutdown(Shutdown::Read);
        connection.changed.notify_all();
        connection.wait(|state| (state.pumps == 0).then_some(()));
        lock(&self.connections).open.remove(&key);
        let blob = {
            let mut state = lock(&connection.state);
            let mut unsent = device.take_payload_for_guest(key);
            state.tx_cnt = state.tx_cnt.wrapping_sub(Part::total(&unsent) as u32);
            unsent.extend(state.unsent.drain(..));
            ConnectionBlob {
                guest_cid: device.guest_cid(),
                host_cid: device.host_cid,
                guest_port: key.0,
                host_port: key.1,
                socket_type: connection.socket_type,
                guest_shutdown: state.guest_shutdown,
                host_shutdown: if state.finishing { SHUTDOWN_SEND } else { 0 },
                tx_cnt: state.tx_cnt,
                fwd_cnt: state.fwd_cnt,
                buf_alloc: BUF_ALLOC,
                peer_buf_alloc: state.peer_buf_alloc,
                peer_fwd_cnt: state.peer_fwd_cnt,
                received: state.received.drain(..).collect(),
                unsent,
                ..ConnectionBlob::default()
            }
            .to_bytes()
        };
        let _ = connection.stream.shutdown(Shutdown::Both);
        writeln!(stream, "STATE {}", blob.len())?;
        stream.write_all(&blob)?;
        Ok(())
    }

    /// Takes the state of a connection from its program, which goes on by this socket.
    fn restore(
        self: &Arc<Self>,
        stream: &mut UnixStream,
        socket_type: u16,
        len: usize,
    ) -> Result<()> {
        ensure!(
            len <= blob::MAX_LEN,
            "the state has {len} bytes, more than {}",
            blob::MAX_LEN
        );
        let mut bytes = vec![0; len];
        stream.read_exact(&mut bytes).context("reading the state")?;
        let blob = ConnectionBlob::parse(&bytes)?;
        ensure!(
            blob.buf_alloc <= BUF_ALLOC,
            "this device has no such connections"
        );
        ensure!(
            blob.socket_type == socket_type,
            "the connection is of another type than the socket"
        );
        let key = (blob.guest_port, blob.host_port);
        let state = ConnectionState {
            established: true,
            held: true,
            tx_cnt: blob.tx_cnt,
            fwd_cnt: blob.fwd_cnt,
            peer_buf_alloc: blob.peer_buf_alloc,
            peer_fwd_cnt: blob.peer_fwd_cnt,
            received_bytes: Part::total(&blob.received),
            received: blob.received.into(),
            unsent: blob.unsent.into(),
            guest_shutdown: blob.guest_shutdown,
            // The guest is told again, for it may not have got it.
            finishing: blob.host_shutdown & SHUTDOWN_SEND != 0,
            // Its state may be asked for as soon as the program is told, and has to be waited for then.
            pumps: PUMPS,
            ..ConnectionState::default()
        };
        let connection = Connection::new(key, socket_type, stream.try_clone()?, state);
        connection.let_program_see_shutdown();
        {
            let mut connections = lock(&self.connections);
            ensure!(
                !connections.begun,
                "the device has begun, the guest was told already"
            );
            ensure!(
                !connections.open.contains_key(&key),
                "the connection is here already"
            );
            connections.open.insert(key, connection.clone());
        }
        // One write, for it may be a message.
        let told = stream.write_all(format!("OK {}\n", key.1).as_bytes());
        // Where the program has gone meanwhile, the threads find that.
        self.pump(&connection);
        Ok(told?)
    }

    fn connect_to_host(self: &Arc<Self>, packet: &Packet) {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", packet.dst_port));
        let path = Path::new(&path);
        let Ok(stream) = connect_for_guest(path, packet.socket_type, packet.src_port) else {
            return self.refuse(packet);
        };
        let mut state = ConnectionState {
            established: true,
            ..ConnectionState::default()
        };
        state.note_credit(packet);
        let key = (packet.src_port, packet.dst_port);
        let connection = Connection::new(key, packet.socket_type, stream, state);
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
                state.received.push_back(Part::of(packet));
            }
            Op::CREDIT_REQUEST => self.send(connection, Op::CREDIT_UPDATE, 0, Vec::new()),
            Op::CREDIT_UPDATE => {}
            Op::SHUTDOWN => {
                let mut state = lock(&connection.state);
                state.guest_shutdown |= packet.flags;
                drop(state);
                connection.let_program_see_shutdown();
            }
            Op::RST => self.forget(connection),
            _ => self.abort(connection),
        }
    }

    /// Starts moving data, both ways.
    fn pump(self: &Arc<Self>, connection: &Arc<Connection>) {
        lock(&connection.state).pumps = PUMPS;
        let (bridge, reading) = (self.clone(), connection.clone());
        thread::spawn(move || {
            bridge.pump_to_guest(&reading);
            reading.pump_ended();
        });
        let (bridge, writing) = (self.clone(), connection.clone());
        thread::spawn(move || {
            bridge.pump_to_host(&writing);
            writing.pump_ended();
        });
    }

    fn pump_to_guest(&self, connection: &Connection) {
        let mut buffer = vec![0; MAX_PAYLOAD];
        loop {
            let Some(device) = self.device.upgrade() else {
                return;
            };
            // How much to read, or that there is no more to do.
            let room = connection.wait(|state| {
                if state.reset {
                    return Some(None);
                }
                if state.moving {
                    // All that the program has written goes into the state.
                    return Some((!state.finishing).then_some(MAX_PAYLOAD));
                }
                if state.held {
                    return None;
                }
                self.send_unsent(&device, connection, state);
                if !state.unsent.is_empty() {
                    return None;
                }
                if state.finishing {
                    self.say_finished(&device, connection, state);
                    return Some(None);
                }
                let room = state.credit().min(MAX_PAYLOAD);
                let room = match connection.socket_type {
                    // Of a message the rest would be lost.
                    TYPE_SEQPACKET if room > 0 => MAX_PAYLOAD,
                    _ => room,
                };
                (room > 0).then_some(Some(room))
            });
            let Some(room) = room else {
                return;
            };
            let read = (&connection.stream).read(&mut buffer[..room]);
            let mut state = lock(&connection.state);
            match read {
                // An end that came from asking for the state is none.
                Ok(0) | Err(_) if state.moving => return,
                Ok(0) | Err(_) => state.finishing = true,
                Ok(len) => state.unsent.push_back(Part {
                    payload: buffer[..len].to_vec(),
                    flags: match connection.socket_type {
                        TYPE_SEQPACKET => SEQ_EOM,
                        _ => 0,
                    },
                }),
            }
        }
    }

    /// Sends what waits, as far as the credit goes.
    fn send_unsent(&self, device: &Shared, connection: &Connection, state: &mut ConnectionState) {
        while let Some(mut part) = state.unsent.pop_front() {
            let room = state.credit().min(MAX_PAYLOAD);
            let rest = part.payload.split_off(part.payload.len().min(room));
            let flags = if rest.is_empty() { part.flags } else { 0 };
            if !rest.is_empty() {
                state.unsent.push_front(Part {
                    payload: rest,
                    flags: part.flags,
                });
            }
            if part.payload.is_empty() {
                return;
            }
            state.tx_cnt = state.tx_cnt.wrapping_add(part.payload.len() as u32);
            self.send_locked(device, connection, state, Op::RW, flags, part.payload);
        }
    }

    fn say_finished(&self, device: &Shared, connection: &Connection, state: &mut ConnectionState) {
        let (op, flags) = (Op::SHUTDOWN, SHUTDOWN_SEND);
        self.send_locked(device, connection, state, op, flags, Vec::new());
        state.host_finished = true;
        connection.changed.notify_all();
    }

    fn pump_to_host(&self, connection: &Connection) {
        loop {
            let payload = connection.wait(|state| {
                if state.moving {
                    return Some(None);
                }
                if let Some(payload) = state.next_for_program(connection.socket_type) {
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
        if lock(&connection.state).moving {
            return;
        }
        let _ = connection.stream.shutdown(Shutdown::Write);
        // When neither end sends any more, the host has the last word.
        connection.wait(|state| {
            let both = state.host_finished || state.guest_shutdown == SHUTDOWN_RCV | SHUTDOWN_SEND;
            (state.reset || state.moving || both).then_some(())
        });
        let goes_on = {
            let state = lock(&connection.state);
            state.reset || state.moving
        };
        if !goes_on {
            self.abort(connection);
        }
    }
}

impl Connection {
    fn new(key: Key, socket_type: u16, stream: UnixStream, state: ConnectionState) -> Arc<Self> {
        Arc::new(Self {
            key,
            socket_type,
            stream,
            state: Mutex::new(state),
            changed: Condvar::new(),
        })
    }

    /// Where the guest receives no more, the program learns when it writes.
    fn let_program_see_shutdown(&self) {
        if lock(&self.state).guest_shutdown & SHUTDOWN_RCV != 0 {
            let _ = self.stream.shutdown(Shutdown::Read);
        }
    }

    fn pump_ended(&self) {
        lock(&self.state).pumps -= 1;
        self.changed.notify_all();
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

// SPDX-License-Identifier: GPL-2.0

//! System calls on sockets in a machine, made by its agent.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::Deserialize;
use serde_json::{json, Value};

use crate::agent::{Agent, CallError, Pending};
use crate::lab::{wait_for, CID_ANY, LIMIT};

/// The result of a system call in a machine.
pub type Call<T> = Result<T, CallError>;

/// `SOCK_STREAM`.
pub const STREAM: i32 = 1;

/// `SOCK_SEQPACKET`.
pub const SEQPACKET: i32 = 5;

/// With a time of 64 bits.
const SO_VM_SOCKETS_CONNECT_TIMEOUT: i32 = 8;

/// States of a socket as the kernel's diagnostics show them.
pub const ESTABLISHED: u8 = 1;
pub const LISTEN: u8 = 10;

/// How much of a pattern was sent or received until there was an error, or the end.
#[derive(Debug, Deserialize)]
pub struct HowFar {
    pub bytes: u64,
    pub error: Option<String>,
}

/// A completion of sends with MSG_ZEROCOPY: of which calls, both ends included, and whether the kernel has copied what they sent.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub struct Completion {
    pub first: u32,
    pub last: u32,
    pub is_copied: bool,
}

/// A socket as the kernel's diagnostics show it: addresses are CID and port.
#[derive(Debug, Deserialize)]
pub struct ShownSocket {
    pub kind: u8,
    pub state: u8,
    pub own: (u32, u32),
    pub peer: (u32, u32),
}

impl Agent {
    fn system_call<T: DeserializeOwned>(&self, method: &str, params: Value) -> Call<T> {
        self.call(method, params, LIMIT)
    }

    /// A socket that receives the kernel's uevents.
    pub fn uevent_socket(&self) -> Call<i32> {
        self.system_call("uevent_socket", json!({}))
    }

    /// The next uevent of a migration: its fields, those of the driver.
    pub fn next_migration(&self, uevents: i32) -> Result<HashMap<String, String>> {
        loop {
            let fields: HashMap<_, _> = self
                .recv(uevents, 8192)
                .context("waiting for a uevent")?
                .split('\0')
                .filter_map(|field| field.split_once('='))
                .filter_map(|(name, value)| Some((name.strip_prefix("VSOCK_")?, value)))
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect();
            if !fields.is_empty() {
                return Ok(fields);
            }
        }
    }

    /// A socket in a network namespace of its own.
    pub fn socket_in_new_namespace(&self, kind: i32) -> Call<i32> {
        self.system_call("socket_in_new_namespace", json!({"kind": kind}))
    }

    pub fn socket(&self, kind: i32) -> Call<i32> {
        self.system_call("socket", json!({"kind": kind}))
    }

    pub fn bind(&self, fd: i32, cid: u32, port: u32) -> Call<()> {
        self.system_call("bind", json!({"fd": fd, "cid": cid, "port": port}))
    }

    pub fn listen(&self, fd: i32, backlog: i32) -> Call<()> {
        self.system_call("listen", json!({"fd": fd, "number": backlog}))
    }

    /// A stream socket that listens at any CID.
    pub fn listener(&self, port: u32) -> Call<i32> {
        self.listener_of_kind(STREAM, port)
    }

    /// The same of a kind, [`STREAM`] or [`SEQPACKET`].
    pub fn listener_of_kind(&self, kind: i32, port: u32) -> Call<i32> {
        let fd = self.socket(kind)?;
        self.bind(fd, CID_ANY, port)?;
        self.listen(fd, 128)?;
        Ok(fd)
    }

    pub fn accept(&self, fd: i32) -> Call<i32> {
        self.system_call("accept", json!({"fd": fd}))
    }

    pub fn connect(&self, fd: i32, cid: u32, port: u32) -> Call<()> {
        self.system_call("connect", json!({"fd": fd, "cid": cid, "port": port}))
    }

    pub fn start_connect(&self, fd: i32, cid: u32, port: u32) -> Pending {
        self.start("connect", json!({"fd": fd, "cid": cid, "port": port}))
    }

    pub fn send(&self, fd: i32, text: &str) -> Call<usize> {
        self.system_call("send", json!({"fd": fd, "text": text}))
    }

    pub fn send_flags(&self, fd: i32, text: &str, flags: i32) -> Call<usize> {
        self.system_call("send", json!({"fd": fd, "text": text, "flags": flags}))
    }

    pub fn recv(&self, fd: i32, len: usize) -> Call<String> {
        self.recv_flags(fd, len, 0)
    }

    pub fn recv_flags(&self, fd: i32, len: usize, flags: i32) -> Call<String> {
        self.system_call("recv", json!({"fd": fd, "len": len, "flags": flags}))
    }

    /// Receives and says only how much.
    pub fn recv_len(&self, fd: i32, len: usize) -> Call<usize> {
        self.system_call("recv_len", json!({"fd": fd, "len": len}))
    }

    pub fn start_send_pattern(&self, fd: i32, seed: u64, len: u64) -> Pending {
        self.start("send_pattern", json!({"fd": fd, "seed": seed, "len": len}))
    }

    /// Sends so many times one byte.
    pub fn start_send_small(&self, fd: i32, count: u64) -> Pending {
        self.start("send_small", json!({"fd": fd, "count": count}))
    }

    pub fn start_recv_pattern(&self, fd: i32, seed: u64, len: u64) -> Pending {
        self.start("recv_pattern", json!({"fd": fd, "seed": seed, "len": len}))
    }

    /// Sends a pattern until that fails, and says how far it came: [`HowFar`].
    pub fn start_send_pattern_until_error(&self, fd: i32, seed: u64) -> Pending {
        let params = json!({"fd": fd, "seed": seed, "len": u64::MAX});
        self.start("send_pattern_until_error", params)
    }

    /// Receives a pattern until that fails, and says how far it came: [`HowFar`].
    pub fn start_recv_pattern_until_error(&self, fd: i32, seed: u64) -> Pending {
        let params = json!({"fd": fd, "seed": seed, "len": u64::MAX});
        self.start("recv_pattern_until_error", params)
    }

    /// Lets a call end that sends on a socket until this; it may not have begun yet.
    pub fn end_sending(&self, fd: i32) -> Result<()> {
        wait_for("the call that sends to be there", || {
            Ok(self.start("end_sending", json!({"fd": fd})).wait(LIMIT)?)
        })
    }

    pub fn shutdown(&self, fd: i32, how: i32) -> Call<()> {
        self.system_call("shutdown", json!({"fd": fd, "number": how}))
    }

    pub fn close(&self, fd: i32) -> Call<()> {
        self.system_call("close", json!({"fd": fd}))
    }

    pub fn set_nonblocking(&self, fd: i32, on: bool) -> Call<()> {
        self.system_call(
            "set_nonblocking",
            json!({"fd": fd, "number": i32::from(on)}),
        )
    }

    pub fn start_poll(&self, fd: i32, events: i16, limit: Duration) -> Pending {
        let ms = limit.as_millis() as i32;
        self.start(
            "poll",
            json!({"fd": fd, "events": events, "timeout_ms": ms}),
        )
    }

    /// What poll() says within a limit.
    pub fn poll(&self, fd: i32, events: i16, limit: Duration) -> Call<i16> {
        self.start_poll(fd, events, limit).wait(LIMIT + limit)
    }

    pub fn epoll(&self, fd: i32, events: i32) -> Call<i32> {
        self.system_call(
            "epoll",
            json!({"fd": fd, "events": events as u32, "timeout_ms": 0}),
        )
    }

    /// The events of an epoll instance's descriptor within a limit, 0 for none.
    pub fn epoll_wait(&self, epoll: i32, limit: Duration) -> Call<i32> {
        let ms = limit.as_millis() as i32;
        let params = json!({"fd": epoll, "events": 0, "timeout_ms": ms});
        self.start("epoll_wait", params).wait(LIMIT + limit)
    }

    pub fn set_option(&self, fd: i32, level: i32, name: i32, value: &[u8]) -> Call<()> {
        self.system_call(
            "setsockopt",
            json!({"fd": fd, "level": level, "name": name, "value": value}),
        )
    }

    /// How long connect() waits for an answer, in whole seconds.
    pub fn set_connect_timeout(&self, fd: i32, timeout: Duration) -> Call<()> {
        let value = [timeout.as_secs(), 0].map(u64::to_ne_bytes).concat();
        self.set_option(fd, libc::AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &value)
    }

    pub fn option(&self, fd: i32, level: i32, name: i32, len: usize) -> Call<Vec<u8>> {
        self.system_call(
            "getsockopt",
            json!({"fd": fd, "level": level, "name": name, "len": len}),
        )
    }

    /// The completions of sends with MSG_ZEROCOPY that are there.
    pub fn zero_copy_completions(&self, fd: i32) -> Call<Vec<Completion>> {
        self.system_call("zero_copy_completions", json!({"fd": fd}))
    }

    pub fn siocinq(&self, fd: i32) -> Call<i32> {
        self.system_call("siocinq", json!({"fd": fd}))
    }

    pub fn siocoutq(&self, fd: i32) -> Call<i32> {
        self.system_call("siocoutq", json!({"fd": fd}))
    }

    /// All sockets, as `ss --vsock` shows them.
    pub fn sockets(&self) -> Call<Vec<ShownSocket>> {
        self.system_call("sockets", json!({}))
    }

    pub fn local_cid(&self) -> Call<u32> {
        self.system_call("local_cid", json!({}))
    }

    pub fn own_address(&self, fd: i32) -> Call<(u32, u32)> {
        self.system_call("getsockname", json!({"fd": fd}))
    }

    pub fn peer_address(&self, fd: i32) -> Call<(u32, u32)> {
        self.system_call("getpeername", json!({"fd": fd}))
    }
}

// SPDX-License-Identifier: GPL-2.0

//! The methods: one arm of [`call`] each, named after the system call where there is one.

use std::os::fd::RawFd;
use std::process::Command;

use anyhow::{bail, ensure, Context, Result};
use serde::de::DeserializeOwned;
use serde::Deserialize;
use serde_json::{json, Value};

use crate::messages;
use crate::observe;
use crate::pattern;
use crate::sender::Sender;
use crate::sys::{self, End};
use crate::waiting;
use crate::zerocopy;

/// How much a pattern is sent or received by one system call, in bytes.
const PATTERN_PART: usize = 64 * 1024;

#[derive(Deserialize)]
struct Socket {
    kind: i32,
}

#[derive(Deserialize)]
struct Fd {
    fd: RawFd,
}

#[derive(Deserialize)]
struct Fds {
    fds: Vec<RawFd>,
}

#[derive(Deserialize)]
struct FdAddress {
    fd: RawFd,
    cid: u32,
    port: u32,
}

#[derive(Deserialize)]
struct FdNumber {
    fd: RawFd,
    number: i32,
}

#[derive(Deserialize)]
struct Send {
    fd: RawFd,
    text: String,
    #[serde(default)]
    flags: i32,
}

#[derive(Deserialize)]
struct Receive {
    fd: RawFd,
    len: usize,
    #[serde(default)]
    flags: i32,
}

#[derive(Deserialize)]
struct SendBytes {
    fd: RawFd,
    len: usize,
    #[serde(default)]
    readable: Option<usize>,
    #[serde(default)]
    flags: i32,
}

#[derive(Deserialize)]
struct SendHeldBack {
    fd: RawFd,
    len: usize,
    there: usize,
    userfaultfd: RawFd,
}

#[derive(Deserialize)]
struct Pieces {
    fd: RawFd,
    pieces: usize,
    len: usize,
    before: u8,
    later: u8,
}

#[derive(Deserialize)]
struct Number {
    number: u64,
}

#[derive(Deserialize)]
struct Way {
    fd: RawFd,
    way: String,
    #[serde(default)]
    len: usize,
}

#[derive(Deserialize)]
struct Pattern {
    fd: RawFd,
    seed: u64,
    #[serde(default = "without_end")]
    len: u64,
}

#[derive(Deserialize)]
struct Messages {
    fd: RawFd,
    seed: u64,
}

#[derive(Deserialize)]
struct Small {
    fd: RawFd,
    count: u64,
}

#[derive(Deserialize)]
struct Poll {
    fd: RawFd,
    events: u32,
    timeout_ms: i32,
}

#[derive(Deserialize)]
struct SockOption {
    fd: RawFd,
    level: i32,
    name: i32,
    #[serde(default)]
    value: Vec<u8>,
    #[serde(default)]
    len: usize,
}

#[derive(Deserialize)]
struct Interface {
    interface: String,
}

#[derive(Deserialize)]
struct Redirect {
    from: RawFd,
    to: RawFd,
}

#[derive(Deserialize)]
struct WriteWithFault {
    path: String,
    text: String,
    nth: u32,
}

#[derive(Deserialize)]
struct Script {
    script: String,
}

fn params<T: DeserializeOwned>(params: &Value) -> Result<T> {
    serde_json::from_value(params.clone()).with_context(|| format!("the parameters {params}"))
}

/// Does what a request asks for.
pub fn call(method: &str, given: &Value) -> Result<Value> {
    Ok(match method {
        "socket" => json!(sys::socket(params::<Socket>(given)?.kind)?),
        "socket_in_new_namespace" => {
            json!(sys::socket_in_new_namespace(params::<Socket>(given)?.kind)?)
        }
        "write_with_fault" => {
            let WriteWithFault { path, text, nth } = params(given)?;
            json!(sys::write_with_fault(&path, &text, nth)?)
        }
        "uevent_socket" => json!(observe::uevent_socket()?),
        "bind" => {
            let FdAddress { fd, cid, port } = params(given)?;
            json!(sys::bind(fd, cid, port)?)
        }
        "connect" => {
            let FdAddress { fd, cid, port } = params(given)?;
            json!(sys::connect(fd, cid, port)?)
        }
        "listen" => {
            let FdNumber { fd, number } = params(given)?;
            json!(sys::listen(fd, number)?)
        }
        "accept" => json!(sys::accept(params::<Fd>(given)?.fd)?),
        "getsockname" => json!(sys::name(params::<Fd>(given)?.fd, End::Own)?),
        "getpeername" => json!(sys::name(params::<Fd>(given)?.fd, End::Peer)?),
        "send" => {
            let Send { fd, text, flags } = params(given)?;
            json!(sys::send(fd, text.as_bytes(), flags)?)
        }
        "recv" => {
            let Receive { fd, len, flags } = params(given)?;
            let mut bytes = vec![0; len];
            let len = sys::recv(fd, &mut bytes, flags)?;
            bytes.truncate(len);
            json!(String::from_utf8_lossy(&bytes))
        }
        "recv_len" => {
            let Receive { fd, len, flags } = params(given)?;
            json!(sys::recv(fd, &mut vec![0; len], flags)?)
        }
        "recv_bytes" => {
            let Receive { fd, len, flags } = params(given)?;
            let mut bytes = vec![0; len];
            let len = sys::recv(fd, &mut bytes, flags)?;
            bytes.truncate(len);
            json!(bytes)
        }
        "receive_by" => {
            let Way { fd, way, len } = params(given)?;
            json!(waiting::receive(fd, &way, len)?)
        }
        "send_by" => {
            let Way { fd, way, .. } = params(given)?;
            json!(waiting::send_until_error(fd, &way)?)
        }
        "send_zero_copy_by_io_uring" => {
            let Receive { fd, len, .. } = params(given)?;
            json!(waiting::send_zero_copy(fd, &vec![0; len])?)
        }
        "send_bytes" => {
            let SendBytes {
                fd,
                len,
                readable,
                flags,
            } = params(given)?;
            json!(messages::send_bytes(fd, len, readable, flags)?)
        }
        "userfaultfd" => json!(messages::userfaultfd()?),
        "send_held_back" => {
            let SendHeldBack {
                fd,
                len,
                there,
                userfaultfd,
            } = params(given)?;
            json!(messages::send_held_back(fd, len, there, userfaultfd)?)
        }
        "recv_message" => {
            let Receive { fd, len, flags } = params(given)?;
            messages::recv_message(fd, len, flags)?
        }
        "recv_long_message" => {
            let Receive { fd, len, .. } = params(given)?;
            json!(messages::recv_long_message(fd, len)?)
        }
        "recv_short_messages" => {
            let Small { fd, count } = params(given)?;
            json!(messages::recv_short_messages(fd, count)?)
        }
        "send_zero_copy_pieces" => {
            let Pieces {
                fd,
                pieces,
                len,
                before,
                later,
            } = params(given)?;
            json!(zerocopy::send_pieces(fd, pieces, len, before, later)?)
        }
        "count_tracepoint" => json!(observe::count_tracepoint(params::<Number>(given)?.number)?),
        "read_counters" => json!(observe::read_counters(&params::<Fds>(given)?.fds)?),
        "send_zero_copy" => {
            let Small { fd, count } = params(given)?;
            json!(zerocopy::send_what_fits(fd, count as usize)?)
        }
        "zero_copy_completions" => json!(zerocopy::completions(params::<Fd>(given)?.fd)?),
        "packet_socket" => {
            let Interface { interface } = params(given)?;
            json!(observe::packet_socket(&interface)?)
        }
        "sockets" => json!(observe::sockets()?),
        "redirect" => {
            let Redirect { from, to } = params(given)?;
            json!(observe::redirect(from, to)?)
        }
        "send_small" => send_small(&params(given)?)?,
        "recv_small" => recv_small(&params(given)?)?,
        "send_pattern" => {
            let mut sent = 0;
            send_pattern(&params(given)?, &mut sent)?;
            json!(sent)
        }
        "recv_pattern" => {
            let mut received = 0;
            recv_pattern(&params(given)?, &mut received)?;
            json!(received)
        }
        "send_pattern_until_error" => {
            let mut sent = 0;
            let result = send_pattern(&params(given)?, &mut sent);
            how_far(sent, result)
        }
        "recv_pattern_until_error" => {
            let mut received = 0;
            let result = recv_pattern(&params(given)?, &mut received);
            how_far(received, result)
        }
        "send_pattern_zero_copy" => {
            let Pattern { fd, seed, len } = params(given)?;
            json!(zerocopy::send_pattern(fd, seed, len)?)
        }
        "send_messages" => send_messages(&params(given)?)?,
        "recv_messages" => recv_messages(&params(given)?)?,
        "end_sending" => json!(Sender::end(params::<Fd>(given)?.fd)),
        "shutdown" => {
            let FdNumber { fd, number } = params(given)?;
            json!(sys::shutdown(fd, number)?)
        }
        "close" => json!(sys::close(params::<Fd>(given)?.fd)?),
        "set_nonblocking" => {
            let FdNumber { fd, number } = params(given)?;
            json!(sys::set_nonblocking(fd, number != 0)?)
        }
        "poll" => {
            let Poll {
                fd,
                events,
                timeout_ms,
            } = params(given)?;
            json!(sys::poll(fd, events as i16, timeout_ms)?)
        }
        "epoll" => {
            let Poll { fd, events, .. } = params(given)?;
            json!(sys::epoll(fd, events)?)
        }
        "epoll_wait" => {
            let Poll { fd, timeout_ms, .. } = params(given)?;
            json!(sys::epoll_wait(fd, timeout_ms)?)
        }
        "setsockopt" => {
            let SockOption {
                fd,
                level,
                name,
                value,
                ..
            } = params(given)?;
            json!(sys::set_option(fd, level, name, &value)?)
        }
        "getsockopt" => {
            let SockOption {
                fd,
                level,
                name,
                len,
                ..
            } = params(given)?;
            json!(sys::option(fd, level, name, len)?)
        }
        "siocinq" => json!(sys::ioctl_int(params::<Fd>(given)?.fd, libc::FIONREAD)?),
        "siocoutq" => json!(sys::ioctl_int(params::<Fd>(given)?.fd, libc::TIOCOUTQ)?),
        "local_cid" => json!(sys::local_cid()?),
        "accept_many" => accept_many(&params(given)?)?,
        "sh" => run_script(&params::<Script>(given)?.script)?,
        _ => bail!("no method {method:?}"),
    })
}

/// Sends one byte, many times.
fn send_small(wanted: &Small) -> Result<Value> {
    for _ in 0..wanted.count {
        sys::send(wanted.fd, b"s", 0)?;
    }
    Ok(json!(wanted.count))
}

/// Receives so many bytes, and as many more as come with the last of them; says how many, and the most of one call.
fn recv_small(wanted: &Small) -> Result<Value> {
    let mut buffer = vec![0; PATTERN_PART];
    let (mut received, mut most) = (0, 0);
    while received < wanted.count {
        let len = sys::recv(wanted.fd, &mut buffer, 0)?;
        ensure!(len > 0, "the end after {received} bytes");
        received += len as u64;
        most = most.max(len);
    }
    Ok(json!((received, most)))
}

fn without_end() -> u64 {
    u64::MAX
}

/// Sends all of a pattern, or until `end_sending`; counts the bytes that were sent.
fn send_pattern(wanted: &Pattern, sent: &mut u64) -> Result<()> {
    let sender = Sender::new(wanted.fd);
    let mut buffer = vec![0; PATTERN_PART];
    while *sent < wanted.len {
        let part = PATTERN_PART.min((wanted.len - *sent) as usize);
        pattern::fill(&mut buffer[..part], wanted.seed, *sent);
        let mut done = 0;
        while done < part {
            let len = sys::send(wanted.fd, &buffer[done..part], 0)?;
            done += len;
            *sent += len as u64;
        }
        if sender.is_ended() {
            break;
        }
    }
    Ok(())
}

/// Receives a pattern, up to its length or the end of the stream, and counts how much of it came; an error where it differs.
fn recv_pattern(wanted: &Pattern, received: &mut u64) -> Result<()> {
    let mut buffer = vec![0; PATTERN_PART];
    while *received < wanted.len {
        let part = PATTERN_PART.min((wanted.len - *received) as usize);
        let len = sys::recv(wanted.fd, &mut buffer[..part], 0)?;
        if len == 0 {
            break;
        }
        if let Some(at) = pattern::first_difference(&buffer[..len], wanted.seed, *received) {
            bail!("the stream differs from what was sent at byte {at}");
        }
        *received += len as u64;
    }
    Ok(())
}

/// How much of a pattern was sent or received, and the error that ended it.
fn how_far(bytes: u64, result: Result<()>) -> Value {
    json!({"bytes": bytes, "error": result.err().map(|error| sys::describe(&error))})
}

/// Sends messages of a pattern until `end_sending`; says how many that were.
fn send_messages(wanted: &Messages) -> Result<Value> {
    let sender = Sender::new(wanted.fd);
    let mut sent = 0;
    loop {
        let message = pattern::message(wanted.seed, sent);
        let len = sys::send(wanted.fd, &message, 0)?;
        ensure!(len == message.len(), "{len} of {} bytes", message.len());
        sent += 1;
        if sender.is_ended() {
            return Ok(json!(sent));
        }
    }
}

/// Receives messages of a pattern up to the end; says how many came. An error where one differs, in its length too.
fn recv_messages(wanted: &Messages) -> Result<Value> {
    let mut buffer = vec![0; pattern::MAX_MESSAGE + 1];
    let mut received = 0;
    loop {
        let len = sys::recv(wanted.fd, &mut buffer, 0)?;
        if len == 0 {
            return Ok(json!(received));
        }
        let should = pattern::message(wanted.seed, received);
        ensure!(
            buffer[..len] == should,
            "message {received}, of {} bytes, came as another one, of {len}",
            should.len()
        );
        received += 1;
    }
}

fn accept_many(wanted: &Small) -> Result<Value> {
    let count = usize::try_from(wanted.count)?;
    allow_descriptors(count)?;
    let mut fds = Vec::with_capacity(count);
    for _ in 0..count {
        fds.push(sys::accept(wanted.fd)?);
    }
    Ok(json!(fds))
}

/// Raises the limit of open descriptors by `count`.
fn allow_descriptors(count: usize) -> Result<()> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: There is room for the limit.
    sys::check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) })?;
    limit.rlim_cur = limit.rlim_cur.saturating_add(count as libc::rlim_t);
    limit.rlim_max = limit.rlim_max.max(limit.rlim_cur);
    // SAFETY: The limit is valid.
    sys::check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) })?;
    Ok(())
}

fn run_script(script: &str) -> Result<Value> {
    let output = Command::new("/bin/sh")
        .args(["-c", script])
        .output()
        .context("running /bin/sh")?;
    let mut said = output.stdout;
    said.extend(output.stderr);
    Ok(json!({
        "status": output.status.code().unwrap_or(-1),
        "output": String::from_utf8_lossy(&said),
    }))
}

// SPDX-License-Identifier: GPL-2.0

//! Single messages: out of memory of which a part cannot be read, or not yet, and with the flags that they come with.

use std::io;
use std::os::fd::RawFd;

use anyhow::{ensure, Result};
use linux_raw_sys::general::{
    uffdio_api, uffdio_range, uffdio_register, UFFDIO_REGISTER_MODE_MISSING, UFFD_API,
};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER};
use serde_json::{json, Value};

use crate::pattern;
use crate::sys::{check, check_size, iovec, message};

/// The pattern of messages by [`Mapping::send`] has this seed.
const SEED: u64 = 0;

/// The `number`th of many short messages: what it is full of, how long it is, and whether it ends a record.
fn short_message(number: u64) -> (u8, usize, bool) {
    (number as u8, 1 + (number % 7) as usize, number % 3 == 0)
}

/// Memory of its own.
struct Mapping {
    start: *mut libc::c_void,
    len: usize,
}

impl Mapping {
    fn new(len: usize) -> io::Result<Self> {
        // SAFETY: The kernel chooses where.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start, len })
    }

    /// Fills it with a pattern.
    fn fill(&mut self, len: usize) {
        // SAFETY: It is at least as long, and borrowed.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.start.cast(), len.min(self.len)) };
        pattern::fill(bytes, SEED, 0);
    }

    /// Sends all of it with one call.
    fn send(&self, fd: RawFd, flags: i32) -> io::Result<usize> {
        let flags = flags | libc::MSG_NOSIGNAL;
        // SAFETY: It is as long. The kernel looks whether it can be read.
        check_size(unsafe { libc::send(fd, self.start, self.len, flags) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: Nobody uses the mapping any more.
        unsafe { libc::munmap(self.start, self.len) };
    }
}

/// Sends `len` bytes with one call, of which those from `readable` on, a whole number of pages, cannot be read.
pub fn send_bytes(fd: RawFd, len: usize, readable: Option<usize>, flags: i32) -> Result<usize> {
    let mut mapping = Mapping::new(len)?;
    mapping.fill(len);
    if let Some(readable) = readable.filter(|readable| *readable < len) {
        // SAFETY: The mapping is longer.
        unsafe {
            let unreadable = mapping.start.byte_add(readable);
            check(libc::mprotect(unreadable, len - readable, libc::PROT_NONE))?;
        }
    }
    Ok(mapping.send(fd, flags)?)
}

/// Makes a userfaultfd. It is readable while a thread waits for memory that it holds back, and closing it gives the memory.
pub fn userfaultfd() -> Result<RawFd> {
    let mut api = uffdio_api {
        api: UFFD_API.into(),
        features: 0,
        ioctls: 0,
    };
    // SAFETY: No pointers, and then one to what the ioctl reads and writes.
    unsafe {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let fd = check(libc::syscall(libc::SYS_userfaultfd, flags) as libc::c_int)?;
        check(libc::ioctl(fd, UFFDIO_API as libc::Ioctl, &raw mut api))?;
        Ok(fd)
    }
}

/// Sends `len` bytes with one call, of which those from `there` on, a whole number of pages, are held back by a userfaultfd.
pub fn send_held_back(fd: RawFd, len: usize, there: usize, userfaultfd: RawFd) -> Result<usize> {
    ensure!(there <= len, "{there} of {len} bytes are there");
    let mut mapping = Mapping::new(len)?;
    mapping.fill(there);
    let mut held_back = uffdio_register {
        range: uffdio_range {
            start: (mapping.start.addr() + there) as u64,
            len: (len - there) as u64,
        },
        mode: UFFDIO_REGISTER_MODE_MISSING.into(),
        ioctls: 0,
    };
    // SAFETY: The mapping is as long, and nobody writes to the part that is held back.
    unsafe {
        check(libc::ioctl(
            userfaultfd,
            UFFDIO_REGISTER as libc::Ioctl,
            &raw mut held_back,
        ))?;
    }
    Ok(mapping.send(fd, 0)?)
}

/// Receives up to `len` bytes of a message; returns what the call said, the bytes, and the flags of the message.
fn recv(fd: RawFd, len: usize, flags: i32) -> io::Result<(usize, Vec<u8>, i32)> {
    let mut bytes = vec![0_u8; len];
    let mut parts = [iovec(&mut bytes)];
    let mut message = message(&mut parts);
    // SAFETY: The buffer lives, and is as long as is said.
    let said = check_size(unsafe { libc::recvmsg(fd, &mut message, flags) })?;
    bytes.truncate(said);
    Ok((said, bytes, message.msg_flags))
}

/// The same, with the flags that are of interest by name.
pub fn recv_message(fd: RawFd, len: usize, flags: i32) -> Result<Value> {
    let (said, bytes, flags) = recv(fd, len, flags)?;
    Ok(json!({
        "len": said,
        "bytes": bytes,
        "ends_record": flags & libc::MSG_EOR != 0,
        "is_cut": flags & libc::MSG_TRUNC != 0,
    }))
}

/// Receives a message with one call, which has to be as one by [`send_bytes`]; says how long it is.
pub fn recv_long_message(fd: RawFd, len: usize) -> Result<usize> {
    let (said, bytes, _) = recv(fd, len, 0)?;
    let wrong = pattern::first_difference(&bytes, SEED, 0);
    ensure!(
        wrong.is_none(),
        "the message differs from what was sent at byte {wrong:?}"
    );
    Ok(said)
}

/// Receives so many short messages; an error where one is not what it should be.
pub fn recv_short_messages(fd: RawFd, count: u64) -> Result<u64> {
    for number in 0..count {
        let (_, bytes, flags) = recv(fd, 100, 0)?;
        let (filling, len, ends_record) = short_message(number);
        let is = (&bytes[..], flags & libc::MSG_EOR != 0);
        ensure!(
            is == (&vec![filling; len][..], ends_record),
            "message {number} is {is:?}"
        );
    }
    Ok(count)
}

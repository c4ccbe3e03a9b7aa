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

use crate::sys::{check, check_size, iovec, message};

/// What messages sent by [`send_bytes`] are full of.
const FILLING: u8 = b'm';

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
    let mapping = Mapping::new(len)?;
    // SAFETY: The mapping is as long, and protected from `readable` on where that is inside.
    unsafe {
        mapping.start.cast::<u8>().write_bytes(FILLING, len);
        if let Some(readable) = readable.filter(|readable| *readable < len) {
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
    let mapping = Mapping::new(len)?;
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
        mapping.start.cast::<u8>().write_bytes(FILLING, there);
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

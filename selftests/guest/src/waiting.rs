// SPDX-License-Identifier: GPL-2.0

//! The ways in which a program can wait for a socket, besides plain `recv()` and `send()`.

use std::io;
use std::os::fd::RawFd;

use anyhow::{bail, ensure, Result};
use io_uring::{opcode, types, IoUring};

use crate::sys::{self, check, check_size, iovec, message};

/// How much one call sends, in bytes.
const PART: usize = 64 * 1024;

/// A pipe: the end that is read and the end that is written.
fn pipe() -> io::Result<(RawFd, RawFd)> {
    let mut ends = [0; 2];
    // SAFETY: There is room for both ends.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
    Ok((ends[0], ends[1]))
}

fn splice(from: RawFd, to: RawFd, len: usize) -> io::Result<usize> {
    // SAFETY: There are no offsets to point to.
    check_size(unsafe {
        libc::splice(
            from,
            std::ptr::null_mut(),
            to,
            std::ptr::null_mut(),
            len,
            libc::SPLICE_F_MOVE,
        )
    })
}

/// Submits one operation to an io_uring of its own and waits for its result.
fn submit(entry: &io_uring::squeue::Entry) -> Result<usize> {
    let mut ring = IoUring::new(8)?;
    // SAFETY: What the entry points to lives until the results are there, as they are waited for here.
    unsafe { ring.submission().push(entry)? };
    ring.submit_and_wait(1)?;
    let Some(done) = ring.completion().next() else {
        bail!("the io_uring has no result");
    };
    if io_uring::cqueue::more(done.flags()) {
        // The pages of a send are still used until there is a second result.
        while ring.completion().is_empty() {
            ring.submit_and_wait(1)?;
        }
    }
    if done.result() < 0 {
        return Err(io::Error::from_raw_os_error(-done.result()).into());
    }
    Ok(done.result() as usize)
}

/// Receives up to `len` bytes in one of the ways; returns how many.
pub fn receive(fd: RawFd, way: &str, len: usize) -> Result<usize> {
    let mut bytes = vec![0_u8; len];
    let mut parts = [iovec(&mut bytes)];
    // SAFETY: The buffers live until the calls return, and are as long as is said.
    Ok(unsafe {
        match way {
            "recv" => sys::recv(fd, &mut bytes, 0)?,
            "recv with MSG_WAITALL" => sys::recv(fd, &mut bytes, libc::MSG_WAITALL)?,
            "recv with MSG_PEEK" => sys::recv(fd, &mut bytes, libc::MSG_PEEK)?,
            "read" => check_size(libc::read(fd, bytes.as_mut_ptr().cast(), len))?,
            "readv" => check_size(libc::readv(fd, parts.as_ptr(), 1))?,
            "recvmsg" => check_size(libc::recvmsg(fd, &mut message(&mut parts), 0))?,
            "splice" => {
                let (read, write) = pipe()?;
                let moved = splice(fd, write, len);
                sys::close(read)?;
                sys::close(write)?;
                moved?
            }
            "io_uring" => {
                submit(&opcode::Recv::new(types::Fd(fd), bytes.as_mut_ptr(), len as u32).build())?
            }
            _ => bail!("no way to receive is called {way:?}"),
        }
    })
}

/// Sends with an io_uring from the caller's memory, and waits until the kernel needs that no more.
pub fn send_zero_copy(fd: RawFd, bytes: &[u8]) -> Result<usize> {
    submit(
        &opcode::SendZc::new(types::Fd(fd), bytes.as_ptr(), bytes.len() as u32)
            .flags(libc::MSG_NOSIGNAL)
            .build(),
    )
}

/// Sends in one of the ways until that fails. Zeroes, in parts of 64 KiB.
pub fn send_until_error(fd: RawFd, way: &str) -> Result<()> {
    let mut bytes = vec![0_u8; PART];
    let (pipe_read, pipe_write) = pipe()?;
    loop {
        let mut parts = [iovec(&mut bytes)];
        // SAFETY: As above.
        let sent = unsafe {
            match way {
                "send" => sys::send(fd, &bytes, 0)?,
                "write" => check_size(libc::write(fd, bytes.as_ptr().cast(), PART))?,
                "writev" => check_size(libc::writev(fd, parts.as_ptr(), 1))?,
                "sendmsg" => {
                    check_size(libc::sendmsg(fd, &message(&mut parts), libc::MSG_NOSIGNAL))?
                }
                "splice" => {
                    let there = check_size(libc::write(pipe_write, bytes.as_ptr().cast(), 4096))?;
                    splice(pipe_read, fd, there)?
                }
                "io_uring" => submit(
                    &opcode::Send::new(types::Fd(fd), bytes.as_ptr(), PART as u32)
                        .flags(libc::MSG_NOSIGNAL)
                        .build(),
                )?,
                "io_uring zerocopy" => send_zero_copy(fd, &bytes)?,
                _ => bail!("no way to send is called {way:?}"),
            }
        };
        ensure!(sent > 0, "{way} sent nothing, without an error");
    }
}

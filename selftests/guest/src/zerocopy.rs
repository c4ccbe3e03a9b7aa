// SPDX-License-Identifier: GPL-2.0

//! Sends with `MSG_ZEROCOPY`, and their completions on the socket's error queue.

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::RawFd;

use anyhow::{ensure, Result};
use serde::Serialize;

use crate::pattern;
use crate::sender::Sender;
use crate::sys;

/// How much one call sends, in bytes.
const PART: usize = 16 * 1024;

/// `SO_EE_ORIGIN_ZEROCOPY` of linux/errqueue.h.
const ORIGIN_ZEROCOPY: u8 = 5;

/// `SO_EE_CODE_ZEROCOPY_COPIED` of it.
const CODE_COPIED: u8 = 1;

/// The size of a page, in bytes.
const PAGE: usize = 4096;

/// How much is sent before the pages are used for something else, in bytes.
const WINDOW: u64 = 16 * PART as u64;

/// How long a completion may take, in milliseconds, before it is looked for again.
const LOOK_AGAIN_MS: libc::c_int = 10;

fn enable(fd: RawFd) -> io::Result<()> {
    let on = 1_i32.to_ne_bytes();
    sys::set_option(fd, libc::SOL_SOCKET, libc::SO_ZEROCOPY, &on)
}

/// Sends a part of `bytes`, without waiting; `None` where the socket takes nothing.
fn send_some(fd: RawFd, bytes: &[u8]) -> io::Result<Option<usize>> {
    match sys::send(fd, bytes, libc::MSG_ZEROCOPY | libc::MSG_DONTWAIT) {
        Ok(len) => Ok(Some(len)),
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Sends all of a pattern, or until it is asked to end, and waits for the completions before pages are used again: they have to come in order, each
/// once, and one at least for each call.
pub fn send_pattern(fd: RawFd, seed: u64, len: u64) -> Result<u64> {
    enable(fd)?;
    let sender = Sender::new(fd);
    let (mut sent, mut calls, mut completed) = (0, 0, 0);
    while sent < len {
        let mut bytes = vec![0; WINDOW.min(len - sent) as usize];
        pattern::fill(&mut bytes, seed, sent);
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            match send_some(fd, &rest[..rest.len().min(PART)])? {
                Some(len) => {
                    rest = &rest[len..];
                    calls += 1;
                }
                None => {
                    note_completions(fd, &mut completed)?;
                    sys::poll(fd, libc::POLLOUT, LOOK_AGAIN_MS)?;
                }
            }
        }
        while completed < calls || sys::ioctl_int(fd, libc::TIOCOUTQ)? > 0 {
            note_completions(fd, &mut completed)?;
            sys::poll(fd, 0, LOOK_AGAIN_MS)?;
        }
        sent += bytes.len() as u64;
        if sender.is_ended() {
            break;
        }
    }
    note_completions(fd, &mut completed)?;
    Ok(sent)
}

/// Takes the completions that are there, which have to follow those of before.
fn note_completions(fd: RawFd, completed: &mut u32) -> Result<()> {
    for Completion { first, last, .. } in completions(fd)? {
        ensure!(
            first == *completed && last >= first,
            "the calls {first} to {last} are said to be complete after {completed} calls"
        );
        *completed = last + 1;
    }
    Ok(())
}

/// Sends until the socket takes no more, without waiting, `limit` times at most. Returns how many calls were made. The
/// pages are never used for anything else.
pub fn send_what_fits(fd: RawFd, limit: usize) -> Result<usize> {
    enable(fd)?;
    for sent in 0..limit {
        let bytes = vec![0x5a_u8; PART].leak();
        if send_some(fd, bytes)?.is_none() {
            return Ok(sent);
        }
    }
    Ok(limit)
}

/// Sends so many pieces of `len` bytes, each in a page of its own, with one call, and writes `later` over them in place of
/// `before`; returns how many bytes were sent. The pages are never used for anything else.
pub fn send_pieces(fd: RawFd, pieces: usize, len: usize, before: u8, later: u8) -> Result<usize> {
    ensure!(len < PAGE, "{len} bytes are no piece of a page");
    let pages = vec![before; (pieces + 1) * PAGE].leak();
    let mut parts: Vec<libc::iovec> = pages
        .chunks_exact_mut(PAGE)
        .take(pieces)
        .map(|page| sys::iovec(&mut page[..len]))
        .collect();
    let message = sys::message(&mut parts);
    let flags = libc::MSG_ZEROCOPY | libc::MSG_NOSIGNAL;
    // SAFETY: What the message points to lives.
    let sent = sys::check_size(unsafe { libc::sendmsg(fd, &message, flags) })?;
    pages.fill(later);
    Ok(sent)
}

/// A completion: of which calls it is, both ends included, and whether the kernel has copied what they sent.
#[derive(Serialize)]
pub struct Completion {
    pub first: u32,
    pub last: u32,
    pub is_copied: bool,
}

/// Reads the completions that are there.
pub fn completions(fd: RawFd) -> Result<Vec<Completion>> {
    let mut completions = Vec::new();
    loop {
        let mut control = [0_u64; 16];
        // SAFETY: All-zero is a valid message; the control buffer lives, and is as long as is said.
        let error = unsafe {
            let mut message: libc::msghdr = zeroed();
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = size_of::<[u64; 16]>() as _;
            let result = libc::recvmsg(fd, &mut message, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT);
            if result < 0 {
                let error = io::Error::last_os_error();
                if error.raw_os_error() == Some(libc::EAGAIN) {
                    return Ok(completions);
                }
                return Err(error.into());
            }
            let header = libc::CMSG_FIRSTHDR(&message);
            ensure!(!header.is_null(), "an error without a control message");
            libc::CMSG_DATA(header)
                .cast::<libc::sock_extended_err>()
                .read_unaligned()
        };
        ensure!(
            error.ee_errno == 0 && error.ee_origin == ORIGIN_ZEROCOPY,
            "no completion, but error {} of origin {}",
            error.ee_errno,
            error.ee_origin
        );
        completions.push(Completion {
            first: error.ee_info,
            last: error.ee_data,
            is_copied: error.ee_code == CODE_COPIED,
        });
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Sends with `MSG_ZEROCOPY`, and their completions on the socket's error queue.

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::RawFd;

use anyhow::{ensure, Result};

use crate::sys;

/// How much one call sends, in bytes.
const PART: usize = 16 * 1024;

/// `SO_EE_ORIGIN_ZEROCOPY` of linux/errqueue.h.
const ORIGIN_ZEROCOPY: u8 = 5;

/// Sends until the socket takes no more, without waiting, `limit` times at most. Returns how many calls were made. The
/// pages are never used for anything else.
pub fn send_what_fits(fd: RawFd, limit: usize) -> Result<usize> {
    sys::set_option(
        fd,
        libc::SOL_SOCKET,
        libc::SO_ZEROCOPY,
        &1_i32.to_ne_bytes(),
    )?;
    for sent in 0..limit {
        let bytes = vec![0x5a_u8; PART].leak();
        match sys::send(fd, bytes, libc::MSG_ZEROCOPY | libc::MSG_DONTWAIT) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => return Ok(sent),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(limit)
}

/// Reads the completions that are there; returns the ranges of calls that they are for, both ends included.
pub fn completions(fd: RawFd) -> Result<Vec<(u32, u32)>> {
    let mut ranges = Vec::new();
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
                    return Ok(ranges);
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
        ranges.push((error.ee_info, error.ee_data));
    }
}

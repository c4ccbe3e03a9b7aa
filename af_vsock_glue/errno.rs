// SPDX-License-Identifier: GPL-2.0

//! Error numbers of sockets, which the kernel's Rust names from Linux 7.3 on only (`kernel::error::code`).
//!
//! C headers: [`include/uapi/asm-generic/errno.h`](srctree/include/uapi/asm-generic/errno.h)

use super::bindings;
use kernel::{ffi::c_int, prelude::*};

/// An error number that becomes an [`Error`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Errno(u32);

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::from_errno(-(errno.0 as c_int))
    }
}

/// Connection refused.
pub(crate) const ECONNREFUSED: Errno = Errno(bindings::ECONNREFUSED);
/// Connection reset by peer.
pub(crate) const ECONNRESET: Errno = Errno(bindings::ECONNRESET);
/// No buffer space available.
pub(crate) const ENOBUFS: Errno = Errno(bindings::ENOBUFS);
/// Transport endpoint is not connected.
pub(crate) const ENOTCONN: Errno = Errno(bindings::ENOTCONN);
/// Protocol error.
pub(crate) const EPROTO: Errno = Errno(bindings::EPROTO);
/// Socket type not supported.
pub(crate) const ESOCKTNOSUPPORT: Errno = Errno(bindings::ESOCKTNOSUPPORT);

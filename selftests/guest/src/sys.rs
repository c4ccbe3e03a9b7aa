// SPDX-License-Identifier: GPL-2.0

//! System calls of AF_VSOCK, with the errors as they come.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::mem::{size_of, zeroed};
use std::os::fd::RawFd;

/// `IOCTL_VM_SOCKETS_GET_LOCAL_CID`.
const IOCTL_GET_LOCAL_CID: libc::Ioctl = 0x7b9;

const SO_VM_SOCKETS_CONNECT_TIMEOUT: libc::c_int = 8;

/// In seconds. A non-blocking connect() keeps its socket so long, closed or not.
const CONNECT_TIMEOUT_S: u64 = 240;

/// The result of a system call that returns -1 for an error.
pub fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// The same, of one that returns a number of bytes.
pub fn check_size(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// A part of a message.
pub fn iovec(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    }
}

/// A message of such parts.
pub fn message(parts: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: All-zero is a valid message.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = parts.as_mut_ptr();
    message.msg_iovlen = parts.len() as _;
    message
}

/// The name of an error of a system call, `ECONNRESET` and such; the text of any other error.
pub fn describe(error: &anyhow::Error) -> String {
    const NAMES: &[(i32, &str)] = &[
        (libc::EPERM, "EPERM"),
        (libc::ENOENT, "ENOENT"),
        (libc::EINTR, "EINTR"),
        (libc::EIO, "EIO"),
        (libc::EBADF, "EBADF"),
        (libc::EAGAIN, "EAGAIN"),
        (libc::ENOMEM, "ENOMEM"),
        (libc::ENOSPC, "ENOSPC"),
        (libc::EACCES, "EACCES"),
        (libc::EFAULT, "EFAULT"),
        (libc::EBUSY, "EBUSY"),
        (libc::EEXIST, "EEXIST"),
        (libc::ENODEV, "ENODEV"),
        (libc::EINVAL, "EINVAL"),
        (libc::EPIPE, "EPIPE"),
        (libc::EPROTO, "EPROTO"),
        (libc::EMSGSIZE, "EMSGSIZE"),
        (libc::ENOPROTOOPT, "ENOPROTOOPT"),
        (libc::ESOCKTNOSUPPORT, "ESOCKTNOSUPPORT"),
        (libc::EOPNOTSUPP, "EOPNOTSUPP"),
        (libc::EADDRINUSE, "EADDRINUSE"),
        (libc::EADDRNOTAVAIL, "EADDRNOTAVAIL"),
        (libc::ENETUNREACH, "ENETUNREACH"),
        (libc::ECONNRESET, "ECONNRESET"),
        (libc::ENOBUFS, "ENOBUFS"),
        (libc::EISCONN, "EISCONN"),
        (libc::ENOTCONN, "ENOTCONN"),
        (libc::ETIMEDOUT, "ETIMEDOUT"),
        (libc::ECONNREFUSED, "ECONNREFUSED"),
        (libc::EHOSTUNREACH, "EHOSTUNREACH"),
        (libc::EALREADY, "EALREADY"),
        (libc::EINPROGRESS, "EINPROGRESS"),
    ];
    let number = error
        .downcast_ref::<io::Error>()
        .and_then(io::Error::raw_os_error);
    match number {
        Some(number) => NAMES
            .iter()
            .find(|(known, _)| *known == number)
            .map_or_else(|| format!("errno {number}"), |(_, name)| (*name).to_owned()),
        None => format!("{error:#}"),
    }
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: All-zero is a valid address.
    let mut address: libc::sockaddr_vm = unsafe { zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

const ADDRESS_LEN: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

/// A socket whose connect() waits for an answer longer than a test does: the kernel's own 2 s pass with an emulated machine's
/// processors somewhere else. A test of that limit sets another one.
pub fn socket(kind: libc::c_int) -> io::Result<RawFd> {
    // SAFETY: No pointers.
    let fd = check(unsafe { libc::socket(libc::AF_VSOCK, kind | libc::SOCK_CLOEXEC, 0) })?;
    let timeout = [CONNECT_TIMEOUT_S, 0].map(u64::to_ne_bytes).concat();
    set_option(fd, libc::AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &timeout)?;
    Ok(fd)
}

/// Writes to a file while the kernel lets the `nth` allocation for this write fail. Returns the error's name, where there
/// was one, and whether there were so many allocations at all.
pub fn write_with_fault(path: &str, text: &str, nth: u32) -> io::Result<(Option<String>, bool)> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    // It cannot be sought in, and opening it takes memory, so it is opened before for each use.
    let fail_nth = "/proc/thread-self/fail-nth";
    let mut arm = OpenOptions::new().write(true).open(fail_nth)?;
    let mut look = OpenOptions::new().read(true).open(fail_nth)?;
    let mut disarm = OpenOptions::new().write(true).open(fail_nth)?;
    let mut left = [0; 16];
    arm.write_all(nth.to_string().as_bytes())?;
    let written = file.write_all(text.as_bytes());
    let len = look.read(&mut left)?;
    disarm.write_all(b"0")?;
    let error = written.err().map(|error| describe(&error.into()));
    Ok((error, left[..len].trim_ascii() == b"0"))
}

/// A socket in a new network namespace, in which nothing but it is.
pub fn socket_in_new_namespace(kind: libc::c_int) -> io::Result<RawFd> {
    let in_new_namespace = move || {
        // SAFETY: No pointers; it concerns this thread only.
        check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
        socket(kind)
    };
    std::thread::spawn(in_new_namespace)
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
}

pub fn bind(fd: RawFd, cid: u32, port: u32) -> io::Result<()> {
    let address = address(cid, port);
    // SAFETY: The address is valid and as long as it is said to be.
    check(unsafe { libc::bind(fd, (&raw const address).cast(), ADDRESS_LEN) }).map(drop)
}

pub fn connect(fd: RawFd, cid: u32, port: u32) -> io::Result<()> {
    let address = address(cid, port);
    // SAFETY: As above.
    check(unsafe { libc::connect(fd, (&raw const address).cast(), ADDRESS_LEN) }).map(drop)
}

pub fn listen(fd: RawFd, backlog: libc::c_int) -> io::Result<()> {
    // SAFETY: No pointers.
    check(unsafe { libc::listen(fd, backlog) }).map(drop)
}

/// Which end of a socket's addresses is meant.
pub enum End {
    Own,
    Peer,
}

pub fn accept(fd: RawFd) -> io::Result<RawFd> {
    // SAFETY: Null pointers ask for no address.
    check(unsafe {
        libc::accept4(
            fd,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            libc::SOCK_CLOEXEC,
        )
    })
}

pub fn name(fd: RawFd, end: End) -> io::Result<(u32, u32)> {
    let mut address = address(0, 0);
    let mut len = ADDRESS_LEN;
    let pointer = (&raw mut address).cast();
    // SAFETY: The address has room for as much as `len` says.
    check(unsafe {
        match end {
            End::Own => libc::getsockname(fd, pointer, &mut len),
            End::Peer => libc::getpeername(fd, pointer, &mut len),
        }
    })?;
    Ok((address.svm_cid, address.svm_port))
}

pub fn send(fd: RawFd, bytes: &[u8], flags: libc::c_int) -> io::Result<usize> {
    // SAFETY: The buffer is as long as it is said to be.
    check_size(unsafe {
        libc::send(
            fd,
            bytes.as_ptr().cast(),
            bytes.len(),
            flags | libc::MSG_NOSIGNAL,
        )
    })
}

pub fn recv(fd: RawFd, bytes: &mut [u8], flags: libc::c_int) -> io::Result<usize> {
    // SAFETY: As above.
    check_size(unsafe { libc::recv(fd, bytes.as_mut_ptr().cast(), bytes.len(), flags) })
}

pub fn shutdown(fd: RawFd, how: libc::c_int) -> io::Result<()> {
    // SAFETY: No pointers.
    check(unsafe { libc::shutdown(fd, how) }).map(drop)
}

pub fn close(fd: RawFd) -> io::Result<()> {
    // SAFETY: The test that asks for it owns the descriptor.
    check(unsafe { libc::close(fd) }).map(drop)
}

pub fn poll(fd: RawFd, events: i16, timeout_ms: libc::c_int) -> io::Result<i16> {
    let mut entry = libc::pollfd {
        fd,
        events,
        revents: 0,
    };
    // SAFETY: One entry, as it is said.
    check(unsafe { libc::poll(&mut entry, 1, timeout_ms) })?;
    Ok(entry.revents)
}

/// Makes an epoll instance that watches `fd`.
pub fn epoll(fd: RawFd, events: u32) -> io::Result<RawFd> {
    // SAFETY: No pointers.
    let epoll = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
    let mut event = libc::epoll_event { events, u64: 0 };
    // SAFETY: The event is valid.
    check(unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &mut event) })?;
    Ok(epoll)
}

/// The events of the watched descriptor, 0 for none in time.
pub fn epoll_wait(epoll: RawFd, timeout_ms: libc::c_int) -> io::Result<u32> {
    let mut event = libc::epoll_event { events: 0, u64: 0 };
    // SAFETY: There is room for one event.
    let count = check(unsafe { libc::epoll_wait(epoll, &mut event, 1, timeout_ms) })?;
    Ok(if count == 0 { 0 } else { event.events })
}

pub fn set_option(
    fd: RawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: &[u8],
) -> io::Result<()> {
    let len = value.len() as libc::socklen_t;
    // SAFETY: The value is as long as it is said to be.
    check(unsafe { libc::setsockopt(fd, level, name, value.as_ptr().cast(), len) }).map(drop)
}

pub fn option(fd: RawFd, level: libc::c_int, name: libc::c_int, len: usize) -> io::Result<Vec<u8>> {
    let mut value = vec![0; len];
    let mut len = len as libc::socklen_t;
    // SAFETY: The value has room for as much as `len` says.
    check(unsafe { libc::getsockopt(fd, level, name, value.as_mut_ptr().cast(), &mut len) })?;
    value.truncate(len as usize);
    Ok(value)
}

pub fn set_nonblocking(fd: RawFd, on: bool) -> io::Result<()> {
    // SAFETY: No pointers.
    let flags = check(unsafe { libc::fcntl(fd, libc::F_GETFL) })?;
    let flags = if on {
        flags | libc::O_NONBLOCK
    } else {
        flags & !libc::O_NONBLOCK
    };
    // SAFETY: No pointers.
    check(unsafe { libc::fcntl(fd, libc::F_SETFL, flags) }).map(drop)
}

/// An ioctl that writes one `int`.
pub fn ioctl_int(fd: RawFd, request: libc::Ioctl) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    // SAFETY: The request writes an `int`.
    check(unsafe { libc::ioctl(fd, request, &mut value) })?;
    Ok(value)
}

pub fn local_cid() -> io::Result<u32> {
    use std::os::fd::AsRawFd;
    let device = std::fs::File::open("/dev/vsock")?;
    Ok(ioctl_int(device.as_raw_fd(), IOCTL_GET_LOCAL_CID)? as u32)
}

// SPDX-License-Identifier: GPL-2.0

//! What observes or redirects sockets besides their own system calls: packet captures, socket diagnostics, sockmaps.

use std::ffi::CString;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::RawFd;

use anyhow::{ensure, Context, Result};
use serde::Serialize;

use crate::sys::check;

/// A packet socket that gets whatever a network interface captures.
pub fn packet_socket(interface: &str) -> Result<RawFd> {
    let name = CString::new(interface)?;
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: The name is a C string; the address is valid and as long as it says.
    unsafe {
        let index = libc::if_nametoindex(name.as_ptr());
        ensure!(index != 0, io::Error::last_os_error());
        let fd = check(libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            protocol.into(),
        ))?;
        let mut address: libc::sockaddr_ll = zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index as i32;
        let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        check(libc::bind(fd, (&raw const address).cast(), len))?;
        Ok(fd)
    }
}

/// A socket as the kernel's diagnostics show it.
#[derive(Debug, Serialize)]
pub struct Shown {
    kind: u8,
    state: u8,
    own: (u32, u32),
    peer: (u32, u32),
}

/// All AF_VSOCK sockets, as `ss --vsock` asks for them.
pub fn sockets() -> Result<Vec<Shown>> {
    const NETLINK_HEADER: usize = 16;
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    let mut request = Vec::new();
    request.extend(40_u32.to_ne_bytes());
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend(((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
    request.extend([0; 8]);
    // struct vsock_diag_req: the family, and all states.
    request.extend([libc::AF_VSOCK as u8, 0, 0, 0]);
    request.extend(u32::MAX.to_ne_bytes());
    request.resize(40, 0);
    // SAFETY: The buffers are as long as their lengths say.
    let fd = unsafe {
        let fd = check(libc::socket(
            libc::AF_NETLINK,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            libc::NETLINK_SOCK_DIAG,
        ))?;
        ensure!(
            libc::send(fd, request.as_ptr().cast(), request.len(), 0) == 40,
            io::Error::last_os_error()
        );
        fd
    };
    let mut shown = Vec::new();
    let mut buffer = vec![0_u8; 32 * 1024];
    'replies: loop {
        // SAFETY: As above.
        let len = unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        let mut rest = &buffer[..usize::try_from(len).map_err(|_| io::Error::last_os_error())?];
        while rest.len() >= NETLINK_HEADER {
            let u32_at =
                |at: usize| Some(u32::from_ne_bytes(rest.get(at..at + 4)?.try_into().ok()?));
            let len = u32_at(0).context("a message without a length")? as usize;
            let kind = u16::from_ne_bytes([rest[4], rest[5]]);
            if i32::from(kind) == libc::NLMSG_DONE {
                break 'replies;
            }
            ensure!(
                kind == SOCK_DIAG_BY_FAMILY,
                "the kernel answers with a message of kind {kind}"
            );
            let field = |at| u32_at(NETLINK_HEADER + at).context("a message that is too short");
            shown.push(Shown {
                kind: rest[NETLINK_HEADER + 1],
                state: rest[NETLINK_HEADER + 2],
                own: (field(4)?, field(8)?),
                peer: (field(12)?, field(16)?),
            });
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
    }
    // SAFETY: It is ours.
    unsafe { libc::close(fd) };
    Ok(shown)
}

/// Part of `union bpf_attr`: enough for what is done here, and zero elsewhere.
type Attributes = [u32; 32];

fn bpf(command: libc::c_long, attributes: &Attributes) -> Result<RawFd> {
    // SAFETY: The attributes are as long as their length says, and what they point to is valid.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attributes.as_ptr(),
            size_of::<Attributes>(),
        )
    };
    Ok(check(result as libc::c_int)?)
}

/// A pointer as two of the attributes' words.
fn words<T>(pointer: *const T) -> [u32; 2] {
    let pointer = pointer as u64;
    [pointer as u32, (pointer >> 32) as u32]
}

fn new_sockmap() -> Result<RawFd> {
    const BPF_MAP_CREATE: libc::c_long = 0;
    const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
    let mut attributes = [0; 32];
    // map_type, key_size, value_size, max_entries
    attributes[..4].copy_from_slice(&[BPF_MAP_TYPE_SOCKMAP, 4, 4, 1]);
    bpf(BPF_MAP_CREATE, &attributes).context("making a sockmap")
}

fn add_to_sockmap(map: RawFd, socket: RawFd) -> Result<()> {
    const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
    let (key, value) = (0_u32, socket);
    let mut attributes = [0; 32];
    attributes[0] = map as u32;
    attributes[2..4].copy_from_slice(&words(&raw const key));
    attributes[4..6].copy_from_slice(&words(&raw const value));
    bpf(BPF_MAP_UPDATE_ELEM, &attributes).context("putting a socket into a sockmap")?;
    Ok(())
}

/// Lets everything that `from` receives be sent by `to`, in the kernel.
pub fn redirect(from: RawFd, to: RawFd) -> Result<()> {
    const BPF_PROG_LOAD: libc::c_long = 5;
    const BPF_PROG_ATTACH: libc::c_long = 8;
    const BPF_PROG_TYPE_SK_SKB: u32 = 14;
    const BPF_SK_SKB_VERDICT: u32 = 38;
    let (sources, targets) = (new_sockmap()?, new_sockmap()?);
    // return skb->family == AF_VSOCK ? bpf_sk_redirect_map(skb, targets, 0, 0) : SK_DROP, with the packet in register 1 already
    const FAMILY_AT: u64 = 88;
    let program: [u64; 10] = [
        0x61 | (1 << 12) | (FAMILY_AT << 16), // r0 = family, which is that of the packet's owner
        0x15 | (2 << 16) | ((libc::AF_VSOCK as u64) << 32), // skip two if r0 == AF_VSOCK
        0xb7,                                 // r0 = SK_DROP
        0x95,                                 // exit
        0x18 | (2 << 8) | (1 << 12) | ((targets as u64) << 32), // r2 = targets
        0,
        0xb7 | (3 << 8),   // r3 = 0
        0xb7 | (4 << 8),   // r4 = 0
        0x85 | (52 << 32), // call bpf_sk_redirect_map
        0x95,              // exit
    ];
    let license = c"GPL";
    let mut attributes = [0; 32];
    attributes[..2].copy_from_slice(&[BPF_PROG_TYPE_SK_SKB, program.len() as u32]);
    attributes[2..4].copy_from_slice(&words(program.as_ptr()));
    attributes[4..6].copy_from_slice(&words(license.as_ptr()));
    let program = bpf(BPF_PROG_LOAD, &attributes).context("loading the program")?;
    let mut attributes = [0; 32];
    attributes[..3].copy_from_slice(&[sources as u32, program as u32, BPF_SK_SKB_VERDICT]);
    bpf(BPF_PROG_ATTACH, &attributes).context("attaching the program")?;
    add_to_sockmap(targets, to)?;
    add_to_sockmap(sources, from)
}

/// A socket that receives the kernel's uevents.
pub fn uevent_socket() -> Result<RawFd> {
    // SAFETY: No pointers.
    let fd = check(unsafe {
        libc::socket(
            libc::AF_NETLINK,
            libc::SOCK_DGRAM | libc::SOCK_CLOEXEC,
            libc::NETLINK_KOBJECT_UEVENT,
        )
    })?;
    // SAFETY: All-zero is a valid address.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as u16;
    address.nl_groups = 1;
    let len = std::mem::size_of_val(&address) as libc::socklen_t;
    // SAFETY: The address is valid and as long as it is said to be.
    check(unsafe { libc::bind(fd, (&raw const address).cast(), len) })?;
    Ok(fd)
}

/// Counts a tracepoint on every CPU from now on, as perf does; returns a descriptor for each of them.
pub fn count_tracepoint(id: u64) -> Result<Vec<RawFd>> {
    const TYPE_TRACEPOINT: u32 = 2;
    // The first version of struct perf_event_attr: type, size, config, and 48 bytes that are 0.
    const ATTRIBUTES_SIZE: usize = 64;
    let mut attributes = [0_u8; ATTRIBUTES_SIZE];
    attributes[..4].copy_from_slice(&TYPE_TRACEPOINT.to_ne_bytes());
    attributes[4..8].copy_from_slice(&(ATTRIBUTES_SIZE as u32).to_ne_bytes());
    attributes[8..16].copy_from_slice(&id.to_ne_bytes());
    // SAFETY: No pointers.
    let cpus = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    let open = |cpu: libc::c_long| {
        const ALL_TASKS: libc::c_long = -1;
        const NO_GROUP: libc::c_long = -1;
        // SAFETY: The attributes are as long as they say.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                attributes.as_ptr(),
                ALL_TASKS,
                cpu,
                NO_GROUP,
                0_u64,
            )
        };
        Ok(check(fd as libc::c_int)?)
    };
    (0..cpus).map(open).collect()
}

/// The sum of what such descriptors have counted.
pub fn read_counters(fds: &[RawFd]) -> Result<u64> {
    let mut sum = 0;
    for fd in fds {
        let mut count = [0_u8; 8];
        // SAFETY: There is room for a count.
        let len = unsafe { libc::read(*fd, count.as_mut_ptr().cast(), count.len()) };
        ensure!(len == 8, io::Error::last_os_error());
        sum += u64::from_ne_bytes(count);
    }
    Ok(sum)
}

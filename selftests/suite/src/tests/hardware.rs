// SPDX-License-Identifier: GPL-2.0

//! The device in all forms that virtio has: rings of all sizes, without and with what was negotiated, on every bus.

use anyhow::{ensure, Context, Result};
use serde_json::json;

use vsock_device::device::{FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC};
use vsock_device::Op;

use super::lifecycle::{BIND, UNBIND};
use super::stream::{exchange_over_the_bridge, HOST};
use crate::lab::{
    expect_eq, expect_errno, wait_for, Guest, Lab, Peer, A_WHILE, CID_ANY, GUEST_CID, LIMIT, PORT,
    SEQPACKET, STREAM,
};
use crate::machine::{Bus, Hardware, DEFAULT_RING};
use crate::Driver;

/// The bound on receive buffers of Documentation/data-path.md.
const MAX_RX_BUFFERS: u16 = 512;

/// How often data goes over a ring of one, where guest and device wait for each other with every packet.
const EXCHANGES_ON_RING_OF_ONE: u32 = 5;

/// Feature bits of virtio 5.10.3, as a set.
const VIRTIO_VSOCK_F_STREAM: u64 = 1 << 0;
const VIRTIO_VSOCK_F_SEQPACKET: u64 = 1 << 1;
const VIRTIO_VSOCK_F_NO_IMPLIED_STREAM: u64 = 1 << 2;

/// Feature bit of virtio 6.
const VIRTIO_F_ACCESS_PLATFORM: u32 = 33;

/// Rings from the smallest to the largest that QEMU has. The driver does not fill the largest with receive buffers.
pub fn ring_sizes(lab: &Lab) -> Result<()> {
    for ring in [1, 2, 4, 16, 1024] {
        let hardware = Hardware {
            ring,
            ..Hardware::default()
        };
        let guest = lab.guest_on(&hardware)?;
        if lab.driver == Driver::Rs {
            let should = ring.min(MAX_RX_BUFFERS);
            wait_for(
                &format!("{should} receive buffers with a ring of {ring}"),
                || Ok(guest.device.posted_buffers().0 == should),
            )?;
        }
        let exchanges = if ring == 1 {
            EXCHANGES_ON_RING_OF_ONE
        } else {
            1
        };
        for _ in 0..exchanges {
            exchange_over_the_bridge(&guest).with_context(|| format!("with {hardware:?}"))?;
        }
        lab.end_machines()?;
    }
    Ok(())
}

/// Pieces of memory that MSG_ZEROCOPY sends with one call, in pages of their own.
struct Pieces {
    count: usize,
    /// How long each is, in bytes.
    len: usize,
}

/// Sends with MSG_ZEROCOPY, and writes over the memory before the device sees it: it is sent what is there now, unless the kernel
/// has copied. Returns whether it has, which the completion has to say as well; it comes when the kernel needs the memory no more.
fn is_copied(guest: &Guest, peer: &Peer, fd: i32, pieces: &Pieces) -> Result<bool> {
    const BEFORE: u8 = b'a';
    const LATER: u8 = b'b';
    let len = pieces.count * pieces.len;
    let params = json!({
        "fd": fd, "pieces": pieces.count, "len": pieces.len, "before": BEFORE, "later": LATER,
    });
    guest.device.hold_tx(true);
    let sent: usize = guest.start("send_zero_copy_pieces", params).wait(LIMIT)?;
    let mut completions = guest.zero_copy_completions(fd)?;
    let is_early = !completions.is_empty();
    guest.device.hold_tx(false);
    expect_eq("bytes sent", sent, len)?;
    let mut received = Vec::new();
    while received.len() < len {
        received.extend(peer.expect(Op::RW)?.payload);
    }
    if !is_early {
        completions = guest.wait_zero_copy_completions(fd)?;
    }
    ensure!(
        completions.len() == 1,
        "one call has the completions {completions:?}"
    );
    let is_copied = completions[0].is_copied;
    ensure!(
        is_copied || !is_early,
        "the completion {completions:?} came before the device had the memory"
    );
    let should = if is_copied { BEFORE } else { LATER };
    ensure!(
        received == vec![should; len],
        "is said to be copied: {is_copied}; received: {received:?}"
    );
    Ok(is_copied)
}

/// An io_uring gives the memory of a send back when the device has used it. Where the kernel has copied it may be sooner.
fn io_uring_gives_memory_back(guest: &Guest, peer: &Peer, fd: i32, is_copied: bool) -> Result<()> {
    const LEN: usize = 10_000;
    guest.device.hold_tx(true);
    let sending = guest.start("send_zero_copy_by_io_uring", json!({"fd": fd, "len": LEN}));
    if !is_copied {
        sending.expect_blocked(A_WHILE)?;
    }
    guest.device.hold_tx(false);
    expect_eq("bytes sent", sending.wait::<usize>(LIMIT)?, LEN)?;
    expect_eq("bytes received", peer.expect(Op::RW)?.payload.len(), LEN)
}

/// MSG_ZEROCOPY sends the caller's pages where the ring takes as many as a packet may have, and otherwise a copy; so it does where
/// the caller's memory is in more pieces than a packet has room for. The completion says which.
pub fn zero_copy(lab: &Lab) -> Result<()> {
    for (ring, copies) in [(4, true), (DEFAULT_RING, false)] {
        let guest = lab.guest_on(&Hardware {
            ring,
            ..Hardware::default()
        })?;
        expect_zero_copy(&guest, copies).with_context(|| format!("on a ring of {ring}"))?;
        lab.end_machines()?;
    }
    Ok(())
}

/// That the kernel sends the caller's pages, or `copies` them.
fn expect_zero_copy(guest: &Guest, copies: bool) -> Result<()> {
    for kind in [STREAM, SEQPACKET] {
        let fd = guest.socket(kind)?;
        let peer = Peer::accept(guest, fd)?;
        let on = 1_i32.to_ne_bytes();
        guest.set_option(fd, libc::SOL_SOCKET, libc::SO_ZEROCOPY, &on)?;
        let few = Pieces { count: 5, len: 100 };
        let many = Pieces {
            count: 40,
            len: 100,
        };
        for (pieces, should) in [(&few, copies), (&many, true), (&few, copies)] {
            let what = format!("{} pieces of a socket of type {kind} copied", pieces.count);
            let is = is_copied(guest, &peer, fd, pieces).context(what.clone())?;
            expect_eq(&what, is, should)?;
        }
        io_uring_gives_memory_back(guest, &peer, fd, copies)
            .with_context(|| format!("an io_uring and a socket of type {kind}"))?;
    }
    Ok(())
}

/// Without VIRTIO_F_EVENT_IDX and VIRTIO_F_INDIRECT_DESC, which all other tests have.
pub fn without_ring_features(lab: &Lab) -> Result<()> {
    let all = lab.ring_features();
    for without in [
        FEATURE_EVENT_IDX,
        FEATURE_INDIRECT_DESC,
        FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC,
    ] {
        lab.set_ring_features(all & !without);
        let guest = lab.guest()?;
        exchange_over_the_bridge(&guest).with_context(|| format!("without {without:#x}"))?;
        expect_zero_copy(&guest, false).with_context(|| format!("without {without:#x}"))?;
        lab.end_machines()?;
    }
    Ok(())
}

/// Devices whose features leave out a kind of sockets: it cannot be used from either side, the other can.
pub fn kinds_of_sockets(lab: &Lab) -> Result<()> {
    let all = VIRTIO_VSOCK_F_STREAM | VIRTIO_VSOCK_F_SEQPACKET;
    for (features, stream, seqpacket) in [
        (0, true, false),
        (VIRTIO_VSOCK_F_SEQPACKET, true, true),
        (
            VIRTIO_VSOCK_F_SEQPACKET | VIRTIO_VSOCK_F_NO_IMPLIED_STREAM,
            false,
            true,
        ),
        (
            VIRTIO_VSOCK_F_STREAM | VIRTIO_VSOCK_F_NO_IMPLIED_STREAM,
            true,
            false,
        ),
    ] {
        let guest = lab.guest_on(&Hardware {
            features,
            without_features: all & !features,
            ..Hardware::default()
        })?;
        for (kind, is_there, errno) in [
            (STREAM, stream, "ENETUNREACH"),
            (SEQPACKET, seqpacket, "ESOCKTNOSUPPORT"),
        ] {
            let what = format!("sockets of type {kind} with the features {features:#b}");
            let fd = guest.socket(kind)?;
            if is_there {
                let peer = Peer::accept(&guest, fd).context(what)?;
                expect_eq("send()", guest.send(fd, "x")?, 1)?;
                peer.expect(Op::RW)?;
            } else {
                expect_errno(&what, guest.connect(fd, HOST, PORT), errno)?;
                let peer = Peer::watch_kind(&guest, kind);
                peer.send(Op::REQUEST);
                let rst = peer.expect(Op::RST).context(what)?;
                expect_eq(
                    "its type",
                    rst.socket_type,
                    peer.packet(Op::RST).socket_type,
                )?;
            }
        }
        lab.end_machines()?;
    }
    Ok(())
}

/// With VIRTIO_F_ACCESS_PLATFORM, where all data goes through bounce buffers.
pub fn platform_dma(lab: &Lab) -> Result<()> {
    let hardware = Hardware {
        features: 1 << VIRTIO_F_ACCESS_PLATFORM,
        device_properties: ",iommu_platform=on",
        kernel_parameters: "swiotlb=force",
        ..Hardware::default()
    };
    let guest = lab.guest_on(&hardware)?;
    let is_negotiated = guest.features()? & (1 << VIRTIO_F_ACCESS_PLATFORM) != 0;
    expect_eq("VIRTIO_F_ACCESS_PLATFORM", is_negotiated, true)?;
    let used = guest.sh("cat /sys/kernel/debug/swiotlb/io_tlb_used")?;
    ensure!(
        used.trim().parse::<u32>()? > 0,
        "no buffer is a bounce buffer"
    );
    exchange_over_the_bridge(&guest)
}

/// Where the memory that the device can reach is used up for a moment nothing is lost: packets wait for it.
pub fn full_bounce_pool(lab: &Lab) -> Result<()> {
    // Receive buffers take as much as there is: 512 KiB.
    let guest = lab.guest_on(&Hardware {
        features: 1 << VIRTIO_F_ACCESS_PLATFORM,
        device_properties: ",iommu_platform=on",
        kernel_parameters: "swiotlb=256,1,force",
        ..Hardware::default()
    })?;
    let used = guest.sh("cd /sys/kernel/debug/swiotlb && cat io_tlb_used io_tlb_nslabs")?;
    let mut used = used.lines();
    expect_eq("what is used of the pool", used.next(), used.next())?;

    let mut peer = Peer::watch(&guest);
    let fd = guest.socket(STREAM)?;
    let connecting = guest.start_connect(fd, HOST, PORT);
    connecting.expect_blocked(A_WHILE)?;
    expect_eq("packets to the device", peer.drain(), vec![])?;
    // What the device uses is given back to the pool: a packet that nobody answers.
    peer.send(Op::RST);
    let request = peer.expect(Op::REQUEST)?;
    peer.set_ports(PORT, request.src_port);
    peer.send(Op::RESPONSE);
    connecting.wait::<()>(LIMIT).context("connect()")?;
    Ok(())
}

/// On virtio-mmio, whose queues and configuration share an interrupt.
pub fn mmio(lab: &Lab) -> Result<()> {
    const NEW_CID: u32 = GUEST_CID + 7;
    let guest = lab.guest_on(&Hardware {
        bus: Bus::Mmio,
        ..Hardware::default()
    })?;
    exchange_over_the_bridge(&guest)?;
    let listener = guest.listener(PORT)?;
    let _stream = guest.connect_from_host(PORT)?;
    let fd = guest.accept(listener)?;
    let reading = guest.start("recv", json!({"fd": fd, "len": 1}));
    reading.expect_blocked(A_WHILE)?;
    guest.device.transport_reset(u64::from(NEW_CID));
    expect_errno("recv()", reading.wait::<String>(LIMIT), "ECONNRESET")?;
    let _stream = guest.connect_from_host(PORT)?;
    let fd = guest.accept(listener)?;
    expect_eq("the address", guest.own_address(fd)?, (NEW_CID, PORT))?;

    let reading = guest.start("recv", json!({"fd": fd, "len": 1}));
    reading.expect_blocked(A_WHILE)?;
    guest.sh(UNBIND)?;
    expect_errno("recv()", reading.wait::<String>(LIMIT), "ECONNRESET")?;
    expect_eq("the CID", guest.local_cid()?, CID_ANY)?;
    guest.sh(BIND)?;
    guest.device.wait_ready(LIMIT)?;
    expect_eq("the CID", guest.local_cid()?, NEW_CID)?;
    guest.close(listener)?;
    exchange_over_the_bridge(&guest)
}

/// Lets a device of virtio-pci fail as QEMU does when a driver breaks the rules: by writing 0 to `queue_enable` of the
/// common configuration, at the beginning of the third region.
const LET_DEVICE_FAIL: &str = "device=$(readlink -f /sys/bus/virtio/drivers/*vsock*/virtio*)
    region=$(sed -n 3p ${device%/*}/resource | cut -d' ' -f1)
    devmem $((region + 0x1c)) 16 0";

/// The device sets DEVICE_NEEDS_RESET: connections fail, blocked calls too, and it works again when it was unbound and
/// bound.
pub fn needs_reset(lab: &Lab) -> Result<()> {
    let guest = lab.guest_on(&Hardware {
        kernel_parameters: "iomem=relaxed",
        ..Hardware::default()
    })?;
    let listener = guest.listener(PORT)?;
    for _ in 0..2 {
        let _stream = guest.connect_from_host(PORT)?;
        let fd = guest.accept(listener)?;
        let reading = guest.start("recv", json!({"fd": fd, "len": 1}));
        guest.sh(LET_DEVICE_FAIL)?;
        expect_errno("recv()", reading.wait::<String>(LIMIT), "ECONNRESET")?;
        expect_out_of_use_and_bind_again(&guest, listener)?;
        guest.close(fd)?;
    }
    wait_for("both reasons in the log", || {
        Ok(guest.machine.log().matches("needs a reset").count() == 2)
    })
}

/// That a device has failed and the driver does not use it any more, and that both work again when they are bound again.
pub(super) fn expect_out_of_use_and_bind_again(guest: &Guest, listener: i32) -> Result<()> {
    wait_for("the guest to be without a CID", || {
        Ok(guest.local_cid()? == CID_ANY)
    })?;
    let fd = guest.socket(STREAM)?;
    expect_errno("connect()", guest.connect(fd, HOST, PORT), "ENODEV")?;
    guest.close(fd)?;
    guest.sh(UNBIND)?;
    guest.sh(BIND)?;
    wait_for("the CID to be back", || Ok(guest.local_cid()? == guest.cid))?;
    let _stream = guest.connect_from_host(PORT)?;
    let fd = guest.accept(listener)?;
    guest.close(fd)?;
    Ok(())
}

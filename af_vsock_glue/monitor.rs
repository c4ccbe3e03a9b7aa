// SPDX-License-Identifier: GPL-2.0

//! Packets shown to those who watch: vsockmon devices, and tracepoints.
//!
//! C headers: [`include/uapi/linux/vsockmon.h`](srctree/include/uapi/linux/vsockmon.h),
//! [`include/net/af_vsock.h`](srctree/include/net/af_vsock.h) (`vsock_deliver_tap`)

use super::{bindings, skb::SkBuff};
use core::{
    ffi::c_void,
    ptr::{self, NonNull},
};

/// The header of a virtio socket packet, as it is on the wire.
pub(crate) type RawHeader = [u8; size_of::<bindings::virtio_vsock_hdr>()];

/// What a packet is for, as vsockmon has it (`enum af_vsockmon_op`).
#[derive(Clone, Copy, Debug)]
#[repr(u16)]
pub(crate) enum Purpose {
    /// None of the others.
    Unknown = bindings::af_vsockmon_op_AF_VSOCK_OP_UNKNOWN as u16,
    /// To make a connection.
    Connect = bindings::af_vsockmon_op_AF_VSOCK_OP_CONNECT as u16,
    /// To end one.
    Disconnect = bindings::af_vsockmon_op_AF_VSOCK_OP_DISCONNECT as u16,
    /// To control one.
    Control = bindings::af_vsockmon_op_AF_VSOCK_OP_CONTROL as u16,
    /// It carries payload.
    Payload = bindings::af_vsockmon_op_AF_VSOCK_OP_PAYLOAD as u16,
}

/// Which way a packet goes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Direction {
    /// From the device.
    Received,
    /// To the device.
    Sent,
}

/// A packet to be shown.
struct Capture<'a, C> {
    header: &'a RawHeader,
    purpose: fn(&RawHeader) -> Purpose,
    packet: &'a SkBuff<C>,
}

/// Shows a packet to those who watch, if there are any: `packet` is `header` with the payload behind it, and
/// `purpose` is asked for what it is for. Callable in atomic context.
pub(crate) fn show<C>(
    direction: Direction,
    header: &RawHeader,
    purpose: fn(&RawHeader) -> Purpose,
    packet: &SkBuff<C>,
) {
    let raw: *const bindings::virtio_vsock_hdr = ptr::from_ref(header).cast();
    // SAFETY: It is as large as a header, all of whose fields are little-endian bytes without alignment
    // (`__packed`).
    unsafe {
        match direction {
            Direction::Received => bindings::vsock_glue_trace_received(raw),
            Direction::Sent => bindings::vsock_glue_trace_sent(raw),
        }
    }
    let mut capture = Capture {
        header,
        purpose,
        packet,
    };
    // SAFETY: `build()` is called with the pointer, which is valid, before the function returns, or not at all,
    // and gives a new buffer or null.
    unsafe { bindings::vsock_deliver_tap(Some(build::<C>), (&raw mut capture).cast()) }
}

/// Makes the buffer that vsockmon devices get. Called in an RCU read-side critical section.
///
/// # Safety
///
/// `capture` is a valid [`Capture`].
unsafe extern "C" fn build<C>(capture: *mut c_void) -> *mut bindings::sk_buff {
    // SAFETY: As the caller promises.
    let capture = unsafe { &*capture.cast::<Capture<'_, C>>() };
    // SAFETY: It is as large as a header, and any bytes are one.
    let header: bindings::virtio_vsock_hdr = unsafe {
        ptr::from_ref(capture.header)
            .cast::<bindings::virtio_vsock_hdr>()
            .read_unaligned()
    };
    let payload_offset = capture.header.len();
    let payload = capture.packet.len().saturating_sub(payload_offset);
    let monitor_header = bindings::af_vsockmon_hdr {
        // Little-endian in both.
        src_cid: header.src_cid,
        dst_cid: header.dst_cid,
        src_port: header.src_port,
        dst_port: header.dst_port,
        op: ((capture.purpose)(capture.header) as u16).to_le(),
        transport: (bindings::af_vsockmon_transport_AF_VSOCK_TRANSPORT_VIRTIO as u16).to_le(),
        len: (size_of::<RawHeader>() as u16).to_le(),
        reserved: [0; 2],
    };
    let size = size_of_val(&monitor_header) + capture.header.len() + payload;
    // SAFETY: No preconditions.
    let skb = unsafe { bindings::vsock_glue_alloc_atomic(size as u32) };
    let Some(skb) = NonNull::new(skb).map(NonNull::as_ptr) else {
        return ptr::null_mut();
    };
    // SAFETY: The buffer was made with room for all three; the packet has `payload` bytes behind the offset.
    unsafe {
        bindings::skb_put(skb, size_of_val(&monitor_header) as u32)
            .cast::<bindings::af_vsockmon_hdr>()
            .write_unaligned(monitor_header);
        ptr::copy_nonoverlapping(
            capture.header.as_ptr(),
            bindings::skb_put(skb, capture.header.len() as u32).cast(),
            capture.header.len(),
        );
        let to = bindings::skb_put(skb, payload as u32);
        // It fails for an offset behind the end only, where there is nothing to copy.
        bindings::skb_copy_bits(
            capture.packet.as_raw(),
            payload_offset as i32,
            to,
            payload as i32,
        );
    }
    skb
}

// SPDX-License-Identifier: GPL-2.0

//! What operators find in debugfs below `virtio_vsock_rs/`: counters, and how much waits in the queues.
//!
//! Counters are relaxed atomics that only grow; a reader sees each, not all of them at one instant.

use super::VsockDriver;
use kernel::{
    debugfs::{Dir, File},
    prelude::*,
    sync::{
        atomic::{Atomic, Relaxed},
        Arc,
    },
};

/// A number that grows.
pub(crate) struct Counter(Atomic<i64>);

impl Default for Counter {
    fn default() -> Self {
        Self(Atomic::new(0))
    }
}

impl Counter {
    /// Adds one.
    pub(crate) fn increment(&self) {
        self.add(1);
    }

    /// Adds `amount`.
    pub(crate) fn add(&self, amount: usize) {
        self.0.add(amount as i64, Relaxed);
    }

    /// Adds `amount` to a counter that nobody else changes meanwhile: who does so holds the same lock.
    pub(crate) fn add_exclusively(&self, amount: usize) {
        let sum = self.get().wrapping_add(amount as i64);
        self.0.store(sum, Relaxed);
    }

    fn get(&self) -> i64 {
        self.0.load(Relaxed)
    }
}

macro_rules! statistics {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The counters.
        #[derive(Default)]
        pub(crate) struct Statistics {
            $($(#[$doc])* pub(crate) $name: Counter,)*
        }

        /// All counters, one `name value` a line.
        fn show(statistics: &Arc<Statistics>, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
            $(kernel::fmt::Write::write_fmt(
                f,
                kernel::prelude::fmt!("{} {}\n", stringify!($name), statistics.$name.get()),
            )?;)*
            Ok(())
        }
    };
}

statistics! {
    /// Packets from the device that were well-formed.
    rx_packets,
    /// Payload of those, in bytes.
    rx_bytes,
    /// Packets that the transmit virtqueue has taken.
    tx_packets,
    /// Payload of those, in bytes.
    tx_bytes,
    /// Packets that had to wait for room in the transmit virtqueue, or for memory to map them.
    tx_waited,
    /// Packets of payload that waited for the work which takes several of them to the device.
    tx_batched,
    /// Packets shorter than a header, or than their header's `len` says.
    dropped_short,
    /// Buffers in which the device claims to have written more than there is room.
    dropped_long,
    /// Buffers in which the device claims to have written a packet, and has not: lost while a hypervisor copied the memory.
    dropped_unwritten,
    /// Packets from or to a CID that is reserved, or not this guest's.
    dropped_cid,
    /// Packets that make no sense in their connection's state, unknown operations among them.
    dropped_state,
    /// Packets that could not be sent: the device is gone or broken, or its ring too small for the packet.
    dropped_tx,
    /// Packets with a socket type that is unknown, or was not negotiated.
    unknown_type,
    /// RST sent in answer to a REQUEST: nobody listens on its port, the listener can take no more, or its type is unknown.
    refused_requests,
    /// RST sent for other packets that are of no connection, and for such tuples of an update.
    rst_no_connection,
    /// Attempts to connect that the peer has refused.
    refused_connects,
    /// Times that senders of a connection began to find no room because the peer has none.
    credit_stalls,
    /// The same, because the device has not taken what was sent before.
    device_stalls,
    /// Packets of credit sent for nothing else.
    credit_updates,
    /// Transport resets: that the device announced, or for a refused update or lost packets.
    transport_resets,
    /// Those for lost packets.
    lost_packet_resets,
    /// Connections that were reset by transport resets, or because an update did not list them.
    resets_by_transport,
    /// Connections that were reset because the device went away, slept, or failed.
    resets_by_device_loss,
    /// Connections that the peer has ended by RST though neither end had closed them.
    resets_by_peer,
    /// Connections that were reset because the peer has asked for another one between the same ports: it had lost them.
    resets_by_new_request,
    /// Connections that were reset because their peer sent more than its credit.
    resets_by_credit,
    /// Connections that were closed, and ended by RST because the peer did not answer.
    resets_by_close_timeout,
    /// Updates of CIDs that were applied.
    cid_updates,
    /// Connections that went on by other addresses.
    kept_connections,
    /// Updates of CIDs that were refused, each of which was a transport reset instead; the log says why.
    refused_updates,
    /// Events of unknown kind or wrong length.
    unknown_events,
}

/// How much waits in the queues now.
#[derive(Clone, Copy, Default)]
pub(crate) struct QueueLengths {
    /// Packets that the device has and has not used.
    pub(crate) tx_in_flight: usize,
    /// Packets that wait for room in the transmit virtqueue, for memory to map them, or for others to go with.
    pub(crate) tx_waiting: usize,
    /// Those of them that answer packets of the device.
    pub(crate) tx_waiting_replies: usize,
    /// Buffers of packets that the device has used, for the next ones.
    pub(crate) tx_spare_buffers: usize,
    /// Whether no packets or events are received until fewer answers wait.
    pub(crate) rx_is_stopped: bool,
    /// Buffers that the device has for packets.
    pub(crate) rx_buffers: usize,
    /// Buffers of packets that were read, which it will be given again.
    pub(crate) rx_spare_buffers: usize,
    /// Buffers that the device has for events.
    pub(crate) event_buffers: usize,
}

fn show_queues(
    driver: &Arc<VsockDriver>,
    f: &mut kernel::fmt::Formatter<'_>,
) -> kernel::fmt::Result {
    let lengths = driver.queue_lengths();
    let lines = [
        ("tx_in_flight", lengths.tx_in_flight),
        ("tx_waiting", lengths.tx_waiting),
        ("tx_waiting_replies", lengths.tx_waiting_replies),
        ("tx_spare_buffers", lengths.tx_spare_buffers),
        ("rx_is_stopped", lengths.rx_is_stopped.into()),
        ("rx_buffers", lengths.rx_buffers),
        ("rx_spare_buffers", lengths.rx_spare_buffers),
        ("event_buffers", lengths.event_buffers),
    ];
    for (name, value) in lines {
        kernel::fmt::Write::write_fmt(f, kernel::prelude::fmt!("{name} {value}\n"))?;
    }
    Ok(())
}

/// The directory in debugfs; dropping it removes it.
#[pin_data]
pub(crate) struct DebugFs {
    #[pin]
    statistics: File<Arc<Statistics>>,
    #[pin]
    queues: File<Arc<VsockDriver>>,
    _dir: Dir,
}

impl DebugFs {
    /// Makes the directory.
    pub(crate) fn new(
        statistics: Arc<Statistics>,
        driver: Arc<VsockDriver>,
    ) -> impl PinInit<Self, Error> {
        let dir = Dir::new(c"virtio_vsock_rs");
        try_pin_init!(Self {
            statistics <- dir.read_callback_file(c"statistics", statistics, &show),
            queues <- dir.read_callback_file(c"queues", driver, &show_queues),
            _dir: dir.clone(),
        })
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Counters for operators, in debugfs below `virtio_vsock_rs/`.
//!
//! They are relaxed atomics that only grow; a reader sees each, not all of them at one instant.

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
    /// Packets from or to a CID that is reserved, or not this guest's.
    dropped_cid,
    /// Packets that make no sense in their connection's state, unknown operations among them.
    dropped_state,
    /// Packets that could not be sent: the device is gone or broken.
    dropped_tx,
    /// Packets with an unknown socket type.
    unknown_type,
    /// RST sent because there is no socket for a packet, or no connection for a tuple of an update.
    rst_no_socket,
    /// Connections that were reset because their peer sent more than its credit.
    credit_exceeded,
    /// Sends that found no credit.
    credit_stalls,
    /// Packets of credit sent for nothing else.
    credit_updates,
    /// Transport resets that the device announced.
    transport_resets,
    /// Connections that were reset because of those, because the device went away, or because their peer had lost them.
    reset_connections,
    /// Updates of CIDs that were applied.
    cid_updates,
    /// Connections that went on by other addresses.
    kept_connections,
    /// Updates of CIDs that were refused, each of which was a transport reset instead; the log says why.
    refused_updates,
    /// Events of unknown kind or wrong length.
    unknown_events,
}

/// The directory in debugfs; dropping it removes it.
#[pin_data]
pub(crate) struct DebugFs {
    #[pin]
    statistics: File<Arc<Statistics>>,
    _dir: Dir,
}

impl DebugFs {
    /// Makes the directory.
    pub(crate) fn new(statistics: Arc<Statistics>) -> impl PinInit<Self, Error> {
        let dir = Dir::new(c"virtio_vsock_rs");
        try_pin_init!(Self {
            statistics <- dir.read_callback_file(c"statistics", statistics, &show),
            _dir: dir.clone(),
        })
    }
}

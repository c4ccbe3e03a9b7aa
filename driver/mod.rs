// SPDX-License-Identifier: GPL-2.0

//! The driver: one virtio socket device, and the sockets that use it.
//!
//! | module | what happens there |
//! | --- | --- |
//! | [`device`] | the device comes and goes: probe, remove, freeze, restore |
//! | [`rx`] | packets from the device: which socket they are for, and what follows |
//! | [`spare_buffers`] | buffers that have had a packet, for the next ones |
//! | [`backlog`] | packets that wait for room in the transmit virtqueue, fairly |
//! | [`moderation`] | whether packets are handled before the program that runs goes on, or after its turn |
//! | [`tx`] | packets to the device: the virtqueue, and what waits for room in it |
//! | [`events`] | the device says that connections are gone |
//! | [`updates`] | the device says which connections go on by other addresses |
//! | [`payload`] | what programs send: credit for it, and packets made of it |
//! | [`sockets`] | what the core of AF_VSOCK asks of a transport |
//! | [`connection`] | what is kept for each socket: credit, the receive queue |
//! | [`statistics`] | counters and queue lengths for operators, in debugfs |
//!
//! A guest has one device at a time, so there is one [`VsockDriver`], which outlives devices. Documentation/
//! has the locks and their order in one table (locking.md).

pub(crate) mod backlog;
pub(crate) mod connection;
pub(crate) mod device;
pub(crate) mod events;
pub(crate) mod moderation;
pub(crate) mod payload;
pub(crate) mod rx;
pub(crate) mod sockets;
pub(crate) mod spare_buffers;
pub(crate) mod statistics;
pub(crate) mod tx;
pub(crate) mod updates;

use crate::{
    af_vsock_glue::{
        monitor::{Purpose, RawHeader},
        socket::Address,
        workqueue::OwnedQueue, //
    },
    protocol::{
        cid::Cid,
        header::{Header, Op},
        SocketTypes, //
    },
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{Atomic, Relaxed},
        new_mutex, Arc, Mutex,
    },
    time::{delay::fsleep, Delta},
    workqueue::{impl_has_work, new_work, Work, WorkItem},
};

/// How long work waits that has found no memory, before it tries again.
const MEMORY_RETRY_INTERVAL: Delta = Delta::from_millis(10);

/// Which of a driver's work items is meant.
mod work {
    pub(super) const RX: u64 = 0;
    pub(super) const TX: u64 = 1;
    pub(super) const EVENTS: u64 = 2;
    pub(super) const DEVICE: u64 = 3;
}

/// The driver's state: the device's queues while there is a device, and what is shared by all sockets.
#[pin_data]
pub(crate) struct VsockDriver {
    /// The current device's CID; [`Address::CID_ANY`] while there is no device.
    guest_cid: Atomic<u32>,

    /// The kinds of sockets that driver and device agreed on, a bit each; see [`Self::socket_types`].
    socket_types: Atomic<u32>,

    /// Serialises probe, remove, freeze, restore and [`Self::check_device`].
    #[pin]
    device: Mutex<device::DeviceState>,
    #[pin]
    rx: Mutex<Option<rx::RxQueue>>,
    /// Receive buffers that were read.
    spare_buffers: Arc<spare_buffers::SpareBuffers<()>>,
    /// The place in the receive queue up to which packets were handled, as updates of CIDs say it. Changed with the rx mutex,
    /// or while there is no such queue.
    rx_handled: Atomic<u32>,
    /// How often all connections were lost, modulo 2^32: by transport resets, refused updates among them, and with the device.
    /// Changed with the rx mutex, or when there is no receive queue any more.
    resets: Atomic<u32>,
    /// How many migrations there were. Changed with the events mutex.
    migrations: Atomic<u64>,
    /// Whether an update of CIDs waits for packets to be handled. Changed with the rx mutex, or while there is no receive queue.
    update_waits: Atomic<bool>,
    #[pin]
    tx: tx::Tx,
    #[pin]
    events: Mutex<Option<events::EventQueue>>,

    #[pin]
    rx_work: Work<Self, { work::RX }>,
    #[pin]
    tx_work: Work<Self, { work::TX }>,
    #[pin]
    event_work: Work<Self, { work::EVENTS }>,
    #[pin]
    device_work: Work<Self, { work::DEVICE }>,

    statistics: Arc<statistics::Statistics>,

    moderation: moderation::Moderation,

    /// Runs the work above and the close timeouts of sockets, before programs run.
    work_at_once: Arc<OwnedQueue>,
    /// Runs the work above that [`moderation`] lets wait, or that has done much, as programs run.
    work_in_turn: Arc<OwnedQueue>,
}

impl_has_work! {
    impl HasWork<Self, { work::RX }> for VsockDriver { self.rx_work }
    impl HasWork<Self, { work::TX }> for VsockDriver { self.tx_work }
    impl HasWork<Self, { work::EVENTS }> for VsockDriver { self.event_work }
    impl HasWork<Self, { work::DEVICE }> for VsockDriver { self.device_work }
}

impl WorkItem<{ work::RX }> for VsockDriver {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.process_rx();
    }
}

impl WorkItem<{ work::TX }> for VsockDriver {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.process_tx();
    }
}

impl WorkItem<{ work::EVENTS }> for VsockDriver {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.process_events();
    }
}

impl WorkItem<{ work::DEVICE }> for VsockDriver {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.check_device();
    }
}

impl VsockDriver {
    /// A driver without a device. The workqueues have to outlive all uses of the result.
    pub(crate) fn new(
        work_at_once: Arc<OwnedQueue>,
        work_in_turn: Arc<OwnedQueue>,
        statistics: Arc<statistics::Statistics>,
    ) -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self {
                guest_cid: Atomic::new(Address::CID_ANY),
                socket_types: Atomic::new(0),
                device <- new_mutex!(device::DeviceState::default(), "virtio_vsock_rs_device"),
                rx <- new_mutex!(None, "virtio_vsock_rs_rx"),
                spare_buffers: Arc::pin_init(spare_buffers::SpareBuffers::new(), GFP_KERNEL)?,
                rx_handled: Atomic::new(0),
                resets: Atomic::new(0),
                migrations: Atomic::new(0),
                update_waits: Atomic::new(false),
                tx <- tx::Tx::new(),
                events <- new_mutex!(None, "virtio_vsock_rs_events"),
                rx_work <- new_work!("virtio_vsock_rs_rx_work"),
                tx_work <- new_work!("virtio_vsock_rs_tx_work"),
                event_work <- new_work!("virtio_vsock_rs_event_work"),
                device_work <- new_work!("virtio_vsock_rs_device_work"),
                statistics,
                moderation: moderation::Moderation::new(),
                work_at_once,
                work_in_turn,
            }),
            GFP_KERNEL,
        )
    }

    /// How much waits in the queues. Sleeps.
    fn queue_lengths(&self) -> statistics::QueueLengths {
        let mut lengths = self.tx.lengths();
        lengths.rx_buffers = (*self.rx.lock()).as_ref().map_or(0, rx::RxQueue::posted);
        lengths.rx_spare_buffers = self.spare_buffers.len();
        lengths.event_buffers = (*self.events.lock())
            .as_ref()
            .map_or(0, events::EventQueue::posted);
        lengths
    }

    /// The device's CID, `None` while there is no device.
    fn guest_cid(&self) -> Option<Cid> {
        Cid::guest_from_config(u64::from(self.guest_cid.load(Relaxed))).ok()
    }

    /// The kinds of sockets that driver and device agreed on.
    fn socket_types(&self) -> SocketTypes {
        let bits = self.socket_types.load(Relaxed);
        SocketTypes {
            stream: bits & Self::STREAM_BIT != 0,
            seqpacket: bits & Self::SEQPACKET_BIT != 0,
        }
    }

    fn set_socket_types(&self, types: SocketTypes) {
        let stream = if types.stream { Self::STREAM_BIT } else { 0 };
        let seqpacket = if types.seqpacket {
            Self::SEQPACKET_BIT
        } else {
            0
        };
        self.socket_types.store(stream | seqpacket, Relaxed);
    }

    const STREAM_BIT: u32 = 1;
    const SEQPACKET_BIT: u32 = 2;

    fn set_guest_cid(&self, cid: Option<Cid>) {
        self.guest_cid.store(cid_or_any(cid), Relaxed);
    }
}

/// The CID's number; [`Address::CID_ANY`] for none.
fn cid_or_any(cid: Option<Cid>) -> u32 {
    cid.map_or(Address::CID_ANY, Cid::get)
}

/// What a packet is for, to those who watch packets.
fn purpose(header: &RawHeader) -> Purpose {
    match Header::parse(header).op {
        Op::Request | Op::Response => Purpose::Connect,
        Op::Rst | Op::Shutdown => Purpose::Disconnect,
        Op::CreditUpdate | Op::CreditRequest => Purpose::Control,
        Op::Rw => Purpose::Payload,
        Op::Unknown(_) => Purpose::Unknown,
    }
}

/// Lets a work item of the driver run soon. Callable in any context; nothing is lost where it is queued
/// already, because the work looks at its queue after it left the workqueue.
fn queue_work<const ID: u64>(driver: Arc<VsockDriver>)
where
    VsockDriver: WorkItem<ID, Pointer = Arc<VsockDriver>>,
    VsockDriver: kernel::workqueue::HasWork<VsockDriver, ID>,
{
    let queue = driver.work_at_once.clone();
    // The error is the driver, given back because the work is queued already.
    let _ = queue.enqueue::<Arc<VsockDriver>, ID>(driver);
}

/// The same, when it is the work's turn among programs: for work that has done much, or that a program need not be interrupted
/// for. Callable in any context.
fn queue_work_in_turn<const ID: u64>(driver: Arc<VsockDriver>)
where
    VsockDriver: WorkItem<ID, Pointer = Arc<VsockDriver>>,
    VsockDriver: kernel::workqueue::HasWork<VsockDriver, ID>,
{
    let queue = driver.work_in_turn.clone();
    let _ = queue.enqueue::<Arc<VsockDriver>, ID>(driver);
}

/// Lets the current work item, which has found no memory and gets no interrupt, run again: later, so that others have the CPU
/// to free some. Sleeps; no locks may be held.
fn queue_work_without_memory<const ID: u64>(driver: Arc<VsockDriver>)
where
    VsockDriver: WorkItem<ID, Pointer = Arc<VsockDriver>>,
    VsockDriver: kernel::workqueue::HasWork<VsockDriver, ID>,
{
    fsleep(MEMORY_RETRY_INTERVAL);
    queue_work::<ID>(driver);
}

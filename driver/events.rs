// SPDX-License-Identifier: GPL-2.0

//! Events of the device.

use super::{
    cid_or_any,
    queue_work,
    queue_work_in_turn,
    queue_work_without_memory,
    rx::RxQueue,
    statistics::Counter,
    updates::Updates,
    work,
    VsockDriver, //
};
use crate::{
    af_vsock_glue::{
        skb::SkBuff,
        socket::Socket,
        virtio::{Cause, LiveDevice, Migration, RawQueue, Virtqueue},
        workqueue::{cond_resched, may_log},
    },
    protocol::{
        cid::Cid,
        event::{Event, EVENT_LEN, LONG_EVENT_LEN},
    },
};
use kernel::{
    prelude::*,
    sync::{atomic::Relaxed, Arc},
};

/// How many events the device can have under way.
const BUFFERS: usize = 8;

/// How many events one run of the work item handles, so that others get the CPU and the locks.
const BUDGET: u32 = 64;

/// Offset of `guest_cid` in the device's configuration space, in bytes.
const CONFIG_GUEST_CID: u32 = 0;

/// The event virtqueue.
pub(crate) struct EventQueue {
    queue: Virtqueue<()>,
    /// Buffers that the device has.
    posted: usize,
    /// How long the buffers are, in bytes.
    buffer_len: u32,
    /// Room for a copy of an event, which the device cannot change any more. One byte more than a buffer has, to tell
    /// a longer event.
    copy: KVec<u8>,
    updates: Updates,
}

impl EventQueue {
    /// Takes over an empty queue. `has_updates` says whether the device may send updates of CIDs.
    pub(crate) fn new(queue: RawQueue, has_updates: bool) -> Result<Self> {
        let buffer_len = if has_updates {
            LONG_EVENT_LEN
        } else {
            EVENT_LEN
        };
        Ok(Self {
            queue: queue.into(),
            posted: 0,
            buffer_len: buffer_len as u32,
            copy: KVec::from_elem(0, buffer_len + 1, GFP_KERNEL)?,
            updates: Updates::new(),
        })
    }

    /// Whether the device broke the queue's rules.
    pub(crate) fn is_broken(&self) -> bool {
        self.queue.is_broken()
    }

    /// How many buffers the device has.
    pub(crate) fn posted(&self) -> usize {
        self.posted
    }

    /// The update of CIDs that is under way, and the device.
    pub(super) fn updates_and_device(&mut self) -> (&mut Updates, &LiveDevice) {
        (&mut self.updates, self.queue.device())
    }

    /// Gives the device the buffers that it does not have. May sleep.
    pub(crate) fn fill(&mut self) {
        while self.posted < BUFFERS {
            // Without memory the device has those that it has.
            let Ok(buffer) = SkBuff::empty(self.buffer_len, ()) else {
                break;
            };
            if !self.post(buffer) {
                break;
            }
        }
        self.queue.kick();
    }

    /// Gives the device a buffer; `false` where the queue has no room for it.
    fn post(&mut self, buffer: SkBuff<()>) -> bool {
        let posted = self
            .queue
            .push_empty_with_room(buffer, self.buffer_len)
            .is_ok();
        self.posted += usize::from(posted);
        posted
    }

    /// Gives the device a buffer that it has used.
    fn post_again(&mut self, mut buffer: SkBuff<()>) {
        buffer.truncate(0);
        self.post(buffer);
    }
}

/// Reads the CID from a device's configuration space.
pub(crate) fn read_guest_cid(device: &LiveDevice) -> Result<Cid> {
    let raw = device.read_config_le64(CONFIG_GUEST_CID);
    Cid::guest_from_config(raw).map_err(|_| {
        if may_log() {
            pr_err!("the device's guest_cid {raw:#x} is not a CID that a guest can have\n");
        }
        EINVAL
    })
}

impl VsockDriver {
    /// Handles the events that the device has made available. Work item; sleeps, and takes sockets' locks.
    pub(super) fn process_events(self: &Arc<Self>) {
        // Packets wait meanwhile: a connection of after the event is not reset by it.
        let rx = self.rx.lock();
        let has_updates = (*rx).as_ref().is_some_and(RxQueue::has_updates);
        if has_updates && self.tx.park_if_congested() {
            // The device takes no answers, and an update may have many. process_tx() lets this go on.
            return;
        }
        self.handle_events();
        drop(rx);
        if self.lacks_event_buffers() {
            // There was no memory for even one buffer, and no interrupt will come.
            queue_work_without_memory::<{ work::EVENTS }>(self.clone());
        }
    }

    /// Whether the device has no buffer for an event.
    fn lacks_event_buffers(&self) -> bool {
        let events = self.events.lock();
        (*events)
            .as_ref()
            .is_some_and(|events| events.posted == 0 && !events.is_broken())
    }

    /// Handles the events that the device has made available before the packet that was taken out of its queue last.
    /// Needs the rx mutex; sleeps, and takes sockets' locks.
    ///
    /// Where there are none, which is nearly always, it is quick.
    pub(super) fn handle_events_before_packet(self: &Arc<Self>) {
        {
            let mut guard = self.events.lock();
            let Some(events) = (*guard).as_mut() else {
                return;
            };
            let has_news = events.updates.is_due() || self.handle_next_event(events);
            // What is broken makes no more interrupts.
            if !has_news && !events.is_broken() {
                return;
            }
        }
        self.handle_events();
    }

    /// Handles the next event; returns whether there was one. Sleeps, and takes sockets' locks.
    fn handle_next_event(self: &Arc<Self>, events: &mut EventQueue) -> bool {
        let Some(buffer) = events.queue.pop_received() else {
            return false;
        };
        events.posted = events.posted.saturating_sub(1);
        let buffer = buffer.ok();
        self.handle_event(buffer.as_ref(), events);
        if let Some(buffer) = buffer {
            events.post_again(buffer);
        }
        events.fill();
        if events.posted == 0 {
            // Whoever receives packets is not the one that tries again.
            queue_work::<{ work::EVENTS }>(self.clone());
        }
        true
    }

    /// Handles the events that the device has made available. Needs the rx mutex; sleeps, and takes sockets'
    /// locks.
    pub(super) fn handle_events(self: &Arc<Self>) {
        let mut guard = self.events.lock();
        let Some(events) = (*guard).as_mut() else {
            return;
        };
        if events.posted == 0 {
            events.fill();
        }
        let mut budget = BUDGET;
        loop {
            events.queue.disable_interrupts();
            loop {
                let (updates, device) = events.updates_and_device();
                if !self.apply_due_update(updates, device) {
                    // Packets go first, and whoever receives them comes back here.
                    return;
                }
                if !self.handle_next_event(events) {
                    break;
                }
                budget -= 1;
                if budget == 0 {
                    self.moderation.note_flood();
                    queue_work_in_turn::<{ work::EVENTS }>(self.clone());
                    return;
                }
                cond_resched();
            }
            if events.is_broken() {
                queue_work::<{ work::DEVICE }>(self.clone());
                break;
            }
            if events.queue.enable_interrupts() {
                break;
            }
        }
    }

    /// Handles one event, `None` where its buffer was used wrongly.
    fn handle_event(&self, buffer: Option<&SkBuff<()>>, events: &mut EventQueue) {
        let EventQueue {
            queue,
            copy,
            updates,
            buffer_len,
            ..
        } = events;
        let event = buffer.map(|buffer| Event::parse(buffer.copy_into(copy)));
        let has_updates = *buffer_len > EVENT_LEN as u32;
        match event {
            Some(Ok(Event::TransportReset)) => {
                updates.discard();
                self.transport_reset(queue.device());
            }
            Some(Ok(Event::CidUpdate(part))) if has_updates => {
                self.take_update_part(updates, &part, queue.device());
            }
            Some(_) | None => self.statistics.unknown_events.increment(),
        }
    }

    /// Resets all connections, for packets of the device are missing, and nobody knows of which of them. Needs the rx mutex; sleeps,
    /// and takes sockets' locks.
    ///
    /// That happens when a guest is migrated by a device that does not tell its hypervisor what it writes. The event of the
    /// migration may come later than the packets of before it, and a reader would not know that there is a hole between these.
    #[cold]
    #[inline(never)]
    pub(super) fn reset_for_lost_packets(self: &Arc<Self>) {
        self.handle_events();
        let mut guard = self.events.lock();
        let Some(events) = (*guard).as_mut() else {
            return;
        };
        let has_connections = Socket::some_connected::<Self>().iter().any(Option::is_some);
        if !has_connections {
            return;
        }
        if may_log() {
            pr_warn!("packets that the device has sent are missing from the guest's memory\n");
        }
        self.statistics.lost_packet_resets.increment();
        // An update that waits for these packets stays: its connections are gone, and the device has to be told of each.
        self.transport_reset(events.queue.device());
    }

    /// The device has lost all connections, and perhaps has another CID.
    pub(super) fn transport_reset(&self, device: &LiveDevice) {
        let before = self.guest_cid();
        let cid = read_guest_cid(device).ok();
        self.resets.add(1, Relaxed);
        self.set_guest_cid(cid);
        self.statistics.transport_resets.increment();
        let mut migration = self.begin_migration(device, Cause::TransportReset, before);
        let reset = self.reset_all_connections(&self.statistics.resets_by_transport);
        if let Some(cid) = cid {
            self.readdress_waiting_requests(cid);
            self.let_bound_sockets_follow(cid);
        }
        if may_log() {
            pr_info!(
                "transport reset: CID {} is now {}, {reset} connections were reset\n",
                cid_or_any(before),
                cid_or_any(cid)
            );
        }
        migration.reset = u32::try_from(reset).unwrap_or(u32::MAX);
        device.announce(&migration);
    }

    /// Shows programs in sysfs that a migration has begun, before the first of them sees its connection fail: who then
    /// looks at the generation finds a new one. It is announced when it is over. Needs the events mutex; sleeps.
    pub(super) fn begin_migration(
        &self,
        device: &LiveDevice,
        cause: Cause,
        before: Option<Cid>,
    ) -> Migration {
        let generation = self.migrations.load(Relaxed) + 1;
        self.migrations.store(generation, Relaxed);
        let migration = Migration {
            cause,
            generation,
            old_cid: cid_or_any(before),
            new_cid: cid_or_any(self.guest_cid()),
            reset: 0,
            kept: 0,
        };
        device.show(&migration);
        migration
    }

    /// Gives sockets without a connection that are bound to a CID that the guest had its present one. Sleeps, and takes sockets'
    /// locks. The caller has the rx mutex, or begins to use a device.
    pub(super) fn let_bound_sockets_follow(&self, cid: Cid) {
        Socket::change_bound_cid::<Self>(cid.get());
    }

    /// Resets all connections, which `cause` counts, and returns how many there were. Sleeps, and takes sockets' locks.
    ///
    /// The caller sees to it that no new ones are made meanwhile: by the rx mutex, or without a device.
    pub(super) fn reset_all_connections(&self, cause: &Counter) -> usize {
        let mut count = 0;
        loop {
            let sockets = Socket::some_connected::<Self>();
            for socket in sockets.iter().flatten() {
                let socket = socket.lock();
                let connection = socket.connection::<Self>();
                if connection.is_some_and(|it| self.reset_connection(&socket, &it, cause)) {
                    count += 1;
                }
                // So that it is not found again.
                socket.remove_from_tables();
            }
            if sockets.iter().any(Option::is_none) {
                break;
            }
            cond_resched();
        }
        self.cancel_waiting_of_reset_connections();
        count
    }
}

// SPDX-License-Identifier: GPL-2.0

//! The device comes and goes.

use super::{
    events::{read_guest_cid, EventQueue},
    queue_work,
    rx::RxQueue,
    work,
    VsockDriver, //
};
use crate::{
    af_vsock_glue::{
        socket::Socket,
        virtio::{is_shutting_down, uapi, Device, Driver},
    },
    protocol::{connection::ConnectError, event, feature, queue, update, SocketTypes},
};
use kernel::{
    prelude::*,
    sync::{atomic::Relaxed, Arc, ArcBorrow},
};

// The header that devices are written by says what this driver does.
const _: () = assert!(
    uapi::VIRTIO_VSOCK_F_CHECKPOINT == feature::CHECKPOINT
        && uapi::VIRTIO_VSOCK_EVENT_CID_UPDATE == event::CID_UPDATE
        && uapi::VIRTIO_VSOCK_EVENT_BUF_SIZE as usize == event::LONG_EVENT_LEN
        && uapi::VIRTIO_VSOCK_MAX_TUPLES == update::MAX_TUPLES
        && size_of::<uapi::virtio_vsock_cid_update>() == event::CID_UPDATE_LEN
        && size_of::<uapi::virtio_vsock_tuple>() == update::TUPLE_LEN
);

/// Whether a device is bound to the driver.
#[derive(Default, PartialEq, Eq)]
pub(crate) enum DeviceState {
    /// None is.
    #[default]
    Absent,
    /// One is, asleep or not.
    Bound,
}

impl Driver for VsockDriver {
    const DEVICE_TYPE: u32 = uapi::VIRTIO_ID_VSOCK;
    const FEATURES: &'static [u32] = &[
        feature::STREAM,
        feature::SEQPACKET,
        feature::NO_IMPLIED_STREAM,
        feature::CHECKPOINT,
    ];

    fn probe(this: ArcBorrow<'_, Self>, device: &Device) -> Result {
        let mut state = this.device.lock();
        if *state == DeviceState::Bound {
            dev_err!(
                device.as_ref(),
                "a guest has one virtio socket device, and another one is in use\n"
            );
            return Err(EBUSY);
        }
        this.start(device)?;
        *state = DeviceState::Bound;
        Ok(())
    }

    fn remove(this: ArcBorrow<'_, Self>, _device: &Device) {
        let mut state = this.device.lock();
        this.stop();
        *state = DeviceState::Absent;
    }

    fn freeze(this: ArcBorrow<'_, Self>, _device: &Device) -> Result {
        let _state = this.device.lock();
        this.stop();
        Ok(())
    }

    fn restore(this: ArcBorrow<'_, Self>, device: &Device) -> Result {
        let _state = this.device.lock();
        this.start(device)
    }

    fn queue_used(this: ArcBorrow<'_, Self>, queue: u32) {
        match queue {
            queue::RX => Arc::from(this).queue_moderated_work::<{ work::RX }>(),
            queue::TX => Arc::from(this).queue_moderated_work::<{ work::TX }>(),
            queue::EVENT => Arc::from(this).queue_work_unless_flooded::<{ work::EVENTS }>(),
            _ => {}
        }
    }

    fn config_changed(this: ArcBorrow<'_, Self>) {
        queue_work::<{ work::DEVICE }>(this.into());
    }
}

impl VsockDriver {
    /// Stops using the device where it does not work any more, so that nobody waits for it. Work item; sleeps, and
    /// takes sockets' locks.
    ///
    /// A CID that has changed is not looked at: the event that follows says what becomes of the connections.
    pub(super) fn check_device(&self) {
        let _state = self.device.lock();
        if is_shutting_down() {
            return;
        }
        let Some(failure) = self.failure() else {
            return;
        };
        self.stop();
        pr_err!("{failure}: all connections were reset. Unbind the device and bind it again to use it\n");
    }

    /// What is wrong with the device, where there is one.
    fn failure(&self) -> Option<&'static str> {
        let rx = self.rx.lock();
        let rx = (*rx).as_ref()?;
        if rx.device().needs_reset() {
            return Some("the device has failed and needs a reset");
        }
        let events = self.events.lock();
        let is_broken = rx.is_broken()
            || (*events).as_ref().is_some_and(EventQueue::is_broken)
            || self.tx.is_broken();
        is_broken.then_some("the device has broken the rules of a virtqueue")
    }

    /// Begins to use a device. Needs the device mutex.
    fn start(self: ArcBorrow<'_, Self>, device: &Device) -> Result {
        let (live, [rx, tx, events]) =
            device.make_queues::<{ queue::COUNT }>([c"rx", c"tx", c"event"])?;
        // On an error below the queues are dropped, which resets the device.
        let cid = read_guest_cid(&live)?;
        live.start();

        let has_updates = device.has_feature(feature::CHECKPOINT);
        let is_packed = device.has_feature(feature::RING_PACKED);
        let mut rx = RxQueue::new(rx, is_packed, has_updates, self.spare_buffers.clone());
        let mut events = EventQueue::new(events, has_updates)?;
        events.fill();
        rx.fill();
        self.set_socket_types(SocketTypes::negotiated(|bit| device.has_feature(bit)));
        self.tx.start(tx, self.into());
        self.rx_handled.store(rx.place().into(), Relaxed);
        self.update_waits.store(false, Relaxed);
        self.set_guest_cid(Some(cid));
        self.let_bound_sockets_follow(cid);
        *self.events.lock() = Some(events);
        *self.rx.lock() = Some(rx);
        // Interrupts that came before this found no queues.
        queue_work::<{ work::EVENTS }>(self.into());
        queue_work::<{ work::RX }>(self.into());
        dev_info!(
            device.as_ref(),
            "virtio socket device with CID {}\n",
            cid.get()
        );
        Ok(())
    }

    /// Stops using the device, and ends all connections and attempts to connect. Needs the device mutex.
    fn stop(&self) {
        // All queues are taken out of use before the first is dropped, which resets the device.
        let rx = self.rx.lock().take();
        let events = self.events.lock().take();
        let tx = self.tx.take_queue();
        self.set_guest_cid(None);
        self.resets.add(1, Relaxed);
        drop((rx, events, tx));
        self.statistics.dropped_tx.add(self.tx.drop_backlog());
        self.reset_all_connections(&self.statistics.resets_by_device_loss);
        // Nobody will answer these.
        Socket::for_each_connecting::<Self>(|socket| {
            self.fail_connect(socket, ConnectError::Refused);
        });
    }
}

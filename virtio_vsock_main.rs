// SPDX-License-Identifier: GPL-2.0

//! virtio_vsock_rs: AF_VSOCK sockets of a guest over a virtio socket device.
//!
//! The crate root says what is registered with whom. See Documentation/ for the architecture.

#![deny(unsafe_code)]

#[allow(unsafe_code)]
mod af_vsock_glue;
mod driver;
mod protocol;

use af_vsock_glue::{
    transport, virtio,
    workqueue::{Drained, OwnedQueue, Priority},
};
use driver::{
    statistics::{DebugFs, Statistics},
    VsockDriver,
};
use kernel::{prelude::*, sync::Arc};

module! {
    type: VsockModule,
    name: "virtio_vsock_rs",
    authors: ["The virtio_vsock_rs authors"],
    description: "virtio socket transport for AF_VSOCK",
    license: "GPL",
    alias: ["virtio:d00000013v*"],
}

/// The module. Its fields are dropped in this order: the device goes first, then the transport, of which no
/// socket is left, and when nothing can queue work any more the rest of it is waited for.
#[pin_data]
struct VsockModule {
    #[pin]
    _device_driver: virtio::Registration<VsockDriver>,
    #[pin]
    _transport: transport::Registration<VsockDriver>,
    #[pin]
    _debugfs: DebugFs,
    _work_in_turn: Drained,
    _work_at_once: Drained,
}

impl kernel::InPlaceModule for VsockModule {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(move || {
            let statistics = Arc::new(Statistics::default(), GFP_KERNEL)?;
            let work_at_once = OwnedQueue::new(c"virtio_vsock_rs", Priority::BeforePrograms)?;
            let work_in_turn = OwnedQueue::new(c"virtio_vsock_rs_turn", Priority::AsPrograms)?;
            let driver = VsockDriver::new(
                work_at_once.clone(),
                work_in_turn.clone(),
                statistics.clone(),
            )?;
            Ok(try_pin_init!(Self {
                // Where a later line fails, these go in the reverse order: the same as otherwise.
                _work_at_once: Drained::new(work_at_once),
                _work_in_turn: Drained::new(work_in_turn),
                _debugfs <- DebugFs::new(statistics, driver.clone()),
                // First, because nothing may fail once sockets can be given to the transport.
                _device_driver <- virtio::Registration::new(
                    c"virtio_vsock_rs",
                    module,
                    driver.clone(),
                ),
                _transport <- transport::Registration::new(module, driver),
            }))
        })
    }
}

// SPDX-License-Identifier: GPL-2.0

//! virtio_vsock_rs: AF_VSOCK sockets of a guest over a virtio socket device.
//!
//! The crate root says what is registered with whom. See Documentation/ for the architecture.

#![deny(unsafe_code)]

#[allow(unsafe_code)]
mod af_vsock_glue;
mod driver;
mod protocol;

use af_vsock_glue::{transport, virtio, workqueue::OwnedQueue};
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

/// The module. Its fields are dropped in this order: the device goes first, and the workqueue last, when
/// nothing is left that could queue work.
#[pin_data]
struct VsockModule {
    #[pin]
    _device_driver: virtio::Registration<VsockDriver>,
    #[pin]
    _transport: transport::Registration<VsockDriver>,
    #[pin]
    _debugfs: DebugFs,
    _workqueue: Arc<OwnedQueue>,
}

impl kernel::InPlaceModule for VsockModule {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(move || {
            let statistics = Arc::new(Statistics::default(), GFP_KERNEL)?;
            let workqueue = Arc::new(OwnedQueue::new(c"virtio_vsock_rs")?, GFP_KERNEL)?;
            let driver = VsockDriver::new(workqueue.clone(), statistics.clone())?;
            Ok(try_pin_init!(Self {
                _debugfs <- DebugFs::new(statistics),
                _transport <- transport::Registration::new(module, driver.clone()),
                _device_driver <- virtio::Registration::new(
                    c"virtio_vsock_rs",
                    module,
                    driver,
                ),
                _workqueue: workqueue,
            }))
        })
    }
}

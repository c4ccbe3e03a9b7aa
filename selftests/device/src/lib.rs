// SPDX-License-Identifier: GPL-2.0

//! A virtio socket device outside of QEMU, for tests.
//!
//! QEMU's `vhost-user-test-device-pci` (with `virtio-id=19,num_vqs=3,config_size=8`) hands all three virtqueues and the
//! configuration space to a [`Device`], one for each guest. The devices of a [`Switch`] route packets by CID: between
//! guests, and to the host (CID 2), which a [`Bridge`] gives Unix sockets as Firecracker and vhost-device-vsock do.
//! A test in the same process can also play the peer itself, packet by packet, and make the device misbehave.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`packet`] | a packet, to and from bytes |
//! | [`device`] | the handle that tests hold: inject, observe, hold back, reset |
//! | [`backend`] | the virtqueues, as QEMU's frontend drives them |
//! | [`ring`] | a virtqueue, whatever the layout of its ring |
//! | [`packed`] | the packed layout, which the library does not know |
//! | [`update`] | the event that says which connections go on after a migration |
//! | [`switch`] | which packet goes where |
//! | [`blob`] | the host's end of a connection as bytes, for another device |
//! | [`bridge`] | the host's side of connections, on Unix sockets |
//! | `migration` | how a guest comes from another device, and leaves for one |
//! | [`state`] | what a device leaves to the one that its guest moves to |
//! | [`relay`] | between QEMU and a guest's devices: moves the guest from one to another |

pub mod backend;
pub mod blob;
pub mod bridge;
pub mod device;
mod migration;
pub mod packed;
pub mod packet;
pub mod relay;
pub mod ring;
pub mod state;
pub mod switch;
pub mod update;

pub use bridge::Bridge;
pub use device::{Device, DeviceConfig};
pub use packet::{Op, Packet};
pub use relay::Relay;
pub use switch::Switch;
pub use update::{Tuple, Update};

/// The host's CID.
pub const HOST_CID: u64 = 2;

/// What the program says when it can be connected to.
pub const READY: &str = "ready";

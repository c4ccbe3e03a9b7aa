// SPDX-License-Identifier: GPL-2.0

//! Safe abstractions of what the driver uses of the kernel: AF_VSOCK's core, virtio, `sk_buff`, messages.
//!
//! This is the only place with unsafe code and C. It is written in the style of rust/kernel: a type for what
//! C passes around with its invariants, a trait for what a driver implements, ownership in the types. It knows
//! nothing of the driver, and of the virtio socket protocol only what tracepoints show of a header and what programs are
//! told of a migration.
//!
//! | module | what it wraps |
//! | --- | --- |
//! | [`errno`] | error numbers of sockets |
//! | [`skb`] | `struct sk_buff` that has one owner, and queues of them |
//! | [`message`] | `struct msghdr`, as source and as destination |
//! | [`monitor`] | vsockmon and tracepoints |
//! | [`virtio`] | `struct virtio_driver`, `struct virtio_device`, `struct virtqueue` |
//! | [`socket`] | `struct vsock_sock`, its lock, the tables of sockets |
//! | [`sort`] | the sort of slices |
//! | [`transport`] | `struct vsock_transport`: what a transport implements, and its registration |
//! | [`workqueue`] | a `struct workqueue_struct` of one's own |

mod bindings;
pub(crate) mod errno;
pub(crate) mod message;
pub(crate) mod monitor;
pub(crate) mod skb;
pub(crate) mod socket;
pub(crate) mod sort;
pub(crate) mod transport;
pub(crate) mod virtio;
pub(crate) mod workqueue;

/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * Checkpoint extension of the virtio socket device: connections that go on
 * after the guest's CID, or their peers', have changed.
 *
 * Documentation/checkpoint.md is its text.
 */
#ifndef _UAPI_LINUX_VIRTIO_VSOCK_CHECKPOINT_H
#define _UAPI_LINUX_VIRTIO_VSOCK_CHECKPOINT_H

#include <linux/types.h>

/* The device can send VIRTIO_VSOCK_EVENT_CID_UPDATE. */
#define VIRTIO_VSOCK_F_CHECKPOINT	23

/* An event, beside VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (0). */
#define VIRTIO_VSOCK_EVENT_CID_UPDATE	1

/* Length of the event buffers once the feature is negotiated, in bytes. */
#define VIRTIO_VSOCK_EVENT_BUF_SIZE	4096

/* How many tuples an update has at most, in all of its parts. */
#define VIRTIO_VSOCK_MAX_TUPLES		65536

/* A connection that goes on. */
struct virtio_vsock_tuple {
	__le64 host_old_cid;
	__le64 host_new_cid;
	__le32 host_port;
	__le32 guest_port;
	__le16 type;		/* enum virtio_vsock_type */
	__le16 reserved1;	/* 0 */
	__le32 reserved2;	/* 0 */
};

/* One part of an update. */
struct virtio_vsock_cid_update {
	__le32 id;		/* VIRTIO_VSOCK_EVENT_CID_UPDATE */
	__le32 generation;	/* the same in all parts of an update */
	__le64 old_guest_cid;
	__le64 new_guest_cid;
	__le32 total;		/* tuples in the whole update */
	__le32 first;		/* index of tuples[0] in the whole update */
	__le32 count;		/* tuples in this part */
	__le16 rx_used;		/* place in the receive queue behind the last
				 * packet before the update: the used ring's
				 * idx; of a packed ring the place, with the
				 * wrap counter as its top bit
				 */
	__le16 reserved;	/* 0 */
	struct virtio_vsock_tuple tuples[];
};

#endif /* _UAPI_LINUX_VIRTIO_VSOCK_CHECKPOINT_H */

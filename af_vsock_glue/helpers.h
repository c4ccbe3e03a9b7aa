/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the Rust glue calls in C: the headers that bindgen reads, and a function for each inline
 * function or macro of the kernel that Rust cannot call.
 */
#ifndef _AF_VSOCK_GLUE_HELPERS_H
#define _AF_VSOCK_GLUE_HELPERS_H

#include <linux/list.h>
#include <linux/skbuff.h>
#include <linux/socket.h>
#include <linux/sort.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/workqueue.h>
#include <net/af_vsock.h>
#include <net/sock.h>
#include <uapi/linux/virtio_vsock.h>
#include <uapi/linux/vsockmon.h>

#include "../include/uapi/linux/virtio_vsock_checkpoint.h"

/* sock */
void vsock_glue_sock_hold(struct sock *sk);
void vsock_glue_sock_put(struct sock *sk);
void vsock_glue_lock_sock(struct sock *sk);
void vsock_glue_lock_sock_child(struct sock *sk);
void vsock_glue_release_sock(struct sock *sk);
u8 vsock_glue_state(const struct sock *sk);
void vsock_glue_set_state(struct sock *sk, u8 state);
bool vsock_glue_flag(const struct sock *sk, enum sock_flags flag);
void vsock_glue_set_flag(struct sock *sk, enum sock_flags flag);
void vsock_glue_reset_flag(struct sock *sk, enum sock_flags flag);
void vsock_glue_state_change(struct sock *sk);
void vsock_glue_write_space(struct sock *sk);
unsigned int vsock_glue_send_memory(const struct sock *sk);
void vsock_glue_data_ready(struct sock *sk);
void vsock_glue_error_report(struct sock *sk, int err);
int vsock_glue_take_error(struct sock *sk);
bool vsock_glue_has_error(const struct sock *sk);
unsigned int vsock_glue_blocked_readers(struct sock *sk);
unsigned int vsock_glue_blocked_writers(struct sock *sk);
void vsock_glue_set_socket_connected(struct sock *sk);
bool vsock_glue_accept_queue_is_full(const struct sock *sk);
int vsock_glue_rcvlowat(const struct sock *sk);
bool vsock_glue_current_is_exiting(void);

/* AF_VSOCK */
void vsock_glue_table_lock(void);
void vsock_glue_table_unlock(void);
bool vsock_glue_net_mode_global(struct vsock_sock *vsk);
void vsock_glue_init_close_work(struct vsock_sock *vsk, work_func_t function);

/* migrations, for programs */
enum vsock_glue_cause {
	VSOCK_GLUE_NOTHING,
	VSOCK_GLUE_TRANSPORT_RESET,
	VSOCK_GLUE_CID_UPDATE,
};

struct vsock_glue_migration {
	u64 generation;
	u32 cause;	/* enum vsock_glue_cause */
	u32 old_cid;
	u32 new_cid;
	u32 reset;
	u32 kept;
};

void vsock_glue_show_migration(const struct vsock_glue_migration *migration);
void vsock_glue_announce(struct virtio_device *vdev,
			 const struct vsock_glue_migration *migration);
void vsock_glue_set_groups(struct virtio_driver *driver);

/* sk_buff */
struct sk_buff *vsock_glue_alloc_linear(unsigned int size);
struct sk_buff *vsock_glue_alloc_linear_nofail(unsigned int size);
struct sk_buff *vsock_glue_alloc_with_frags(unsigned int linear, unsigned int data);
unsigned int vsock_glue_largest_linear(void);
unsigned int vsock_glue_page_sized(void);
unsigned int vsock_glue_page_truesize(void);
unsigned int vsock_glue_tailroom(const struct sk_buff *skb);
void vsock_glue_set_owner(struct sk_buff *skb, struct sock *sk);
void vsock_glue_set_receiver(struct sk_buff *skb, struct sock *sk);
void vsock_glue_charge_more(struct sk_buff *skb, int size);
bool vsock_glue_set_owner_sk(struct sk_buff *skb, struct sock *sk);
void vsock_glue_orphan(struct sk_buff *skb);
void vsock_glue_recycle_received(struct sk_buff *skb);
bool vsock_glue_recycle_sent(struct sk_buff *skb);
bool vsock_glue_is_made_for(const struct sk_buff *skb, unsigned int linear, unsigned int data);
bool vsock_glue_wipes_freed_memory(void);
void vsock_glue_zcopy_set(struct sk_buff *skb, struct ubuf_info *uarg);
void vsock_glue_zcopy_set_copied(struct ubuf_info *uarg);
void vsock_glue_zcopy_put(struct ubuf_info *uarg, bool used);
unsigned int vsock_glue_most_segments(void);
struct sk_buff *vsock_glue_alloc_atomic(unsigned int size);
void vsock_glue_clear_cb(struct sk_buff *skb);

/* tracepoints */
void vsock_glue_trace_received(const struct virtio_vsock_hdr *header);
void vsock_glue_trace_sent(const struct virtio_vsock_hdr *header);

/* virtio */
int vsock_glue_find_vqs(struct virtio_device *vdev, unsigned int count, struct virtqueue *vqs[],
			const char *const names[], vq_callback_t *callback);
void vsock_glue_del_vqs(struct virtio_device *vdev);
void vsock_glue_device_ready(struct virtio_device *vdev);
bool vsock_glue_has_feature(const struct virtio_device *vdev, unsigned int feature);
bool vsock_glue_needs_reset(struct virtio_device *vdev);
bool vsock_glue_is_shutting_down(void);
u64 vsock_glue_read_config_le64(struct virtio_device *vdev, unsigned int offset);
int vsock_glue_add_out(struct virtqueue *vq, struct sk_buff *skb);
int vsock_glue_add_in(struct virtqueue *vq, struct sk_buff *skb, unsigned int len);

/* workqueue */
struct workqueue_struct *vsock_glue_alloc_workqueue(const char *name, bool is_high);
void vsock_glue_cond_resched(void);
bool vsock_glue_ratelimit(void);
bool vsock_glue_current_is_realtime(void);
unsigned long vsock_glue_jiffies(void);

#endif /* _AF_VSOCK_GLUE_HELPERS_H */

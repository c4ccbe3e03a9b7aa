// SPDX-License-Identifier: GPL-2.0

#include <linux/mm.h>
#include <linux/net.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/wait.h>

#include "helpers.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

void vsock_glue_sock_hold(struct sock *sk)
{
	sock_hold(sk);
}

void vsock_glue_sock_put(struct sock *sk)
{
	sock_put(sk);
}

void vsock_glue_lock_sock(struct sock *sk)
{
	lock_sock(sk);
}

/* The lock of a connection that is being made, taken inside its listener's. */
void vsock_glue_lock_sock_child(struct sock *sk)
{
	lock_sock_nested(sk, SINGLE_DEPTH_NESTING);
}

void vsock_glue_release_sock(struct sock *sk)
{
	release_sock(sk);
}

u8 vsock_glue_state(const struct sock *sk)
{
	return READ_ONCE(sk->sk_state);
}

void vsock_glue_set_state(struct sock *sk, u8 state)
{
	WRITE_ONCE(sk->sk_state, state);
}

bool vsock_glue_flag(const struct sock *sk, enum sock_flags flag)
{
	return sock_flag(sk, flag);
}

void vsock_glue_set_flag(struct sock *sk, enum sock_flags flag)
{
	sock_set_flag(sk, flag);
}

void vsock_glue_reset_flag(struct sock *sk, enum sock_flags flag)
{
	sock_reset_flag(sk, flag);
}

void vsock_glue_state_change(struct sock *sk)
{
	sk->sk_state_change(sk);
}

void vsock_glue_write_space(struct sock *sk)
{
	sk->sk_write_space(sk);
}

unsigned int vsock_glue_send_memory(const struct sock *sk)
{
	return sk_wmem_alloc_get(sk);
}

void vsock_glue_data_ready(struct sock *sk)
{
	sk->sk_data_ready(sk);
}

void vsock_glue_error_report(struct sock *sk, int err)
{
	WRITE_ONCE(sk->sk_err, err);
	sk_error_report(sk);
}

int vsock_glue_take_error(struct sock *sk)
{
	return sock_error(sk);
}

bool vsock_glue_has_error(const struct sock *sk)
{
	return READ_ONCE(sk->sk_err);
}

/*
 * How many calls sleep that are woken by a function: vsock_connectible_wait_data()
 * waits with DEFINE_WAIT(), vsock_connectible_sendmsg() with wait_woken(), and
 * poll() and its kin have functions of their own.
 */
static unsigned int count_waiters(struct sock *sk, wait_queue_func_t wake)
{
	wait_queue_entry_t *entry;
	struct socket_wq *wq;
	unsigned long flags;
	unsigned int count = 0;

	rcu_read_lock();
	wq = rcu_dereference(sk->sk_wq);
	if (wq) {
		spin_lock_irqsave(&wq->wait.lock, flags);
		list_for_each_entry(entry, &wq->wait.head, entry)
			count += entry->func == wake;
		spin_unlock_irqrestore(&wq->wait.lock, flags);
	}
	rcu_read_unlock();
	return count;
}

unsigned int vsock_glue_blocked_readers(struct sock *sk)
{
	return count_waiters(sk, autoremove_wake_function);
}

unsigned int vsock_glue_blocked_writers(struct sock *sk)
{
	return count_waiters(sk, woken_wake_function);
}

void vsock_glue_set_socket_connected(struct sock *sk)
{
	if (sk->sk_socket)
		sk->sk_socket->state = SS_CONNECTED;
}

bool vsock_glue_accept_queue_is_full(const struct sock *sk)
{
	return sk_acceptq_is_full(sk);
}

int vsock_glue_rcvlowat(const struct sock *sk)
{
	return sock_rcvlowat(sk, 0, INT_MAX);
}

bool vsock_glue_current_is_exiting(void)
{
	return current->flags & PF_EXITING;
}

void vsock_glue_table_lock(void)
{
	spin_lock_bh(&vsock_table_lock);
}

void vsock_glue_table_unlock(void)
{
	spin_unlock_bh(&vsock_table_lock);
}

bool vsock_glue_net_mode_global(struct vsock_sock *vsk)
{
	return vsock_net_mode_global(vsk);
}

void vsock_glue_init_close_work(struct vsock_sock *vsk, work_func_t function)
{
	INIT_DELAYED_WORK(&vsk->close_work, function);
}

struct sk_buff *vsock_glue_alloc_linear(unsigned int size)
{
	return alloc_skb(size, GFP_KERNEL);
}

/* Waits for memory until there is some: for small packets without which a connection would hang. */
struct sk_buff *vsock_glue_alloc_linear_nofail(unsigned int size)
{
	return alloc_skb(size, GFP_KERNEL | __GFP_NOFAIL);
}

/* The result has all its data in pages, none of it in the linear part yet. */
struct sk_buff *vsock_glue_alloc_with_frags(unsigned int linear, unsigned int data)
{
	struct sk_buff *skb;
	int err;

	skb = alloc_skb_with_frags(linear, data, PAGE_ALLOC_COSTLY_ORDER, &err, GFP_KERNEL);
	if (skb) {
		skb->data_len = data;
		skb->len = data;
	}
	return skb;
}

/* The largest linear buffer that does not strain the page allocator. */
unsigned int vsock_glue_largest_linear(void)
{
	return SKB_WITH_OVERHEAD(PAGE_SIZE << PAGE_ALLOC_COSTLY_ORDER);
}

/* The largest linear buffer that takes 4 KiB with its bookkeeping. */
unsigned int vsock_glue_page_sized(void)
{
	return SKB_WITH_OVERHEAD(4096);
}

/* Memory of such a buffer as it is charged to sockets. */
unsigned int vsock_glue_page_truesize(void)
{
	return SKB_TRUESIZE(vsock_glue_page_sized());
}

unsigned int vsock_glue_tailroom(const struct sk_buff *skb)
{
	return skb_tailroom(skb);
}

void vsock_glue_set_owner(struct sk_buff *skb, struct sock *sk)
{
	skb_set_owner_w(skb, sk);
}

void vsock_glue_set_receiver(struct sk_buff *skb, struct sock *sk)
{
	skb_set_owner_r(skb, sk);
}

/* What sock_rfree() takes off again. */
void vsock_glue_charge_more(struct sk_buff *skb, int size)
{
	skb->truesize += size;
	if (skb->sk) {
		atomic_add(size, &skb->sk->sk_rmem_alloc);
		sk_mem_charge(skb->sk, size);
	}
}

/* Makes a socket a buffer's owner, to which that has a reference from now on. */
bool vsock_glue_set_owner_sk(struct sk_buff *skb, struct sock *sk)
{
	return skb_set_owner_sk_safe(skb, sk);
}

void vsock_glue_orphan(struct sk_buff *skb)
{
	skb_orphan(skb);
}

/* Makes a linear buffer of which nobody else has a part what it was when it was allocated. */
void vsock_glue_recycle_received(struct sk_buff *skb)
{
	skb_orphan(skb);
	skb->data = skb->head;
	skb_reset_tail_pointer(skb);
	skb->len = 0;
	skb->truesize = SKB_TRUESIZE(skb_end_offset(skb));
}

/* vsock_glue_alloc_with_frags() makes no more fragments where memory is not in pieces. */
static unsigned int usual_frags(unsigned int data)
{
	return DIV_ROUND_UP(data, PAGE_SIZE << PAGE_ALLOC_COSTLY_ORDER) + PAGE_ALLOC_COSTLY_ORDER;
}

/*
 * Makes a buffer to the device what vsock_glue_alloc_linear() or
 * vsock_glue_alloc_with_frags() made. Fails for one whose pages, or the completion that
 * it has, are a program's, and for one that was made when memory was short or in pieces.
 */
bool vsock_glue_recycle_sent(struct sk_buff *skb)
{
	if (skb_zcopy(skb) || skb_pfmemalloc(skb) ||
	    skb_shinfo(skb)->nr_frags > usual_frags(skb->data_len))
		return false;
	skb_orphan(skb);
	skb->data = skb->head;
	skb_reset_tail_pointer(skb);
	skb->len = skb->data_len;
	return true;
}

/*
 * Whether a buffer of which that has made what it was is what would be made for so many
 * bytes: vsock_glue_alloc_with_frags() if data is not 0, else vsock_glue_alloc_linear().
 */
bool vsock_glue_is_made_for(const struct sk_buff *skb, unsigned int linear, unsigned int data)
{
	if (skb->data_len != data)
		return false;
	if (data)
		return linear <= skb_end_offset(skb);
	return skb_end_offset(skb) ==
	       SKB_WITH_OVERHEAD(kmalloc_size_roundup(SKB_HEAD_ALIGN(linear)));
}

/* Whether the administrator wants memory to be written over as soon as nobody needs it. */
bool vsock_glue_wipes_freed_memory(void)
{
	return want_init_on_free() || page_poisoning_enabled_static();
}

void vsock_glue_zcopy_set(struct sk_buff *skb, struct ubuf_info *uarg)
{
	skb_zcopy_set(skb, uarg, NULL);
}

void vsock_glue_zcopy_set_copied(struct ubuf_info *uarg)
{
	uarg_to_msgzc(uarg)->zerocopy = 0;
}

void vsock_glue_zcopy_put(struct ubuf_info *uarg, bool used)
{
	if (used)
		net_zcopy_put(uarg);
	else
		net_zcopy_put_abort(uarg, true);
}

/* How many segments a packet has at the most: the header and the fragments. */
unsigned int vsock_glue_most_segments(void)
{
	return MAX_SKB_FRAGS + 1;
}

struct sk_buff *vsock_glue_alloc_atomic(unsigned int size)
{
	return alloc_skb(size, GFP_ATOMIC);
}

void vsock_glue_clear_cb(struct sk_buff *skb)
{
	memset(skb->cb, 0, sizeof(skb->cb));
}

void vsock_glue_trace_received(const struct virtio_vsock_hdr *header)
{
	trace_packet_received(header);
}

void vsock_glue_trace_sent(const struct virtio_vsock_hdr *header)
{
	trace_packet_sent(header);
}

int vsock_glue_find_vqs(struct virtio_device *vdev, unsigned int count, struct virtqueue *vqs[],
			const char *const names[], vq_callback_t *callback)
{
	struct virtqueue_info info[4] = {};
	unsigned int i;

	if (count > ARRAY_SIZE(info))
		return -EINVAL;
	for (i = 0; i < count; i++) {
		info[i].name = names[i];
		info[i].callback = callback;
	}
	return virtio_find_vqs(vdev, count, vqs, info, NULL);
}

void vsock_glue_del_vqs(struct virtio_device *vdev)
{
	vdev->config->del_vqs(vdev);
}

void vsock_glue_device_ready(struct virtio_device *vdev)
{
	virtio_device_ready(vdev);
}

bool vsock_glue_has_feature(const struct virtio_device *vdev, unsigned int feature)
{
	return virtio_has_feature(vdev, feature);
}

bool vsock_glue_needs_reset(struct virtio_device *vdev)
{
	return vdev->config->get_status(vdev) & VIRTIO_CONFIG_S_NEEDS_RESET;
}

bool vsock_glue_is_shutting_down(void)
{
	return system_state > SYSTEM_RUNNING;
}

u64 vsock_glue_read_config_le64(struct virtio_device *vdev, unsigned int offset)
{
	__le64 value;

	__virtio_cread_many(vdev, offset, &value, 1, sizeof(value));
	return le64_to_cpu(value);
}

int vsock_glue_add_out(struct virtqueue *vq, struct sk_buff *skb)
{
	struct scatterlist sg[MAX_SKB_FRAGS + 1];
	struct skb_shared_info *shinfo = skb_shinfo(skb);
	unsigned int i, count = shinfo->nr_frags + 1;

	sg_init_table(sg, count);
	sg_set_buf(&sg[0], skb->data, skb_headlen(skb));
	for (i = 0; i < shinfo->nr_frags; i++) {
		const skb_frag_t *frag = &shinfo->frags[i];

		sg_set_page(&sg[i + 1], skb_frag_page(frag), skb_frag_size(frag),
			    skb_frag_off(frag));
	}
	return virtqueue_add_outbuf(vq, sg, count, skb, GFP_KERNEL);
}

int vsock_glue_add_in(struct virtqueue *vq, struct sk_buff *skb, unsigned int len)
{
	struct scatterlist sg;

	sg_init_one(&sg, skb->data, min_t(unsigned int, len, skb_tailroom(skb)));
	return virtqueue_add_inbuf(vq, &sg, 1, skb, GFP_KERNEL);
}

struct workqueue_struct *vsock_glue_alloc_workqueue(const char *name, bool is_high)
{
	return alloc_workqueue("%s", WQ_PERCPU | (is_high ? WQ_HIGHPRI : 0), 0, name);
}

bool vsock_glue_current_is_realtime(void)
{
	return current->prio < MAX_RT_PRIO;
}

unsigned long vsock_glue_jiffies(void)
{
	return jiffies;
}

bool vsock_glue_ratelimit(void)
{
	return net_ratelimit();
}

void vsock_glue_cond_resched(void)
{
	cond_resched();
}

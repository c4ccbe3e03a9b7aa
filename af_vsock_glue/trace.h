/* SPDX-License-Identifier: GPL-2.0 */
/* Tracepoints: events/virtio_vsock_rs/ in tracefs. */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM virtio_vsock_rs

#if !defined(_AF_VSOCK_GLUE_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define _AF_VSOCK_GLUE_TRACE_H

#include <linux/tracepoint.h>
#include <uapi/linux/virtio_vsock.h>

/* So that perf and trace-cmd, which know no enums, can show the names. */
TRACE_DEFINE_ENUM(VIRTIO_VSOCK_TYPE_STREAM);
TRACE_DEFINE_ENUM(VIRTIO_VSOCK_TYPE_SEQPACKET);
TRACE_DEFINE_ENUM(VIRTIO_VSOCK_OP_REQUEST);
TRACE_DEFINE_ENUM(VIRTIO_VSOCK_OP_RESPONSE);
TRACE_DEFINE_ENUM(VIRTIO_VSOCK_OP_RST);
TRACE_DEFINE_ENUM(VIRTIO_VSOCK_OP_SHUTDOWN);
TRACE_DEFINE_ENUM(VIRTIO_VSOCK_OP_RW);
TRACE_DEFINE_ENUM(VIRTIO_VSOCK_OP_CREDIT_UPDATE);
TRACE_DEFINE_ENUM(VIRTIO_VSOCK_OP_CREDIT_REQUEST);

#define show_socket_type(type) \
	__print_symbolic(type, \
			 { VIRTIO_VSOCK_TYPE_STREAM, "STREAM" }, \
			 { VIRTIO_VSOCK_TYPE_SEQPACKET, "SEQPACKET" })

#define show_operation(op) \
	__print_symbolic(op, \
			 { VIRTIO_VSOCK_OP_REQUEST, "REQUEST" }, \
			 { VIRTIO_VSOCK_OP_RESPONSE, "RESPONSE" }, \
			 { VIRTIO_VSOCK_OP_RST, "RST" }, \
			 { VIRTIO_VSOCK_OP_SHUTDOWN, "SHUTDOWN" }, \
			 { VIRTIO_VSOCK_OP_RW, "RW" }, \
			 { VIRTIO_VSOCK_OP_CREDIT_UPDATE, "CREDIT_UPDATE" }, \
			 { VIRTIO_VSOCK_OP_CREDIT_REQUEST, "CREDIT_REQUEST" })

DECLARE_EVENT_CLASS(packet,
	TP_PROTO(const struct virtio_vsock_hdr *header),
	TP_ARGS(header),
	TP_STRUCT__entry(
		__field(u64, src_cid)
		__field(u64, dst_cid)
		__field(u32, src_port)
		__field(u32, dst_port)
		__field(u32, len)
		__field(u16, type)
		__field(u16, op)
		__field(u32, flags)
		__field(u32, buf_alloc)
		__field(u32, fwd_cnt)
	),
	TP_fast_assign(
		__entry->src_cid = le64_to_cpu(header->src_cid);
		__entry->dst_cid = le64_to_cpu(header->dst_cid);
		__entry->src_port = le32_to_cpu(header->src_port);
		__entry->dst_port = le32_to_cpu(header->dst_port);
		__entry->len = le32_to_cpu(header->len);
		__entry->type = le16_to_cpu(header->type);
		__entry->op = le16_to_cpu(header->op);
		__entry->flags = le32_to_cpu(header->flags);
		__entry->buf_alloc = le32_to_cpu(header->buf_alloc);
		__entry->fwd_cnt = le32_to_cpu(header->fwd_cnt);
	),
	TP_printk("%llu:%u -> %llu:%u len=%u type=%s op=%s flags=%#x buf_alloc=%u fwd_cnt=%u",
		  __entry->src_cid, __entry->src_port, __entry->dst_cid, __entry->dst_port,
		  __entry->len, show_socket_type(__entry->type), show_operation(__entry->op),
		  __entry->flags, __entry->buf_alloc, __entry->fwd_cnt)
);

/* A well-formed packet of the device. */
DEFINE_EVENT(packet, packet_received,
	TP_PROTO(const struct virtio_vsock_hdr *header),
	TP_ARGS(header)
);

/* A packet that was put into the virtqueue. */
DEFINE_EVENT(packet, packet_sent,
	TP_PROTO(const struct virtio_vsock_hdr *header),
	TP_ARGS(header)
);

#endif /* _AF_VSOCK_GLUE_TRACE_H */

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>

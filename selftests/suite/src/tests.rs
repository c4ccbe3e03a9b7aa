// SPDX-License-Identifier: GPL-2.0

//! The tests of the device tier: what a user of a guest sees.

mod credit;
mod hostile;
mod lifecycle;
mod observe;
mod reset;
mod stream;

use crate::runner::Test;

macro_rules! tests {
    ($($module:ident: $($name:ident),+;)+) => {
        /// All of them.
        pub const ALL: &[Test] = &[
            $($(Test {
                name: concat!(stringify!($module), "::", stringify!($name)),
                run: $module::$name,
            },)+)+
        ];
    };
}

tests! {
    stream: between_guests, over_the_bridge, connect_refused, connect_timeout, nonblocking_connect, backlog_full,
        bind_conflicts, peek_and_dontwait, shutdown_send, shutdown_by_peer, close_with_unread_data, close_timeout,
        linger, epipe, many_connections;
    credit: window_blocks_writer, peer_shrinks_its_buffer, peer_exceeds_its_credit, requests_are_answered,
        updates_are_few, low_water_mark, ioctls, epoll_edges, buffer_size_limits;
    reset: new_cid, bound_sockets_follow, same_cid_and_blocked_calls, late_rst_does_not_hide_it, repeated;
    lifecycle: c_driver_first, rust_driver_first, unbind_with_traffic, remove_while_in_use, unbind_in_a_loop;
    observe: vsockmon, tracepoints, diagnostics, sockmap;
    hostile: malformed_packets, unknown_packets, wrong_cids, forged_completions, bad_events, tx_not_consumed,
        reply_flood;
}

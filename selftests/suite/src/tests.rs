// SPDX-License-Identifier: GPL-2.0

//! The tests of the device tier: what a user of a guest sees.

mod carrier;
mod checkpoint;
mod credit;
mod faults;
pub mod file_transfer;
mod hardware;
mod hostile;
mod lifecycle;
mod messages;
pub mod migration;
mod namespaces;
mod observe;
mod recovery;
mod reset;
mod sharing;
mod stream;
pub mod traffic;
mod units;
mod upstream;

use vsock_device::device::{FEATURE_RING_PACKED, RING_FEATURES};

use crate::machine::Env;
use crate::runner::Test;

macro_rules! tests {
    ($($module:ident: $($name:ident),+;)+) => {
        const ON_ANY_KERNEL: &[Test] = &[
            $($(Test {
                name: concat!(stringify!($module), "::", stringify!($name)),
                run: $module::$name,
            },)+)+
        ];
    };
}

/// Tests that are run once more on packed rings.
macro_rules! tests_on_packed_rings {
    ($($module:ident: $($name:ident),+;)+) => {
        const ON_PACKED_RINGS: &[Test] = &[
            $($(Test {
                name: concat!("packed_rings::", stringify!($module), "::", stringify!($name)),
                run: |lab| {
                    lab.set_ring_features(RING_FEATURES | FEATURE_RING_PACKED);
                    $module::$name(lab)
                },
            },)+)+
        ];
    };
}

/// Tests for kernels that can let allocations fail.
const WITH_FAULT_INJECTION: &[Test] = &[Test {
    name: "faults::probe",
    run: faults::probe,
}];

/// Tests for kernels that can hibernate.
const WITH_HIBERNATION: &[Test] = &[Test {
    name: "lifecycle::hibernation",
    run: lifecycle::hibernation,
}];

/// All tests that a kernel is able to run.
pub fn all(env: &Env) -> Vec<&'static Test> {
    let mut tests: Vec<&Test> = ON_ANY_KERNEL.iter().chain(ON_PACKED_RINGS).collect();
    if env.has_option("CONFIG_FAULT_INJECTION") {
        tests.extend(WITH_FAULT_INJECTION);
    }
    if env.has_option("CONFIG_HIBERNATION") {
        tests.extend(WITH_HIBERNATION);
    }
    if env.has_option("CONFIG_KCSAN") {
        // Such a kernel does not wake up again, whatever the driver.
        const SLEEP: [&str; 2] = ["lifecycle::suspend", "lifecycle::hibernation"];
        tests.retain(|test| !SLEEP.iter().any(|sleep| test.name.ends_with(sleep)));
    }
    tests
}

tests! {
    stream: between_guests, over_the_bridge, unreadable_memory, connect_refused, connect_timeout, connect_again,
        nonblocking_connect, backlog_full, bind_conflicts, peek_and_dontwait, shutdown_send, shutdown_by_peer, close_with_unread_data,
        ports_used_anew, close_timeout, linger, epipe, shutdown_after_the_end,
        poll_for_room_at_the_end, shutdown_while_connecting, many_connections;
    messages: without_room, waits_for_room, buffer_becomes_too_small, unreadable_end, long_ones, ends_of_records, many_short_ones;
    credit: window_blocks_writer, peer_shrinks_its_buffer, peer_exceeds_its_credit, requests_are_answered,
        updates_are_few, no_updates_at_the_end, no_update_answers_the_end, room_beside_an_unread_message,
        low_water_mark, message_below_the_mark, ioctls, epoll_edges, buffer_size_limits, buffer_grows_while_connecting;
    reset: new_cid, bound_sockets_follow, same_cid_and_blocked_calls, late_rst_does_not_hide_it, attempts, attempt_that_waits,
        repeated, every_blocked_reader, reader_with_a_part, every_blocked_writer, so_error, half_closed, accept_queue,
        request_before_event, silence_afterwards, zerocopy_completions, lingering_close, sockets_in_a_sockmap;
    checkpoint: connections_go_on, unlisted_are_reset, packets_that_wait, credit_of_packets_that_wait,
        packets_before_and_after, behind_a_flood, same_cids, again_and_again, update_of_nothing, refused_updates,
        rest_of_a_refused_update;
    migration: traffic_goes_on, one_of_two_guests, without_the_extension, bad_states,
        told_to_programs;
    recovery: resets_and_a_reboot, collector_dies, collector_in_a_guest;
    file_transfer: reset_and_migrations;
    units: migrated_service, journal_is_forwarded;
    sharing: fairness, order_is_kept, memory_of_small_packets, cpu_in_a_flood;
    namespaces: global_mode, local_mode, deletion;
    hardware: ring_sizes, without_ring_features, zero_copy, kinds_of_sockets, platform_dma, full_bounce_pool, mmio, needs_reset;
    lifecycle: c_driver_first, rust_driver_first, unbind_with_traffic, unbind_while_connecting,
        unbind_within_a_send, remove_while_in_use, unbind_in_a_loop, hotplug, two_devices, suspend;
    upstream: vsock_test, vsock_diag_test, vsock_uring_test;
    observe: counters, queue_lengths, spare_buffers, vsockmon, vsockmon_of_waiting_packets, tracepoints, diagnostics,
        sockmap;
    hostile: malformed_packets, unwritten_packets, unknown_packets, wrong_cids, forged_completions, bad_events, bad_cid,
        tx_not_consumed, reply_flood, credit_request_flood;
}

tests_on_packed_rings! {
    stream: over_the_bridge, between_guests, many_connections;
    reset: new_cid, request_before_event;
    checkpoint: packets_before_and_after, behind_a_flood, again_and_again;
    migration: traffic_goes_on;
    sharing: fairness;
    messages: waits_for_room, unreadable_end;
    hardware: ring_sizes, zero_copy, without_ring_features, platform_dma, full_bounce_pool, mmio;
    lifecycle: unbind_in_a_loop, hotplug, suspend;
    hostile: malformed_packets, forged_completions;
}

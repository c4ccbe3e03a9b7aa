// SPDX-License-Identifier: GPL-2.0

//! Places in virtqueues, against what the specification says of the rings.

use vsock_protocol::ring::UsedPlace;

/// More than any ring and any index wraps at, twice.
const BUFFERS: u32 = 140_000;

fn places(packed_size: Option<u32>) -> impl Iterator<Item = (u32, u16)> {
    let mut place = UsedPlace::first(packed_size);
    (0..BUFFERS).map(move |buffers| {
        let now = place.to_wire();
        place.advance();
        (buffers, now)
    })
}

#[test]
fn split_rings_count_modulo_two_to_the_sixteenth() {
    for (buffers, place) in places(None) {
        assert_eq!(place, (buffers % 65536) as u16, "{buffers} buffers");
    }
}

#[test]
fn packed_rings_have_an_index_and_a_wrap_counter() {
    for size in [1, 2, 3, 100, 128, 256, 1024, 32767, 32768] {
        for (buffers, place) in places(Some(size)) {
            let rounds = buffers / size;
            // It is 1 in the first round, and changes with each.
            let wrap_counter = 1 - rounds % 2;
            let expected = (buffers % size) | (wrap_counter << 15);
            assert_eq!(u32::from(place), expected, "{buffers} buffers of {size}");
        }
    }
}

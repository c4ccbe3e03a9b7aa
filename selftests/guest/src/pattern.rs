// SPDX-License-Identifier: GPL-2.0

//! Bytes that tell where in a stream they are, so that a lost, doubled or reordered one is seen.

/// Fills `bytes` with the pattern of `seed` from `offset` on.
pub fn fill(bytes: &mut [u8], seed: u64, offset: u64) {
    for (byte, at) in bytes.iter_mut().zip(offset..) {
        *byte = byte_at(seed, at);
    }
}

/// Where `bytes` differ from the pattern of `seed` from `offset` on.
pub fn first_difference(bytes: &[u8], seed: u64, offset: u64) -> Option<u64> {
    (offset..)
        .zip(bytes)
        .find(|(at, byte)| byte_at(seed, *at) != **byte)
        .map(|(at, _)| at)
}

/// A hash of seed and position: neighbouring bytes, blocks and streams are all different.
fn byte_at(seed: u64, at: u64) -> u8 {
    let word = (seed ^ (at / 8)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((word ^ (word >> 29)) >> (8 * (at % 8) % 64)) as u8
}

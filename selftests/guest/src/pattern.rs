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

/// The `number`th message of `seed`, of 8 bytes to [`MAX_MESSAGE`]: its number first, then a pattern of its own.
pub fn message(seed: u64, number: u64) -> Vec<u8> {
    let random = (seed ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    // Half of them are short.
    let most = if random & 1 == 0 { 100 } else { MAX_MESSAGE };
    let mut message = vec![0; 8 + (random >> 1) as usize % (most - 7)];
    fill(&mut message, seed, number << 32);
    message[..8].copy_from_slice(&number.to_le_bytes());
    message
}

/// The longest message, in bytes.
pub const MAX_MESSAGE: usize = 40_000;

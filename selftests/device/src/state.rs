// SPDX-License-Identifier: GPL-2.0

//! What a device that has stopped leaves to the one that the guest moves to, by vhost-user's transfer of a device's state.
//!
//! It is what belongs to the device: the guest's CIDs, and what was on its way. The ends of the host's connections belong
//! to their programs, which carry them as [blobs](crate::blob).

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::device::Addresses;

/// The version of the format.
const VERSION: u32 = 1;

/// The longest state, in bytes.
pub const MAX_LEN: usize = 16 << 20;

/// The state of a device; packets and events are as on the wire.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    /// Set when it is written.
    pub version: u32,
    /// The addresses that packets of the guest may have which are on their way, the present ones last.
    pub addresses: Vec<Addresses>,
    /// Which migration brought the guest there.
    pub generation: u32,
    /// Events that wait for a buffer.
    pub events: Vec<ByteBuf>,
    /// Updates, in parts, and transport resets that wait for these events.
    pub updates: Vec<Vec<ByteBuf>>,
    /// Packets for the guest that no program of the host has to do with.
    pub for_guest: Vec<ByteBuf>,
    /// The guest's requests for connections that it has no answer to.
    pub requests: Vec<ByteBuf>,
}

impl DeviceState {
    /// Writes it down, in the present version.
    pub fn to_bytes(&self) -> Vec<u8> {
        let state = Self {
            version: VERSION,
            ..self.clone()
        };
        let mut bytes = Vec::new();
        ciborium::into_writer(&state, &mut bytes).expect("a Vec takes all bytes");
        bytes
    }

    /// Reads what another device has written.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        ensure!(
            bytes.len() <= MAX_LEN,
            "the device's state has more than {MAX_LEN} bytes"
        );
        let mut rest = bytes;
        let state: Self = ciborium::from_reader(&mut rest).context("this is no device's state")?;
        ensure!(rest.is_empty(), "there are {} bytes too many", rest.len());
        ensure!(
            state.version == VERSION,
            "the device's state has version {}, this device knows {VERSION}",
            state.version
        );
        ensure!(
            !state.addresses.is_empty(),
            "the device's state has no addresses"
        );
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> DeviceState {
        DeviceState {
            version: VERSION,
            addresses: vec![Addresses {
                guest_cid: 3,
                host_cid: 2,
            }],
            generation: 7,
            events: vec![ByteBuf::from([1, 2])],
            updates: vec![vec![ByteBuf::from([3]), ByteBuf::from([4])]],
            for_guest: vec![ByteBuf::from([5; 44])],
            requests: vec![ByteBuf::from([6; 44])],
        }
    }

    fn refusal(bytes: &[u8]) -> String {
        format!("{:#}", DeviceState::parse(bytes).unwrap_err())
    }

    #[test]
    fn bytes_and_back() {
        assert_eq!(DeviceState::parse(&state().to_bytes()).unwrap(), state());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let bytes = state().to_bytes();
        for len in 0..bytes.len() {
            assert!(
                refusal(&bytes[..len]).contains("no device's state"),
                "{len} bytes"
            );
        }
        let mut long = bytes.clone();
        long.push(0);
        assert!(refusal(&long).contains("1 bytes too many"));
        let at = bytes.windows(7).position(|at| at == b"version").unwrap() + 7;
        let mut newer = bytes;
        newer[at] = 9;
        assert!(refusal(&newer).contains("version 9"));
        let nowhere = DeviceState {
            addresses: Vec::new(),
            ..state()
        };
        assert!(refusal(&nowhere.to_bytes()).contains("no addresses"));
    }
}

// SPDX-License-Identifier: GPL-2.0

//! The host's end of a connection as bytes, which its program carries from the device of one host to that of another.
//!
//! A blob is CBOR. It says all that there is to know, and which version of this format it has; whoever takes one in
//! checks it, for it may come from an older device, or a hostile one.

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};

use crate::packet::{Packet, SEQ_END_FLAGS};

/// The version of the format.
const VERSION: u32 = 2;

/// The most that a program can have written without its having been sent, in bytes: what a Unix socket and a device hold.
const MAX_UNSENT: usize = 4 << 20;

/// The longest blob, in bytes.
pub const MAX_LEN: usize = MAX_UNSENT + (1 << 20);

/// The state of a connection's end at the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConnectionBlob {
    /// Set when it is written.
    pub version: u32,
    pub guest_cid: u64,
    pub host_cid: u64,
    pub guest_port: u32,
    pub host_port: u32,
    pub socket_type: u16,
    /// `SHUTDOWN_*` that the guest has said, and that it was told.
    pub guest_shutdown: u32,
    pub host_shutdown: u32,
    pub tx_cnt: u32,
    pub fwd_cnt: u32,
    pub buf_alloc: u32,
    pub peer_buf_alloc: u32,
    pub peer_fwd_cnt: u32,
    /// What the program has not got of the guest's.
    pub received: Vec<Part>,
    /// What the guest has not got of the program's.
    pub unsent: Vec<Part>,
}

/// Payload of a packet, or a part of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    #[serde(with = "serde_bytes")]
    pub payload: Vec<u8>,
    /// `SEQ_*`, where it is the last part of a message.
    pub flags: u32,
}

impl Part {
    /// The payload of a packet.
    pub fn of(packet: Packet) -> Self {
        Self {
            flags: packet.flags & SEQ_END_FLAGS,
            payload: packet.payload,
        }
    }

    /// How many bytes parts have.
    pub fn total<'a>(parts: impl IntoIterator<Item = &'a Part>) -> usize {
        parts.into_iter().map(|part| part.payload.len()).sum()
    }
}

impl ConnectionBlob {
    /// Writes it down, in the present version.
    pub fn to_bytes(&self) -> Vec<u8> {
        let blob = Self {
            version: VERSION,
            ..self.clone()
        };
        let mut bytes = Vec::new();
        ciborium::into_writer(&blob, &mut bytes).expect("a Vec takes all bytes");
        bytes
    }

    /// Reads what anybody may have written.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        ensure!(
            bytes.len() <= MAX_LEN,
            "the state has {} bytes, more than {MAX_LEN}",
            bytes.len()
        );
        let mut rest = bytes;
        let blob: Self =
            ciborium::from_reader(&mut rest).context("this is no connection's state")?;
        ensure!(rest.is_empty(), "there are {} bytes too many", rest.len());
        ensure!(
            blob.version == VERSION,
            "the state has version {}, this device knows {VERSION}",
            blob.version
        );
        let cids = [blob.guest_cid, blob.host_cid];
        ensure!(
            cids.iter()
                .all(|cid| (2..u64::from(u32::MAX)).contains(cid))
                && cids[0] != cids[1],
            "the CIDs {cids:?} are not those of a connection"
        );
        ensure!(
            matches!(blob.socket_type, 1 | 2),
            "there is no socket type {}",
            blob.socket_type
        );
        ensure!(
            blob.guest_shutdown <= 3 && blob.host_shutdown <= 3,
            "there are two directions to shut down"
        );
        let (received, unsent) = (Part::total(&blob.received), Part::total(&blob.unsent));
        ensure!(
            received <= blob.buf_alloc as usize,
            "{received} bytes were received, more than the buffer of {} has",
            blob.buf_alloc
        );
        ensure!(
            unsent <= MAX_UNSENT,
            "{unsent} bytes were not sent, more than {MAX_UNSENT}"
        );
        Ok(blob)
    }
}

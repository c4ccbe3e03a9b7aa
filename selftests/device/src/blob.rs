// SPDX-License-Identifier: GPL-2.0

//! The host's end of a connection as bytes, which its program carries from the device of one host to that of another.
//!
//! A blob is CBOR. It says all that there is to know, and which version of this format it has; whoever takes one in
//! checks it, for it may come from an older device, or a hostile one.

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};

/// The version of the format.
const VERSION: u32 = 1;

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
    /// Bytes of the guest that the program has not got.
    #[serde(with = "serde_bytes")]
    pub received: Vec<u8>,
    /// Bytes of the program that the guest has not got.
    #[serde(with = "serde_bytes")]
    pub unsent: Vec<u8>,
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
        ensure!(
            blob.received.len() <= blob.buf_alloc as usize,
            "{} bytes were received, more than the buffer of {} has",
            blob.received.len(),
            blob.buf_alloc
        );
        ensure!(
            blob.unsent.len() <= MAX_UNSENT,
            "{} bytes were not sent, more than {MAX_UNSENT}",
            blob.unsent.len()
        );
        Ok(blob)
    }
}

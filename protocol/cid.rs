// SPDX-License-Identifier: GPL-2.0

//! Context identifiers (virtio 5.10.4).

/// A context identifier (CID) that may name a communicating party: the host or a guest.
///
/// The reserved values are no [`Cid`]: 0 and 1 and `0xffff_ffff`, nor is anything wider than 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cid(u32);

/// Why a number is no [`Cid`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReservedCid(pub u64);

impl Cid {
    /// The well-known CID of the host.
    pub const HOST: Cid = Cid(2);

    const HYPERVISOR: u64 = 0;
    const LOCAL: u64 = 1;
    const ANY: u64 = u32::MAX as u64;

    /// Takes a CID off the wire, where it is 64 bits wide with the upper half reserved.
    pub fn from_wire(raw: u64) -> Result<Self, ReservedCid> {
        match raw {
            Self::HYPERVISOR | Self::LOCAL | Self::ANY => Err(ReservedCid(raw)),
            _ => u32::try_from(raw).map(Cid).map_err(|_| ReservedCid(raw)),
        }
    }

    /// Takes the device's `guest_cid` field: a CID that names a guest, so not the host's either.
    pub fn guest_from_config(raw: u64) -> Result<Self, ReservedCid> {
        match Self::from_wire(raw) {
            Ok(Self::HOST) => Err(ReservedCid(raw)),
            other => other,
        }
    }

    /// The number that sockaddr_vm and the wire have.
    pub const fn get(self) -> u32 {
        self.0
    }
}

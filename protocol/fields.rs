// SPDX-License-Identifier: GPL-2.0

//! Reading what is on the wire.

/// Little-endian fields, one after the other; 0 behind their end.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk::<N>() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }

    pub(super) fn le16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    pub(super) fn le32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub(super) fn le64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

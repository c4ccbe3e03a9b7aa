// SPDX-License-Identifier: GPL-2.0

//! CIDs: what names a party and what is reserved.

use proptest::prelude::*;
use vsock_protocol::cid::{Cid, ReservedCid};

/// `VMADDR_CID_HYPERVISOR`, `VMADDR_CID_LOCAL` and `VMADDR_CID_ANY`: reserved.
const RESERVED: [u64; 3] = [0, 1, 0xffff_ffff];
const HOST: u64 = 2;

#[test]
fn the_host_has_cid_2() {
    assert_eq!(u64::from(Cid::HOST.get()), HOST);
    assert_eq!(Cid::from_wire(HOST), Ok(Cid::HOST));
}

#[test]
fn the_host_is_no_guest() {
    assert_eq!(Cid::guest_from_config(HOST), Err(ReservedCid(HOST)));
}

#[test]
fn reserved_values_are_refused_with_any_upper_half() {
    for low in RESERVED {
        for high in [0, 1, 1 << 31, u64::from(u32::MAX)] {
            let raw = (high << 32) | low;
            assert_eq!(Cid::from_wire(raw), Err(ReservedCid(raw)));
            assert_eq!(Cid::guest_from_config(raw), Err(ReservedCid(raw)));
        }
    }
}

#[test]
fn the_first_and_the_last_guest_are_taken() {
    for raw in [3, 0xffff_fffe] {
        let cid = Cid::guest_from_config(raw).expect("a guest's CID");
        assert_eq!(u64::from(cid.get()), raw);
    }
}

proptest! {
    #[test]
    fn every_other_number_of_32_bits_is_a_guest(raw in 3..u64::from(u32::MAX)) {
        let cid = Cid::from_wire(raw);
        prop_assert_eq!(cid.map(|cid| u64::from(cid.get())), Ok(raw));
        prop_assert_eq!(Cid::guest_from_config(raw), cid);
    }

    #[test]
    fn nothing_wider_is_cut(high in 1..=u32::MAX, low in any::<u32>()) {
        let raw = (u64::from(high) << 32) | u64::from(low);
        prop_assert_eq!(Cid::from_wire(raw), Err(ReservedCid(raw)));
        prop_assert_eq!(Cid::guest_from_config(raw), Err(ReservedCid(raw)));
    }
}

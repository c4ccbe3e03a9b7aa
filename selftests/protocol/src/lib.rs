// SPDX-License-Identifier: GPL-2.0

//! The very files that the kernel module is built of, as a crate for user space.
//!
//! There is nothing else here: the tests are in `tests/`, the fuzz targets in `fuzz/`.

#![no_std]

#[path = "../../../protocol/mod.rs"]
mod protocol;

pub use protocol::*;

// SPDX-License-Identifier: GPL-2.0

//! systemd as a machine's process 1, as the toolchain root has it: what a distribution's guest runs, and no more of it than
//! udev, the journal, and units that tests start.

use std::env::consts::ARCH;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::initramfs::Initramfs;

/// It is no first boot, for which systemd would set all units up, and it starts nothing by itself.
pub const KERNEL_PARAMETERS: &str =
    "systemd.unit=sysinit.target systemd.machine_id=5a0d1c9e4b7f4f6e9c3a2b1d0e8f7a6b systemd.condition-first-boot=no";

const PROGRAMS: &[&str] = &[
    "/usr/bin/journalctl",
    "/usr/bin/systemctl",
    "/usr/bin/udevadm",
    "/usr/lib/systemd/systemd",
    "/usr/lib/systemd/systemd-executor",
    "/usr/lib/systemd/systemd-journald",
    "/usr/lib/systemd/systemd-udevd",
];

/// Libraries that newer versions of it load when they need them, and older ones are linked with.
const LIBRARIES: &[&str] = &["libkmod.so.2", "libmount.so.1"];

/// Where its units are.
const UNITS: &str = "/usr/lib/systemd/system";

/// Adds what systemd needs.
pub fn add_to(image: &mut Initramfs) -> Result<()> {
    for program in PROGRAMS {
        image.program(Path::new(program))?;
    }
    for library in LIBRARIES {
        // With those that it is linked with itself.
        image.program(Path::new(&format!("/usr/lib/{ARCH}-linux-gnu/{library}")))?;
    }
    for entry in fs::read_dir(UNITS).with_context(|| format!("reading {UNITS}"))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let wanted = name.ends_with(".target")
            || name.starts_with("systemd-journald")
            || name.starts_with("systemd-udevd");
        if wanted && path.is_file() {
            image.file(&path.to_string_lossy(), &path)?;
        }
    }
    Ok(())
}

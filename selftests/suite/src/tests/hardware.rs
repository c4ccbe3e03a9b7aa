// SPDX-License-Identifier: GPL-2.0

//! The device in all forms that virtio has: rings of all sizes, without and with what was negotiated, on every bus.

use anyhow::{Context, Result};

use vsock_device::device::{FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC};

use super::stream::exchange_over_the_bridge;
use crate::lab::{expect_eq, Lab};
use crate::machine::{Bus, Hardware};

/// Feature bit of virtio 6.
const VIRTIO_F_ACCESS_PLATFORM: u32 = 33;

fn expect_to_work_on(lab: &Lab, hardware: &Hardware) -> Result<()> {
    let guest = lab.guest_on(hardware)?;
    exchange_over_the_bridge(&guest).with_context(|| format!("with {hardware:?}"))
}

/// Rings from the smallest to the largest that QEMU has.
pub fn ring_sizes(lab: &Lab) -> Result<()> {
    for ring in [1, 2, 4, 16, 1024] {
        let hardware = Hardware {
            ring,
            ..Hardware::default()
        };
        expect_to_work_on(lab, &hardware)?;
    }
    Ok(())
}

/// Without VIRTIO_F_EVENT_IDX and VIRTIO_F_INDIRECT_DESC, which all other tests have.
pub fn without_ring_features(lab: &Lab) -> Result<()> {
    let all = lab.ring_features();
    for without in [
        FEATURE_EVENT_IDX,
        FEATURE_INDIRECT_DESC,
        FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC,
    ] {
        lab.set_ring_features(all & !without);
        expect_to_work_on(lab, &Hardware::default())?;
    }
    Ok(())
}

/// With VIRTIO_F_ACCESS_PLATFORM, where all data goes through bounce buffers.
pub fn platform_dma(lab: &Lab) -> Result<()> {
    let hardware = Hardware {
        features: 1 << VIRTIO_F_ACCESS_PLATFORM,
        device_properties: ",iommu_platform=on",
        kernel_parameters: "swiotlb=force",
        ..Hardware::default()
    };
    let guest = lab.guest_on(&hardware)?;
    let is_negotiated = guest.features()? & (1 << VIRTIO_F_ACCESS_PLATFORM) != 0;
    expect_eq("VIRTIO_F_ACCESS_PLATFORM", is_negotiated, true)?;
    exchange_over_the_bridge(&guest)
}

/// On virtio-mmio.
pub fn mmio(lab: &Lab) -> Result<()> {
    let hardware = Hardware {
        bus: Bus::Mmio,
        ..Hardware::default()
    };
    expect_to_work_on(lab, &hardware)
}

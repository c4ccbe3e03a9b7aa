// SPDX-License-Identifier: GPL-2.0

//! Allocations fail, one after the other. Needs a kernel that lets them.

use anyhow::{ensure, Context, Result};
use serde_json::json;

use super::stream::exchange_over_the_bridge;
use crate::lab::{expect_eq, Lab, GUEST_CID, LIMIT};

/// Lets those allocations fail that may wait for memory, as the driver's do, without a word in the log.
const SET_UP: &str = "cd /sys/kernel/debug
    for which in failslab fail_page_alloc; do
        echo N >$which/ignore-gfp-wait
        echo 0 >$which/verbose
    done
    echo 0 >fail_page_alloc/min-order
    cd /sys/bus/virtio/drivers/virtio_vsock_rs && basename virtio*";

const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_vsock_rs";

/// Each allocation of probe() fails once: the device stays unbound with nothing left behind, or works with less.
pub fn probe(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let device = guest.sh(SET_UP)?.trim().to_owned();
    let unbind = format!("echo {device} >{DRIVER}/unbind");
    let mut failures = 0;
    // The later ones are the buffers of the receive queue, one like the other.
    for nth in (1..100).chain((100..).step_by(23)) {
        guest.sh(&unbind)?;
        let params = json!({"path": format!("{DRIVER}/bind"), "text": device, "nth": nth});
        let (error, failed): (Option<String>, bool) =
            guest.start("write_with_fault", params).wait(LIMIT)?;
        if let Some(error) = error {
            ensure!(
                failed && (error == "ENOMEM" || error == "ENODEV"),
                "binding the device fails with {error}, with allocation {nth} made to fail: {failed}"
            );
            failures += 1;
            expect_eq("the CID without a device", guest.local_cid()?, u32::MAX)?;
            guest.sh(&format!("echo {device} >{DRIVER}/bind"))?;
        }
        expect_eq("the CID with a device", guest.local_cid()?, GUEST_CID)?;
        if !failed {
            ensure!(failures > 0, "no allocation of probe() is needed");
            return exchange_over_the_bridge(&guest)
                .with_context(|| format!("after {failures} failures of probe()"));
        }
    }
    Ok(())
}

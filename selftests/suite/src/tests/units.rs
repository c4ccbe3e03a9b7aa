// SPDX-License-Identifier: GPL-2.0

//! The udev rule and the systemd units of examples/, in a guest with systemd, udev and the journal of a distribution.

use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};

use super::recovery::Collector;
use crate::agent::sh;
use crate::lab::{expect_eq, wait_for, Guest, Lab, GUEST_CID, LIMIT};

/// A file of examples/.
fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../examples")
        .join(name)
}

/// Boots a guest with files of examples/ in place, and waits for udev and the journal.
fn boot(lab: &Lab) -> Result<Guest> {
    let rule = example("udev/90-vsock-migration.rules");
    let migrated = example("systemd/vsock-migrated@.service");
    let forwarder = example("systemd/vsock-forwarder.service");
    let guest = lab.guest_with_systemd(&[
        ("etc/udev/rules.d/90-vsock-migration.rules", &rule),
        ("etc/systemd/system/vsock-migrated@.service", &migrated),
        ("etc/systemd/system/vsock-forwarder.service", &forwarder),
        ("usr/local/bin/vsock-forwarder", &lab.env.forwarder),
    ])?;
    let mut said = String::new();
    wait_for("systemd to start udev and the journal", || {
        let script =
            "systemctl start systemd-journald-dev-log.socket systemd-journald systemd-udevd";
        let started = sh(&guest.machine.agent, script, LIMIT)?;
        said = started.output;
        Ok(started.status == 0)
    })
    .with_context(|| said)?;
    Ok(guest)
}

/// After each migration the rule starts the unit, and the unit reloads a service.
pub fn migrated_service(lab: &Lab) -> Result<()> {
    const GENERATION: &str = "/sys/bus/virtio/drivers/virtio_vsock_rs/virtio*/migration/generation";
    let guest = boot(lab)?;
    guest.sh(&format!(
        "cat >/etc/systemd/system/my-agent.service <<END
[Service]
ExecStart=/bin/sleep 100000
ExecReload=/bin/sh -c 'cat {GENERATION} >/tmp/new && mv /tmp/new /tmp/reloaded'
END
systemctl daemon-reload && systemctl start my-agent"
    ))?;
    for generation in 1..=3 {
        let cid = u64::from(GUEST_CID) + generation;
        guest.device.transport_reset(cid);
        let what = format!("the service to be reloaded after migration {generation}");
        wait_for(&what, || {
            let reloaded = guest.sh("cat /tmp/reloaded || true")?;
            Ok(reloaded.trim() == generation.to_string())
        })?;
        let unit = format!("vsock-migrated@{generation}.service");
        let result = guest.sh(&format!("systemctl show --value --property=Result {unit}"))?;
        expect_eq(&unit, result.trim(), "success")?;
    }
    Ok(())
}

/// The unit of vsock-forwarder forwards the journal, through migrations and a restart of the unit.
pub fn journal_is_forwarded(lab: &Lab) -> Result<()> {
    let guest = boot(lab)?;
    let collector = Collector::start(lab, &guest)?;
    let boot = guest.sh("cat /proc/sys/kernel/random/boot_id")?;
    guest.sh("systemctl start vsock-forwarder")?;
    for round in 1..=5 {
        match round {
            3 => drop(guest.sh("systemctl restart vsock-forwarder")?),
            _ => guest.device.transport_reset(u64::from(GUEST_CID) + round),
        }
        let message = format!("message {round} of the test");
        guest.sh(&format!("logger {message}"))?;
        wait_for(&format!("{message:?} to be stored"), || {
            // There is nothing before the agent has said hello.
            let stored = collector.stored("journal", boot.trim()).unwrap_or_default();
            Ok(String::from_utf8_lossy(&stored).contains(&message))
        })?;
    }
    let mut journal = String::new();
    let same = wait_for("what is stored to be the journal", || {
        journal = guest.sh("journalctl --boot --no-tail --output=export")?;
        Ok(collector.stored("journal", boot.trim())? == journal.as_bytes())
    });
    same.or_else(|error| {
        // To compare it with what is stored, which is beside it.
        std::fs::write(lab.file("journal"), &journal)?;
        Err(error)
    })?;
    ensure!(
        journal.contains("message 5 of the test"),
        "the journal is {journal}"
    );
    Ok(())
}

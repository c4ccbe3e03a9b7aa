// SPDX-License-Identifier: GPL-2.0

//! The udev rule and the systemd units of examples/, in a guest with systemd, udev and the journal of a distribution.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

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

/// The journal of this boot as journalctl exports it, byte for byte: not all of it is text.
fn journal(guest: &Guest) -> Result<Vec<u8>> {
    // What a script prints comes as text, in which other bytes than those of UTF-8 are replaced.
    let hex = guest.sh(
        "set -o pipefail; journalctl --boot --no-tail --output=export | xxd -p | tr -d '\\n'",
    )?;
    let byte = |digits| -> Result<u8> {
        let digits = std::str::from_utf8(digits)?;
        u8::from_str_radix(digits, 16).with_context(|| format!("xxd says {digits:?}"))
    };
    hex.as_bytes().chunks(2).map(byte).collect()
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
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
        let text = format!("message {round} of the test");
        // The last byte is none of UTF-8, so that this field is binary.
        guest.sh(&format!("logger \"$(printf '{text}\\377')\""))?;
        let message = [text.as_bytes(), b"\xff"].concat();
        wait_for(&format!("{text:?} to be stored"), || {
            // There is nothing before the agent has said hello.
            let stored = collector.stored("journal", boot.trim()).unwrap_or_default();
            Ok(contains(&stored, &message))
        })?;
    }
    let mut is = Vec::new();
    let same = wait_for("what is stored to be the journal", || {
        is = journal(&guest)?;
        Ok(collector.stored("journal", boot.trim())? == is)
    });
    same.or_else(|error| {
        // To compare it with what is stored, which is beside it.
        std::fs::write(lab.file("journal"), &is)?;
        Err(error)
    })
}

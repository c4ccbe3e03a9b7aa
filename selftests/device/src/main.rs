// SPDX-License-Identifier: GPL-2.0

//! vsock-device: virtio socket devices for guests of QEMU, which reach each other and the host's Unix sockets.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result};
use clap::Parser;
use vsock_device::device::FEATURE_RING_PACKED;
use vsock_device::update::FEATURE_CHECKPOINT;
use vsock_device::{Device, DeviceConfig, Switch, HOST_CID, READY};

/// Serves virtio socket devices over vhost-user, for QEMU's
/// `-device vhost-user-test-device-pci,virtio-id=19,num_vqs=3,vq_size=128,config_size=8`. Says `ready` when QEMU and
/// programs of the host can connect, and ends when QEMU has gone.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// A guest: its CID, the socket that QEMU connects to, and the path of the host's Unix sockets, as
    /// `cid=3,socket=PATH,uds-path=PATH`. May be given several times; the guests reach each other by CID.
    #[arg(long = "guest", required = true)]
    guests: Vec<Guest>,
    /// The host's CID.
    #[arg(long, default_value_t = HOST_CID)]
    host_cid: u64,
    /// Offer that connections go on after a migration (VIRTIO_VSOCK_F_CHECKPOINT).
    #[arg(long)]
    checkpoint: bool,
    /// Offer packed rings (VIRTIO_F_RING_PACKED), which QEMU takes with `packed=on`.
    #[arg(long)]
    packed: bool,
}

#[derive(Clone, Debug)]
struct Guest(DeviceConfig);

impl FromStr for Guest {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (mut cid, mut socket, mut uds_path) = (None, None, None);
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("cid", value)) => {
                    cid = Some(
                        value
                            .parse()
                            .with_context(|| format!("the CID {value:?} is no number"))?,
                    );
                }
                Some(("socket", value)) => socket = Some(PathBuf::from(value)),
                Some(("uds-path", value)) => uds_path = Some(PathBuf::from(value)),
                _ => anyhow::bail!("{part:?} is none of cid=, socket=, uds-path="),
            }
        }
        let mut config = DeviceConfig::new(
            socket.context("socket= is missing")?,
            cid.context("cid= is missing")?,
        );
        anyhow::ensure!(
            (3..u64::from(u32::MAX)).contains(&config.guest_cid),
            "the CID {} is reserved, guests have 3 to 4294967294",
            config.guest_cid
        );
        config.uds_path = uds_path;
        Ok(Self(config))
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let switch = Switch::new();
    let devices = arguments
        .guests
        .into_iter()
        .map(|Guest(mut config)| {
            config.host_cid = arguments.host_cid;
            if arguments.checkpoint {
                config.features |= FEATURE_CHECKPOINT;
            }
            if arguments.packed {
                config.features |= FEATURE_RING_PACKED;
            }
            Device::start(config, switch.clone())
        })
        .collect::<Result<Vec<_>>>()?;
    println!("{READY}");
    for device in devices {
        device.wait();
    }
    Ok(())
}

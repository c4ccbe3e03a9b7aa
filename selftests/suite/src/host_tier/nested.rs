// SPDX-License-Identifier: GPL-2.0

//! A host of our own, and guests on it: the stock kernel under TCG, which emulates AMD's virtualization, with KVM,
//! `vhost_vsock` and QEMU in its initramfs.
//!
//! So the tests need neither KVM nor vsock of the machine that they run on. QEMU in the host opens virtio-serial ports
//! of the host as its guest's console and agent port; a guest on the host is then as near to us as the host itself:
//!
//! ```text
//!   we --socket-- port of the host ------------------------------------------- agent in the host
//!   we --socket-- port of the host -- QEMU in the host -- port of the guest -- agent in the guest
//!   log file ---- port of the host -- QEMU in the host -- ttyS0 of the guest
//! ```

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::agent::{sh_ok, Agent};
use crate::initramfs::{output_of, Initramfs};
use crate::machine::{find_program, Env, Kind, Machine, Port, BOOT_LIMIT};
use crate::Driver;

/// Has the guest's kernel answer an NMI by a panic that shows the stacks of all tasks (1) and processors (0x40).
const DUMP_ON_NMI: &str = "unknown_nmi_panic panic_print=0x41";

/// How long that takes.
const DUMP_SECONDS: u32 = 30;

/// The host and the guest as QEMU's user network numbers them.
pub const HOST_ADDRESS: &str = "10.0.2.2";
const GUEST_ADDRESS: &str = "10.0.2.15";

/// A guest to run on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestSpec {
    /// Its CID; no two guests on the host have the same.
    pub cid: u32,
    /// The driver of its vsock device.
    pub driver: Driver,
}

impl GuestSpec {
    fn agent_port(&self) -> String {
        format!("guest{}.agent", self.cid)
    }

    fn console_port(&self) -> String {
        format!("guest{}.console", self.cid)
    }

    fn initramfs(&self) -> String {
        format!("guest{}.cpio", self.cid)
    }

    /// The guest's TCP port that QEMU's user network gives the host, under the same number.
    pub fn forwarded_port(&self) -> u32 {
        10_000 + self.cid
    }

    /// What its QEMU says, a file of the host.
    fn qemu_log(&self) -> String {
        format!("/tmp/qemu{}.log", self.cid)
    }

    fn monitor_port(&self) -> u32 {
        30_000 + self.cid
    }

    /// A TCP port of the host that is this guest's to connect to.
    pub fn host_port(&self) -> u32 {
        20_000 + self.cid
    }
}

/// A guest that runs on the host.
pub struct NestedGuest {
    pub spec: GuestSpec,
    pub agent: Agent,
    pub console: PathBuf,
}

/// The host, running.
pub struct NestedHost {
    pub machine: Machine,
}

impl NestedHost {
    /// Boots a host that can run `guests`. Images, logs and sockets go to `dir`.
    pub fn boot(env: &Env, guests: &[GuestSpec], dir: &Path) -> Result<Self> {
        let initramfs = dir.join("host.cpio");
        build_host(env, guests, dir)?
            .write(&initramfs)
            .context("writing the initramfs of the nested host")?;
        let ports = guests
            .iter()
            .flat_map(|guest| {
                [
                    Port::Socket(guest.agent_port()),
                    Port::File(guest.console_port()),
                ]
            })
            .collect::<Vec<_>>();
        let machine = Machine::boot(env, Kind::NestedHost, "host", &initramfs, dir, &ports)?;
        sh_ok(
            &machine.agent,
            "ifconfig lo 127.0.0.1 up && test -c /dev/kvm && test -c /dev/vhost-vsock",
            BOOT_LIMIT,
        )
        .context("the nested host has no KVM or no vhost-vsock")?;
        Ok(Self { machine })
    }

    /// Boots one of the guests and waits for its agent and its driver.
    pub fn start_guest(&mut self, spec: GuestSpec) -> Result<NestedGuest> {
        let what = format!("guest {} ({:?})", spec.cid, spec.driver);
        let qemu_log = spec.qemu_log();
        let script = format!(
            r#"
            port() {{
                for d in /sys/class/virtio-ports/*; do
                    [ "$(cat $d/name)" = "$1" ] && echo "/dev/${{d##*/}}" && return
                done
                echo "the host has no virtio port $1" >&2
                return 1
            }}
            agent=$(port {agent}) && console=$(port {console}) || exit 1
            setsid qemu-system-x86_64 -accel kvm -cpu host -smp 2 -m 512 \
                -nodefaults -no-user-config -display none -no-reboot -no-shutdown \
                -kernel /vmlinuz -initrd /{initramfs} -append "console=ttyS0 panic=-1 {DUMP_ON_NMI}" \
                -chardev serial,id=console,path=$console -serial chardev:console \
                -monitor tcp:127.0.0.1:{monitor},server=on,wait=off \
                -device virtio-serial-pci \
                -chardev serial,id=agent,path=$agent -device virtserialport,chardev=agent,name={agent_name} \
                -netdev user,id=net,hostfwd=tcp:127.0.0.1:{forwarded}-:{forwarded} \
                -device virtio-net-pci,netdev=net,romfile= \
                -device vhost-vsock-pci,guest-cid={cid} \
                >{qemu_log} 2>&1 </dev/null &
            "#,
            agent = spec.agent_port(),
            console = spec.console_port(),
            initramfs = spec.initramfs(),
            agent_name = Agent::PORT_NAME,
            forwarded = spec.forwarded_port(),
            cid = spec.cid,
            monitor = spec.monitor_port(),
        );
        let agent_socket = self.machine.port_socket(&spec.agent_port());
        let agent = Agent::connect(&agent_socket, BOOT_LIMIT)
            .with_context(|| format!("connecting to the agent port of {what}"))?;
        sh_ok(&self.machine.agent, &script, BOOT_LIMIT)
            .with_context(|| format!("starting QEMU for {what} in the nested host"))?;
        let console = self.machine.port_file(&spec.console_port());
        if let Err(error) = agent.wait_ready(false, BOOT_LIMIT) {
            let said = sh_ok(&self.machine.agent, &format!("cat {qemu_log}"), BOOT_LIMIT)
                .unwrap_or_default();
            return Err(error).context(format!(
                "{what} did not boot; QEMU in the nested host says: {said:?}; its console is {}",
                console.display()
            ));
        }
        let guest = NestedGuest {
            spec,
            agent,
            console,
        };
        sh_ok(
            &guest.agent,
            &format!("ifconfig lo 127.0.0.1 up && ifconfig eth0 {GUEST_ADDRESS} netmask 255.255.255.0 up"),
            BOOT_LIMIT,
        )
        .with_context(|| format!("the network of {what}"))?;
        Ok(guest)
    }
}

impl NestedHost {
    /// Makes the kernel of a guest that does not answer show on its console what it is at; gives what its virtual
    /// processors are at.
    pub fn dump(&mut self, guest: &GuestSpec) -> Result<String> {
        let script = format!(
            "(echo 'info status'; echo 'info registers -a'; echo nmi; sleep {DUMP_SECONDS}) | nc 127.0.0.1 {}; cat {}; ps | grep qemu; dmesg | tail -n 5",
            guest.monitor_port(),
            guest.qemu_log(),
        );
        sh_ok(&self.machine.agent, &script, BOOT_LIMIT)
    }
}

/// What the host needs in its initramfs.
fn build_host<'a>(env: &'a Env, guests: &[GuestSpec], dir: &Path) -> Result<Initramfs<'a>> {
    let mut host = Initramfs::new(env)?;
    host.modules(&["kvm-amd", "vhost_vsock", "vsock_diag"])?;
    add_upstream_tests(env, &mut host)?;
    add_qemu(&mut host)?;
    host.file("vmlinuz", &env.vmlinuz)?;
    for guest in guests {
        let image = dir.join(guest.initramfs());
        build_guest(env, guest.driver)?
            .write(&image)
            .with_context(|| format!("writing the initramfs of guest {}", guest.cid))?;
        host.file(&guest.initramfs(), &image)?;
    }
    Ok(host)
}

fn build_guest(env: &Env, driver: Driver) -> Result<Initramfs<'_>> {
    let mut guest = Initramfs::new(env)?;
    guest.modules(&["virtio_net"])?;
    guest.driver(driver)?;
    guest.modules(&["vsock_diag"])?;
    add_upstream_tests(env, &mut guest)?;
    Ok(guest)
}

fn add_upstream_tests(env: &Env, image: &mut Initramfs) -> Result<()> {
    for program in [
        "vsock_test",
        "vsock_perf",
        "vsock_diag_test",
        "vsock_uring_test",
    ] {
        image.file(&format!("bin/{program}"), &env.upstream.join(program))?;
    }
    Ok(())
}

/// QEMU as it is installed here, the libraries that it is linked with, and the firmware of a PC.
fn add_qemu(image: &mut Initramfs) -> Result<()> {
    let qemu = find_program("qemu-system-x86_64")?;
    image.program(&qemu)?;
    let folders = output_of(Command::new(&qemu).args(["-L", "help"]))?;
    for firmware in ["bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin"] {
        let found = folders
            .lines()
            .map(|folder| Path::new(folder).join(firmware))
            .find(|path| path.exists())
            .with_context(|| {
                format!("QEMU's firmware {firmware} is in none of its folders: {folders}")
            })?;
        image.file(&format!("usr/share/qemu/{firmware}"), &found)?;
    }
    Ok(())
}

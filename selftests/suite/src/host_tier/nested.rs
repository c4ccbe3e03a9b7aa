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
//!   we --socket-- port of the host -- monitor of QEMU in the host
//! ```
//!
//! A guest is migrated from one QEMU to another on the same host. A port of the host can be opened once at a time, so
//! neither of them opens the guest's: a shell holds them open for as long as the guest lives, starts QEMU after QEMU, and
//! each has the descriptors from it. What the guest writes is then one stream, whichever QEMU writes it.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{emulation_failure, without_hang};
use crate::agent::{sh_ok, Agent};
use crate::initramfs::{output_of, Initramfs};
use crate::lab::{wait_for, LIMIT};
use crate::machine::{
    faults, find_program, read_log, Env, Kind, Machine, Port, BOOT_LIMIT, FIND_PORT,
};
use crate::qmp::{MigrationFigures, Monitor};
use crate::Driver;

/// Has the guest's kernel answer an NMI by a panic that shows the stacks of all tasks (1) and processors (0x40).
const DUMP_ON_NMI: &str = "unknown_nmi_panic panic_print=0x41";

/// How long that takes.
const DUMP_TIME: Duration = Duration::from_secs(30);

/// The host and the guest as QEMU's user network numbers them.
pub const HOST_ADDRESS: &str = "10.0.2.2";
const GUEST_ADDRESS: &str = "10.0.2.15";

/// Where a QEMU in the host waits for the state of a guest that is migrated to it.
const MIGRATION: &str = "unix:/tmp/migration";

/// A guest to run on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestSpec {
    /// Its CID when it boots; no two guests on the host have the same.
    pub cid: u32,
    /// The CID that it has where it is migrated to, if it is; from there it is migrated back.
    pub other_cid: Option<u32>,
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

    /// A FIFO of the host: the shell that has the guest's ports open runs what is written to it.
    fn shell(&self) -> String {
        format!("/tmp/guest{}.shell", self.cid)
    }

    fn cids(&self) -> impl Iterator<Item = u32> {
        [self.cid].into_iter().chain(self.other_cid)
    }

    /// The guest's TCP port that QEMU's user network gives the host, under the same number.
    pub fn forwarded_port(&self) -> u32 {
        forwarded_port(self.cid)
    }

    /// A TCP port of the host that is this guest's to connect to.
    pub fn host_port(&self) -> u32 {
        20_000 + self.cid
    }
}

fn forwarded_port(cid: u32) -> u32 {
    10_000 + cid
}

/// The port of the host that is the monitor of the QEMU whose guest has this CID.
fn monitor_port(cid: u32) -> String {
    format!("qemu{cid}.monitor")
}

/// What that QEMU says, a file of the host.
fn qemu_log(cid: u32) -> String {
    format!("/tmp/qemu{cid}.log")
}

/// The status that it ended with, a file of the host.
fn qemu_status(cid: u32) -> String {
    format!("/tmp/qemu{cid}.status")
}

/// QEMU that runs a guest, or waits for one.
struct Qemu {
    cid: u32,
    monitor: Monitor,
}

/// A guest that runs on the host.
pub struct NestedGuest {
    pub spec: GuestSpec,
    pub agent: Agent,
    pub console: PathBuf,
    qemu: Qemu,
}

impl NestedGuest {
    /// The CID that its device has now.
    pub fn cid(&self) -> u32 {
        self.qemu.cid
    }
}

/// The host, running.
pub struct NestedHost {
    pub machine: Machine,
    /// Our ends of the monitors' ports, by CID. They stay open: a QEMU that opens such a port and finds nobody at the other
    /// end takes it for closed for good.
    monitors: BTreeMap<u32, UnixStream>,
}

impl NestedHost {
    /// Boots a host that can run `guests`. Images, logs and sockets go to `dir`.
    pub fn boot(env: &Env, guests: &[GuestSpec], dir: &Path) -> Result<Self> {
        let initramfs = dir.join("host.cpio");
        build_host(env, guests, dir)?
            .write(&initramfs)
            .context("writing the initramfs of the nested host")?;
        let mut ports = Vec::new();
        for guest in guests {
            ports.push(Port::Socket(guest.agent_port()));
            ports.push(Port::File(guest.console_port()));
            ports.extend(guest.cids().map(|cid| Port::Socket(monitor_port(cid))));
        }
        let machine = Machine::boot(
            env,
            Kind::NestedHost { disk: None },
            "host",
            &initramfs,
            dir,
            &ports,
        )?;
        sh_ok(
            &machine.agent,
            "ifconfig lo 127.0.0.1 up && test -c /dev/kvm && test -c /dev/vhost-vsock",
            BOOT_LIMIT,
        )
        .context("the nested host has no KVM or no vhost-vsock")?;
        let mut monitors = BTreeMap::new();
        for cid in guests.iter().flat_map(GuestSpec::cids) {
            let socket = machine.port_socket(&monitor_port(cid));
            let monitor = UnixStream::connect(&socket)
                .with_context(|| format!("connecting to {}", socket.display()))?;
            monitors.insert(cid, monitor);
        }
        Ok(Self { machine, monitors })
    }

    /// Boots one of the guests and waits for its agent and its driver.
    pub fn start_guest(&mut self, spec: GuestSpec) -> Result<NestedGuest> {
        let what = format!("guest {} ({:?})", spec.cid, spec.driver);
        let agent_socket = self.machine.port_socket(&spec.agent_port());
        let agent = Agent::attach(&agent_socket, BOOT_LIMIT, || Ok(()))
            .with_context(|| format!("connecting to the agent port of {what}"))?;
        let hold_ports = format!(
            "{FIND_PORT}
            agent=$(port {agent}) && console=$(port {console}) && mkfifo {shell} || exit 1
            setsid sh <>{shell} 3<>$agent 4<>$console >/dev/null 2>&1 &",
            agent = spec.agent_port(),
            console = spec.console_port(),
            shell = spec.shell(),
        );
        sh_ok(&self.machine.agent, &hold_ports, BOOT_LIMIT)
            .with_context(|| format!("opening the ports of {what}"))?;
        let qemu = self
            .start_qemu(&spec, spec.cid, "")
            .with_context(|| format!("starting QEMU for {what} in the nested host"))?;
        let mut guest = NestedGuest {
            console: self.machine.port_file(&spec.console_port()),
            spec,
            agent,
            qemu,
        };
        if let Err(error) = guest.agent.wait_ready(false, BOOT_LIMIT) {
            let said = self.qemu_says(guest.cid());
            // What it gives is for people; without it the console shows no trace.
            let _ = self.dump(&mut guest);
            let log = read_log(&guest.console);
            let bad_boot =
                emulation_failure(&said, &log).filter(|_| faults(without_hang(&log)).is_empty());
            let error = bad_boot.map_or(error, Into::into);
            return Err(error).context(format!(
                "{what} did not boot; QEMU in the nested host says: {said:?}; its console is {}",
                guest.console.display()
            ));
        }
        sh_ok(
            &guest.agent,
            &format!("ifconfig lo 127.0.0.1 up && ifconfig eth0 {GUEST_ADDRESS} netmask 255.255.255.0 up"),
            BOOT_LIMIT,
        )
        .with_context(|| format!("the network of {what}"))?;
        Ok(guest)
    }

    /// Starts QEMU for a guest, whose CID will be `cid`.
    fn start_qemu(&self, spec: &GuestSpec, cid: u32, arguments: &str) -> Result<Qemu> {
        // What comes after the first line is for the shell that has the guest's ports: as descriptors 3 and 4.
        let script = format!(
            r#"rm -f {status} && cat >{shell} <<'END'
            {FIND_PORT}
            (qemu-system-x86_64 -accel kvm -cpu host -smp 1 -m 512 \
                -nodefaults -no-user-config -display none -no-reboot -no-shutdown \
                -kernel /vmlinuz -initrd /{initramfs} -append "console=ttyS0 panic=-1 {DUMP_ON_NMI}" \
                -add-fd fd=3,set=1 -add-fd fd=4,set=2 \
                -chardev serial,id=console,path=/dev/fdset/2 -serial chardev:console \
                -chardev serial,id=monitor,path=$(port {monitor}) -qmp chardev:monitor \
                -device virtio-serial-pci \
                -chardev serial,id=agent,path=/dev/fdset/1 -device virtserialport,chardev=agent,name={agent_name} \
                -netdev user,id=net,hostfwd=tcp:127.0.0.1:{forwarded}-:{forwarded} \
                -device virtio-net-pci,netdev=net,romfile= \
                -device vhost-vsock-pci,guest-cid={cid} {arguments}
            echo $? >{status}) >{log} 2>&1 </dev/null &
END"#,
            status = qemu_status(cid),
            shell = spec.shell(),
            initramfs = spec.initramfs(),
            monitor = monitor_port(cid),
            agent_name = Agent::PORT_NAME,
            forwarded = forwarded_port(cid),
            log = qemu_log(cid),
        );
        sh_ok(&self.machine.agent, &script, BOOT_LIMIT)?;
        let port = self.monitors.get(&cid).context("it has no such CID")?;
        let monitor = Monitor::greet(port.try_clone()?)
            .with_context(|| format!("QEMU says: {:?}", self.qemu_says(cid)))?;
        Ok(Qemu { cid, monitor })
    }

    fn qemu_says(&self, cid: u32) -> String {
        let script = format!("cat {}", qemu_log(cid));
        sh_ok(&self.machine.agent, &script, BOOT_LIMIT).unwrap_or_default()
    }

    /// Migrates a guest, while it runs, to another QEMU, where it has its other CID.
    pub fn migrate(&mut self, guest: &mut NestedGuest) -> Result<MigrationFigures> {
        let here = guest.cid();
        let mut cids = guest.spec.cids();
        let there = cids
            .find(|cid| *cid != here)
            .context("the guest has no other CID")?;
        let mut destination = self.start_qemu(&guest.spec, there, "-incoming defer")?;
        destination.monitor.wait_for_migration(MIGRATION)?;
        // Whatever the agent's port has taken by now the agent has read; the QEMU that stops would take more for itself.
        guest.agent.wait_ready(false, LIMIT)?;
        let figures = guest
            .qemu
            .monitor
            .migrate(MIGRATION)
            .with_context(|| format!("the destination says: {:?}", self.qemu_says(there)))?;
        guest.qemu.monitor.quit()?;
        wait_for("QEMU to end after the migration", || {
            let script = format!("cat {} 2>/dev/null; true", qemu_status(here));
            Ok(!sh_ok(&self.machine.agent, &script, LIMIT)?.is_empty())
        })?;
        guest.qemu = destination;
        Ok(figures)
    }

    /// Makes the kernel of a guest that does not answer show on its console what it is at; gives what its virtual
    /// processors are at.
    pub fn dump(&mut self, guest: &mut NestedGuest) -> Result<String> {
        let monitor = &mut guest.qemu.monitor;
        let mut said = monitor.human("info status")? + &monitor.human("info registers -a")?;
        monitor.human("nmi")?;
        std::thread::sleep(DUMP_TIME);
        let script = format!(
            "cat {}; ps | grep qemu; dmesg | tail -n 5",
            qemu_log(guest.cid())
        );
        said += &sh_ok(&self.machine.agent, &script, BOOT_LIMIT)?;
        Ok(said)
    }
}

/// What the host needs in its initramfs.
fn build_host<'a>(env: &'a Env, guests: &[GuestSpec], dir: &Path) -> Result<Initramfs<'a>> {
    let mut host = Initramfs::new(env)?;
    host.modules(&["kvm-amd", "vhost_vsock", "vsock_diag", "vsock_loopback"])?;
    host.upstream_programs()?;
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
    guest.guest_for_upstream(driver)?;
    Ok(guest)
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

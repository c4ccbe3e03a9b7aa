// SPDX-License-Identifier: GPL-2.0

//! What a test of the device tier works with: guests, their devices in this process, and a peer that the test plays itself.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::ops::Deref;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{anyhow, bail, ensure, Context, Result};
use serde_json::json;
use vsock_device::bridge;
use vsock_device::device::{FEATURE_RING_PACKED, RING_FEATURES};
use vsock_device::packet::{SEQ_EOM, TYPE_SEQPACKET, TYPE_STREAM};
use vsock_device::update::FEATURE_CHECKPOINT;
use vsock_device::{Device, DeviceConfig, Op, Packet, Relay, Switch, HOST_CID, READY};

use crate::agent::{sh_ok, Agent, CallError};
use crate::initramfs::Initramfs;
use crate::machine::{boot_anew_if_bad, Env, Hardware, Kind, Machine, Plug};
use crate::sockets::Completion;
pub use crate::sockets::{Call, SEQPACKET, STREAM};
use crate::systemd;
use crate::Driver;

/// How long anything may take that takes moments when nothing else runs.
pub const LIMIT: Duration = Duration::from_secs(120);

/// The same of thousands of things.
pub const BULK_LIMIT: Duration = Duration::from_secs(600);

/// How many answers may wait for the device, by Documentation/data-path.md.
pub const WAITING_ANSWERS: i64 = 128;

/// How many credit updates of a connection may wait for the device, by the same.
pub const WAITING_UPDATES: u32 = 64;

/// The limit of connect() where no answer comes.
pub const NO_ANSWER: Duration = Duration::from_secs(2);

/// How long a test looks whether something happens that should not.
pub const A_WHILE: Duration = Duration::from_millis(700);

/// `VMADDR_CID_ANY`.
pub const CID_ANY: u32 = u32::MAX;

/// `VMADDR_PORT_ANY`: `bind()` takes one that is free.
pub const PORT_ANY: u32 = u32::MAX;

/// The CID of a test's first guest; the others follow.
pub const GUEST_CID: u32 = 3;

/// A port of no special meaning.
pub const PORT: u32 = 1234;

/// The receive buffer of a peer that a test plays, in bytes.
const PEER_BUF_ALLOC: u32 = 256 * 1024;

/// How much of a connection's state is written at once, in bytes.
const STATE_PIECE: usize = 32 * 1024;

/// What one test gets.
pub struct Lab<'a> {
    pub env: &'a Env,
    /// The driver under test.
    pub driver: Driver,
    dir: PathBuf,
    switch: Arc<Switch>,
    machines: Mutex<Vec<Arc<Machine>>>,
    /// Boots that were begun. Files have names of their own in each: those of machines of before are still there, and a
    /// device that ends removes its socket.
    boots: AtomicU32,
    /// What the rings of devices can do.
    ring_features: AtomicU64,
    destinations: AtomicU32,
}

impl<'a> Lab<'a> {
    pub fn new(env: &'a Env, driver: Driver, test: &str) -> Result<Self> {
        Ok(Self {
            env,
            driver,
            dir: env.run_dir(&test.replace("::", "."))?,
            switch: Switch::new(),
            machines: Mutex::default(),
            boots: AtomicU32::new(0),
            ring_features: AtomicU64::new(RING_FEATURES),
            destinations: AtomicU32::new(1),
        })
    }

    /// What the rings of devices can do.
    pub fn ring_features(&self) -> u64 {
        self.ring_features.load(Ordering::Relaxed)
    }

    /// Changes what the rings of all devices can do that are made from now on.
    pub fn set_ring_features(&self, features: u64) {
        self.ring_features.store(features, Ordering::Relaxed);
    }

    /// Removes the files of a test that has passed.
    pub fn remove_files(&self) {
        // What stays is in nobody's way.
        let _ = std::fs::remove_dir_all(&self.dir);
    }

    /// The machines that were booted.
    pub fn machines(&self) -> Vec<Arc<Machine>> {
        crate::lock(&self.machines).clone()
    }

    /// The consoles of the machines that were booted.
    pub fn consoles(&self) -> Vec<PathBuf> {
        let machines = self.machines();
        machines
            .iter()
            .map(|machine| machine.console.clone())
            .collect()
    }

    /// That no machine has ended by itself, and that the kernels of those that are on have watched to the end. Asks them for
    /// memory that nobody has a pointer to, where they know of it.
    pub fn check_machines(&self) -> Result<()> {
        const LOCKDEP: &str =
            "[ ! -e /proc/lockdep_stats ] || grep debug_locks /proc/lockdep_stats";
        // Memory has to be so old before it counts, and checksums have to stay the same for a while.
        const LEAKS: &str = "set -e; cd /sys/kernel/debug; [ -e kmemleak ] || exit 0
            sleep 6; echo scan >kmemleak; sleep 1; echo scan >kmemleak; cat kmemleak";
        for machine in self.machines() {
            if machine.expect_on()? {
                let lockdep = sh_ok(&machine.agent, LOCKDEP, LIMIT)?;
                let is_off = lockdep.split_whitespace().last() == Some("0");
                ensure!(!is_off, "lockdep has switched itself off");
                // Scanning is refused where kmemleak has.
                let leaks = sh_ok(&machine.agent, LEAKS, LIMIT)?;
                ensure!(leaks.is_empty(), "kmemleak has found:\n{leaks}");
            }
        }
        Ok(())
    }

    /// Switches the machines off, of which the test needs no more; otherwise they are on until it has ended.
    pub fn end_machines(&self) -> Result<()> {
        self.check_machines()?;
        for machine in self.machines() {
            machine.switch_off();
        }
        Ok(())
    }

    /// Boots a guest with the driver under test.
    pub fn guest(&self) -> Result<Guest> {
        self.guest_with(GUEST_CID, Some(self.driver), &[])
    }

    /// Boots a guest with the driver under test and other modules of the kernel.
    pub fn guest_with_modules(&self, modules: &[&str]) -> Result<Guest> {
        self.boot(GUEST_CID, &Hardware::default(), |initramfs| {
            initramfs.driver(self.driver)?;
            initramfs.modules(modules)
        })
    }

    /// Boots a guest with the driver under test, upstream's programs, and a network to another such guest.
    pub fn guest_for_upstream(&self, cid: u32, plug: Plug) -> Result<Guest> {
        let hardware = Hardware {
            network: Some(plug),
            ..Hardware::default()
        };
        let guest = self.boot(cid, &hardware, |initramfs| {
            initramfs.guest_for_upstream(self.driver)
        })?;
        let address = network_address(cid);
        guest.sh(&format!(
            "ifconfig lo 127.0.0.1 up && ifconfig eth0 {address} netmask 255.255.255.0 up"
        ))?;
        Ok(guest)
    }

    /// Boots a guest with the driver under test and upstream's programs, whose clock counts instructions.
    pub fn guest_that_counts_instructions(&self) -> Result<Guest> {
        let hardware = Hardware {
            counts_instructions: true,
            ..Hardware::default()
        };
        self.boot(GUEST_CID, &hardware, |initramfs| {
            initramfs.driver(self.driver)?;
            initramfs.upstream_programs()
        })
    }

    /// Boots a guest with the driver under test on special hardware.
    pub fn guest_on(&self, hardware: &Hardware) -> Result<Guest> {
        self.boot(GUEST_CID, hardware, |initramfs| {
            if hardware.disk.is_some() {
                initramfs.hardware(&["virtio_blk"])?;
            }
            initramfs.driver(self.driver)
        })
    }

    /// Boots a guest with the driver under test and a program in `/bin`.
    pub fn guest_with_program(&self, cid: u32, program: &Path) -> Result<Guest> {
        self.boot(cid, &Hardware::default(), |initramfs| {
            initramfs.driver(self.driver)?;
            initramfs.program_in_bin(program)
        })
    }

    /// Boots a guest with the driver under test whose process 1 is systemd, with files of the source tree in its folders.
    pub fn guest_with_systemd(&self, files: &[(&str, &Path)]) -> Result<Guest> {
        let hardware = Hardware {
            kernel_parameters: systemd::KERNEL_PARAMETERS,
            ..Hardware::default()
        };
        self.boot(GUEST_CID, &hardware, |initramfs| {
            initramfs.driver(self.driver)?;
            systemd::add_to(initramfs)?;
            let mut files = files.iter();
            files.try_for_each(|(name, source)| initramfs.file(name, source))
        })
    }

    /// The path of a file of the test's own.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Starts one more device, which no machine has yet; returns it with its socket.
    pub fn spare_device(&self, cid: u32) -> Result<(Device, DeviceConfig)> {
        let config = self.device_config(cid, &format!("spare{cid}"));
        let device = Device::start(config.clone(), self.switch.clone())?;
        Ok((device, config))
    }

    /// Boots a guest that can move to other devices.
    pub fn moving_guest(&self) -> Result<MovingGuest> {
        self.boot_moving(FEATURE_CHECKPOINT, |_| Ok(()))
    }

    /// The same, whose devices did not offer that its connections go on.
    pub fn moving_guest_without_checkpoint(&self) -> Result<MovingGuest> {
        self.boot_moving(0, |_| Ok(()))
    }

    /// Boots one with a program in `/bin`.
    pub fn moving_guest_with_program(&self, program: &Path) -> Result<MovingGuest> {
        self.boot_moving(FEATURE_CHECKPOINT, |initramfs| {
            initramfs.program_in_bin(program)
        })
    }

    fn boot_moving(
        &self,
        features: u64,
        add: impl Fn(&mut Initramfs) -> Result<()>,
    ) -> Result<MovingGuest> {
        let hardware = Hardware {
            features,
            ..Hardware::default()
        };
        let mut relay = None;
        let guest = self.boot_behind(
            GUEST_CID,
            &hardware,
            &mut |device| {
                let socket = device.with_extension("relay");
                // That of a boot that was given up goes first, with its socket.
                drop(relay.take());
                relay = Some(Relay::start(&socket, device)?);
                Ok(socket)
            },
            |initramfs| {
                initramfs.driver(self.driver)?;
                add(initramfs)
            },
        )?;
        Ok(MovingGuest {
            guest,
            relay: relay.context("the guest has no relay")?,
            destination: None,
        })
    }

    /// Boots a guest that stays where it is while others move.
    pub fn staying_guest(&self, cid: u32) -> Result<Guest> {
        let hardware = Hardware {
            features: FEATURE_CHECKPOINT,
            ..Hardware::default()
        };
        self.boot(cid, &hardware, |initramfs| initramfs.driver(self.driver))
    }

    /// Makes the device that a guest moves to without leaving the other guests: in this process, as they are.
    pub fn near_destination(&self, cid: u32) -> Result<Destination> {
        let number = self.destinations.fetch_add(1, Ordering::Relaxed);
        let mut config = self.device_config(cid, &format!("destination{number}"));
        config.features |= FEATURE_CHECKPOINT;
        let device = Device::start(config.clone(), self.switch.clone())?;
        Ok(Destination {
            cid,
            socket: config.socket,
            uds: config.uds_path.context("it has a path")?,
            runs: Runs::Here { _device: device },
        })
    }

    /// Starts the device that a guest moves to, as a process: with another CID of the guest, perhaps another one of the
    /// host, and other Unix sockets.
    pub fn destination(&self, cid: u32, host_cid: u64) -> Result<Destination> {
        let number = self.destinations.fetch_add(1, Ordering::Relaxed);
        let config = self.device_config(cid, &format!("destination{number}"));
        let uds = config.uds_path.context("it has a path")?;
        let mut guest = OsString::from(format!("cid={cid},socket="));
        guest.push(&config.socket);
        guest.push(",uds-path=");
        guest.push(&uds);
        let is_packed = self.ring_features() & FEATURE_RING_PACKED != 0;
        let mut process = Command::new(&self.env.device)
            .args(is_packed.then_some("--packed"))
            .arg("--checkpoint")
            .arg("--host-cid")
            .arg(host_cid.to_string())
            .arg("--guest")
            .arg(guest)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting vsock-device")?;
        let stdout = process.stdout.take().context("it has an output")?;
        let mut said = String::new();
        BufReader::new(stdout).read_line(&mut said)?;
        let destination = Destination {
            cid,
            socket: config.socket,
            uds,
            runs: Runs::InProcess(process),
        };
        ensure!(said.trim_end() == READY, "vsock-device says {said:?}");
        Ok(destination)
    }

    fn device_config(&self, cid: u32, name: &str) -> DeviceConfig {
        let socket = self.dir.join(format!("{name}.vhost"));
        let mut config = DeviceConfig::new(socket, u64::from(cid));
        config.uds_path = Some(self.dir.join(format!("{name}.uds")));
        config.features &= !RING_FEATURES;
        config.features |= self.ring_features();
        config
    }

    /// Boots a guest with a driver, or none; `extra` drivers are in `/extra`, not loaded.
    pub fn guest_with(&self, cid: u32, driver: Option<Driver>, extra: &[Driver]) -> Result<Guest> {
        self.boot(cid, &Hardware::default(), |initramfs| {
            if let Some(driver) = driver {
                initramfs.driver(driver)?;
            }
            extra
                .iter()
                .try_for_each(|driver| initramfs.extra_driver(*driver))
        })
    }

    /// Boots a guest from an initramfs that `fill` has put something into.
    fn boot(
        &self,
        cid: u32,
        hardware: &Hardware,
        fill: impl Fn(&mut Initramfs) -> Result<()>,
    ) -> Result<Guest> {
        self.boot_behind(cid, hardware, &mut |device| Ok(device.to_owned()), fill)
    }

    /// The same, with something between QEMU and the device: `stand_between` gets the device's socket and returns
    /// QEMU's.
    fn boot_behind(
        &self,
        cid: u32,
        hardware: &Hardware,
        stand_between: &mut dyn FnMut(&Path) -> Result<PathBuf>,
        fill: impl Fn(&mut Initramfs) -> Result<()>,
    ) -> Result<Guest> {
        boot_anew_if_bad(|| self.boot_once(cid, hardware, stand_between, &fill))
    }

    fn boot_once(
        &self,
        cid: u32,
        hardware: &Hardware,
        stand_between: &mut dyn FnMut(&Path) -> Result<PathBuf>,
        fill: &impl Fn(&mut Initramfs) -> Result<()>,
    ) -> Result<Guest> {
        let name = match self.boots.fetch_add(1, Ordering::Relaxed) {
            0 => format!("guest{cid}"),
            before => format!("guest{cid}.{before}"),
        };
        let mut config = self.device_config(cid, &name);
        config.features |= hardware.features;
        config.features &= !hardware.without_features;
        let device = Device::start(config.clone(), self.switch.clone())?;
        let socket = stand_between(&config.socket)?;
        let mut initramfs = Initramfs::new(self.env)?;
        fill(&mut initramfs)?;
        let has_driver = initramfs.has_driver();
        let image = self.dir.join(format!("{name}.cpio"));
        initramfs.write(&image)?;
        let machine = Arc::new(Machine::boot(
            self.env,
            Kind::Guest {
                device: &socket,
                hardware,
            },
            &name,
            &image,
            &self.dir,
            &[],
        )?);
        crate::lock(&self.machines).push(machine.clone());
        // It is large, and not needed any more.
        let _ = std::fs::remove_file(image);
        let guest = Guest {
            machine,
            device,
            uds: config.uds_path.unwrap_or_default(),
            cid,
        };
        if has_driver {
            guest.device.wait_ready(LIMIT)?;
            let rings = RING_FEATURES | FEATURE_RING_PACKED;
            expect_eq(
                "features of the rings",
                guest.features()? & rings,
                config.features & rings,
            )?;
        }
        Ok(guest)
    }
}

/// The IPv4 address of a guest on the network between two.
pub fn network_address(cid: u32) -> String {
    format!("192.168.0.{cid}")
}

/// A guest that runs, with its device.
pub struct Guest {
    pub machine: Arc<Machine>,
    pub device: Device,
    /// The path of the host's Unix sockets for this guest.
    pub uds: PathBuf,
    pub cid: u32,
}

/// A device that a guest moves to. Dropping it ends its process.
pub struct Destination {
    pub cid: u32,
    socket: PathBuf,
    /// The path of the host's Unix sockets.
    pub uds: PathBuf,
    runs: Runs,
}

/// Where a device runs.
enum Runs {
    Here { _device: Device },
    InProcess(Child),
}

impl Drop for Destination {
    fn drop(&mut self) {
        if let Runs::InProcess(process) = &mut self.runs {
            let _ = process.kill();
            let _ = process.wait();
        }
        let _ = std::fs::remove_file(&self.socket);
        for socket_type in [TYPE_STREAM, TYPE_SEQPACKET] {
            let _ = std::fs::remove_file(bridge::entrance(&self.uds, socket_type));
        }
    }
}

/// A guest that can move to other devices. Its own [`Guest::device`] is the one that it was booted with.
pub struct MovingGuest {
    guest: Guest,
    relay: Relay,
    destination: Option<Destination>,
}

impl Deref for MovingGuest {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        &self.guest
    }
}

impl MovingGuest {
    /// Resets the device to another CID of the guest, where the guest has not moved yet.
    pub fn reset(&mut self, cid: u32) {
        self.guest.device.transport_reset(u64::from(cid));
        self.guest.cid = cid;
    }

    /// Stops the device: programs of the host can ask it for the states of their connections.
    pub fn stop(&self) -> Result<()> {
        self.relay.stop().context("stopping the device")
    }

    /// Goes on with another device.
    pub fn go_on(&mut self, destination: Destination) -> Result<()> {
        self.relay
            .go_on(&destination.socket)
            .context("going on with another device")?;
        self.guest.cid = destination.cid;
        self.guest.uds.clone_from(&destination.uds);
        self.destination = Some(destination);
        Ok(())
    }
}

impl Deref for Guest {
    type Target = Agent;

    fn deref(&self) -> &Agent {
        &self.machine.agent
    }
}

impl Guest {
    pub fn sh(&self, script: &str) -> Result<String> {
        sh_ok(&self.machine.agent, script, LIMIT)
    }

    /// Memory that programs could have, in KiB.
    pub fn available_memory(&self) -> Result<i64> {
        let text =
            self.sh("sync; echo 3 >/proc/sys/vm/drop_caches; grep MemAvailable /proc/meminfo")?;
        let figure = text.split_whitespace().nth(1);
        Ok(figure.context("MemAvailable has no figure")?.parse()?)
    }

    /// The features that driver and device agreed on.
    pub fn features(&self) -> Result<u64> {
        // A character for each bit, the lowest first.
        let bits = self.sh("cat /sys/bus/virtio/drivers/*vsock*/virtio*/features")?;
        let bit = |(at, is): (usize, char)| u64::from(is == '1') << at;
        Ok(bits.trim().chars().enumerate().map(bit).sum())
    }

    /// Connects to a port of the guest as a program of the host does.
    pub fn connect_from_host(&self, port: u32) -> Result<UnixStream> {
        Ok(self.connect_from_host_port(port)?.0)
    }

    /// The same, with the port of the host that the connection has.
    pub fn connect_from_host_port(&self, port: u32) -> Result<(UnixStream, u32)> {
        connect_by(&self.uds, TYPE_STREAM, port)
    }

    /// The same with a socket of a type (`TYPE_*`).
    pub fn connect_from_host_by(&self, socket_type: u16, port: u32) -> Result<(UnixStream, u32)> {
        connect_by(&self.uds, socket_type, port)
    }

    /// Asks the device, as a program of the host does, for the state of a connection that the program has.
    pub fn checkpoint(&self, host_port: u32, guest_port: u32) -> Result<Vec<u8>> {
        let mut stream = connect_to_bridge(&self.uds, TYPE_STREAM)?;
        writeln!(stream, "CHECKPOINT {host_port} {guest_port}")?;
        let answer = read_line(&mut stream, TYPE_STREAM).context("waiting for STATE")?;
        let len = answer
            .strip_prefix("STATE ")
            .with_context(|| format!("the answer to CHECKPOINT is {answer:?}"))?;
        let mut state = vec![0; len.parse()?];
        stream.read_exact(&mut state).context("reading the state")?;
        Ok(state)
    }

    /// The same, where the program reads to the end of its socket meanwhile: the device has to get rid of what it has begun
    /// to write.
    pub fn checkpoint_while(
        &self,
        host_port: u32,
        guest_port: u32,
        read_to_end: impl FnOnce() -> Result<()>,
    ) -> Result<Vec<u8>> {
        std::thread::scope(|scope| {
            let asking = scope.spawn(|| self.checkpoint(host_port, guest_port));
            read_to_end()?;
            asking.join().map_err(|_| anyhow!("a thread panicked"))?
        })
    }

    /// Serves a port of the host to the guest.
    pub fn host_listener(&self, port: u32) -> Result<UnixListener> {
        host_listener(&self.uds, port)
    }

    /// Lets the guest switch itself off; there is no answer to this.
    pub fn start_power_off(&self) {
        self.start("sh", json!({"script": "poweroff -f"}));
    }

    /// Waits until our driver has stopped receiving, because the device takes no answers and as many as may be wait.
    pub fn wait_congested(&self) -> Result<()> {
        wait_for("the guest to stop receiving", || {
            Ok(self.queue_length("rx_is_stopped")? == 1 && self.device.posted_buffers().0 == 0)
        })?;
        expect_eq(
            "answers that wait",
            self.queue_length("tx_waiting_replies")?,
            WAITING_ANSWERS,
        )
    }

    /// Waits for completions of sends with MSG_ZEROCOPY.
    pub fn wait_zero_copy_completions(&self, fd: i32) -> Result<Vec<Completion>> {
        let mut completions = Vec::new();
        wait_for("a completion", || {
            completions = self.zero_copy_completions(fd)?;
            Ok(!completions.is_empty())
        })?;
        Ok(completions)
    }

    /// Waits until a counter of our driver is `value`, and no more.
    pub fn wait_counter(&self, name: &str, value: i64) -> Result<()> {
        let mut counted = 0;
        wait_for(&format!("the counter {name} to be {value}"), || {
            counted = self.counter(name)?;
            Ok(counted >= value)
        })?;
        expect_eq(&format!("the counter {name}"), counted, value)
    }
}

/// The Unix socket of a port of the host, as the guest of the device at `uds` sees it.
pub fn host_socket(uds: &Path, port: u32) -> PathBuf {
    format!("{}_{port}", uds.display()).into()
}

/// Serves a port of the host to the guest of the device at `uds`.
pub fn host_listener(uds: &Path, port: u32) -> Result<UnixListener> {
    let path = host_socket(uds, port);
    let _ = std::fs::remove_file(&path);
    UnixListener::bind(&path).with_context(|| format!("listening on {}", path.display()))
}

/// Takes the next connection of the guest to a port of the host.
pub fn accept_at_host(listener: &UnixListener) -> Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let mut accepted = None;
    wait_for("a connection to the host", || match listener.accept() {
        Ok((stream, _)) => {
            accepted = Some(stream);
            Ok(true)
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error.into()),
    })?;
    accepted.context("it was accepted")
}

/// Connects to the bridge of a device as a program of the host.
fn connect_to_bridge(uds: &Path, socket_type: u16) -> Result<UnixStream> {
    let entrance = bridge::entrance(uds, socket_type);
    let stream = bridge::connect(&entrance, socket_type).context("connecting to the bridge")?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    Ok(stream)
}

fn connect_by(uds: &Path, socket_type: u16, port: u32) -> Result<(UnixStream, u32)> {
    let mut stream = connect_to_bridge(uds, socket_type)?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let answer = read_line(&mut stream, socket_type).context("waiting for OK")?;
    let host_port = answer
        .strip_prefix("OK ")
        .with_context(|| format!("the answer to CONNECT {port} is {answer:?}"))?;
    Ok((stream, host_port.parse()?))
}

/// Hands a connection's state to the device at `uds`, as a program of the host does; returns the connection, or why it was
/// refused.
pub fn restore(uds: &Path, state: &[u8]) -> Result<UnixStream> {
    restore_by(uds, TYPE_STREAM, state)
}

/// The same for a connection of a type (`TYPE_*`).
pub fn restore_by(uds: &Path, socket_type: u16, state: &[u8]) -> Result<UnixStream> {
    let mut stream = connect_to_bridge(uds, socket_type)?;
    stream.write_all(format!("RESTORE {}\n", state.len()).as_bytes())?;
    for piece in state.chunks(STATE_PIECE) {
        // A device that refuses it by its length reads no more.
        let _ = stream.write_all(piece);
    }
    let answer = read_line(&mut stream, socket_type).context("waiting for OK")?;
    ensure!(
        answer.starts_with("OK "),
        "the answer to RESTORE is {answer:?}"
    );
    Ok(stream)
}

/// Reads a line, and not a byte more: a message, or a stream byte by byte.
fn read_line(stream: &mut UnixStream, socket_type: u16) -> Result<String> {
    let mut piece = if socket_type == TYPE_STREAM {
        vec![0]
    } else {
        vec![0; 256]
    };
    let mut line = Vec::new();
    loop {
        let len = stream.read(&mut piece)?;
        line.extend(&piece[..len]);
        if len == 0 || line.ends_with(b"\n") {
            return Ok(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
    }
}

/// Waits until a condition holds that gives no event to wait for.
pub fn wait_for(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = std::time::Instant::now() + LIMIT;
    while !holds()? {
        ensure!(
            std::time::Instant::now() < end,
            "waited {} s for {what}",
            LIMIT.as_secs()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// That a call failed with an error.
pub fn expect_errno<T: std::fmt::Debug>(what: &str, result: Call<T>, errno: &str) -> Result<()> {
    match result {
        Err(CallError::Errno(name)) if name == errno => Ok(()),
        other => bail!("{what}: {other:?} instead of {errno}"),
    }
}

/// That two things are equal.
pub fn expect_eq<T: PartialEq + std::fmt::Debug>(what: &str, is: T, should: T) -> Result<()> {
    ensure!(is == should, "{what}: {is:?} instead of {should:?}");
    Ok(())
}

/// That a socket gets an error. A poll() that comes while the connection fails may report the end and no error: the core looks
/// for the error before it waits for the socket's lock, and for the end after it.
pub fn expect_pollerr(agent: &Agent, fd: i32) -> Result<()> {
    wait_for("POLLERR", || {
        Ok(agent.poll(fd, 0, Duration::ZERO)? & libc::POLLERR != 0)
    })
}

/// The host's end of one connection, played by the test packet by packet.
pub struct Peer<'a> {
    guest: &'a Guest,
    packets: Receiver<Packet>,
    /// A packet to the guest without anything but its addresses and credit.
    template: Packet,
}

impl<'a> Peer<'a> {
    /// Takes the host's place for one guest: its packets come to the test from now on.
    fn new(guest: &'a Guest) -> Self {
        let packets = guest.device.observe();
        guest.device.set_manual(true);
        Self {
            guest,
            packets,
            template: Packet {
                src_cid: HOST_CID,
                dst_cid: u64::from(guest.cid),
                src_port: 5000,
                dst_port: PORT,
                socket_type: TYPE_STREAM,
                op: Op::RST,
                flags: 0,
                buf_alloc: PEER_BUF_ALLOC,
                fwd_cnt: 0,
                payload: Vec::new(),
            },
        }
    }

    /// Connects to a listener of the guest and waits for its response.
    pub fn connect(guest: &'a Guest) -> Result<Self> {
        Self::connect_kind(guest, STREAM)
    }

    /// Connects to a listener of the guest of a kind, [`STREAM`] or [`SEQPACKET`], and waits for its response.
    pub fn connect_kind(guest: &'a Guest, kind: i32) -> Result<Self> {
        let peer = Self::watch_kind(guest, kind);
        peer.send(Op::REQUEST);
        peer.expect(Op::RESPONSE)?;
        Ok(peer)
    }

    /// Answers the connection that the guest makes to [`PORT`] with a socket.
    pub fn accept(guest: &'a Guest, fd: i32) -> Result<Self> {
        let mut peer = Self::new(guest);
        let connecting = guest.start_connect(fd, HOST_CID as u32, PORT);
        // The last packets of an earlier connection may be before it.
        let request = peer.find(Op::REQUEST)?;
        peer.template.src_port = PORT;
        peer.template.dst_port = request.src_port;
        peer.template.socket_type = request.socket_type;
        peer.send(Op::RESPONSE);
        connecting.wait::<()>(LIMIT).context("connect()")?;
        Ok(peer)
    }

    /// Watches the guest without a connection.
    pub fn watch(guest: &'a Guest) -> Self {
        Self::new(guest)
    }

    /// The same; its packets are those of a kind, [`STREAM`] or [`SEQPACKET`].
    pub fn watch_kind(guest: &'a Guest, kind: i32) -> Self {
        let mut peer = Self::new(guest);
        if kind == SEQPACKET {
            peer.template.socket_type = TYPE_SEQPACKET;
        }
        peer
    }

    /// A packet of this connection.
    pub fn packet(&self, op: Op) -> Packet {
        Packet {
            op,
            ..self.template.clone()
        }
    }

    /// Sends a control packet.
    pub fn send(&self, op: Op) {
        self.guest.device.inject(self.packet(op));
    }

    /// Sends payload.
    pub fn send_payload(&self, payload: &[u8]) {
        self.guest.device.inject(Packet {
            payload: payload.to_vec(),
            ..self.packet(Op::RW)
        });
    }

    /// Sends a message of a seqpacket socket, in packets that fit into the guest's buffers.
    pub fn send_message(&self, message: &[u8]) {
        let mut parts = message.chunks(3_500).peekable();
        while let Some(part) = parts.next() {
            self.guest.device.inject(Packet {
                flags: if parts.peek().is_none() { SEQ_EOM } else { 0 },
                payload: part.to_vec(),
                ..self.packet(Op::RW)
            });
        }
    }

    /// Shuts directions down.
    pub fn send_shutdown(&self, flags: u32) {
        self.guest.device.inject(Packet {
            flags,
            ..self.packet(Op::SHUTDOWN)
        });
    }

    /// Changes the addresses of the packets from now on, as an update has it.
    pub fn set_cids(&mut self, host_cid: u64, guest_cid: u64) {
        self.template.src_cid = host_cid;
        self.template.dst_cid = guest_cid;
    }

    /// Changes the ports of the packets from now on: the peer's and the guest's.
    pub fn set_ports(&mut self, host_port: u32, guest_port: u32) {
        self.template.src_port = host_port;
        self.template.dst_port = guest_port;
    }

    /// Changes the credit of the packets from now on.
    pub fn set_credit(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.template.buf_alloc = buf_alloc;
        self.template.fwd_cnt = fwd_cnt;
    }

    /// The next packet of the guest.
    pub fn next(&self, what: &str) -> Result<Packet> {
        self.packets
            .recv_timeout(LIMIT)
            .map_err(|_| anyhow::anyhow!("waited {} s for {what}", LIMIT.as_secs()))
    }

    /// The next packet of the guest, which has to be of one kind.
    pub fn expect(&self, op: Op) -> Result<Packet> {
        let packet = self.next(&format!("a packet with {op:?}"))?;
        ensure!(
            packet.op == op,
            "the guest sent {packet:?} instead of {op:?}"
        );
        Ok(packet)
    }

    /// The next packet of one kind; others before it are passed over.
    pub fn find(&self, op: Op) -> Result<Packet> {
        loop {
            let packet = self.next(&format!("a packet with {op:?}"))?;
            if packet.op == op {
                return Ok(packet);
            }
        }
    }

    /// That the guest sends nothing for a while.
    pub fn expect_silence(&self) -> Result<()> {
        match self.packets.recv_timeout(A_WHILE) {
            Ok(packet) => bail!("the guest sent {packet:?} instead of nothing"),
            Err(RecvTimeoutError::Timeout) => Ok(()),
            Err(RecvTimeoutError::Disconnected) => bail!("the device went away"),
        }
    }

    /// All packets that the guest has sent and nobody has looked at.
    pub fn drain(&self) -> Vec<Packet> {
        self.packets.try_iter().collect()
    }
}

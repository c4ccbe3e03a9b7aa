// SPDX-License-Identifier: GPL-2.0

//! Machines: QEMU around them, and what their kernel says.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, ensure, Context, Result};

use crate::agent::Agent;
use crate::qmp::Monitor;
use crate::Driver;

/// How long a machine may take to boot. It takes seconds when nothing else runs.
pub const BOOT_LIMIT: Duration = Duration::from_secs(300);

/// How long the kernel may say nothing before it has started its init.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);

/// What the machines are made of, and where their files go.
#[derive(Clone, Debug)]
pub struct Env {
    /// The kernel's release.
    pub release: String,
    /// Its image.
    pub vmlinuz: PathBuf,
    /// Its configuration.
    pub config: PathBuf,
    /// The folder with its modules and their `modules.dep`.
    pub modules: PathBuf,
    /// Upstream's test programs.
    pub upstream: PathBuf,
    /// Our module.
    pub rs_module: PathBuf,
    /// The agent for the machines.
    pub agent: PathBuf,
    /// The socket device as a program of its own.
    pub device: PathBuf,
    /// The example of a program that lives with migrations.
    pub forwarder: PathBuf,
    /// Where each test gets a folder.
    pub run: PathBuf,
    /// QEMU's accelerator.
    pub accelerator: String,
    /// How often a guest moves in the tests of migrations, where it is not the usual number.
    pub migrations: Option<u32>,
    /// What decides on the random moments of tests.
    pub seed: u64,
}

impl Env {
    /// Whether the kernel is built with an option.
    pub fn has_option(&self, option: &str) -> bool {
        self.config_has(&format!("{option}=y"))
    }

    /// Whether the kernel has a module of an option.
    pub fn has_module(&self, option: &str) -> bool {
        self.config_has(&format!("{option}=m"))
    }

    fn config_has(&self, line: &str) -> bool {
        fs::read_to_string(&self.config).is_ok_and(|config| config.lines().any(|is| is == line))
    }

    /// A new folder for the files of a test.
    pub fn run_dir(&self, name: &str) -> Result<PathBuf> {
        crate::new_folder(&self.run, &format!("{name}."))
    }
}

impl Driver {
    /// The name of the driver's module.
    pub fn module(self) -> &'static str {
        match self {
            Driver::Rs => "virtio_vsock_rs",
            Driver::C => "vmw_vsock_virtio_transport",
        }
    }
}

/// Lines of a kernel's log that say that it found something wrong, or has stopped looking.
pub fn faults(log: &str) -> Vec<String> {
    const WORDS: &[&str] = &[
        "BUG",
        "WARNING",
        "Oops",
        "refcount",
        "unregister",
        "Call Trace",
        "general protection",
        "UBSAN",
        "Kernel panic",
        "ODEBUG disabled",
        "dma-debug disabled",
        "DMA-API: debugging out of memory",
        "memory leak detector disabled",
    ];
    let mut faults = Vec::new();
    let mut lines = log.lines();
    while let Some(line) = lines.next() {
        let is_fault = WORDS.iter().any(|word| line.contains(word));
        // The kernel repeats its command line, which may have such a word.
        if !is_fault || line.to_lowercase().contains("command line") || is_known_race(line) {
            continue;
        }
        match len_of_report_without_driver(line, lines.clone()) {
            // Its other lines may have such words, too.
            Some(len) => drop(lines.nth(len - 1)),
            None => faults.push(line.to_owned()),
        }
    }
    faults
}

/// What KCSAN calls a data race in the title of a report; nothing if this is no such title.
fn race_of(title: &str) -> Option<&str> {
    let (_, race) = title.split_once("BUG: KCSAN: data-race in ")?;
    Some(race)
}

/// Whether a line of a kernel's log is the title of KCSAN's report on a data race that the kernel is known to have without us.
fn is_known_race(line: &str) -> bool {
    let known = include_str!("../../kernel/known-races");
    race_of(line).is_some_and(|race| known.lines().any(|known| known == race))
}

/// How many lines follow the title of a report of KCSAN's that has two stacks and the driver in none of them; nothing if it is not
/// such a report, or not whole.
fn len_of_report_without_driver<'a>(
    title: &str,
    following: impl Iterator<Item = &'a str>,
) -> Option<usize> {
    race_of(title)?;
    let mut is_signed = false;
    for (line, len) in following.zip(1..) {
        // Rust code is not instrumented: what it changes is a change of unknown origin.
        if line.contains("[virtio_vsock_rs]") || line.contains("race at unknown origin") {
            return None;
        }
        is_signed |= line.contains("Reported by Kernel Concurrency Sanitizer");
        if is_signed && line.ends_with("==========") {
            return Some(len);
        }
    }
    None
}

/// Fails where a machine's kernel has found something wrong.
pub fn check_log(what: &str, log: &str) -> Result<()> {
    let faults = faults(log);
    if !faults.is_empty() {
        bail!("the kernel of {what} says:\n{}", faults.join("\n"));
    }
    Ok(())
}

/// Finds a program as a shell would.
pub fn find_program(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").context("there is no PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|path| path.exists())
        .with_context(|| format!("the program {name} is not installed"))
}

/// The kernel did not come to its init, or not in good order, for reasons that are not ours.
///
/// The first two were seen under TCG in one boot of some hundred: the stock kernel stands still where it first stops all
/// processors; KASAN finds the kernel's own first interrupts at fault, after which nothing is watched any more.
#[derive(Debug)]
pub enum BadBoot {
    /// It has said nothing for [`SILENCE_LIMIT`].
    StoodStill,
    /// It has said so of itself.
    FoundFault(String),
    /// QEMU has ended with this status.
    Ended(ExitStatus),
    /// In a nested host, QEMU says [`EXIT_DURING_DELIVERY`], and the kernel nothing of a fault.
    ExitDuringDelivery,
    /// In a nested host, TCG has given the kernel an interrupt that was disabled, and it hangs.
    ForcedInterrupt,
}

/// What QEMU in a nested host says when its KVM is told by TCG's SVM that the guest exits while an interrupt is delivered to it;
/// it stops the guest then. Other numbers are of what a guest itself may do.
pub const EXIT_DURING_DELIVERY: &str = "KVM internal error. Suberror: 3";

/// How often a machine is booted that does not come to its init, at most.
const BOOT_ATTEMPTS: u32 = 5;

/// Boots a machine by `boot`, anew where it was a [`BadBoot`].
pub fn boot_anew_if_bad<T>(mut boot: impl FnMut() -> Result<T>) -> Result<T> {
    let mut attempts = 1..BOOT_ATTEMPTS;
    loop {
        match boot() {
            Err(error) if error.is::<BadBoot>() && attempts.next().is_some() => {
                println!("note: {error:#}; begun again");
            }
            result => return result,
        }
    }
}

impl std::fmt::Display for BadBoot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::StoodStill => {
                let limit = SILENCE_LIMIT.as_secs();
                write!(
                    f,
                    "the kernel said nothing for {limit} s and has not started its init"
                )
            }
            Self::FoundFault(fault) => write!(f, "the kernel said before its init: {fault}"),
            Self::Ended(status) => write!(f, "QEMU ended with {status} before the kernel's init"),
            Self::ExitDuringDelivery => write!(f, "QEMU said: {EXIT_DURING_DELIVERY}"),
            Self::ForcedInterrupt => write!(f, "TCG has given it an interrupt that was disabled"),
        }
    }
}

impl std::error::Error for BadBoot {}

/// What the kernel says when it starts its init.
const INIT_BEGINS: &str = "Run /init";

pub fn read_log(console: &Path) -> String {
    fs::read(console).map_or_else(
        |_| String::new(),
        |bytes| String::from_utf8_lossy(&bytes).into_owned(),
    )
}

/// A shell function for machines: the device of their port of a name.
pub const FIND_PORT: &str = r#"port() {
    for d in /sys/class/virtio-ports/*; do
        [ "$(cat $d/name)" = "$1" ] && echo "/dev/${d##*/}" && return
    done
    echo "there is no virtio port $1" >&2
    return 1
}"#;

/// A virtio port of a machine besides its agent's.
pub enum Port {
    /// A Unix socket here.
    Socket(String),
    /// What the machine writes goes to a file here.
    File(String),
}

/// Size of the device's virtqueues where a test wants no other.
pub const DEFAULT_RING: u16 = 128;

/// What a guest's machine is like.
#[derive(Clone, Copy, Debug)]
pub struct Hardware {
    /// How the device is attached.
    pub bus: Bus,
    /// Size of the device's virtqueues.
    pub ring: u16,
    /// More feature bits that the device offers.
    pub features: u64,
    /// Feature bits that it does not offer.
    pub without_features: u64,
    /// More properties of the device, as QEMU takes them.
    pub device_properties: &'static str,
    /// More parameters of the kernel.
    pub kernel_parameters: &'static str,
    /// Whether the agent has a serial port, which works on when the machine was suspended.
    pub agent_on_serial_port: bool,
    /// A disk of [`DISK_LEN`] bytes in a file of this name in the test's folder; a later machine finds what this one has
    /// written.
    pub disk: Option<&'static str>,
    /// A cable to another machine of the test, besides the sockets.
    pub network: Option<Plug>,
    /// Whether its clock counts the instructions that it executes, a nanosecond each. It has one processor then.
    pub counts_instructions: bool,
}

/// An end of the cable between two machines: a Unix socket in the test's folder. The machine with `First` is booted first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plug {
    First,
    Second,
}

/// Length of a machine's disk, in bytes. Its memory fits onto it.
const DISK_LEN: u64 = 1 << 30;

/// How a device is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bus {
    /// virtio-pci.
    Pci,
    /// virtio-mmio, on QEMU's microvm.
    Mmio,
}

impl Default for Hardware {
    fn default() -> Self {
        Self {
            bus: Bus::Pci,
            ring: DEFAULT_RING,
            features: 0,
            without_features: 0,
            device_properties: "",
            kernel_parameters: "",
            agent_on_serial_port: false,
            disk: None,
            network: None,
            counts_instructions: false,
        }
    }
}

/// The frequency of the TSC that TCG's machines have, in kHz. It is that of this machine, which can be told where this is a
/// virtual machine itself: its processors have no other frequency.
fn tsc_khz() -> Option<u32> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").ok()?;
    let value = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim())
    };
    let mut flags = value("flags")?.split(' ');
    let mhz: f64 = value("cpu MHz")?.parse().ok()?;
    flags
        .any(|flag| flag == "hypervisor")
        .then_some((mhz * 1000.0) as u32)
}

/// Tells a kernel under TCG how fast its clock is.
///
/// When this machine is busy it takes a frequency for right that is up to 50 times too low, and all of its limits of time
/// end too early. On microvm, which has neither an HPET nor a PM timer, it stands still more often than not where it has
/// to find out, so that any frequency is better than none.
fn clock_parameter(is_microvm: bool) -> String {
    let khz = tsc_khz().or(is_microvm.then_some(1_000_000));
    khz.map_or_else(String::new, |khz| format!(" tsc_early_khz={khz}"))
}

/// Properties of the test device that make it a socket device.
pub fn vsock_properties(ring: u16) -> serde_json::Value {
    serde_json::json!({"virtio-id": 19, "num_vqs": 3, "vq_size": ring, "config_size": 8})
}

/// What kind of a machine it is.
pub enum Kind<'a> {
    /// A guest whose vsock device is served on this vhost-user socket.
    Guest {
        device: &'a Path,
        hardware: &'a Hardware,
    },
    /// A machine that can run guests of its own. What it writes to its disk is gone with it.
    NestedHost { disk: Option<&'a Path> },
}

/// A machine that runs. Dropping it switches it off.
pub struct Machine {
    qemu: Mutex<Child>,
    /// Whether somebody has switched it off, or waited for it to switch itself off.
    may_be_off: AtomicBool,
    pub agent: Agent,
    pub console: PathBuf,
    dir: PathBuf,
    name: String,
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.switch_off();
    }
}

impl Machine {
    /// Switches the machine off, as a power cut does.
    pub fn switch_off(&self) {
        self.may_be_off.store(true, Ordering::Relaxed);
        let mut qemu = crate::lock(&self.qemu);
        let _ = qemu.kill();
        let _ = qemu.wait();
    }

    /// Boots a machine and waits for its agent. `name` names its files in `dir`.
    pub fn boot(
        env: &Env,
        kind: Kind,
        name: &str,
        initramfs: &Path,
        dir: &Path,
        ports: &[Port],
    ) -> Result<Self> {
        let console = dir.join(format!("{name}.console"));
        let agent_port = Port::Socket(format!("{name}.{}", Agent::PORT_NAME));
        let mut qemu = Command::new("qemu-system-x86_64");
        add_kind(&mut qemu, env, &kind);
        qemu.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]);
        qemu.arg("-kernel")
            .arg(&env.vmlinuz)
            .arg("-initrd")
            .arg(initramfs);
        let hardware = match kind {
            Kind::Guest { hardware, .. } => *hardware,
            Kind::NestedHost { .. } => Hardware::default(),
        };
        let mut parameters = format!("console=ttyS0 panic=-1 {}", hardware.kernel_parameters);
        if hardware.counts_instructions {
            // The TSC counts instructions, too.
            parameters += " tsc_early_khz=1000000";
        } else if matches!(kind, Kind::NestedHost { .. }) || env.accelerator.starts_with("tcg") {
            parameters += &clock_parameter(hardware.bus == Bus::Mmio);
        }
        if hardware.agent_on_serial_port {
            // For init.
            parameters += " agent_port=ttyS1";
        }
        qemu.arg("-append").arg(parameters);
        qemu.arg("-serial")
            .arg(format!("file:{}", console.display()));
        qemu.arg("-qmp").arg(format!(
            "unix:{},server=on,wait=off",
            dir.join(format!("{name}.qmp")).display()
        ));
        let serial_bus = match hardware.bus {
            Bus::Pci => "virtio-serial-pci",
            Bus::Mmio => "virtio-serial-device",
        };
        if let Some(disk) = hardware.disk {
            let path = dir.join(disk);
            fs::File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .and_then(|file| file.set_len(DISK_LEN))
                .with_context(|| format!("making the disk {}", path.display()))?;
            qemu.arg("-drive").arg(format!(
                "if=none,id=disk,format=raw,file={}",
                path.display()
            ));
            qemu.args(["-device", "virtio-blk-pci,drive=disk"]);
        }
        if let Some(plug) = hardware.network {
            let server = if plug == Plug::First { "on" } else { "off" };
            qemu.arg("-netdev").arg(format!(
                "stream,id=network,server={server},addr.type=unix,addr.path={}",
                dir.join("network.sock").display()
            ));
            qemu.arg("-device").arg(format!(
                "virtio-net-pci,netdev=network,romfile=,mac=52:54:00:00:00:{:02x}",
                plug as u8
            ));
        }
        if hardware.agent_on_serial_port {
            let path = dir.join(format!("{name}.{}.sock", Agent::PORT_NAME));
            qemu.arg("-serial")
                .arg(format!("unix:{},server=on,wait=off", path.display()));
        } else {
            qemu.args(["-device", serial_bus]);
            add_port(&mut qemu, dir, 1, &agent_port, Some(Agent::PORT_NAME));
        }
        for (port, number) in ports.iter().zip(2..) {
            add_port(&mut qemu, dir, number, port, None);
        }
        let said = dir.join(format!("{name}.qemu"));
        let log = fs::File::create(&said).with_context(|| format!("making {}", said.display()))?;
        qemu.stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut qemu = qemu.spawn().context("starting qemu-system-x86_64")?;
        let socket = dir.join(format!("{name}.{}.sock", Agent::PORT_NAME));
        match Self::wait_for_agent(&mut qemu, &socket, &console, hardware.agent_on_serial_port) {
            Ok(agent) => Ok(Self {
                qemu: Mutex::new(qemu),
                may_be_off: AtomicBool::new(false),
                agent,
                console,
                dir: dir.to_owned(),
                name: name.to_owned(),
            }),
            Err(error) => {
                let error = match qemu.try_wait() {
                    Ok(Some(status)) => {
                        let log = read_log(&console);
                        if log.is_empty() || log.contains(INIT_BEGINS) {
                            // No kernel has begun, or our init had.
                            anyhow!("QEMU ended with {status}")
                        } else {
                            BadBoot::Ended(status).into()
                        }
                    }
                    _ => error,
                };
                let _ = qemu.kill();
                let _ = qemu.wait();
                let said = fs::read_to_string(said).unwrap_or_default();
                let console = console.display();
                Err(error.context(format!(
                    "booting {name}; QEMU says {said:?}; its console is {console}"
                )))
            }
        }
    }

    fn wait_for_agent(
        qemu: &mut Child,
        socket: &Path,
        console: &Path,
        announces: bool,
    ) -> Result<Agent> {
        let agent = Agent::attach(socket, BOOT_LIMIT, || {
            ensure!(qemu.try_wait()?.is_none(), "QEMU has ended");
            Ok(())
        })?;
        let mut said = 0;
        let mut is_ready = false;
        while !is_ready && !read_log(console).contains(INIT_BEGINS) {
            is_ready = agent.wait_ready(announces, SILENCE_LIMIT).is_ok();
            let before = std::mem::replace(&mut said, read_log(console).len());
            if !is_ready && said == before {
                bail!(BadBoot::StoodStill);
            }
        }
        if !is_ready {
            agent.wait_ready(announces, BOOT_LIMIT)?;
        }
        let log = read_log(console);
        let before_init = log.split(INIT_BEGINS).next().unwrap_or_default();
        if let Some(fault) = faults(before_init).into_iter().next() {
            bail!(BadBoot::FoundFault(fault));
        }
        Ok(agent)
    }

    /// The socket of a port.
    pub fn port_socket(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.sock"))
    }

    /// The file of a port.
    pub fn port_file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// QEMU's monitor.
    pub fn monitor(&self) -> Result<Monitor> {
        Monitor::connect(&self.dir.join(format!("{}.qmp", self.name)))
    }

    /// What the machine's kernel has said so far.
    pub fn log(&self) -> String {
        read_log(&self.console)
    }

    /// Whether QEMU runs yet.
    fn is_on(&self) -> Result<bool> {
        let ended = crate::lock(&self.qemu).try_wait();
        Ok(ended.context("waiting for QEMU")?.is_none())
    }

    /// That the machine is on, unless it was switched off; returns whether it is.
    pub fn expect_on(&self) -> Result<bool> {
        let is_on = self.is_on()?;
        ensure!(
            is_on || self.may_be_off.load(Ordering::Relaxed),
            "{} has ended by itself",
            self.name
        );
        Ok(is_on)
    }

    /// Waits until the machine has switched itself off.
    pub fn wait_off(&self, limit: Duration) -> Result<()> {
        self.may_be_off.store(true, Ordering::Relaxed);
        let end = Instant::now() + limit;
        while self.is_on()? {
            let waited = limit.as_secs();
            ensure!(
                Instant::now() < end,
                "waited {waited} s for the machine to switch itself off"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

fn add_kind(qemu: &mut Command, env: &Env, kind: &Kind) {
    match kind {
        Kind::Guest { device, hardware } => {
            let (machine, device_model) = match hardware.bus {
                Bus::Pci => ("pc", "vhost-user-test-device-pci"),
                // With ACPI the kernel finds the devices without being told.
                Bus::Mmio => ("microvm,acpi=on", "vhost-user-test-device"),
            };
            if matches!(hardware.bus, Bus::Mmio) {
                // QEMU's default is the interface of before virtio 1.0, whose features are 32 bits.
                qemu.args(["-global", "virtio-mmio.force-legacy=false"]);
            }
            // A kernel that reads its memory from a disk has it twice meanwhile.
            let memory = if hardware.disk.is_some() { 1024 } else { 512 };
            let (accelerator, processors) = match hardware.counts_instructions {
                true => ("tcg,thread=single", "1"),
                false => (env.accelerator.as_str(), "2"),
            };
            qemu.args(["-accel", accelerator, "-cpu", "max", "-smp", processors]);
            if hardware.counts_instructions {
                qemu.args(["-icount", "shift=0"]);
            }
            qemu.args(["-m", &memory.to_string()]);
            qemu.arg("-object").arg(format!(
                "memory-backend-memfd,id=memory,size={memory}M,share=on"
            ));
            qemu.arg("-machine")
                .arg(format!("{machine},memory-backend=memory"));
            qemu.arg("-chardev")
                .arg(format!("socket,id=vsock,path={}", device.display()));
            let properties = vsock_properties(hardware.ring);
            let mut device = format!("{device_model},id=vsock0,chardev=vsock");
            for (name, value) in properties.as_object().into_iter().flatten() {
                device += &format!(",{name}={value}");
            }
            device += hardware.device_properties;
            qemu.arg("-device").arg(device);
        }
        Kind::NestedHost { disk } => {
            // With more than one processor that has SVM, TCG now and then corrupts the memory of the host's kernel:
            // one run of upstream's tests in twenty ended in a panic of it, or in a triple fault.
            qemu.args([
                "-accel",
                "tcg",
                "-cpu",
                "max,+svm,+npt",
                "-smp",
                "1",
                "-m",
                "4096",
            ]);
            if let Some(disk) = disk {
                qemu.arg("-drive").arg(format!(
                    "if=none,id=disk,format=raw,snapshot=on,file={}",
                    disk.display()
                ));
                qemu.args(["-device", "virtio-blk-pci,drive=disk"]);
            }
        }
    }
}

/// Adds a port under its own name or another one.
fn add_port(qemu: &mut Command, dir: &Path, number: u32, port: &Port, name: Option<&str>) {
    let (backend, own_name) = match port {
        Port::Socket(own) => {
            let path = dir.join(format!("{own}.sock"));
            (
                format!("socket,server=on,wait=off,path={}", path.display()),
                own,
            )
        }
        Port::File(own) => (format!("file,path={}", dir.join(own).display()), own),
    };
    let name = name.unwrap_or(own_name);
    qemu.arg("-chardev")
        .arg(format!("{backend},id=port{number}"));
    qemu.arg("-device").arg(format!(
        "virtserialport,nr={number},chardev=port{number},name={name}"
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn races_of_the_kernel_are_no_faults() {
        let known = "[ 9.7] BUG: KCSAN: data-race in lock_sock_nested / release_sock\r\n";
        assert_eq!(faults(known), Vec::<String>::new());

        let title = "[ 9.7] BUG: KCSAN: data-race in a / b\r\n";
        let stack = "[ 9.7] unregister_c+0x1/0x2\r\n";
        let line = "[ 9.7] ==================================================================\r\n";
        let signature = "[ 9.7] Reported by Kernel Concurrency Sanitizer on:\r\n";
        let of_driver = "[ 9.7] d+0x1/0x2 [virtio_vsock_rs]\r\n";
        let of_unknown = "[ 9.7] race at unknown origin, with read to 0x0 of 8 bytes by task 1\r\n";
        let fault = "[ 9.8] BUG: KASAN: use-after-free in e\r\n";
        let count = |parts: &[&str]| faults(&parts.concat()).len();
        assert_eq!(count(&[title, stack, signature, line]), 0);
        assert_eq!(count(&[title, stack, signature, line, fault, of_driver]), 1);
        assert_eq!(count(&[title, of_driver, signature, line]), 1);
        assert_eq!(count(&[title, of_unknown, signature, line]), 1);
        // Another report's line is not the end.
        assert_eq!(count(&[title, line, of_driver, signature, line]), 1);
        assert_eq!(count(&[title, signature]), 1);
        assert_eq!(
            faults("[ 9.7] BUG: KASAN: use-after-free in lock_sock_nested\r\n").len(),
            1
        );
    }
}

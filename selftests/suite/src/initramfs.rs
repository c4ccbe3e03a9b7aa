// SPDX-License-Identifier: GPL-2.0

//! What a machine boots into: busybox, the agent, modules of the kernel, and the files that a test adds.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{ensure, Context, Result};

use crate::machine::{find_program, Env};
use crate::Driver;

/// Mounts what programs expect, loads the modules, and leaves the machine to the agent.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
mount -t debugfs debugfs /sys/kernel/debug
for module in $(cat /modules/order); do
    insmod /modules/$module || echo "init: loading $module failed" >/dev/kmsg
done
for disk in /sys/block/vd*; do
    # A machine that has hibernated to it goes on from there, and this is never left.
    [ ! -e $disk/dev ] || cat $disk/dev >/sys/power/resume
done
for word in $(cat /proc/cmdline); do
    case $word in
    agent_port=*)
        port=/dev/${word#agent_port=}
        stty -F $port raw -echo
        vsock-guest-agent --announce $port
        poweroff -f
        ;;
    esac
done
# Ports of a bus whose driver is a module may be found later than its loading ends.
for attempt in $(seq 600); do
    for port in /sys/class/virtio-ports/*; do
        [ "$(cat $port/name 2>/dev/null)" = agent ] || continue
        if [ -x /usr/lib/systemd/systemd ]; then
            # It has to be this process, and leaves alone what runs already.
            vsock-guest-agent /dev/${port##*/} &
            exec /usr/lib/systemd/systemd
        fi
        vsock-guest-agent /dev/${port##*/}
        break 2
    done
    sleep 0.1
done
poweroff -f
"#;

/// An initramfs that is being put together.
pub struct Initramfs<'a> {
    env: &'a Env,
    /// Names in the image, and the files that they come from.
    files: Vec<(String, PathBuf)>,
    /// Modules that are loaded at boot, in this order.
    modules: Vec<PathBuf>,
}

impl<'a> Initramfs<'a> {
    /// One with the agent and what it needs.
    pub fn new(env: &'a Env) -> Result<Self> {
        let mut this = Self {
            env,
            files: Vec::new(),
            modules: Vec::new(),
        };
        this.file("bin/busybox", &find_program("busybox")?)?;
        this.file("bin/vsock-guest-agent", &env.agent)?;
        // The machine's bus and the agent's port.
        this.hardware(&["virtio_mmio", "virtio_console"])?;
        Ok(this)
    }

    /// Loads drivers of the machine's hardware at boot. Where there are no such modules the kernel has them built in.
    pub fn hardware(&mut self, names: &[&str]) -> Result<()> {
        for name in names {
            if self.is_module(name)? {
                self.modules(&[name])?;
            }
        }
        Ok(())
    }

    /// Loads modules of the kernel at boot, and what they need before them.
    pub fn modules(&mut self, names: &[&str]) -> Result<()> {
        for name in names {
            for path in self.with_dependencies(name)? {
                if !self.modules.contains(&path) {
                    self.modules.push(path);
                }
            }
        }
        Ok(())
    }

    fn index(&self) -> Result<String> {
        let path = self.env.modules.join("modules.dep");
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    fn is_module(&self, name: &str) -> Result<bool> {
        Ok(self.index()?.contains(&format!("/{name}.ko")))
    }

    /// A module and all that it needs, in the order in which they are loaded.
    fn with_dependencies(&self, name: &str) -> Result<Vec<PathBuf>> {
        let file = format!("/{name}.ko");
        let index = self.index()?;
        let (module, needs) = index
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(module, _)| module.trim_end_matches(".xz").ends_with(&file))
            .with_context(|| format!("the kernel {} has no module {name}", self.env.release))?;
        let paths = needs.split_whitespace().rev().chain([module]);
        Ok(paths.map(|path| self.env.modules.join(path)).collect())
    }

    /// Loads a driver for the vsock device at boot.
    pub fn driver(&mut self, driver: Driver) -> Result<()> {
        match driver {
            Driver::C => self.modules(&[driver.module()]),
            Driver::Rs => {
                self.modules(&["vsock"])?;
                self.modules.push(self.env.rs_module.clone());
                Ok(())
            }
        }
    }

    /// Whether a driver is loaded at boot.
    pub fn has_driver(&self) -> bool {
        [Driver::Rs, Driver::C].iter().any(|driver| {
            self.modules.iter().any(|path| {
                path.to_string_lossy()
                    .contains(&format!("/{}.ko", driver.module()))
            })
        })
    }

    /// Puts a driver into `/extra`, with what it needs, without loading it.
    pub fn extra_driver(&mut self, driver: Driver) -> Result<()> {
        let paths = match driver {
            Driver::C => self.with_dependencies(driver.module())?,
            Driver::Rs => vec![self.env.rs_module.clone()],
        };
        for path in paths {
            self.file(&format!("extra/{}", module_name(&path)?), &path)?;
        }
        Ok(())
    }

    /// Adds a file.
    pub fn file(&mut self, name: &str, source: &Path) -> Result<()> {
        ensure!(source.exists(), "{} is not there", source.display());
        let file = (name.trim_start_matches('/').to_owned(), source.to_owned());
        if !self.files.contains(&file) {
            self.files.push(file);
        }
        Ok(())
    }

    /// Adds a program that needs no libraries, in `/bin`.
    pub fn program_in_bin(&mut self, program: &Path) -> Result<()> {
        let name = program.file_name().context("the program has no name")?;
        self.file(&format!("bin/{}", name.to_string_lossy()), program)
    }

    /// Makes it that of a guest for upstream's test programs, with a driver and a network.
    pub fn guest_for_upstream(&mut self, driver: Driver) -> Result<()> {
        self.modules(&["virtio_net"])?;
        self.driver(driver)?;
        self.modules(&["vsock_diag", "vsock_loopback"])?;
        self.upstream_programs()
    }

    /// Adds upstream's test programs, in `/bin`.
    pub fn upstream_programs(&mut self) -> Result<()> {
        for program in [
            "vsock_test",
            "vsock_perf",
            "vsock_diag_test",
            "vsock_uring_test",
        ] {
            self.program_in_bin(&self.env.upstream.join(program))?;
        }
        Ok(())
    }

    /// Adds a program as it is installed here, with the libraries that it is linked with.
    pub fn program(&mut self, program: &Path) -> Result<()> {
        self.file(&program.to_string_lossy(), program)?;
        let libraries = output_of(Command::new("ldd").arg(program))?;
        let mut libraries = libraries
            .split_whitespace()
            .filter(|word| word.starts_with('/'))
            .peekable();
        ensure!(
            libraries.peek().is_some(),
            "ldd names no library of {}",
            program.display()
        );
        libraries.try_for_each(|path| self.file(path, Path::new(path)))
    }

    /// Writes the image.
    pub fn write(&self, image: &Path) -> Result<()> {
        let mut archive = Archive::default();
        for folder in ["dev", "proc", "run", "sys", "tmp"] {
            archive.folder(folder);
        }
        for (name, source) in &self.files {
            archive.file(name, &read_decompressed(source)?, is_executable(source)?);
        }
        let mut order = String::new();
        for path in &self.modules {
            let name = module_name(path)?;
            archive.file(&format!("modules/{name}"), &read_decompressed(path)?, false);
            order += &name;
            order.push('\n');
        }
        archive.file("modules/order", order.as_bytes(), false);
        archive.file("init", INIT.as_bytes(), true);
        fs::write(image, archive.end()).with_context(|| format!("writing {}", image.display()))
    }
}

fn is_executable(path: &Path) -> Result<bool> {
    let metadata = fs::metadata(path).with_context(|| format!("looking at {}", path.display()))?;
    Ok(metadata.permissions().mode() & 0o100 != 0)
}

/// What a program prints that has to succeed.
pub fn output_of(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("running {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).with_context(|| format!("reading the output of {command:?}"))
}

/// The file name of a module when it is not compressed.
fn module_name(path: &Path) -> Result<String> {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.with_context(|| format!("{} has no name", path.display()))?;
    Ok(name.trim_end_matches(".xz").to_owned())
}

/// What is in a file; a compressed module is decompressed.
fn read_decompressed(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "xz") {
        let output = Command::new("xz")
            .arg("-dc")
            .arg(path)
            .output()
            .context("running xz")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "xz -dc {}: {said}", path.display());
        return Ok(output.stdout);
    }
    fs::read(path).with_context(|| format!("reading {}", path.display()))
}

/// A cpio archive in the format that the kernel reads (`newc`).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    folders: BTreeSet<String>,
    inode: u32,
}

impl Archive {
    fn folder(&mut self, name: &str) {
        if let Some((parent, _)) = name.rsplit_once('/') {
            self.folder(parent);
        }
        if self.folders.insert(name.to_owned()) {
            self.entry(name, 0o040_755, &[]);
        }
    }

    fn file(&mut self, name: &str, content: &[u8], executable: bool) {
        if let Some((parent, _)) = name.rsplit_once('/') {
            self.folder(parent);
        }
        let mode = if executable { 0o100_755 } else { 0o100_644 };
        self.entry(name, mode, content);
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.inode += 1;
        let links = 1;
        let (size, name_size) = (content.len() as u32, name.len() as u32 + 1);
        // inode, mode, uid, gid, links, mtime, size, device numbers, length of the name, checksum
        let fields = [
            self.inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn end(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

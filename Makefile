# SPDX-License-Identifier: GPL-2.0
#
# Every command that a person types; `make help` lists them. Kbuild is what the kernel's build system reads.

KDIR ?= /lib/modules/$(shell uname -r)/build
VSOCK_CACHE ?= $(CURDIR)/build
export VSOCK_CACHE
# How often guests are moved in the tests of migrations at full length.
MIGRATIONS ?= 1000
LIVE_MIGRATIONS ?= 50
# For messages that say what to type.
export MAKE_TARGET = $@

.NOTPARALLEL:
.PHONY: module kernel-tree demo test test-all test-vmtest migrations bench fuzz check install uninstall update clean distclean help

module:
	@scripts/build-module "$(KDIR)"

kernel-tree:
	@scripts/setup kernel-tree

demo:
	@scripts/harness demo

test:
	@scripts/run-tests $(TESTS)

test-all:
	@scripts/test-all $(TESTS)

test-vmtest:
	@scripts/test-vmtest $(TESTS)

migrations:
	@scripts/harness run --migrations $(MIGRATIONS) migration::traffic_goes_on
	@scripts/harness run --migrations $(LIVE_MIGRATIONS) host_tier::live_migration

bench:
	@scripts/harness bench
	@scripts/harness bench-instructions

fuzz:
	@scripts/fuzz $(SECONDS)

check:
	@scripts/check

install:
	@scripts/install-module "$(KDIR)"

uninstall:
	@scripts/uninstall-module "$(KDIR)"

update:
	@scripts/setup update

clean:
	rm -rf $(VSOCK_CACHE)/kernel/*/module $(VSOCK_CACHE)/kernel/*/clippy $(VSOCK_CACHE)/target $(VSOCK_CACHE)/run

# What set-up made, part by part, for VSOCK_CACHE may be a folder that has other things as well.
distclean: clean
	rm -rf --one-file-system $(addprefix $(VSOCK_CACHE)/,root kernel kernel-release source accel cargo log .lock)

help:
	@echo 'make              build virtio_vsock_rs.ko for KDIR, the running kernel by default'
	@echo 'make kernel-tree  prepare a stock kernel'\''s build tree that has the Rust metadata'
	@echo 'make demo         set everything up, boot a guest with the module, show it at work'
	@echo 'make test         all tests; TESTS="name ..." for those whose names contain one of them'
	@echo 'make test-all     make test on each kernel of the list KERNELS, and a summary'
	@echo 'make test-vmtest  upstream'\''s vmtest.sh on a nested host, with this driver and with the C driver; TESTS as above'
	@echo 'make migrations   the tests of migrations at full length: MIGRATIONS=$(MIGRATIONS) between devices with the'
	@echo '                  checkpoint extension, LIVE_MIGRATIONS=$(LIVE_MIGRATIONS) between two QEMUs with vhost-vsock'
	@echo 'make bench        this driver and the C driver side by side: throughput, and what the guest executes for it'
	@echo 'make fuzz         the fuzz targets of the protocol, SECONDS=60 for each'
	@echo 'make check        formats, lints, links'
	@echo 'make install      install the module for KDIR'\''s kernel (INSTALL_MOD_PATH=folder for below a folder)'
	@echo 'make uninstall    remove it again, with the same settings'
	@echo 'make update       ask the mirror for its newest kernel, for the next set-up'
	@echo 'make clean        remove what was built from this source; distclean: the whole cache'
	@echo
	@echo 'Settings, with their defaults:'
	@echo '  KDIR=$(KDIR)'
	@echo '  VSOCK_CACHE=$(VSOCK_CACHE)   where set-up puts everything'
	@echo '  SUITE=trixie-backports  FLAVOUR=cloud-amd64  KERNEL_VERSION=7.3.*   which kernel to test with'
	@echo '                          (FLAVOUR=debug, kcsan or vanilla: a kernel of our own, from selftests/kernel/)'
	@echo '  KERNEL=                 or one whole release, such as 7.3.4+deb13-cloud-amd64'
	@echo '  KERNELS=                the kernels of test-all; default: selftests/kernel/list'
	@echo '  MIRROR=                 an apt mirror; default: the one that this machine uses'
	@echo '  JOBS=$(shell nproc)                  compilers at a time'

# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# The disk of the nested host that upstream's vmtest.sh runs on: a Debian system with what the script needs, the kernel
# under test with this module installed, and the script and vsock_test of the kernel's source (see upstream-tests.sh).
#
# The guests' root is the host's, over 9p, as virtme-ng has it.

VMTEST_PACKAGES=(
    # what vmtest.sh starts
    python3-minimal busybox-static qemu-system-x86 openssh-client openssh-server socat iproute2 procps kmod file
    # virtme-ng, with what it imports
    python3-pip python3-argcomplete python3-requests python3-setuptools ca-certificates
)
# The newest one that starts the guest's SSH server for vmtest.sh, which does not know what later ones want to be told.
VIRTME_NG=1.40

VMTEST_ROOT=$VSOCK_CACHE/root/vmtest-$SUITE
VMTEST_FILES=$SOURCE_DIR/selftests/vmtest

vmtest_root_recipe() {
    say "virtme-ng $VIRTME_NG ${VMTEST_PACKAGES[*]}"
}

# Runs a command inside the root of the nested host.
in_vmtest_root() {
    ROOT_FOLDER=$VMTEST_ROOT in_root "$@"
}

ensure_vmtest_root() {
    local stamp=$VMTEST_ROOT/.complete mirror
    [[ ! -e $stamp || $(<"$stamp") != "$(vmtest_root_recipe)" ]] || return 0
    install_prerequisites
    need_root "the root of the nested host"
    need_space 1000 "the root of the nested host"
    discard "$VMTEST_ROOT.new" "$VMTEST_ROOT"
    mirror=$(machine_mirror)
    step "install the root of the nested host ($SUITE)" make_root "$VMTEST_ROOT.new" "$mirror" "${VMTEST_PACKAGES[@]}"
    say "not yet" >"$VMTEST_ROOT.new/.complete"
    mv -T "$VMTEST_ROOT.new" "$VMTEST_ROOT"
    step "install virtme-ng $VIRTME_NG in it" in_vmtest_root env PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
        python3 -m pip install --no-deps --break-system-packages --root-user-action=ignore "virtme-ng==$VIRTME_NG"
    vmtest_root_recipe >"$stamp"
}

# Makes the disk anew, with the module as it is now: $KERNEL_DIR/vmtest.disk
ensure_vmtest_disk() {
    local folder=$KERNEL_DIR/vmtest
    [[ -n $(find "$KERNEL_DIR/lib/modules/$KERNEL" -name '9p.ko*') ]] ||
        die "vmtest.sh needs 9p, which the kernel $KERNEL does not have" "FLAVOUR=amd64 make ${MAKE_TARGET:-test-vmtest}"
    ensure_vmtest_root
    need_space 3000 "the disk of the nested host"
    step "copy the root of the nested host, and the kernel $KERNEL" fill_vmtest_folder "$folder"
    install_module "$KERNEL_TREE" "$folder"
    step "make the disk of the nested host" make_vmtest_disk "$folder"
    discard "$folder"
}

fill_vmtest_folder() {
    local folder=$1 selftests=$1/usr/src/linux/tools/testing/selftests
    discard "$folder"
    cp -a "$VMTEST_ROOT" "$folder"
    # Writes to folders that guests have anew at each boot.
    rm -f "$folder/usr/bin/systemd-tmpfiles"
    mkdir -p "$folder/usr/lib/modules" "$selftests"
    cp -a "$KERNEL_DIR/lib/modules/$KERNEL" "$folder/usr/lib/modules/"
    # virtme-ng has its first modules loaded as they are.
    find "$folder/usr/lib/modules" -name '*.ko.xz' -print0 | in_root xargs -0 xz --decompress
    cp "$KERNEL_DIR/vmlinuz" "$folder/usr/lib/modules/$KERNEL/"
    cp -a "$KERNEL_SOURCE/tools/testing/selftests/"{vsock,kselftest} "$selftests/"
    cp "$KERNEL_DIR/upstream/vsock_test" "$selftests/vsock/"
    install "$VMTEST_FILES/systemd-udevd" "$folder/usr/lib/systemd/"
    install "$VMTEST_FILES/udevadm" "$folder/usr/bin/"
    install "$VMTEST_FILES/"{timeout,socat} "$folder/usr/local/sbin/"
    # virtme-ng's init sets the network up beside udev, and leaves it when its driver is not there yet. vmtest.sh is made for
    # kernels that have it built in.
    sed -i 's/^MODALIASES = \[$/&\n    "virtio:d00000001v00001AF4",/' \
        "$folder"/usr/local/lib/python3*/dist-packages/virtme/virtmods.py
    # A guest that does not answer would hold vmtest.sh up for ever.
    printf '%s\n' 'ConnectTimeout 60' 'ServerAliveInterval 60' >"$folder/etc/ssh/ssh_config.d/vmtest.conf"
}

make_vmtest_disk() {
    local folder=$1 new=$1.disk.new
    in_root depmod --basedir "$folder" "$KERNEL"
    rm -f "$new"
    truncate --size=3G "$new"
    in_root mke2fs -q -t ext4 -d "$folder" "$new"
    mv "$new" "$folder.disk"
}

# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# Which accelerator QEMU may use. /dev/kvm can be there and yet run no stock kernel, so KVM is used only where a probe
# has booted one with it.

ACCEL_MARKER="a guest runs under kvm"

# Sets ACCEL to kvm or tcg. The probe's result holds for as long as host, kernel and access to /dev/kvm are the same.
ensure_accel() {
    local folder=$VSOCK_CACHE/accel access=none probed why
    [[ ! -e /dev/kvm ]] || access=refused
    [[ ! -r /dev/kvm || ! -w /dev/kvm ]] || access=granted
    probed="$(uname -r) $KERNEL $access"
    if [[ ! -e $folder/kind || $(<"$folder/probed") != "$probed" ]]; then
        mkdir -p "$folder"
        rm -f "$folder/kind"
        ACCEL=tcg
        case $access in
        none) why="this machine has no /dev/kvm" ;;
        refused) why="/dev/kvm is there, but may not be opened" ;;
        granted)
            step "probe /dev/kvm with a guest" probe_kvm "$folder"
            if grep -q "$ACCEL_MARKER" "$folder/answer"; then
                ACCEL=kvm why="the probe's guest booted with it"
            else
                why="/dev/kvm is there, but no guest boots with it ($(head -n 1 "$folder/answer"))"
            fi
            ;;
        esac
        say "  guests run under ${ACCEL^^}: $why"
        say "$probed" >"$folder/probed"
        say "$ACCEL" >"$folder/kind"
    fi
    ACCEL=$(<"$folder/kind")
}

# Boots the kernel with an init that says a line and powers off. Writes that line, or what was seen instead, to
# FOLDER/answer: that there is no guest is an answer and no failure.
probe_kvm() {
    local folder=$1 tree=$1/initramfs.d
    mkdir -p "$tree/bin"
    cp "$ROOT/bin/busybox" "$tree/bin/"
    printf '#!/bin/busybox sh\necho "%s"\n/bin/busybox poweroff -f\n' "$ACCEL_MARKER" >"$tree/init"
    chmod +x "$tree/init"
    in_root sh -c "cd '$tree' && find . | cpio --quiet -o -H newc" >"$folder/initramfs"
    # The guest ends with this command: the first line that tells is enough.
    # shellcheck disable=SC2016  # for the inner shell
    in_root bash -c 'grep -m 1 -E "$0|KVM internal error|[Cc]ould not access KVM|failed to initialize kvm" < <("$@" 2>&1)' \
        "$ACCEL_MARKER" timeout 60 \
        qemu-system-x86_64 -accel kvm -cpu host -m 256 -nodefaults -display none -no-reboot -serial file:/dev/stdout \
        -kernel "$KERNEL_DIR/vmlinuz" -initrd "$folder/initramfs" -append "console=ttyS0 panic=-1 quiet" \
        >"$folder/answer" || say "no sign of a guest within 60 s" >"$folder/answer"
}

# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# The module, built by Kbuild in a folder of the cache.

# use_kernel_tree KDIR: sets what run_kbuild needs for a kernel build tree: of this cache, with the compilers of the
# toolchain root, or any other, with the machine's own.
use_kernel_tree() {
    local kdir
    kdir=$(realpath -qe "$1") || die "there is no kernel build tree in $1" \
        "install the headers of that kernel, or 'make kernel-tree' for a stock kernel's tree"
    [[ -e $kdir/rust/libkernel.rmeta ]] ||
        die "the kernel tree $kdir has no Rust metadata (rust/libkernel.rmeta), so no Rust module can be built against it" \
            "'make kernel-tree' prepares a tree for a stock kernel and says how to build for it; or give one that has it: make KDIR=<tree>"
    KERNEL=$(<"$kdir/include/config/kernel.release")
    resolve_kernel
    KERNEL_TREE=$kdir
    KBUILD_RUNNER='env'
    [[ $kdir != "$VSOCK_CACHE"/* ]] || KBUILD_RUNNER=in_root
    COMPILER_MENDING="install that one; or use a tree of 'make kernel-tree', which comes with its compilers" \
        check_compilers "$kdir/.config" "$KBUILD_RUNNER"
}

# run_kbuild TARGET ARGUMENT...: MODULE_OUTPUT is another folder for what is built.
run_kbuild() {
    local output=${MODULE_OUTPUT:-$KERNEL_DIR/module} compiler=(CC="$KERNEL_CC")
    # A kernel built by clang takes no modules of the GNU linker.
    [[ $KERNEL_CC != clang ]] || compiler=(LLVM=1)
    # Kbuild creates one level of the folder only.
    mkdir -p "$output"
    "$KBUILD_RUNNER" make -C "$KERNEL_TREE" M="$SOURCE_DIR" MO="$output" "${compiler[@]}" -j"$JOBS" "$@"
}

# build_module_for KDIR
build_module_for() {
    use_kernel_tree "$1"
    step "build virtio_vsock_rs.ko for $KERNEL" run_kbuild modules
    say "  $KERNEL_DIR/module/virtio_vsock_rs.ko"
}

# Builds the module for the kernel of the tests.
build_module() {
    ensure_kernel_tree
    use_kernel_tree "$KERNEL_TREE"
    step "build virtio_vsock_rs.ko for $KERNEL" run_kbuild modules
}

# install_module KDIR PREFIX: builds the module and puts it, and what prefers it to the C driver, below PREFIX. Sets
# KERNEL; depmod is left to the caller.
install_module() {
    local prefix=$2 modules staging
    build_module_for "$1"
    modules=$prefix/lib/modules/$KERNEL
    [[ -d $modules ]] || die "the kernel $KERNEL is not installed: there is no $modules" \
        "install that kernel, or give the KDIR of one that is"
    [[ -w $modules ]] || die "cannot write to $modules" "sudo make install"
    staging=$KERNEL_DIR/install
    discard "$staging"
    step "make the installed form of the module" run_kbuild modules_install \
        INSTALL_MOD_PATH="$staging" INSTALL_MOD_DIR=updates DEPMOD=true
    mkdir -p "$modules/updates" "$prefix/etc/modprobe.d"
    cp "$staging/lib/modules/$KERNEL/updates/"virtio_vsock_rs.ko* "$modules/updates/"
    discard "$staging"
    cat >"$prefix/etc/modprobe.d/virtio_vsock_rs.conf" <<'CONF'
# Both modules are for the virtio socket device and only one can have it: virtio_vsock_rs is loaded for it, and the
# C driver only when asked for by name. Without this file it is the other way round or by chance.
blacklist vmw_vsock_virtio_transport
CONF
}

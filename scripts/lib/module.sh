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

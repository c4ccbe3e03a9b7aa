# shellcheck shell=bash
# shellcheck disable=SC2030,SC2031  # stock_kernel_of() has settings of its own
# SPDX-License-Identifier: GPL-2.0
#
# Kernels that we build ourselves, from the source of the stock kernel, with the configurations in selftests/kernel/:
# debug and kcsan find faults that a stock kernel does not look for, vanilla has no distribution's configuration.
# FLAVOUR names one.

OWN_KERNELS=$SOURCE_DIR/selftests/kernel

# Whether KERNEL is, or FLAVOUR asks for, a kernel of our own.
is_own_kernel() {
    local flavour=${KERNEL##*-}
    [[ -n $KERNEL ]] || flavour=$FLAVOUR
    [[ $flavour != guest && -e $OWN_KERNELS/$flavour.config ]]
}

# The stock kernel whose source an own kernel is built from.
stock_kernel_of() {
    (
        KERNEL='' FLAVOUR=cloud-amd64
        resolve_kernel
        say "$KERNEL"
    )
}

# Sets KERNEL where FLAVOUR asks for a kernel of our own.
resolve_own_kernel() {
    [[ -z $KERNEL ]] || return 0
    local stock
    stock=$(stock_kernel_of)
    KERNEL=$(grep -oE '^[0-9]+(\.[0-9]+)*' <<<"$stock")-$FLAVOUR
}

# What the kernel is made of. When that changes the kernel is built anew.
own_kernel_recipe() {
    say "$KERNEL_TREE $KERNEL_SOURCE"
    cat "$OWN_KERNELS/guest.config" "$OWN_KERNELS/${KERNEL##*-}.config"
}

ensure_own_kernel() {
    local recipe=$KERNEL_DIR/recipe
    ensure_root
    ensure_kernel_source
    ! cmp -s "$recipe" <(own_kernel_recipe) || return 0
    need_space 6000 "the kernel $KERNEL"
    step "build the kernel $KERNEL" build_own_kernel
    own_kernel_recipe >"$recipe"
}

build_own_kernel() {
    local tree=$KERNEL_TREE option fragments=("$OWN_KERNELS/guest.config" "$OWN_KERNELS/${KERNEL##*-}.config")
    local make=(in_root make -C "$KERNEL_SOURCE" -j"$JOBS" O="$tree" KERNELRELEASE="$KERNEL")
    # The checkers of both C and Rust code need clang.
    grep -qx CONFIG_CC_IS_GCC=y "${fragments[@]}" || make+=(LLVM=1)
    rm -f "$KERNEL_DIR/recipe"
    mkdir -p "$tree"
    "${make[@]}" tinyconfig
    in_root env --chdir="$KERNEL_SOURCE" scripts/kconfig/merge_config.sh -m -O "$tree" "$tree/.config" "${fragments[@]}"
    "${make[@]}" olddefconfig
    # An option that does not exist any more, or lacks what it needs, would go unnoticed.
    while read -r option; do
        grep -qx "$option" "$tree/.config" || { say "the kernel's configuration did not take $option"; return 1; }
    done < <(grep -h '^CONFIG_' "${fragments[@]}")
    "${make[@]}"
    discard "$KERNEL_DIR/lib"
    "${make[@]}" INSTALL_MOD_PATH="$KERNEL_DIR" modules_install
    cp "$tree/arch/x86/boot/bzImage" "$KERNEL_DIR/vmlinuz"
}

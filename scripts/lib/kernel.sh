# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# The kernel: which release, its build tree with Rust metadata, its image and modules as the distribution ships them.
#
# Debian's header packages lack the Rust metadata, so the tree is prepared from the kernel's source package with the
# header package's configuration and Module.symvers. Symbol names of Rust depend on the crate's name and the compiler's
# version, not on the build: a module built against that tree loads into the kernel as shipped.

# Sets KERNEL, KERNEL_DIR and KERNEL_TREE. Which release the defaults mean is asked from the mirror once and kept.
resolve_kernel() {
    local record pattern
    ! is_own_kernel || resolve_own_kernel
    if [[ -z $KERNEL ]]; then
        record=$VSOCK_CACHE/kernel-release/$SUITE/$FLAVOUR/$KERNEL_VERSION
        if [[ ! -s $record ]]; then
            ensure_root
            pattern=${KERNEL_VERSION//./\\.}
            pattern="^linux-headers-${pattern//\*/[0-9.]+}(\\+[a-z0-9]+)?-$FLAVOUR\$"
            KERNEL=$(newest_kernel "$pattern")
            [[ -n $KERNEL ]] || die "$SUITE has no kernel $KERNEL_VERSION of the flavour $FLAVOUR" \
                "'make update' for new package lists, or another SUITE=, KERNEL_VERSION= or FLAVOUR="
            mkdir -p "$(dirname "$record")"
            say "$KERNEL" >"$record.new"
            mv "$record.new" "$record"
        fi
        KERNEL=$(<"$record")
    fi
    export KERNEL
    KERNEL_DIR=$VSOCK_CACHE/kernel/$KERNEL
    KERNEL_TREE=$KERNEL_DIR/tree
}

# The newest release whose headers have a name that matches a pattern, and whose source the suite has, too; nothing where there is
# none. The archive gets the packages of a new version one after the other.
newest_kernel() {
    local names name version sources
    names=$(in_root apt-cache pkgnames linux-headers-) || return
    names=$(grep -E "$1" <<<"$names" | sort -rV) || return 0
    for name in $names; do
        version=$(package_version "$name") || return
        sources=$(in_root apt-cache madison "linux-source-$(series_of "${name#linux-headers-}")") || return
        if [[ -n $version && $sources == *" $version "* ]]; then
            say "${name#linux-headers-}"
            return 0
        fi
    done
}

# The version of a package that is taken.
package_version() {
    in_root apt-cache show --no-all-versions "$1" | sed -n 's/^Version: //p'
}

# The series of a release, such as 7.3.
series_of() {
    grep -oE '^[0-9]+\.[0-9]+' <<<"$1"
}

# Forgets which release the defaults mean, and asks the mirror anew.
update_kernel_release() {
    update_root_lists
    discard "$VSOCK_CACHE/kernel-release"
}

# download_packages FOLDER NAME...: downloads packages and unpacks them, uninstalled, into a folder.
download_packages() {
    local folder=$1 package
    again fetch_packages "$@"
    for package in "$folder"/packages/*.deb; do
        in_root dpkg -x "$package" "$folder"
    done
    discard "$folder/packages"
}

# fetch_packages FOLDER NAME...: downloads packages into packages/ of a folder.
fetch_packages() {
    local folder=$1
    shift
    discard "$folder"
    mkdir -p "$folder/packages"
    in_root env --chdir="$folder/packages" apt-get download "$@" || {
        # The lists may be older than what the mirror keeps.
        in_root apt-get update
        in_root env --chdir="$folder/packages" apt-get download "$@"
    }
}

# The version of the package that has a release, which that of its source must be.
kernel_package_version() {
    local stock=$KERNEL
    ! is_own_kernel || stock=$(stock_kernel_of)
    package_version "linux-headers-$stock"
}

# Sets KERNEL_SOURCE to the release's source, unpacked.
ensure_kernel_source() {
    local version new series
    if [[ ! -s $KERNEL_DIR/package-version ]]; then
        ensure_root
        version=$(kernel_package_version) || true
        [[ -n $version ]] || die "$SUITE has no package linux-headers-$KERNEL" \
            "'make update' for new package lists, or another SUITE= or KERNEL="
        mkdir -p "$KERNEL_DIR"
        say "$version" >"$KERNEL_DIR/package-version"
    fi
    version=$(<"$KERNEL_DIR/package-version")
    KERNEL_SOURCE=$VSOCK_CACHE/source/linux-$version
    [[ ! -d $KERNEL_SOURCE ]] || return 0
    series=$(series_of "$KERNEL")
    new=$KERNEL_SOURCE.new
    discard "$new"
    need_space 2500 "the kernel source"
    step "download the source of Linux $version" download_packages "$new" "linux-source-$series=$version"
    step "unpack it" unpack_kernel_source "$new" "linux-source-$series"
    mv -T "$new/linux-source-$series" "$KERNEL_SOURCE"
    discard "$new"
}

unpack_kernel_source() {
    in_root tar --extract --directory="$1" --file="$1/usr/src/$2.tar.xz"
}

# config_text OPTION FILE: the value of an option of a kernel configuration, without quotes.
config_text() {
    sed -n "s/^$1=\"\{0,1\}\([^\"]*\)\"\{0,1\}\$/\1/p" "$2"
}

# check_compilers CONFIG RUNNER...: ends the script when the compilers that RUNNER starts are not those of a kernel
# configuration; COMPILER_MENDING says what mends that. Sets KERNEL_CC.
check_compilers() {
    local config=$1 want have
    shift
    [[ $(config_text CONFIG_RUST "$config") == y ]] ||
        die "this kernel is built without Rust (CONFIG_RUST is not set in $config)" "another KERNEL= or SUITE="
    want=$(config_text CONFIG_RUSTC_VERSION_TEXT "$config")
    have=$("$@" rustc --version 2>/dev/null) || have="no rustc"
    [[ $have == "$want" ]] ||
        die "the kernel was built with '$want', and here is '$have'; its modules need the very same compiler" \
            "$COMPILER_MENDING"
    want=$(config_text CONFIG_BINDGEN_VERSION_TEXT "$config")
    have=$("$@" bindgen --version 2>/dev/null) || have="no bindgen"
    [[ -z $want || $have == "$want" ]] ||
        die "the kernel was built with '$want', and here is '$have'" "$COMPILER_MENDING"
    want=$(config_text CONFIG_CC_VERSION_TEXT "$config")
    KERNEL_CC=${want%% *}
    [[ -z $(config_text CONFIG_CC_IS_CLANG "$config") ]] || KERNEL_CC=clang
    have=$("$@" "$KERNEL_CC" --version 2>/dev/null | head -n 1) || true
    [[ $have == "$want" ]] ||
        die "the kernel was built with '$want', and here is '${have:-no $KERNEL_CC}'" \
            "$COMPILER_MENDING"
}

ensure_kernel_tree() {
    local config headers=$KERNEL_DIR/headers stamp=$KERNEL_TREE/.complete
    ! is_own_kernel || { ensure_own_kernel; return 0; }
    # A prepared tree bears its own path: it is made in place, and anew when the cache was moved.
    [[ ! -e $stamp || $(<"$stamp") != "$KERNEL_TREE" ]] || return 0
    ensure_root
    ensure_kernel_source
    need_space 700 "the kernel tree"
    if [[ ! -e $headers/.complete ]]; then
        step "download the headers of $KERNEL" download_packages "$headers" "linux-headers-$KERNEL"
        touch "$headers/.complete"
    fi
    config=$headers/usr/src/linux-headers-$KERNEL/.config
    COMPILER_MENDING="rm -rf $ROOT, and make it again: the suite may have the right one by now; else another KERNEL=" \
        check_compilers "$config" in_root
    step "prepare the kernel tree with Rust metadata ($KERNEL)" prepare_kernel_tree "$config"
    discard "$headers"
    say "$KERNEL_TREE" >"$stamp"
}

# prepare_kernel_tree CONFIG
prepare_kernel_tree() {
    local config=$1 tree=$KERNEL_TREE
    local make=(in_root make -C "$KERNEL_SOURCE" -j"$JOBS" O="$tree" CC="$KERNEL_CC" KERNELRELEASE="$KERNEL")
    discard "$tree"
    mkdir -p "$tree"
    cp "$config" "$tree/.config"
    "${make[@]}" olddefconfig
    diff <(grep ^CONFIG_ "$config") <(grep ^CONFIG_ "$tree/.config") ||
        { say "the configuration does not fit the source"; return 1; }
    "${make[@]}" prepare modules_prepare
    [[ -e $tree/rust/libkernel.rmeta ]]
    cp "$(dirname "$config")/Module.symvers" "$tree/"
}

# The kernel's image and modules, as shipped.
ensure_kernel_image() {
    local new=$KERNEL_DIR/image.new
    [[ ! -e $KERNEL_DIR/vmlinuz ]] || return 0
    ! is_own_kernel || { ensure_own_kernel; return 0; }
    ensure_root
    need_space 1000 "the kernel image"
    step "download the kernel $KERNEL and its modules" download_kernel_image "$new"
    discard "$KERNEL_DIR/lib"
    mv "$new/usr/lib" "$KERNEL_DIR/lib"
    mv "$KERNEL_DIR/lib/modules/$KERNEL/vmlinuz.unsigned" "$KERNEL_DIR/vmlinuz"
    discard "$new"
}

download_kernel_image() {
    download_packages "$1" "linux-binary-unsigned-$KERNEL" "linux-modules-$KERNEL"
    in_root depmod --basedir "$1/usr" "$KERNEL"
}

# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# The toolchain root: a Debian system in the cache with the compilers that the kernel was built with, and QEMU.

ROOT_PACKAGES=(
    # kernel and module builds
    make gcc rustc rust-src rustfmt rust-clippy bindgen clang lld llvm
    libc6-dev libelf-dev libssl-dev libdw-dev zlib1g-dev bc flex bison kmod cpio xz-utils zstd pahole rsync
    python3-minimal
    # programs of the tests
    cargo ca-certificates liburing-dev
    # machines
    qemu-system-x86 busybox-static e2fsprogs
    # checks
    shellcheck perl git systemd udev
)
# What comes from SUITE when that is a backports suite; all the rest is from BASE_SUITE, the compilers above all.
BACKPORTED=(src:linux src:qemu src:seabios)

# A mirror that was not brought up to date for a week or so has package lists that have expired. They are signed all the
# same, and for tests newer ones are not worth a failure.
EXPIRED='Release file for .* is expired'
ACCEPT_EXPIRED='Acquire::Check-Valid-Until "false"'

KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

# The machine's own Debian mirror; nothing where it has none.
machine_mirror() {
    [[ -z $MIRROR ]] || { say "$MIRROR"; return; }
    local codename list sites site
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && [[ $ID == debian ]] && say "${VERSION_CODENAME:-}") || return 0
    # shellcheck disable=SC2016  # apt expands these
    list=(apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(ORIGIN) $(SITE)' 'Created-By: Packages')
    sites=$("${list[@]}" | awk -v release="$codename" '$1 == release && $2 == "main" && $3 == "Debian" { print $4 }')
    [[ -n $sites ]] ||
        sites=$("${list[@]}" --no-release-info | awk -v release="$codename" '$1 == release && $2 == "main" { print $NF }')
    for site in $sites; do
        [[ $site != mirror+file:* ]] || site=$(awk 'NF && !/^#/ { print $1; exit }' "${site#mirror+file:}")
        case $site in
        http://* | https://*)
            say "$site"
            return
            ;;
        esac
    done
}

write_root_preferences() {
    [[ $SUITE != "$BASE_SUITE" ]] || return 0
    printf 'Package: *\nPin: release n=%s\nPin-Priority: 100\n\n' "$SUITE"
    printf 'Package: %s\nPin: release n=%s\nPin-Priority: 990\n' "${BACKPORTED[*]}" "$SUITE"
}

# What set-up itself needs of the machine is all that is ever installed on it.
install_prerequisites() {
    local missing=()
    command -v mount >/dev/null || missing+=(mount)
    if ! root_is_complete; then
        command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
        [[ -e $KEYRING ]] || missing+=(debian-archive-keyring)
    fi
    ((${#missing[@]} > 0)) || return 0
    need_root "installing ${missing[*]}"
    command -v apt-get >/dev/null ||
        die "this machine lacks ${missing[*]} and has no apt-get" "use a Debian machine, bookworm or later"
    say "  this machine lacks ${missing[*]}: installing"
    step "install ${missing[*]}" install_on_machine "${missing[@]}"
}

# A machine that has just begun may be busy with updates of its own, and apt-get does not wait for the lists' lock. The
# status of `apt-get update` says nothing: it is 0 where nothing could be downloaded, and not where a list is missing that is not
# needed.
install_on_machine() {
    local started=$SECONDS
    while ((SECONDS - started < 120)); do
        apt-get update || true
        ! DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -o "Acquire::Retries=$DOWNLOAD_RETRIES" \
            install --yes --no-install-recommends "$@" || return 0
        sleep 10
    done
    return 1
}

# make_root NEW_FOLDER MIRROR PACKAGE...: without a mirror mmdebstrap takes Debian's default.
make_root() {
    local new=$1 mirror=$2 preferences=$VSOCK_CACHE/root/preferences options=() option
    shift 2
    options+=("--include=$(IFS=, && say "$*")")
    write_root_preferences >"$preferences"
    options+=("--setup-hook=install -D -m 644 '$preferences' \"\$1/etc/apt/preferences.d/kernel-suite\"")
    if [[ $SUITE != "$BASE_SUITE" ]]; then
        options+=("--setup-hook=sed -n 's/ $BASE_SUITE main\$/ $SUITE main/p' \"\$1/etc/apt/sources.list\" |
            tee -a \"\$1/etc/apt/sources.list\"")
    fi
    # The machine's proxy and TLS settings hold for the root as well, and what it does where its clock is wrong.
    while read -r option; do
        options+=("--aptopt=$option")
    done < <(apt-config dump | grep -iE '^Acquire::(https?::|Check-Date )' | grep -v ' "";$')
    again install_root_from_any_lists "$new" "$mirror" "${options[@]}"
}

# install_root_from_any_lists NEW_FOLDER MIRROR OPTION...: also where the mirror's lists have expired.
install_root_from_any_lists() {
    local new=$1 said=$VSOCK_CACHE/root/said status
    discard "$new"
    # Not `if`: that would switch off `set -e` inside.
    set +e
    (set -e && install_root "$@") 2>&1 | tee "$said"
    status=${PIPESTATUS[0]}
    set -e
    ((status != 0)) || return 0
    grep -qE "$EXPIRED" "$said" || return "$status"
    discard "$new"
    install_root "$@" --aptopt="$ACCEPT_EXPIRED"
}

# install_root NEW_FOLDER MIRROR OPTION...
install_root() {
    local new=$1 mirror=$2
    shift 2
    # In namespaces of its own: whatever happens to it, no mount and no process is left.
    unshare --mount --propagation private --pid --fork --kill-child --mount-proc \
        mmdebstrap --variant=apt --mode=root \
        --aptopt='APT::Install-Recommends "false"' --aptopt="Acquire::Retries \"$DOWNLOAD_RETRIES\"" \
        --aptopt='APT::Sandbox::User "root"' --skip=cleanup/apt/lists \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        "$@" "$BASE_SUITE" "$new" ${mirror:+"$mirror"}
}

root_is_complete() {
    [[ -e $ROOT/.complete && $(<"$ROOT/.complete") == "${ROOT_PACKAGES[*]}" ]]
}

ensure_root() {
    local new=$ROOT.new mirror
    install_prerequisites
    ! root_is_complete || return 0
    need_root "the toolchain root"
    discard "$new" "$ROOT"
    need_space 3500 "the toolchain root"
    mkdir -p "$VSOCK_CACHE/root"
    mirror=$(machine_mirror)
    step "install the toolchain root ($SUITE)" make_root "$new" "$mirror" "${ROOT_PACKAGES[@]}"
    ! grep -rqF "$ACCEPT_EXPIRED" "$new/etc/apt/apt.conf.d" ||
        warn "the mirror's package lists of $SUITE have expired; taken all the same: newer packages may be missing"
    say "${ROOT_PACKAGES[*]}" >"$new/.complete"
    mv -T "$new" "$ROOT"
}

# Asks the mirror for its newest package lists.
update_root_lists() {
    step "update the root's package lists" again in_root apt-get -o APT::Update::Error-Mode=any update
}

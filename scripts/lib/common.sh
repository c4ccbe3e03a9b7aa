# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# What every script shares: where things are, how a step is shown, logged, skipped and locked.
# shellcheck disable=SC2034  # the settings are for the scripts that source this

# --- Settings: each can be given in the environment or on make's command line -------------------------------------

SOURCE_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
export VSOCK_CACHE=${VSOCK_CACHE:-$SOURCE_DIR/build}
SUITE=${SUITE:-trixie-backports}          # the Debian suite that has the kernel and QEMU
FLAVOUR=${FLAVOUR:-cloud-amd64}           # the kernel's flavour: what follows the last dash-joined version
KERNEL_VERSION=${KERNEL_VERSION:-7.3.*}   # which of the suite's kernels; the newest one that matches is taken
KERNEL=${KERNEL:-}                        # a whole release instead, such as 7.3.4+deb13-cloud-amd64
MIRROR=${MIRROR:-}                        # an apt mirror instead of the machine's own
JOBS=${JOBS:-$(nproc)}

[[ $VSOCK_CACHE == /* ]] || VSOCK_CACHE=$PWD/$VSOCK_CACHE
BASE_SUITE=${SUITE%-backports}            # the suite that has the compilers
ROOT=${ROOT_FOLDER:-$VSOCK_CACHE/root/$SUITE}   # the toolchain root, or another one that in-root is to enter
LOGS=$VSOCK_CACHE/log
DOWNLOAD_RETRIES=10                       # of each file, where the connection is at fault

# --- Messages -----------------------------------------------------------------------------------------------------

say() { printf '%s\n' "$*"; }
warn() { printf 'warning: %s\n' "$*" >&2; }

# die REASON [MENDING]: ends the script with the reason and what mends it.
die() {
    printf '\nerror: %s\n' "$1" >&2
    [[ $# -lt 2 ]] || printf '  mend: %s\n' "$2" >&2
    exit 1
}

[[ $SOURCE_DIR$VSOCK_CACHE != *[[:space:]:]* ]] ||
    die "the kernel's build system takes no path with a space or a colon: $SOURCE_DIR, $VSOCK_CACHE" "another folder"

# --- Steps --------------------------------------------------------------------------------------------------------

# step DESCRIPTION COMMAND...: runs the command, shows one line with its time; its output goes to a log, whose end is
# shown when the command fails. The command runs in a subshell with `set -e`.
step() {
    local description=$1 log started=$SECONDS status=0 clock=
    shift
    mkdir -p "$LOGS"
    log=$LOGS/$(tr -cs '[:alnum:].+\n' - <<<"$description").log
    printf '  %-70s ' "$description"
    if [[ -t 1 ]]; then
        (while sleep 1 && kill -0 $$ 2>/dev/null; do printf '\r  %-70s %3d s' "$description" $((SECONDS - started)); done) &
        clock=$!
    fi
    # Not `if (...)` nor `(...) ||`: these would switch off `set -e` inside.
    set +e
    (
        set -e
        exec >"$log" 2>&1 </dev/null
        "$@"
    )
    status=$?
    set -e
    if [[ -n $clock ]]; then
        kill "$clock"
        wait "$clock" 2>/dev/null || true
        printf '\r  %-70s ' "$description"
    fi
    if ((status == 0)); then
        printf '%3d s\n' $((SECONDS - started))
        return 0
    fi
    printf 'failed after %d s\n' $((SECONDS - started))
    printf '\n--- the end of %s\n' "$log" >&2
    tail -n 80 "$log" >&2
    printf -- '---\n' >&2
    explain_failure "$log" "$description"
}

# Ends the script with the cause that a failed step's log tells, as far as it is a known one.
explain_failure() {
    local log=$1 description=$2
    if grep -qiE 'no space left on device|not enough free (disk )?space' "$log"; then
        die "the disk ran full: $description" "free some space, or put the cache elsewhere: VSOCK_CACHE=/other/disk make ..."
    elif grep -qiE 'could not resolve|temporary failure (in name resolution|resolving)|could not connect|connection (refused|timed out)|network is unreachable|could not handshake' "$log"; then
        die "the mirror or registry is not reachable: $description" \
            "check the network, then run the same command again; another mirror: MIRROR=<url> make ..."
    elif grep -qiE 'NO_PUBKEY|not available in the keyring' "$log"; then
        die "this machine does not know the archive keys of $SUITE: $description" \
            "apt-get update && apt-get install debian-archive-keyring, then run the same command again"
    elif grep -qiE 'release file for .* is expired' "$log"; then
        die "the mirror's package lists of $SUITE have expired: $description" \
            "a mirror that is kept up to date: MIRROR=<url> make ..."
    elif grep -qiE 'does not have a release file' "$log"; then
        die "the mirror has no suite $SUITE: $description" "another SUITE=, or another mirror: MIRROR=<url> make ..."
    elif grep -qiE '404 +not found|hash sum mismatch' "$log"; then
        die "the mirror does not have what its lists promise: $description" \
            "'make update' takes the newest kernel and package lists, then run the same command again; another mirror: MIRROR=<url> make ..."
    elif grep -qiE 'unable to locate package|has no installation candidate|unmet dependencies|version .* was not found' "$log"; then
        die "a package is gone from $SUITE: $description" "'make update', or another SUITE=, KERNEL_VERSION= or FLAVOUR="
    fi
    die "$description (the whole log: $log)" "see the log, then run the same command again: what is done stays done"
}

# again COMMAND...: runs a command that downloads, up to three times: apt does not ask a second time where a server or a proxy
# answers that it cannot just now, nor does cargo after some answers. For steps: it needs `set -e`.
again() {
    local attempt status
    trap 'exit 130' INT
    for attempt in 1 2 3; do
        # Not `if (...)` nor `(...) ||`: these would switch off `set -e` inside.
        set +e
        (
            set -e
            "$@"
        )
        status=$?
        set -e
        ((status != 0)) || return 0
        say "attempt $attempt has failed: $1"
        ((attempt == 3)) || sleep $((attempt * 20))
    done
    return "$status"
}

# --- Cache --------------------------------------------------------------------------------------------------------

need_root() {
    [[ $(id -u) == 0 ]] || die "$1 needs root (packages, mounts, chroot)" "sudo make ${MAKE_TARGET:-...}"
}

# need_space MEBIBYTES PURPOSE: ends the script when the cache's file system has less.
need_space() {
    local free
    mkdir -p "$VSOCK_CACHE"
    free=$(df --output=avail --block-size=1M "$VSOCK_CACHE" | tail -n 1)
    ((free >= $1)) || die "$2 needs $1 MiB in $VSOCK_CACHE, and ${free// /} MiB are free" \
        "free some space, or put the cache elsewhere: VSOCK_CACHE=/other/disk make ..."
}

# Removes folders of the cache, never across a mount.
discard() {
    rm -rf --one-file-system -- "$@"
}

# One set-up at a time in a cache. The lock goes with the process that holds it.
lock_cache() {
    mkdir -p "$VSOCK_CACHE" 2>/dev/null || true
    [[ -w $VSOCK_CACHE ]] ||
        die "cannot write to the cache $VSOCK_CACHE" "sudo make ..., or VSOCK_CACHE=/a/folder/of/yours"
    trap 'printf "\ninterrupted: the same command again goes on from here\n" >&2; exit 130' INT TERM
    exec {CACHE_LOCK}>"$VSOCK_CACHE/.lock"
    if ! flock --nonblock "$CACHE_LOCK"; then
        say "  waiting for another set-up in $VSOCK_CACHE"
        flock "$CACHE_LOCK"
    fi
}

# Runs a command inside the toolchain root.
in_root() {
    "$SOURCE_DIR/scripts/in-root" "$@"
}

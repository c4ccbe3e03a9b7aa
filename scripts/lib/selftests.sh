# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# The user-space programs of the tests: the device, the guests' agent and the harness that boots the machines.

SELFTESTS=$SOURCE_DIR/selftests
SELFTESTS_TARGET=x86_64-unknown-linux-gnu
SELFTEST_PROGRAMS=$VSOCK_CACHE/target/$SELFTESTS_TARGET/release

# cargo COMMAND ARGUMENT...: cargo of the root on the workspace, with the versions that Cargo.lock names.
selftests_cargo() {
    in_root env --chdir="$SELFTESTS" cargo "$1" --locked "${@:2}"
}

fetch_crates() {
    again selftests_cargo fetch --target "$SELFTESTS_TARGET"
}

build_selftests() {
    ensure_root
    need_space 2500 "the build of the tests"
    step "download the crates of the test programs" fetch_crates
    step "build the test programs" selftests_cargo build --release --workspace
}

# harness ARGUMENT...: runs the harness for KERNEL.
harness() {
    in_root env VSOCK_ACCEL="$ACCEL" \
        "$SELFTEST_PROGRAMS/vsock-selftest" --cache "$VSOCK_CACHE" --kernel "$KERNEL" "$@"
}

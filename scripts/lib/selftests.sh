# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# The user-space programs of the tests: the device, the guests' agent and the harness that boots the machines.

SELFTESTS=$SOURCE_DIR/selftests
SELFTEST_PROGRAMS=$VSOCK_CACHE/target/x86_64-unknown-linux-gnu/release

# cargo COMMAND ARGUMENT...: cargo of the root on the workspace, with the versions that Cargo.lock names.
selftests_cargo() {
    in_root env --chdir="$SELFTESTS" cargo "$1" --locked "${@:2}"
}

build_selftests() {
    ensure_root
    need_space 2500 "the build of the tests"
    step "build the test programs" selftests_cargo build --release --workspace
}

# harness ARGUMENT...: runs the harness for KERNEL.
harness() {
    in_root env VSOCK_ACCEL="$ACCEL" \
        "$SELFTEST_PROGRAMS/vsock-selftest" --cache "$VSOCK_CACHE" --kernel "$KERNEL" "$@"
}

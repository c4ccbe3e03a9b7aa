# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# Upstream's own vsock tests, from the source of the very kernel under test, unmodified, as static programs. Their
# alarm(), poll() and some other functions are those of selftests/upstream.

WRAPPED=(alarm poll epoll_wait connect bind io_uring_queue_exit)
UPSTREAM_TESTS=(vsock_test vsock_perf vsock_diag_test vsock_uring_test)

ensure_upstream_tests() {
    local new=$KERNEL_DIR/upstream.new
    [[ ! $KERNEL_DIR/upstream -nt $SOURCE_DIR/selftests/upstream/libc_wrappers.c ||
        ! $KERNEL_DIR/upstream -nt $SOURCE_DIR/scripts/lib/upstream-tests.sh ]] || return 0
    discard "$KERNEL_DIR/upstream"
    ensure_root
    ensure_kernel_source
    step "build upstream's vsock tests" build_upstream_tests "$new"
    mv -T "$new/programs" "$KERNEL_DIR/upstream"
    discard "$new"
}

# build_upstream_tests FOLDER: builds a copy, for the source stays as it is.
build_upstream_tests() {
    local new=$1 build=$1/tools/testing/vsock
    discard "$new"
    mkdir -p "$new/tools/testing" "$new/programs"
    ln -s "$KERNEL_SOURCE/tools/include" "$new/tools/include"
    cp -R "$KERNEL_SOURCE/tools/testing/vsock" "$build"
    cp "$SOURCE_DIR/selftests/upstream/libc_wrappers.c" "$build/"
    in_root make -C "$build" -j"$JOBS" libc_wrappers.o
    in_root make -C "$build" -j"$JOBS" LDFLAGS="-static ${WRAPPED[*]/#/-Wl,--wrap=} libc_wrappers.o" "${UPSTREAM_TESTS[@]}"
    (cd "$build" && install "${UPSTREAM_TESTS[@]}" "$new/programs")
}

// SPDX-License-Identifier: GPL-2.0

/*
 * alarm(), poll(), epoll_wait(), connect(), bind() and io_uring_queue_exit() for upstream's test programs, which are made for
 * machines that are an order of magnitude faster than the emulated ones of these tests.
 */

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <linux/vm_sockets.h>

static const unsigned int TIMES_SLOWER = 6;

/* Of limits that are short, a larger part is lost with a processor that does something else. */
static const int TIMES_SLOWER_IN_SHORT = 20;
static const int SHORT_MS = 1000;

/* The kernel's own limit is 2 s. */
static const struct timeval CONNECT_TIMEOUT = { .tv_sec = 12 };

static const struct timespec BIND_INTERVAL = { .tv_nsec = 10 * 1000 * 1000 };

static const struct timespec EXIT_INTERVAL = { .tv_nsec = 1000 * 1000 };

/* For 60 s at least. */
static const int EXIT_ATTEMPTS = 60 * 1000;

/* For 5 s: without an RST the kernel itself gives a closed connection up after 8 s. */
static const int BIND_ATTEMPTS = 500;

unsigned int __real_alarm(unsigned int seconds);
unsigned int __wrap_alarm(unsigned int seconds);
int __real_poll(struct pollfd *fds, nfds_t count, int timeout_ms);
int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout_ms);
int __real_epoll_wait(int epoll, struct epoll_event *events, int count, int timeout_ms);
int __wrap_epoll_wait(int epoll, struct epoll_event *events, int count, int timeout_ms);
int __real_connect(int fd, const struct sockaddr *address, socklen_t length);
int __wrap_connect(int fd, const struct sockaddr *address, socklen_t length);
int __real_bind(int fd, const struct sockaddr *address, socklen_t length);
int __wrap_bind(int fd, const struct sockaddr *address, socklen_t length);

/* Not all of the programs use it. */
struct io_uring;
void __real_io_uring_queue_exit(struct io_uring *ring) __attribute__((weak));
void __wrap_io_uring_queue_exit(struct io_uring *ring);

/* A test is stopped after 10 s. One that hangs is stopped as before, later. */
unsigned int __wrap_alarm(unsigned int seconds)
{
	return __real_alarm(seconds * TIMES_SLOWER);
}

/* Negative is without a limit. */
static int longer(int timeout_ms)
{
	return timeout_ms * (timeout_ms < SHORT_MS ? TIMES_SLOWER_IN_SHORT : (int)TIMES_SLOWER);
}

/* A test waits 100 ms for a completion. */
int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout_ms)
{
	return __real_poll(fds, count, longer(timeout_ms));
}

/* A test waits 10 s for its peer to close. */
int __wrap_epoll_wait(int epoll, struct epoll_event *events, int count, int timeout_ms)
{
	return __real_epoll_wait(epoll, events, count, longer(timeout_ms));
}

int __wrap_connect(int fd, const struct sockaddr *address, socklen_t length)
{
	if (address->sa_family == AF_VSOCK)
		setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &CONNECT_TIMEOUT, sizeof(CONNECT_TIMEOUT));
	return __real_connect(fd, address, length);
}

/*
 * "double bind connect" closes a connection and binds to its port again when the peer has said over TCP that it has seen the
 * end. The port is free once the peer's RST has come, and nothing but the processors' load decides which of them is first.
 */
int __wrap_bind(int fd, const struct sockaddr *address, socklen_t length)
{
	int result = __real_bind(fd, address, length);
	int attempt;

	for (attempt = 1; attempt < BIND_ATTEMPTS; attempt++) {
		if (result == 0 || errno != EADDRINUSE || address->sa_family != AF_VSOCK)
			break;
		nanosleep(&BIND_INTERVAL, NULL);
		result = __real_bind(fd, address, length);
	}
	return result;
}

/* Whether the kernel has let go of all memory that was registered for io_uring. */
static bool is_unpinned(void)
{
	FILE *status = fopen("/proc/self/status", "r");
	unsigned long pinned = 0;
	char line[256];

	if (!status)
		return true;
	while (fgets(line, sizeof(line), status)) {
		if (sscanf(line, "VmPin: %lu", &pinned) == 1)
			break;
	}
	fclose(status);
	return pinned == 0;
}

/*
 * The kernel takes a ring apart after the call, and interrupts the program for that. Where it is in the connect() of the next
 * round by then, that fails with EINTR and is called again, and the first answer is refused meanwhile: if the server has accepted
 * that connection already, nobody listens any more. The memory that is registered is let go of last.
 */
void __wrap_io_uring_queue_exit(struct io_uring *ring)
{
	int attempt;

	__real_io_uring_queue_exit(ring);
	for (attempt = 0; attempt < EXIT_ATTEMPTS && !is_unpinned(); attempt++)
		nanosleep(&EXIT_INTERVAL, NULL);
}

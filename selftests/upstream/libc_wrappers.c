// SPDX-License-Identifier: GPL-2.0

/*
 * alarm(), poll() and bind() for upstream's test programs, which are made for machines that are an order of magnitude faster
 * than the emulated ones of these tests.
 */

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <time.h>

static const unsigned int TIMES_SLOWER = 6;

static const struct timespec BIND_INTERVAL = { .tv_nsec = 10 * 1000 * 1000 };

/* For 5 s: without an RST the kernel itself gives a closed connection up after 8 s. */
static const int BIND_ATTEMPTS = 500;

unsigned int __real_alarm(unsigned int seconds);
unsigned int __wrap_alarm(unsigned int seconds);
int __real_poll(struct pollfd *fds, nfds_t count, int timeout_ms);
int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout_ms);
int __real_bind(int fd, const struct sockaddr *address, socklen_t length);
int __wrap_bind(int fd, const struct sockaddr *address, socklen_t length);

/* A test is stopped after 10 s. One that hangs is stopped as before, later. */
unsigned int __wrap_alarm(unsigned int seconds)
{
	return __real_alarm(seconds * TIMES_SLOWER);
}

/* A test waits 100 ms for a completion. */
int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout_ms)
{
	/* Negative is without a limit. */
	return __real_poll(fds, count, timeout_ms * (int)TIMES_SLOWER);
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

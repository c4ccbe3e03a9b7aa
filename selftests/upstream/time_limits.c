// SPDX-License-Identifier: GPL-2.0

/*
 * alarm() and poll() for upstream's test programs, which stop a test after 10 s, and wait 100 ms for a completion. The machines
 * that the tests run on are emulated, and an order of magnitude slower than those that the limits are made for. A test that
 * hangs is stopped as before, later.
 */

#include <poll.h>

static const unsigned int TIMES_SLOWER = 6;

unsigned int __real_alarm(unsigned int seconds);
unsigned int __wrap_alarm(unsigned int seconds);
int __real_poll(struct pollfd *fds, nfds_t count, int timeout_ms);
int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout_ms);

unsigned int __wrap_alarm(unsigned int seconds)
{
	return __real_alarm(seconds * TIMES_SLOWER);
}

int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout_ms)
{
	/* Negative is without a limit. */
	return __real_poll(fds, count, timeout_ms * (int)TIMES_SLOWER);
}

// SPDX-License-Identifier: GPL-2.0

/*
 * alarm() for upstream's test programs, which stop a test after 10 s. The machines that the tests run on are emulated, and an
 * order of magnitude slower than those that the limit is made for. A test that hangs is stopped as before, later.
 */

static const unsigned int TIMES_SLOWER = 6;

unsigned int __real_alarm(unsigned int seconds);
unsigned int __wrap_alarm(unsigned int seconds);

unsigned int __wrap_alarm(unsigned int seconds)
{
	return __real_alarm(seconds * TIMES_SLOWER);
}

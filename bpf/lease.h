/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Whether a daemon is there. The program goes on without one for as long as its lease says, which the daemon renews every
 * few seconds: it may have ended in order to be replaced, been killed, or be stuck. But the receivers that it has named may be
 * gone by and by, or their addresses somebody else's.
 */
#ifndef FANOUT_LEASE_H
#define FANOUT_LEASE_H

/* Written by user space through a mapping; read by the program without a lookup. */
volatile struct lease lease SEC(".data.lease") = { .until = LEASE_FOR_EVER };

/* A clock is asked once in a tick. The coarse one, since 5.11, costs less; it is behind by a tick at most. */
static __always_inline bool is_headless(struct work *work)
{
	__u64 until = lease.until, tick, now;

	if (until == LEASE_FOR_EVER)
		return false;
	tick = bpf_jiffies64();
	if (work->led_at == tick && work->led_until == until)
		return false;
	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_ktime_get_coarse_ns))
		now = bpf_ktime_get_coarse_ns();
	else
		now = bpf_ktime_get_ns();
	if (now > until)
		return true;
	work->led_at = tick;
	work->led_until = until;
	return false;
}

#endif

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Whether a daemon is there. The program goes on without one for as long as its lease says, which the daemon renews every
 * few seconds: it may have ended in order to be replaced, been killed, or be stuck. But the receivers that it has named may be
 * gone by and by, or their addresses somebody else's.
 */
#ifndef FANOUT_HEARTBEAT_H
#define FANOUT_HEARTBEAT_H

/* Written by user space through a mapping; read by the program without a lookup. */
volatile struct heartbeat heartbeat SEC(".data.heartbeat") = { .deadline = HEARTBEAT_FOREVER };

/* A clock is asked once in a tick. The coarse one, since 5.11, costs less; it is behind by a tick at most. */
static __always_inline bool is_orphaned(struct scratch *scratch)
{
	__u64 deadline = heartbeat.deadline, tick, now;

	if (deadline == HEARTBEAT_FOREVER)
		return false;
	tick = bpf_jiffies64();
	if (scratch->heartbeat_tick == tick && scratch->heartbeat_deadline == deadline)
		return false;
	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_ktime_get_coarse_ns))
		now = bpf_ktime_get_coarse_ns();
	else
		now = bpf_ktime_get_ns();
	if (now > deadline)
		return true;
	scratch->heartbeat_tick = tick;
	scratch->heartbeat_deadline = deadline;
	return false;
}

#endif

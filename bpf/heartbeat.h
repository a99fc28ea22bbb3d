/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Tells whether a daemon is alive. The program continues without one until the heartbeat's
 * deadline, which the daemon renews every few seconds: the daemon may be restarting, killed or
 * stuck. After that, the receivers it named may be gone or their addresses reused.
 */
#ifndef FANOUT_HEARTBEAT_H
#define FANOUT_HEARTBEAT_H

#include "base.h"
#include "fanout_abi.h"
#include "packet.h"

/* Written by user space through a mapping; read by the program without a lookup. */
volatile struct heartbeat heartbeat SEC(".data.heartbeat") = { .deadline = HEARTBEAT_FOREVER };

/*
 * Reads the clock once per tick. The coarse clock (Linux 5.11) is cheaper and at most one tick
 * behind.
 */
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

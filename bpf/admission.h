/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Source rules and rate limits. src/admission.rs is the counterpart: both datapaths must reach the
 * same verdict.
 *
 * A sender's token bucket is one number, the time at which it is full again (the generic cell rate
 * algorithm, ITU-T I.371). Each datagram advances it by its cost; a datagram that would advance it
 * beyond the depth of the bucket is dropped. One number can be updated atomically from several CPUs
 * on every kernel. Two CPUs that find the bucket full at the same moment may count as one: the
 * excess is at most one datagram per CPU, and only at that moment.
 */
#ifndef FANOUT_ADMISSION_H
#define FANOUT_ADMISSION_H

#include "base.h"
#include "fanout_abi.h"
#include "maps.h"
#include "packet.h"

static __always_inline bool source_allowed(__u32 rules, const struct packet *pkt)
{
	struct source_key key = {
		.prefixlen = 8 * (sizeof(key) - offsetof(struct source_key, rules)),
		.rules = rules,
	};
	__u32 *verdict;

	__builtin_memcpy(key.addr_be, pkt->src_be, sizeof(key.addr_be));
	verdict = bpf_map_lookup_elem(&sources, &key);
	return verdict && *verdict == SOURCE_ALLOWED;
}

/*
 * A super-packet is admitted if its first datagram is, and pays for all of them. Tokens taken
 * beyond an empty bucket are a debt that later datagrams wait for.
 */
static __always_inline bool within_rate(const struct listener_state *state, __u32 meter,
					const struct packet *pkt)
{
	struct bucket_key key = { .meter = meter };
	__u64 cost = state->interval * pkt->datagrams;
	__u64 now = bpf_ktime_get_ns() << METER_TICKS_SHIFT;
	__u64 full_again = now + cost, *due;

	for (int i = 0; i < 4; i++)
		key.sender_be[i] = pkt->src_be[i] & state->sender_mask_be[i];
	due = bpf_map_lookup_elem(&buckets, &key);
	if (!due) {
		if (!bpf_map_update_elem(&buckets, &key, &full_again, BPF_NOEXIST))
			return true;
		/* Another CPU created it first, or there is no memory: then admit the datagram. */
		due = bpf_map_lookup_elem(&buckets, &key);
		if (!due)
			return true;
	}
	if (*due < now)
		*due = now;
	else if (*due + state->interval > now + state->depth)
		return false;
	__sync_fetch_and_add(due, cost);
	return true;
}

/*
 * Returns why the datagram is refused, or DROP_REASONS if it is admitted. A separate function,
 * because few listeners need it.
 */
static __noinline int admission_verdict(const struct listener_state *state,
					const struct packet *pkt)
{
	__u32 rules = *(const volatile __u32 *)&state->rules;
	__u32 meter = *(const volatile __u32 *)&state->meter;

	if (rules && !source_allowed(rules, pkt))
		return DROP_SOURCE_DENIED;
	if (meter && !within_rate(state, meter, pkt))
		return DROP_RATE_LIMITED;
	return DROP_REASONS;
}

/* True if the listener has source rules or a rate limit. */
static __always_inline bool has_admission(const struct listener_state *state)
{
	return state->rules | state->meter;
}

#endif

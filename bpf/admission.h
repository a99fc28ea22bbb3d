/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Who may send to a listener, and how fast. src/admission.rs is the other half: both datapaths must decide alike.
 *
 * A sender's token bucket is one number, the time at which it will be full again (the generic cell rate algorithm, ITU-T
 * I.371). Each datagram moves it on by what a datagram costs, and one that would move it further than a bucket is deep
 * is dropped. One number can be added to atomically from several CPUs on every kernel. Two that find the bucket full at
 * the same moment may count as one: it lets through no more datagrams than there are CPUs, and only then.
 */
#ifndef FANOUT_ADMISSION_H
#define FANOUT_ADMISSION_H

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
 * A super-packet passes if its first datagram may, and pays for all of them: what it takes beyond a bucket is a debt that
 * is paid before the next.
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
		/* Another CPU was faster, or there is no memory: then nobody is kept out. */
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

/* Why the datagram is not taken; DROP_REASONS if it is. A function of its own, since few listeners need it. */
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

/* True if there is anything to ask. */
static __always_inline bool has_admission(const struct listener_state *state)
{
	return state->rules | state->meter;
}

#endif

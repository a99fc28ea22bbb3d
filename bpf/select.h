/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * From listener to downstream. Policy has been compiled into the table by user space; all that is left is an index.
 */
#ifndef FANOUT_SELECT_H
#define FANOUT_SELECT_H

/* The next place in the round of `slots` places, starting somewhere random, so that CPUs do not march in step. */
static __always_inline __u32 round_robin(__u32 *cursor, __u32 slots)
{
	__u32 next = *cursor;

	if (next == slots)
		next = 0;
	else if (next == 0 || next > slots) /* first datagram on this CPU, or the table became shorter */
		next = bpf_get_prandom_u32() % slots;
	*cursor = next + 1;
	return next;
}

/* The downstream whose turn it is and its id; NULL if the listener has none. */
static __always_inline struct downstream *select_downstream(__u32 listener_id, __u32 *downstream_id)
{
	struct listener_state *state = bpf_map_lookup_elem(&listener_states, &listener_id);
	__u32 *cursor = bpf_map_lookup_elem(&cursors, &listener_id);
	__u32 slots, index, *slot;
	__u64 table;

	if (!state || !cursor)
		return NULL;
	table = *(volatile __u64 *)&state->table;
	slots = (__u32)table;
	if (!slots)
		return NULL;
	index = (__u32)(table >> 32) + round_robin(cursor, slots);
	slot = bpf_map_lookup_elem(&table_slots, &index);
	if (!slot)
		return NULL;
	*downstream_id = *slot;
	return bpf_map_lookup_elem(&downstreams, downstream_id);
}

#endif

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Finds the listener of a destination. A lookup in a hash map costs more than any other stage, and
 * five cache lines, so an array comes first. It answers unless two destinations share an entry.
 * Foreign traffic costs only that array lookup, too.
 */
#ifndef FANOUT_MATCH_H
#define FANOUT_MATCH_H

#include "base.h"
#include "fanout_abi.h"
#include "maps.h"
#include "packet.h"

/*
 * Index of a destination in `listener_cache`; src/datapath/kernel/listener_cache.rs computes the
 * same.
 */
static __always_inline __u32 cache_index(const struct listener_key *dst)
{
	__u32 hash = (dst->addr_be[3] + dst->port_be) * LISTENER_CACHE_FACTOR;

	return hash >> (32 - LISTENER_CACHE_BITS);
}

static __always_inline bool cache_entry_matches(const struct cached_listener *entry,
						const struct listener_key *dst)
{
	return same_address(entry->addr_be, dst->addr_be) && entry->port_be == dst->port_be;
}

/*
 * Returns the cache entry of a destination and its state. The state may change at any time, so it
 * is read once.
 */
static __always_inline const struct cached_listener *cache_lookup(const struct listener_key *dst,
								  __u16 *state)
{
	__u32 index = cache_index(dst);
	const struct cached_listener *entry = bpf_map_lookup_elem(&listener_cache, &index);

	*state = entry ? *(const volatile __u16 *)&entry->state : CACHE_COLLISION;
	return entry;
}

/* Returns the listener of a datagram, or NULL. */
static __always_inline const struct fanout_listener *find_listener(const struct packet *pkt)
{
	__u16 state;
	const struct cached_listener *entry = cache_lookup(&pkt->dst, &state);

	if (entry && state == CACHE_SINGLE)
		return cache_entry_matches(entry, &pkt->dst) ? &entry->listener : NULL;
	return state == CACHE_COLLISION ? bpf_map_lookup_elem(&listeners, &pkt->dst) : NULL;
}

#endif

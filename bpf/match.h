/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * From destination to listener. A look into a hash map costs more than any other stage of this program, and five
 * cache lines, so there is a look into an array before it, which suffices where no two destinations have the same place.
 * What is somebody else's traffic costs only that, too.
 */
#ifndef FANOUT_MATCH_H
#define FANOUT_MATCH_H

/* The place of a destination in `first_look`; src/datapath/kernel/first_look.rs computes the same. */
static __always_inline __u32 first_look_at(const struct listener_key *dst)
{
	__u32 hash = (dst->addr_be[3] + dst->port_be) * FIRST_LOOK_FACTOR;

	return hash >> (32 - FIRST_LOOK_BITS);
}

static __always_inline bool is_for_one(const struct first_look *one, const struct listener_key *dst)
{
	return same_address(one->addr_be, dst->addr_be) && one->port_be == dst->port_be;
}

/* The place of a destination, and what was found there, to be read once: it may change. */
static __always_inline const struct first_look *first_look_of(const struct listener_key *dst,
							      __u16 *found)
{
	__u32 place = first_look_at(dst);
	const struct first_look *look = bpf_map_lookup_elem(&first_look, &place);

	*found = look ? *(const volatile __u16 *)&look->found : LOOK_FURTHER;
	return look;
}

/* The listener that a datagram is for, or NULL. */
static __always_inline const struct fanout_listener *listener_of(const struct packet *pkt)
{
	__u16 found;
	const struct first_look *look = first_look_of(&pkt->dst, &found);

	if (look && found == LOOK_ONE)
		return is_for_one(look, &pkt->dst) ? &look->listener : NULL;
	return found == LOOK_FURTHER ? bpf_map_lookup_elem(&listeners, &pkt->dst) : NULL;
}

#endif

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Fragmented datagrams. Only the first fragment has the ports. It is treated and counted like a
 * whole datagram, and the verdict is stored for the later fragments, which follow it.
 *
 * A later fragment that arrives before the first may belong to foreign traffic. It is passed to the
 * stack, and then so is the rest of its datagram, for the stack to reassemble: if it is for a
 * listener, the socket gets it. The same happens to a datagram whose state was evicted by too many
 * others; it is lost then, and FRAGMENT_STAT counts such fragments as strays.
 *
 * The state is deleted once the datagram is complete, so that the next one with its ID starts anew.
 * Completeness is measured in bytes; repetitions are recognised by the KiB of the datagram in which
 * they begin. Fragments smaller than that may be taken for repetitions. Then the datagram seems
 * incomplete, and its state is dropped later: after a timeout, or when its ID is reused.
 */
#ifndef FANOUT_FRAGMENTS_H
#define FANOUT_FRAGMENTS_H

#include "base.h"
#include "deliver.h"
#include "fanout_abi.h"
#include "maps.h"
#include "packet.h"
#include "rewrite.h"
#include "scratch.h"

/* How long to wait for the next fragment of a datagram, ns. Set before load. */
const volatile __u64 fragment_timeout = 2000000000;

/*
 * Most bytes that may follow one first fragment: twice the longest datagram. More is a flood, not
 * repetition.
 */
#define MAX_FRAGMENT_BYTES (2 * 65535)

static __always_inline void count_fragment(enum fragment_count kind)
{
	__u32 index = kind;
	__u64 *count = bpf_map_lookup_elem(&FRAGMENT_STAT, &index);

	if (count)
		*count += 1;
}

static __always_inline int drop_fragment(void)
{
	count_fragment(FRAGMENT_LOST);
	return TC_ACT_SHOT;
}

static __always_inline void fragment_key_of(const struct packet *pkt, struct fragment_key *key)
{
	__builtin_memcpy(key->src_be, pkt->src_be, sizeof(key->src_be));
	__builtin_memcpy(key->dst_be, pkt->dst.addr_be, sizeof(key->dst_be));
	key->id_be = pkt->fragment_id_be;
}

/* Returns the state of a datagram unless it has timed out. */
static __always_inline struct fragment_state *lookup_fragment_state(const struct fragment_key *key,
								    __u64 now)
{
	struct fragment_state *state = bpf_map_lookup_elem(&fragments, key);

	return state && now - state->last_seen < fragment_timeout ? state : NULL;
}

/* True if the destination address is a listener's, on any port. */
static __always_inline bool is_listener_address(const struct packet *pkt)
{
	struct listener_key key = { .scope = KEY_ADDRESS };

	__builtin_memcpy(key.addr_be, pkt->dst.addr_be, sizeof(key.addr_be));
	return bpf_map_lookup_elem(&listeners, &key);
}

/* Bytes of the datagram in this fragment, including the UDP header. */
static __always_inline __u32 fragment_bytes(const struct packet *pkt)
{
	return pkt->data_len + (pkt->part == FIRST_FRAGMENT ? sizeof(struct udphdr) : 0);
}

/* Records the arrival of a fragment. True if the datagram is complete. */
static __always_inline bool record_fragment(struct fragment_state *of, const struct packet *pkt,
					    __u64 now)
{
	__u32 bytes = fragment_bytes(pkt);
	__u64 bit = 1ULL << (pkt->offset >> 10 & 63);

	if (!(of->kib_seen & bit))
		of->unique_bytes += bytes;
	of->kib_seen |= bit;
	of->total_bytes += bytes;
	of->last_seen = now;
	if (!pkt->more)
		of->length = pkt->offset + bytes;
	return of->length && of->unique_bytes >= of->length;
}

enum first_fragment_state {
	FIRST_IS_NEW = 0, /* no state */
	FIRST_AFTER_LATER = 1, /* later fragments arrived before and went to the stack */
	FIRST_IS_REPEATED = 2,
};

/* Compares a first fragment with the stored state. */
__noinline int lookup_first_fragment(void)
{
	struct packet *pkt = current_packet();
	struct fragment_key key = {};
	struct fragment_state *state;

	if (!pkt)
		return FIRST_IS_NEW;
	fragment_key_of(pkt, &key);
	state = lookup_fragment_state(&key, bpf_ktime_get_ns());
	if (!state)
		return FIRST_IS_NEW;
	if (!state->udp_header)
		return FIRST_AFTER_LATER;
	/* Only the stack interprets options: not a repetition of a fragment without them. */
	if (pkt->needs_socket && state->verdict >= FRAGMENT_VERDICT_FORWARD)
		return FIRST_IS_NEW;
	/*
	 * The same datagram with another TTL is in a loop: each round counts, until the TTL
	 * expires.
	 */
	return state->udp_header == pkt->udp_header && state->ttl == pkt->ttl ? FIRST_IS_REPEATED
									      : FIRST_IS_NEW;
}

/* Stores the verdict on a first fragment (pkt->fragment_verdict) for the later ones. */
__noinline int store_fragment_verdict(__u32 listener_id, __u32 to_id)
{
	struct packet *pkt = current_packet();
	__u64 now = bpf_ktime_get_ns();
	struct fragment_state state = {};
	struct fragment_key key = {};
	struct fragment_state *previous;
	struct downstream *to;

	if (!pkt)
		return 0;
	fragment_key_of(pkt, &key);
	previous = lookup_fragment_state(&key, now);
	if (previous && !previous->udp_header)
		state = *previous;
	state.udp_header = pkt->udp_header;
	state.ttl = pkt->ttl;
	state.verdict = pkt->fragment_verdict;
	state.listener = listener_id;
	state.to_id = to_id;
	to = bpf_map_lookup_elem(&downstreams, &to_id);
	if (to) {
		__builtin_memcpy(state.to.addr_be, to->addr_be, sizeof(to->addr_be));
		state.to.port_be = to->port_be;
	}
	if (record_fragment(&state, pkt, now))
		bpf_map_delete_elem(&fragments, &key);
	else
		bpf_map_update_elem(&fragments, &key, &state, BPF_ANY);
	return 0;
}

static __always_inline int forward_fragment(struct __sk_buff *skb, struct packet *pkt,
					    const struct fragment_state *of)
{
	__u32 to_id = of->to_id;
	struct downstream *to = bpf_map_lookup_elem(&downstreams, &to_id);
	struct downstream_stats *stats = bpf_map_lookup_elem(&DOWNSTREAM_STAT, &to_id);

	if (!to || !stats || !same_address(to->addr_be, of->to.addr_be) ||
	    to->port_be != of->to.port_be)
		return drop_fragment();
	if (to->delivery == DELIVER_LOCAL)
		return rewrite_any(skb, pkt, to, NULL, pkt->ttl) ? drop_fragment() : TC_ACT_UNSPEC;
	if (to->delivery != DELIVER_NEIGHBOUR || !may_forward(pkt) || pkt->ip_len > to->mtu ||
	    !has_egress_path(skb, pkt, to, &stats->cached_hop) ||
	    deliver_egress(skb, pkt, to, &stats->cached_hop, true) != TC_ACT_REDIRECT)
		return drop_fragment();
	return TC_ACT_REDIRECT;
}

/* Result of handle_later_fragment() if copies are to be made: this plus the listener's id. */
#define COPY_TO_ALL 256

/*
 * Passes a later fragment without state to the stack, with the rest of its datagram if the address
 * is a listener's.
 */
static __always_inline int pass_stray_fragment(const struct packet *pkt,
					       const struct fragment_key *key, __u64 now)
{
	struct fragment_state state = { .verdict = FRAGMENT_VERDICT_PASS };

	if (!is_listener_address(pkt))
		return TC_ACT_UNSPEC;
	count_fragment(FRAGMENT_STRAY);
	record_fragment(&state, pkt, now);
	bpf_map_update_elem(&fragments, key, &state, BPF_ANY);
	return TC_ACT_UNSPEC;
}

static __always_inline int apply_fragment_verdict(struct __sk_buff *skb, struct packet *pkt,
						  const struct fragment_state *of)
{
	switch (of->verdict) {
	case FRAGMENT_VERDICT_FORWARD:
		return forward_fragment(skb, pkt, of);
	case FRAGMENT_VERDICT_COPY:
		return COPY_TO_ALL + of->listener;
	case FRAGMENT_VERDICT_PASS:
		return TC_ACT_UNSPEC;
	}
	return TC_ACT_SHOT;
}

/*
 * Returns the verdict on a later fragment or a repeated first one, or COPY_TO_ALL plus the
 * listener's id.
 */
__noinline int handle_later_fragment(struct __sk_buff *skb)
{
	struct packet *pkt = current_packet();
	__u64 now = bpf_ktime_get_ns();
	struct fragment_key key = {};
	struct fragment_state *state;
	bool complete;
	int verdict;

	if (!pkt)
		return TC_ACT_UNSPEC;
	fragment_key_of(pkt, &key);
	state = lookup_fragment_state(&key, now);
	if (!state)
		return pass_stray_fragment(pkt, &key, now);
	if (state->verdict != FRAGMENT_VERDICT_PASS &&
	    state->total_bytes + fragment_bytes(pkt) > MAX_FRAGMENT_BYTES)
		return drop_fragment();
	complete = record_fragment(state, pkt, now);
	verdict = apply_fragment_verdict(skb, pkt, state);
	if (complete)
		bpf_map_delete_elem(&fragments, &key);
	return verdict;
}

#endif

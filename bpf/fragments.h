/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Datagrams in fragments. Only the first fragment has the ports, so it is treated like a whole datagram, in whose place it
 * is counted, and what has been decided about it is remembered for the others: they go the same way.
 *
 * One that comes before the first cannot be told from one of a datagram for somebody else on this host. It is left to the
 * stack, and then so is all of its datagram, for the stack to put together: if it is a listener's, its socket gets
 * it. The same becomes of a datagram that has been forgotten meanwhile, because too many others have come. It is lost then;
 * FRAGMENT_STAT counts such fragments as strays.
 *
 * What is remembered is forgotten once the datagram is complete, so that the next one with its number starts anew.
 * Completeness is told by bytes; repetitions are recognised by the KiB of the datagram in which they begin. Smaller
 * fragments may be taken for repetitions, which makes the datagram seem incomplete, and it is forgotten later: after a
 * pause, or when its number is used again.
 */
#ifndef FANOUT_FRAGMENTS_H
#define FANOUT_FRAGMENTS_H

/* How long after the latest fragment another is still waited for, ns. Set before load. */
const volatile __u64 fragment_patience = 2000000000;

/* Bytes that may follow one first fragment: each of the longest datagram twice. More are no repetitions but a flood. */
#define MOST_FRAGMENT_BYTES (2 * 65535)

static __always_inline void count_fragment(enum fragment_count what)
{
	__u32 index = what;
	__u64 *count = bpf_map_lookup_elem(&FRAGMENT_STAT, &index);

	if (count)
		*count += 1;
}

static __always_inline int lose_fragment(void)
{
	count_fragment(FRAGMENT_LOST);
	return TC_ACT_SHOT;
}

static __always_inline void key_of(const struct packet *pkt, struct fragment_key *key)
{
	__builtin_memcpy(key->src_be, pkt->src_be, sizeof(key->src_be));
	__builtin_memcpy(key->dst_be, pkt->dst.addr_be, sizeof(key->dst_be));
	key->id_be = pkt->fragment_id_be;
}

/* What is remembered of the datagram, if it is not too long ago. */
static __always_inline struct fragments *remembered(const struct fragment_key *key, __u64 now)
{
	struct fragments *known = bpf_map_lookup_elem(&fragments, key);

	return known && now - known->latest < fragment_patience ? known : NULL;
}

/* True if the address is a listener's, for packets that have no port. */
static __always_inline bool is_listened_on(const struct packet *pkt)
{
	struct listener_key key = { .scope = KEY_ADDRESS };

	__builtin_memcpy(key.addr_be, pkt->dst.addr_be, sizeof(key.addr_be));
	return bpf_map_lookup_elem(&listeners, &key);
}

/* How much of its datagram a fragment holds, the UDP header included. */
static __always_inline __u32 bytes_in(const struct packet *pkt)
{
	return pkt->here + (pkt->part == FIRST_FRAGMENT ? sizeof(struct udphdr) : 0);
}

/* Notes that a fragment has come. True if no more are to come. */
static __always_inline bool note_fragment(struct fragments *of, const struct packet *pkt, __u64 now)
{
	__u32 bytes = bytes_in(pkt);
	__u64 bit = 1ULL << (pkt->offset >> 10 & 63);

	if (!(of->seen & bit))
		of->fresh += bytes;
	of->seen |= bit;
	of->all += bytes;
	of->latest = now;
	if (!pkt->more)
		of->end = pkt->offset + bytes;
	return of->end && of->fresh >= of->end;
}

enum again {
	FIRST_OF_NEW = 0, /* nothing of the datagram is known */
	FIRST_OF_PASSED = 1, /* others have come before and gone up the stack */
	FIRST_REPEATED = 2,
};

/* How a first fragment stands to what is remembered. */
__noinline int look_back(void)
{
	struct packet *pkt = current_packet();
	struct fragment_key key = {};
	struct fragments *known;

	if (!pkt)
		return FIRST_OF_NEW;
	key_of(pkt, &key);
	known = remembered(&key, bpf_ktime_get_ns());
	if (!known)
		return FIRST_OF_NEW;
	if (!known->first)
		return FIRST_OF_PASSED;
	/* One with options, which only the stack interprets, is no repetition of one without. */
	if (pkt->exotic && known->fate >= FRAGMENTS_FORWARDED)
		return FIRST_OF_NEW;
	/* One that is otherwise the same but older has been in a loop: each round counts, until its time is over. */
	return known->first == pkt->udp_header && known->ttl == pkt->ttl ? FIRST_REPEATED
									 : FIRST_OF_NEW;
}

/* Remembers for the others what has been decided about a first fragment (pkt->fate). */
__noinline int remember_fate(__u32 listener_id, __u32 to_id)
{
	struct packet *pkt = current_packet();
	__u64 now = bpf_ktime_get_ns();
	struct fragments begun = {};
	struct fragment_key key = {};
	struct fragments *before;
	struct downstream *to;

	if (!pkt)
		return 0;
	key_of(pkt, &key);
	before = remembered(&key, now);
	if (before && !before->first)
		begun = *before;
	begun.first = pkt->udp_header;
	begun.ttl = pkt->ttl;
	begun.fate = pkt->fate;
	begun.listener = listener_id;
	begun.to_id = to_id;
	to = bpf_map_lookup_elem(&downstreams, &to_id);
	if (to) {
		__builtin_memcpy(begun.to.addr_be, to->addr_be, sizeof(to->addr_be));
		begun.to.port_be = to->port_be;
	}
	if (note_fragment(&begun, pkt, now))
		bpf_map_delete_elem(&fragments, &key);
	else
		bpf_map_update_elem(&fragments, &key, &begun, BPF_ANY);
	return 0;
}

static __always_inline int forward_fragment(struct __sk_buff *skb, struct packet *pkt,
					    const struct fragments *of)
{
	__u32 to_id = of->to_id;
	struct downstream *to = bpf_map_lookup_elem(&downstreams, &to_id);
	struct downstream_stats *stats = bpf_map_lookup_elem(&DOWNSTREAM_STAT, &to_id);

	if (!to || !stats || !same_address(to->addr_be, of->to.addr_be) ||
	    to->port_be != of->to.port_be)
		return lose_fragment();
	if (to->delivery == DELIVER_LOCAL)
		return rewrite_any(skb, pkt, to, NULL, pkt->ttl) ? lose_fragment() : TC_ACT_UNSPEC;
	if (to->delivery != DELIVER_NEIGHBOUR || !may_travel(pkt) || pkt->ip_len > to->mtu ||
	    !has_way_out(skb, pkt, to, &stats->known) ||
	    deliver_out(skb, pkt, to, &stats->known, true) != TC_ACT_REDIRECT)
		return lose_fragment();
	return TC_ACT_REDIRECT;
}

/* What follow() answers if copies are to be made: this and the listener's id. */
#define TO_ALL 256

/* A later fragment of which nothing is known. Its datagram is the stack's, if it is for a listener's address at all. */
static __always_inline int leave_stray(const struct packet *pkt, const struct fragment_key *key,
				       __u64 now)
{
	struct fragments begun = { .fate = FRAGMENTS_PASSED };

	if (!is_listened_on(pkt))
		return TC_ACT_UNSPEC;
	count_fragment(FRAGMENT_STRAY);
	note_fragment(&begun, pkt, now);
	bpf_map_update_elem(&fragments, key, &begun, BPF_ANY);
	return TC_ACT_UNSPEC;
}

static __always_inline int send_after(struct __sk_buff *skb, struct packet *pkt,
				      const struct fragments *of)
{
	switch (of->fate) {
	case FRAGMENTS_FORWARDED:
		return forward_fragment(skb, pkt, of);
	case FRAGMENTS_COPIED:
		return TO_ALL + of->listener;
	case FRAGMENTS_PASSED:
		return TC_ACT_UNSPEC;
	}
	return TC_ACT_SHOT;
}

/* The verdict on a later fragment, or on a repeated first one, or TO_ALL. */
__noinline int follow(struct __sk_buff *skb)
{
	struct packet *pkt = current_packet();
	__u64 now = bpf_ktime_get_ns();
	struct fragment_key key = {};
	struct fragments *known;
	bool complete;
	int verdict;

	if (!pkt)
		return TC_ACT_UNSPEC;
	key_of(pkt, &key);
	known = remembered(&key, now);
	if (!known)
		return leave_stray(pkt, &key, now);
	if (known->fate != FRAGMENTS_PASSED && known->all + bytes_in(pkt) > MOST_FRAGMENT_BYTES)
		return lose_fragment();
	complete = note_fragment(known, pkt, now);
	verdict = send_after(skb, pkt, known);
	if (complete)
		bpf_map_delete_elem(&fragments, &key);
	return verdict;
}

#endif

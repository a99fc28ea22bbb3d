/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * One copy of a datagram to every downstream. All but the last are clones; the packet itself is the last. Which
 * downstream is last changes from packet to packet, so that each in turn goes through bpf_redirect_neigh() now and then
 * and keeps its neighbour entry alive (deliver.h).
 *
 * A clone can only be sent out of a link as it is, its link-layer address filled in. Where that is not known, the clone
 * is sent around: back into the ingress of the link it came from, marked, where this program meets it again and lets
 * the kernel find the neighbour. Nothing is lost while a neighbour is being resolved.
 */
#ifndef FANOUT_REPLICATE_H
#define FANOUT_REPLICATE_H

/* The mark of a clone that has been sent around: this in the upper byte, the downstream's id below. */
#define AROUND_MARK 0xfa000000
#define AROUND_MASK 0xff000000

/*
 * A clone that enters this host once more. The kernel looks at the link-layer address again and leaves to others what
 * is not addressed to this host, so the one that the packet came with must be there, and not a downstream's.
 */
static __always_inline int clone_inwards(struct __sk_buff *skb, const struct packet *pkt)
{
	return bpf_skb_store_bytes(skb, 0, pkt->macs, sizeof(pkt->macs), 0)
		       ?: bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS);
}

static __always_inline int send_around(struct __sk_buff *skb, struct packet *pkt, __u32 to_id)
{
	__u32 mark = skb->mark;
	int err;

	pkt->way = WAY_NEIGHBOUR;
	if (!has_redirects || to_id & AROUND_MASK)
		return -1;
	skb->mark = AROUND_MARK | to_id;
	err = clone_inwards(skb, pkt);
	skb->mark = mark;
	return err;
}

/* A clone of ours that has come around: delivered, and not counted again. */
static __always_inline bool came_around(const struct __sk_buff *skb)
{
	return (skb->mark & AROUND_MASK) == AROUND_MARK;
}

static __always_inline bool is_for(const struct packet *pkt, const struct downstream *to)
{
	return pkt->dst.addr_be[0] == to->addr_be[0] && pkt->dst.addr_be[1] == to->addr_be[1] &&
	       pkt->dst.addr_be[2] == to->addr_be[2] && pkt->dst.addr_be[3] == to->addr_be[3] &&
	       pkt->dst.port_be == to->port_be;
}

/*
 * Delivers a clone that has come around. False if the mark is someone else's, which other programs are free to use: a
 * clone of ours is on its way to the downstream that its mark names.
 */
static __always_inline bool finish_round(struct __sk_buff *skb, struct packet *pkt, int *verdict)
{
	__u32 to_id = skb->mark & ~AROUND_MASK;
	struct downstream *to = bpf_map_lookup_elem(&downstreams, &to_id);

	if (!to || to->delivery != DELIVER_NEIGHBOUR || !is_for(pkt, to))
		return false;
	skb->mark = 0;
	*verdict = redirect_to_neighbour(pkt, to->ifindex, to->next_hop_family, to->next_hop_be);
	return true;
}

/* Where to send a clone now: what this CPU remembers, else what the kernel says. Not remembered, see above. */
static __always_inline bool find_known(struct __sk_buff *skb, const struct packet *pkt,
				       const struct downstream *to, __u32 to_id,
				       struct next_hop *found)
{
	struct next_hop *known = bpf_map_lookup_elem(&next_hops, &to_id);
	struct bpf_fib_lookup fib = {};

	if (known && fresh(known)) {
		*found = *known;
		return true;
	}
	look_up(skb, pkt, to, found, &fib);
	return found->ifindex;
}

static __always_inline int send_clone(struct __sk_buff *skb, struct packet *pkt,
				      const struct downstream *to, __u32 to_id)
{
	struct next_hop found;

	if (to->delivery == DELIVER_LOCAL) {
		pkt->way = WAY_LOCAL;
		return clone_inwards(skb, pkt);
	}
	if (to->flags & DOWNSTREAM_BARE) {
		pkt->way = WAY_BARE;
		return bpf_clone_redirect(skb, to->ifindex, 0);
	}
	if (!find_known(skb, pkt, to, to_id, &found))
		return send_around(skb, pkt, to_id);
	pkt->way = WAY_KNOWN;
	if (bpf_skb_store_bytes(skb, 0, found.macs, sizeof(found.macs), 0))
		return -1;
	return bpf_clone_redirect(skb, found.ifindex, 0);
}

/* Makes the packet the copy for one downstream. Its destination then is that downstream's, for the next rewrite. */
static __always_inline int become_copy(struct __sk_buff *skb, struct packet *pkt,
				       const struct downstream *to)
{
	if (rewrite_destination(skb, pkt, to))
		return -1;
	__builtin_memcpy(pkt->dst.addr_be, to->addr_be, sizeof(to->addr_be));
	pkt->dst.port_be = to->port_be;
	return 0;
}

enum copy_result {
	COPY_SENT = 0,
	COPY_NOT_WANTED = 1, /* not in this downstream's sample */
	COPY_FAILED = 2, /* counted; the next copy is not affected */
	COPY_BROKEN = 3, /* counted; the packet is no longer whole */
	COPY_REDIRECTED = 4, /* sent, and the packet itself is on its way out */
};

static __always_inline enum copy_result fail_copy(struct __sk_buff *skb, __u32 listener_id,
						  const struct packet *pkt,
						  const struct downstream *to,
						  enum drop_reason reason, enum copy_result result)
{
	count_copy_dropped(listener_id, reason, pkt);
	note_drop(skb, pkt, &pkt->came_to, to, listener_id, EVENT_COPY_DROPPED, reason);
	return result;
}

static __always_inline void copy_sent(struct __sk_buff *skb, __u32 listener_id,
				      const struct packet *pkt, const struct downstream *to,
				      __u32 to_id)
{
	count_copy(to_id, pkt);
	note(skb, pkt, &pkt->came_to, to, listener_id, EVENT_COPIED);
}

/*
 * One clone. A global function, which the verifier checks once and not once for every copy; such functions take only
 * the context and numbers on every kernel, so the packet comes through a map.
 */
__noinline int send_copy(struct __sk_buff *skb, __u32 listener_id, __u32 slot)
{
	__u32 zero = 0, to_id = 0;
	struct packet *pkt = bpf_map_lookup_elem(&copying, &zero);
	struct downstream *to = downstream_at(slot, &to_id);

	if (!pkt || !to || bpf_get_prandom_u32() > to->sample)
		return COPY_NOT_WANTED;
	if (to->delivery == DELIVER_NOWHERE)
		return fail_copy(skb, listener_id, pkt, to, DROP_NO_ROUTE, COPY_FAILED);
	if (become_copy(skb, pkt, to))
		return fail_copy(skb, listener_id, pkt, to, DROP_REWRITE_FAILED, COPY_BROKEN);
	if (send_clone(skb, pkt, to, to_id))
		return fail_copy(skb, listener_id, pkt, to, DROP_REDIRECT_FAILED, COPY_FAILED);
	copy_sent(skb, listener_id, pkt, to, to_id);
	return COPY_SENT;
}

/* The packet itself: up the stack (COPY_SENT) or out (COPY_REDIRECTED). A global function for the same reason. */
__noinline int send_last(struct __sk_buff *skb, __u32 listener_id, __u32 slot)
{
	__u32 zero = 0, to_id = 0;
	struct packet *pkt = bpf_map_lookup_elem(&copying, &zero);
	struct downstream *to = downstream_at(slot, &to_id);
	int verdict = TC_ACT_UNSPEC;

	if (!pkt || !to || bpf_get_prandom_u32() > to->sample)
		return COPY_NOT_WANTED;
	if (to->delivery == DELIVER_NOWHERE)
		return fail_copy(skb, listener_id, pkt, to, DROP_NO_ROUTE, COPY_FAILED);
	if (to->delivery == DELIVER_NEIGHBOUR && !has_way_out(skb, pkt, to, to_id))
		return fail_copy(skb, listener_id, pkt, to, DROP_REDIRECT_FAILED, COPY_FAILED);
	if (become_copy(skb, pkt, to))
		return fail_copy(skb, listener_id, pkt, to, DROP_REWRITE_FAILED, COPY_BROKEN);
	pkt->way = WAY_LOCAL;
	if (to->delivery == DELIVER_NEIGHBOUR) {
		/* Not straight into a pod: this datagram would overtake others, whose copies for it were clones. */
		verdict = deliver_out(skb, pkt, to, to_id, false);
		if (verdict != TC_ACT_REDIRECT)
			return fail_copy(skb, listener_id, pkt, to, DROP_REDIRECT_FAILED,
					 COPY_FAILED);
	}
	copy_sent(skb, listener_id, pkt, to, to_id);
	return verdict == TC_ACT_REDIRECT ? COPY_REDIRECTED : COPY_SENT;
}

/*
 * Sends the copies. True if the datagram counts as forwarded: a copy is on its way, or no downstream's sample wanted
 * one. *verdict says what becomes of the packet itself.
 */
static __always_inline bool send_copies(struct __sk_buff *skb, const struct packet *received,
					__u32 listener_id, const struct table *table, int *verdict)
{
	__u32 zero = 0;
	struct packet *pkt = bpf_map_lookup_elem(&copying, &zero);
	__u32 slots = table->slots < MAX_COPIES ? table->slots : MAX_COPIES;
	__u32 start = round_robin(table->cursor, slots);
	/* Results that have occurred, a bit each: no branch, so that the verifier sees the same state every time round. */
	__u32 seen = 0;
	int result;

	if (!pkt)
		return false;
	*pkt = *received;
	pkt->came_to = received->dst;
	if (bpf_skb_load_bytes(skb, 0, pkt->macs, sizeof(pkt->macs)))
		return false;
	for (__u32 i = 0; i < MAX_COPIES - 1; i++) {
		if (i + 1 >= slots)
			break;
		result = send_copy(skb, listener_id, table->first + (start + i) % slots);
		seen |= 1 << (result & 7);
		if (result == COPY_BROKEN)
			break;
	}
	if (!(seen & 1 << COPY_BROKEN)) {
		result = send_last(skb, listener_id, table->first + (start + slots - 1) % slots);
		seen |= 1 << (result & 7);
		if (result == COPY_SENT)
			*verdict = TC_ACT_UNSPEC;
		else if (result == COPY_REDIRECTED)
			*verdict = TC_ACT_REDIRECT;
	}
	return seen & (1 << COPY_SENT | 1 << COPY_REDIRECTED) || seen == 1 << COPY_NOT_WANTED;
}

#endif

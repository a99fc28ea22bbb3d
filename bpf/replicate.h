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

/*
 * A clone that enters this host once more. Marked, so that this program leaves it alone when it meets it again; it would
 * take a fragment for one that it has not seen.
 */
static __always_inline int send_around(struct __sk_buff *skb, __u32 to_id)
{
	__u32 mark = skb->mark;
	int err;

	if (to_id & AROUND_MASK)
		return -1;
	skb->mark = AROUND_MARK | to_id;
	err = bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS);
	skb->mark = mark;
	return err;
}

static __always_inline bool is_for(const struct packet *pkt, const struct downstream *to)
{
	return same_address(pkt->dst.addr_be, to->addr_be) &&
	       (pkt->dst.port_be == to->port_be || pkt->part == LATER_FRAGMENT);
}

/*
 * Delivers a clone that has come around. False if the mark is someone else's, which other programs are free to use: a
 * clone of ours is on its way to the downstream that its mark names.
 */
static __always_inline bool finish_round(struct __sk_buff *skb, struct packet *pkt, int *verdict)
{
	__u32 to_id = skb->mark & ~AROUND_MASK;
	struct downstream *to = bpf_map_lookup_elem(&downstreams, &to_id);

	if (!to || to->delivery == DELIVER_NOWHERE || !is_for(pkt, to))
		return false;
	skb->mark = 0;
	/* The datagram is, but its frame may have come for a group. */
	bpf_skb_change_type(skb, PACKET_HOST);
	pkt->group = true;
	if (to->delivery == DELIVER_NEIGHBOUR)
		*verdict = give_frame(skb, pkt)
				   ? redirect_to_neighbour(skb, pkt, to->ifindex,
							   to->next_hop_family, to->next_hop_be)
				   : TC_ACT_SHOT;
	return true;
}

/* Where to send a clone now: what this CPU remembers, else what the kernel says. Not remembered, see above. */
static __always_inline bool find_known(struct __sk_buff *skb, const struct packet *pkt,
				       const struct downstream *to, const struct next_hop *known,
				       struct next_hop *found)
{
	if (fresh(known)) {
		*found = *known;
		return true;
	}
	look_up_only(skb, pkt, to, found);
	return found->ifindex;
}

enum copy_result {
	COPY_SENT = 0,
	COPY_NOT_WANTED = 1, /* not in this downstream's sample */
	COPY_FAILED = 2, /* counted; the next copy is not affected */
	COPY_BROKEN = 3, /* counted; the packet is no longer whole */
	COPY_REDIRECTED = 4, /* sent, and the packet itself is on its way out */
};

/* The packet has become the copy for one downstream; the next rewrite begins from there. */
static __always_inline void became_copy(struct packet *pkt, const struct downstream *to)
{
	__builtin_memcpy(pkt->dst.addr_be, to->addr_be, sizeof(to->addr_be));
	pkt->dst.port_be = to->port_be;
}

/* Makes the packet the copy for one downstream. Every copy is one hop older, also one that stays on this host. */
static __always_inline bool become_copy(struct __sk_buff *skb, struct packet *pkt,
					const struct downstream *to, const __u8 *macs)
{
	if (rewrite_any(skb, pkt, to, macs, next_ttl(pkt)))
		return false;
	became_copy(pkt, to);
	return true;
}

/*
 * A clone. One that goes around meets the kernel's look at the link-layer address again, which leaves to others what is
 * not addressed to this host: so it has the one that the packet came with, and not a downstream's.
 */
static __always_inline enum copy_result send_clone(struct __sk_buff *skb, struct work *work,
						   const struct downstream *to, __u32 to_id,
						   const struct next_hop *known)
{
	struct packet *pkt = &work->pkt;
	struct next_hop found = { .ifindex = to->ifindex };
	const __u8 *macs = NULL;

	pkt->way = WAY_BARE;
	if (to->delivery == DELIVER_LOCAL) {
		pkt->way = WAY_LOCAL;
		macs = work->macs;
	} else if (!(to->flags & DOWNSTREAM_BARE)) {
		pkt->way = WAY_KNOWN;
		macs = found.macs;
		if (!find_known(skb, pkt, to, known, &found)) {
			pkt->way = WAY_NEIGHBOUR;
			macs = work->macs;
		}
	}
	if (pkt->way == WAY_NEIGHBOUR && !has_redirects)
		return COPY_FAILED;
	if (!become_copy(skb, pkt, to, macs))
		return COPY_BROKEN;
	if (pkt->way == WAY_LOCAL || pkt->way == WAY_NEIGHBOUR)
		return send_around(skb, to_id) ? COPY_FAILED : COPY_SENT;
	return bpf_clone_redirect(skb, found.ifindex, 0) ? COPY_FAILED : COPY_SENT;
}

/* The lot that all fragments of a datagram draw for one downstream. */
static __noinline __u32 lot_of(const struct packet *pkt, const struct downstream *to)
{
	__u32 hash = hash_word(hash_words4(0, pkt->src_be), pkt->fragment_id_be);

	return hash_end(hash_word(hash_words4(hash, to->addr_be), to->port_be), 40);
}

#define SAMPLE_ALL 0xffffffff

/* True if the downstream is to have a copy. */
static __always_inline bool in_sample(const struct packet *pkt, const struct downstream *to)
{
	return to->sample == SAMPLE_ALL ||
	       (pkt->part ? lot_of(pkt, to) : bpf_get_prandom_u32()) <= to->sample;
}

static __always_inline enum copy_result fail_copy(struct __sk_buff *skb, __u32 listener_id,
						  const struct work *work,
						  const struct downstream *to,
						  enum drop_reason reason, enum copy_result result)
{
	count_copy_dropped(listener_id, reason, &work->pkt);
	note_drop(skb, &work->pkt, &work->came_to, to, listener_id, EVENT_COPY_DROPPED, reason);
	return result;
}

static __always_inline void copy_sent(struct __sk_buff *skb, __u32 listener_id,
				      const struct work *work, const struct downstream *to,
				      struct downstream_stats *stats)
{
	count_copy(stats, &work->pkt);
	note(skb, &work->pkt, &work->came_to, to, listener_id, EVENT_COPIED);
}

static __always_inline enum drop_reason reason_of(enum copy_result failure)
{
	return failure == COPY_BROKEN ? DROP_REWRITE_FAILED : DROP_REDIRECT_FAILED;
}

/*
 * One clone. A global function, which the verifier checks once and not once for every copy; such functions take only
 * the context and numbers on every kernel, so the packet comes through a map.
 */
__noinline int send_copy(struct __sk_buff *skb, __u32 listener_id, __u32 slot)
{
	struct work *work = current_work();
	__u32 to_id = 0;
	struct downstream *to = downstream_at(slot, &to_id);
	struct downstream_stats *stats = bpf_map_lookup_elem(&DOWNSTREAM_STAT, &to_id);
	enum copy_result result;

	if (!work || !to || !stats || !in_sample(&work->pkt, to))
		return COPY_NOT_WANTED;
	if (to->delivery == DELIVER_NOWHERE)
		return fail_copy(skb, listener_id, work, to, DROP_NO_ROUTE, COPY_FAILED);
	result = send_clone(skb, work, to, to_id, &stats->known);
	if (result != COPY_SENT)
		return fail_copy(skb, listener_id, work, to, reason_of(result), result);
	copy_sent(skb, listener_id, work, to, stats);
	return COPY_SENT;
}

/*
 * The packet itself, to a receiver on this host: around as well, like the clones of others, which it would overtake on
 * the straight way up the stack.
 */
static __always_inline int redirect_around(struct __sk_buff *skb, struct work *work,
					   const struct downstream *to, __u32 to_id)
{
	work->pkt.way = WAY_LOCAL;
	if (to_id & AROUND_MASK)
		return TC_ACT_SHOT;
	if (rewrite_any(skb, &work->pkt, to, work->macs, next_ttl(&work->pkt)))
		return NOT_REWRITTEN;
	skb->mark = AROUND_MARK | to_id;
	return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
}

/* The packet itself. A global function for the same reason. */
__noinline int send_last(struct __sk_buff *skb, __u32 listener_id, __u32 slot)
{
	struct work *work = current_work();
	__u32 to_id = 0;
	struct downstream *to = downstream_at(slot, &to_id);
	struct downstream_stats *stats = bpf_map_lookup_elem(&DOWNSTREAM_STAT, &to_id);
	enum copy_result result;
	struct packet *pkt;
	int verdict;

	if (!work || !to || !stats || !in_sample(&work->pkt, to))
		return COPY_NOT_WANTED;
	pkt = &work->pkt;
	if (to->delivery == DELIVER_NOWHERE)
		return fail_copy(skb, listener_id, work, to, DROP_NO_ROUTE, COPY_FAILED);
	if (to->delivery == DELIVER_NEIGHBOUR && !has_way_out(skb, pkt, to, &stats->known))
		return fail_copy(skb, listener_id, work, to, DROP_REDIRECT_FAILED, COPY_FAILED);
	/* Not straight into a pod: this datagram would overtake others, whose copies for it were clones. */
	verdict = to->delivery == DELIVER_NEIGHBOUR
			  ? deliver_out(skb, pkt, to, &stats->known, false)
			  : redirect_around(skb, work, to, to_id);
	if (verdict != TC_ACT_REDIRECT) {
		result = verdict == NOT_REWRITTEN ? COPY_BROKEN : COPY_FAILED;
		return fail_copy(skb, listener_id, work, to, reason_of(result), result);
	}
	became_copy(pkt, to);
	copy_sent(skb, listener_id, work, to, stats);
	return COPY_REDIRECTED;
}

/*
 * All the copies, beginning with the one in place `start`. Answers which results there were, a bit each, and in the next
 * byte the result of the packet itself. A global function, since the loop would be verified for every way that leads
 * here.
 */
__noinline int send_each(struct __sk_buff *skb, __u32 listener_id, __u32 first, __u32 slots,
			 __u32 start)
{
	/* No branch depends on it, so that the verifier sees the same state every time round. */
	__u32 seen = 0;
	int result;

	/* As the caller knows, and the verifier does not. */
	if (!slots || slots > MAX_COPIES)
		return 0;
	for (__u32 i = 0; i < MAX_COPIES - 1; i++) {
		if (i + 1 >= slots)
			break;
		result = send_copy(skb, listener_id, first + (start + i) % slots);
		seen |= 1 << (result & 7);
		if (result == COPY_BROKEN)
			return seen | COPY_BROKEN << 8;
	}
	result = send_last(skb, listener_id, first + (start + slots - 1) % slots) & 7;
	return seen | 1 << result | result << 8;
}

/*
 * Sends the copies. True if the datagram counts as forwarded: a copy is on its way, or no downstream's sample wanted
 * one. *verdict says what becomes of the packet itself.
 */
static __always_inline bool send_copies(struct __sk_buff *skb, __u32 listener_id,
					const struct table *table, int *verdict)
{
	struct work *work = current_work();
	__u32 slots = table->slots < MAX_COPIES ? table->slots : MAX_COPIES;
	__u32 start = round_robin(table->cursor, slots);
	int seen, last;

	if (!work)
		return false;
	work->came_to = work->pkt.dst;
	/* Also for copies that go out without, or around: the kernel takes it off again. */
	if (!give_frame(skb, &work->pkt))
		return false;
	if (bpf_skb_load_bytes(skb, 0, work->macs, sizeof(work->macs)))
		return false;
	seen = send_each(skb, listener_id, table->first, slots, start);
	/* What is noted of the datagram is about what came in. */
	work->pkt.dst = work->came_to;
	work->pkt.way = WAY_NONE;
	last = seen >> 8;
	seen &= 0xff;
	if (last == COPY_REDIRECTED)
		*verdict = TC_ACT_REDIRECT;
	return seen & (1 << COPY_SENT | 1 << COPY_REDIRECTED) || seen == 1 << COPY_NOT_WANTED;
}

#endif

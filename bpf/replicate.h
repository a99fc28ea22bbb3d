/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Sends one copy of a datagram to every downstream. All but the last are clones; the packet itself
 * is the last. Which downstream comes last changes from packet to packet, so that each uses
 * bpf_redirect_neigh() now and then and keeps its neighbour entry alive (deliver.h).
 *
 * A clone leaves a device as it is, so its link-layer addresses must be written before. While they
 * are unknown, the clone is reinjected: sent into the ingress of the device it arrived on, with a
 * mark, where this program sees it again and lets the kernel resolve the neighbour. Nothing is lost
 * meanwhile.
 */
#ifndef FANOUT_REPLICATE_H
#define FANOUT_REPLICATE_H

#include "base.h"
#include "counters.h"
#include "deliver.h"
#include "events.h"
#include "fanout_abi.h"
#include "hash.h"
#include "maps.h"
#include "packet.h"
#include "reinject.h"
#include "rewrite.h"
#include "scratch.h"
#include "select.h"

/*
 * Sends a clone into this host's ingress, marked so that the program recognises it. It would take a
 * fragment for a new one.
 */
static __always_inline int reinject_clone(struct __sk_buff *skb, __u32 to_id)
{
	__u32 mark = skb->mark;
	int err;

	if (to_id & REINJECT_MASK)
		return -1;
	skb->mark = REINJECT_MARK | to_id;
	err = bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS);
	skb->mark = mark;
	return err;
}

static __always_inline bool is_addressed_to(const struct packet *pkt, const struct downstream *to)
{
	return same_address(pkt->dst.addr_be, to->addr_be) &&
	       (pkt->dst.port_be == to->port_be || pkt->part == LATER_FRAGMENT);
}

/*
 * Delivers a reinjected clone. False if the mark belongs to another program, which may use any
 * mark: a clone of this program is addressed to the downstream that its mark names.
 */
static __always_inline bool finish_reinjected(struct __sk_buff *skb, struct packet *pkt,
					      int *verdict)
{
	__u32 to_id = skb->mark & ~REINJECT_MASK;
	struct downstream *to = bpf_map_lookup_elem(&downstreams, &to_id);

	if (!to || to->delivery == DELIVER_UNREACHABLE || !is_addressed_to(pkt, to))
		return false;
	skb->mark = 0;
	/* The datagram is unicast, but its frame may have arrived by multicast. */
	bpf_skb_change_type(skb, PACKET_HOST);
	pkt->is_multicast = true;
	if (to->delivery == DELIVER_NEIGHBOUR)
		*verdict = add_eth_header(skb, pkt)
				   ? redirect_via_neighbour(skb, pkt, to->ifindex,
							    to->next_hop_family, to->next_hop_be)
				   : TC_ACT_SHOT;
	return true;
}

/*
 * Finds the next hop of a clone: from this CPU's cache, else from the kernel. Not cached, see
 * above.
 */
static __always_inline bool find_clone_hop(struct __sk_buff *skb, const struct packet *pkt,
					   const struct downstream *to, const struct next_hop *hop,
					   struct next_hop *found)
{
	if (is_fresh(hop)) {
		*found = *hop;
		return true;
	}
	resolve_next_hop(skb, pkt, to, found);
	return found->ifindex;
}

enum copy_result {
	COPY_SENT = 0,
	COPY_NOT_SAMPLED = 1, /* not in this downstream's sample */
	COPY_FAILED = 2, /* counted; the next copy is unaffected */
	COPY_CORRUPTED = 3, /* counted; the packet is half rewritten */
	COPY_REDIRECTED = 4, /* sent as the packet itself */
};

/* The packet now has this downstream's address; the next rewrite starts from it. */
static __always_inline void set_copy_dst(struct packet *pkt, const struct downstream *to)
{
	__builtin_memcpy(pkt->dst.addr_be, to->addr_be, sizeof(to->addr_be));
	pkt->dst.port_be = to->port_be;
}

/* Rewrites the packet for one downstream, with one hop less, also for one on this host. */
static __always_inline bool rewrite_copy(struct __sk_buff *skb, struct packet *pkt,
					 const struct downstream *to, const __u8 *macs)
{
	if (rewrite_any(skb, pkt, to, macs, next_ttl(pkt)))
		return false;
	set_copy_dst(pkt, to);
	return true;
}

/*
 * Sends a clone. A reinjected clone passes the kernel's check of the link-layer address again,
 * which rejects frames not addressed to this host. So it keeps the address that the packet arrived
 * with.
 */
static __always_inline enum copy_result send_clone(struct __sk_buff *skb, struct scratch *scratch,
						   const struct downstream *to, __u32 to_id,
						   const struct next_hop *hop)
{
	struct packet *pkt = &scratch->pkt;
	struct next_hop found = { .ifindex = to->ifindex };
	const __u8 *macs = NULL;

	pkt->path = PATH_L3_DEVICE;
	if (to->delivery == DELIVER_LOCAL) {
		pkt->path = PATH_LOCAL;
		macs = scratch->macs;
	} else if (!(to->flags & DOWNSTREAM_L3_DEVICE)) {
		pkt->path = PATH_KNOWN;
		macs = found.macs;
		if (!find_clone_hop(skb, pkt, to, hop, &found)) {
			pkt->path = PATH_NEIGHBOUR;
			macs = scratch->macs;
		}
	}
	if (pkt->path == PATH_NEIGHBOUR && !has_redirects)
		return COPY_FAILED;
	if (!rewrite_copy(skb, pkt, to, macs))
		return COPY_CORRUPTED;
	if (pkt->path == PATH_LOCAL || pkt->path == PATH_NEIGHBOUR)
		return reinject_clone(skb, to_id) ? COPY_FAILED : COPY_SENT;
	return bpf_clone_redirect(skb, found.ifindex, 0) ? COPY_FAILED : COPY_SENT;
}

/* Random number for a downstream's sample that is the same in all fragments of a datagram. */
static __noinline __u32 sample_hash(const struct packet *pkt, const struct downstream *to)
{
	__u32 hash = hash_word(hash_words4(0, pkt->src_be), pkt->fragment_id_be);

	return hash_end(hash_word(hash_words4(hash, to->addr_be), to->port_be), 40);
}

#define SAMPLE_ALL 0xffffffff

/* True if the downstream gets a copy. */
static __always_inline bool in_sample(const struct packet *pkt, const struct downstream *to)
{
	return to->sample == SAMPLE_ALL ||
	       (pkt->part ? sample_hash(pkt, to) : bpf_get_prandom_u32()) <= to->sample;
}

static __always_inline enum copy_result
record_copy_failure(struct __sk_buff *skb, __u32 listener_id, const struct scratch *scratch,
		    const struct downstream *to, enum drop_reason reason, enum copy_result result)
{
	count_copy_dropped(listener_id, reason, &scratch->pkt);
	trace_drop(skb, &scratch->pkt, &scratch->orig_dst, to, listener_id, EVENT_COPY_DROPPED,
		   reason);
	return result;
}

static __always_inline void record_copy_sent(struct __sk_buff *skb, __u32 listener_id,
					     const struct scratch *scratch,
					     const struct downstream *to,
					     struct downstream_stats *stats)
{
	count_copy(stats, &scratch->pkt);
	trace_event(skb, &scratch->pkt, &scratch->orig_dst, to, listener_id, EVENT_COPIED);
}

static __always_inline enum drop_reason copy_drop_reason(enum copy_result failure)
{
	return failure == COPY_CORRUPTED ? DROP_REWRITE_FAILED : DROP_REDIRECT_FAILED;
}

/*
 * Sends one clone. A global function, which the verifier checks once and not once per copy. Such
 * functions take only the context and numbers on every kernel, so the packet comes through a map.
 */
__noinline int send_copy(struct __sk_buff *skb, __u32 listener_id, __u32 slot)
{
	struct scratch *scratch = current_scratch();
	__u32 to_id = 0;
	struct downstream *to = downstream_at(slot, &to_id);
	struct downstream_stats *stats = bpf_map_lookup_elem(&DOWNSTREAM_STAT, &to_id);
	enum copy_result result;

	if (!scratch || !to || !stats || !in_sample(&scratch->pkt, to))
		return COPY_NOT_SAMPLED;
	if (to->delivery == DELIVER_UNREACHABLE)
		return record_copy_failure(skb, listener_id, scratch, to, DROP_NO_ROUTE,
					   COPY_FAILED);
	result = send_clone(skb, scratch, to, to_id, &stats->cached_hop);
	if (result != COPY_SENT)
		return record_copy_failure(skb, listener_id, scratch, to, copy_drop_reason(result),
					   result);
	record_copy_sent(skb, listener_id, scratch, to, stats);
	return COPY_SENT;
}

/*
 * Sends the packet itself to a receiver on this host. It is reinjected like the clones of other
 * packets, which it would overtake on the direct path up the stack.
 */
static __always_inline int reinject_last(struct __sk_buff *skb, struct scratch *scratch,
					 const struct downstream *to, __u32 to_id)
{
	scratch->pkt.path = PATH_LOCAL;
	if (to_id & REINJECT_MASK)
		return TC_ACT_SHOT;
	if (rewrite_any(skb, &scratch->pkt, to, scratch->macs, next_ttl(&scratch->pkt)))
		return REWRITE_FAILED;
	skb->mark = REINJECT_MARK | to_id;
	return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
}

/* Sends the packet itself as the last copy. A global function for the same reason. */
__noinline int send_last(struct __sk_buff *skb, __u32 listener_id, __u32 slot)
{
	struct scratch *scratch = current_scratch();
	__u32 to_id = 0;
	struct downstream *to = downstream_at(slot, &to_id);
	struct downstream_stats *stats = bpf_map_lookup_elem(&DOWNSTREAM_STAT, &to_id);
	enum copy_result result;
	struct packet *pkt;
	int verdict;

	if (!scratch || !to || !stats || !in_sample(&scratch->pkt, to))
		return COPY_NOT_SAMPLED;
	pkt = &scratch->pkt;
	if (to->delivery == DELIVER_UNREACHABLE)
		return record_copy_failure(skb, listener_id, scratch, to, DROP_NO_ROUTE,
					   COPY_FAILED);
	if (to->delivery == DELIVER_NEIGHBOUR && !has_egress_path(skb, pkt, to, &stats->cached_hop))
		return record_copy_failure(skb, listener_id, scratch, to, DROP_REDIRECT_FAILED,
					   COPY_FAILED);
	/*
	 * Never directly into a pod: it would overtake other datagrams, whose copies to the pod
	 * were clones.
	 */
	verdict = to->delivery == DELIVER_NEIGHBOUR
			  ? deliver_egress(skb, pkt, to, &stats->cached_hop, false)
			  : reinject_last(skb, scratch, to, to_id);
	if (verdict != TC_ACT_REDIRECT) {
		result = verdict == REWRITE_FAILED ? COPY_CORRUPTED : COPY_FAILED;
		return record_copy_failure(skb, listener_id, scratch, to, copy_drop_reason(result),
					   result);
	}
	set_copy_dst(pkt, to);
	record_copy_sent(skb, listener_id, scratch, to, stats);
	return COPY_REDIRECTED;
}

/*
 * Sends all copies, starting at index `start`. Returns the set of results, one bit each, and in the
 * next byte the result of the packet itself. A global function, because the loop would be verified
 * for every path that leads here.
 */
__noinline int send_each(struct __sk_buff *skb, __u32 listener_id, __u32 first, __u32 slots,
			 __u32 start)
{
	/* No branch depends on it, so the verifier sees the same state in every iteration. */
	__u32 results = 0;
	int result;

	/* The caller checks this; the verifier does not know. */
	if (!slots || slots > MAX_COPIES)
		return 0;
	for (__u32 i = 0; i < MAX_COPIES - 1; i++) {
		if (i + 1 >= slots)
			break;
		result = send_copy(skb, listener_id, first + (start + i) % slots);
		results |= 1 << (result & 7);
		if (result == COPY_CORRUPTED)
			return results | COPY_CORRUPTED << 8;
	}
	result = send_last(skb, listener_id, first + (start + slots - 1) % slots) & 7;
	return results | 1 << result | result << 8;
}

/*
 * Sends all copies. True if the datagram counts as forwarded: a copy is on its way, or no
 * downstream's sample includes it. *verdict is the verdict on the packet itself.
 */
static __always_inline bool send_copies(struct __sk_buff *skb, __u32 listener_id,
					const struct table *table, int *verdict)
{
	struct scratch *scratch = current_scratch();
	__u32 slots = table->slots < MAX_COPIES ? table->slots : MAX_COPIES;
	__u32 start = round_robin(table->cursor, slots);
	int results, last;

	if (!scratch)
		return false;
	scratch->orig_dst = scratch->pkt.dst;
	/*
	 * Also for copies that leave by L3 devices or are reinjected: the kernel removes it again.
	 */
	if (!add_eth_header(skb, &scratch->pkt))
		return false;
	if (bpf_skb_load_bytes(skb, 0, scratch->macs, sizeof(scratch->macs)))
		return false;
	results = send_each(skb, listener_id, table->first, slots, start);
	/* Events about the datagram show it as it arrived. */
	scratch->pkt.dst = scratch->orig_dst;
	scratch->pkt.path = PATH_NONE;
	last = results >> 8;
	results &= 0xff;
	if (last == COPY_REDIRECTED)
		*verdict = TC_ACT_REDIRECT;
	return results & (1 << COPY_SENT | 1 << COPY_REDIRECTED) ||
	       results == 1 << COPY_NOT_SAMPLED;
}

#endif

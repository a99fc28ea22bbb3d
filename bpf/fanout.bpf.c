// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The entry point and the slow path of a datagram: parse, match, admit, select, rewrite, deliver,
 * one header per stage. The slow path handles every case; most datagrams take the fast path
 * (fast_path.h) through the same stages.
 *
 * Attached at TC ingress (clsact or TCX) by src/datapath/kernel/attach.rs. Foreign traffic, and
 * datagrams that need the socket path, continue as if the program did not exist: TC_ACT_UNSPEC lets
 * later filters see them, TC_ACT_OK would not.
 */
#include "base.h"
#include "fanout_abi.h"
#include "packet.h"
#include "maps.h"
#include "scratch.h"
#include "parse.h"
#include "match.h"
#include "heartbeat.h"
#include "admission.h"
#include "select.h"
#include "rewrite.h"
#include "events.h"
#include "deliver.h"
#include "counters.h"
#include "replicate.h"
#include "fragments.h"
#include "hook_marker.h"
#include "fast_path.h"

char LICENSE[] SEC("license") = "GPL";

/* What became of a datagram. The stages fill it in; account() counts and reports it. */
struct outcome {
	const struct downstream *to; /* NULL: none, or all */
	struct downstream_stats *to_stats; /* the same */
	__u32 to_id;
	__u32 kind; /* enum event_kind */
	__u32 reason; /* enum drop_reason, if it was dropped */
};

static __always_inline int pass(struct outcome *outcome)
{
	outcome->kind = EVENT_PASSED;
	return TC_ACT_UNSPEC;
}

static __always_inline int drop(struct outcome *outcome, enum drop_reason reason)
{
	outcome->kind = EVENT_DROPPED;
	outcome->reason = reason;
	return TC_ACT_SHOT;
}

static __always_inline int forwarded(struct outcome *outcome, int verdict)
{
	outcome->kind = EVENT_FORWARDED;
	return verdict;
}

/* Forwards to a socket on this host, without touching the TTL. */
static __always_inline int forward_local(struct __sk_buff *skb, struct packet *pkt,
					 struct outcome *outcome)
{
	if (rewrite(skb, pkt, outcome->to, NULL, pkt->ttl))
		return drop(outcome, DROP_REWRITE_FAILED);
	pkt->path = PATH_LOCAL;
	return forwarded(outcome, TC_ACT_UNSPEC);
}

static __always_inline int forward_out(struct __sk_buff *skb, struct packet *pkt,
				       struct outcome *outcome)
{
	const struct downstream *to = outcome->to;
	struct next_hop *hop = &outcome->to_stats->cached_hop;
	int verdict;

	if (!may_forward(pkt))
		return drop(outcome, DROP_TTL_EXPIRED);
	/*
	 * Too long for the egress path: a redirect would lose it silently, while the socket's stack
	 * can fragment it.
	 */
	if (pkt->ip_len > to->mtu)
		return pass(outcome);
	if (!has_egress_path(skb, pkt, to, hop))
		return pass(outcome);
	verdict = deliver_egress(skb, pkt, to, hop, true);
	if (verdict == REWRITE_FAILED)
		return drop(outcome, DROP_REWRITE_FAILED);
	if (verdict != TC_ACT_REDIRECT)
		return drop(outcome, DROP_REDIRECT_FAILED);
	return forwarded(outcome, TC_ACT_REDIRECT);
}

/*
 * Copies to all downstreams. A later fragment goes by the current table: a downstream that stays in
 * the table gets all fragments.
 */
static __always_inline int replicate(struct __sk_buff *skb, __u32 listener_id,
				     const struct packet *pkt, const struct table *table,
				     struct outcome *outcome)
{
	int verdict = TC_ACT_SHOT;

	if (!may_forward(pkt))
		return drop(outcome, DROP_TTL_EXPIRED);
	if (pkt->ip_len > table->min_mtu)
		return pass(outcome);
	if (!send_copies(skb, listener_id, table, &verdict))
		return drop(outcome, DROP_NO_ROUTE);
	return forwarded(outcome, verdict);
}

/*
 * Handles a listener's datagram: whole, its first fragment, or a later one that is copied to all
 * downstreams.
 */
static __always_inline int handle_datagram(struct __sk_buff *skb, __u32 listener_id, __u32 flags,
					   struct packet *pkt, struct stats *stats, bool later,
					   struct outcome *outcome)
{
	const struct listener_state *state = bpf_map_lookup_elem(&listener_states, &listener_id);
	enum drop_reason reason;
	struct table table;

	if (!state)
		return drop(outcome, DROP_NO_DOWNSTREAM);
	if (!later) {
		reason = has_admission(state) ? admission_verdict(state, pkt) : DROP_REASONS;
		if (reason != DROP_REASONS)
			return drop(outcome, reason);
		if (pkt->needs_socket || flags & LISTENER_SOCKET_ONLY)
			return pass(outcome);
	}
	if (!read_table(stats, state, &table))
		return drop(outcome, DROP_NO_DOWNSTREAM);
	if (table.policy == POLICY_REPLICATE)
		return replicate(skb, listener_id, pkt, &table, outcome);
	if (later)
		return drop(outcome, DROP_NO_DOWNSTREAM);
	outcome->to = downstream_at(table.first + choose_index(skb, pkt, &table), &outcome->to_id);
	outcome->to_stats = bpf_map_lookup_elem(&DOWNSTREAM_STAT, &outcome->to_id);
	if (!outcome->to || !outcome->to_stats)
		return drop(outcome, DROP_NO_DOWNSTREAM);
	if (outcome->to->delivery == DELIVER_NEIGHBOUR)
		return forward_out(skb, pkt, outcome);
	if (outcome->to->delivery == DELIVER_LOCAL)
		return forward_local(skb, pkt, outcome);
	return drop(outcome, DROP_NO_ROUTE);
}

/* Counts a datagram and reports it to logs and traces. */
static __always_inline void account(struct __sk_buff *skb, __u32 listener_id, struct stats *stats,
				    const struct packet *pkt, const struct outcome *outcome)
{
	if (outcome->kind == EVENT_DROPPED) {
		count_dropped(stats, listener_id, outcome->reason, pkt);
		trace_drop(skb, pkt, &pkt->dst, outcome->to, listener_id, EVENT_DROPPED,
			   outcome->reason);
		return;
	}
	if (outcome->kind == EVENT_PASSED) {
		count_passed(stats, pkt);
	} else {
		count_forwarded(stats, pkt);
		if (outcome->to_stats)
			count_copy(outcome->to_stats, pkt);
	}
	trace_event(skb, pkt, &pkt->dst, outcome->to, listener_id, outcome->kind);
}

/* Verdict on the other fragments of a datagram. */
static __always_inline enum fragment_verdict fragment_verdict_of(const struct outcome *outcome)
{
	if (outcome->kind == EVENT_DROPPED)
		return FRAGMENT_VERDICT_DROP;
	if (outcome->kind == EVENT_PASSED)
		return FRAGMENT_VERDICT_PASS;
	return outcome->to ? FRAGMENT_VERDICT_FORWARD : FRAGMENT_VERDICT_COPY;
}

/*
 * Passes foreign traffic, and everything once the program is orphaned. The later fragments of a
 * first fragment, which carry no port, must be passed too.
 */
static __always_inline int pass_foreign(struct packet *pkt)
{
	pkt->fragment_verdict = FRAGMENT_VERDICT_PASS;
	if (pkt->part && is_listener_address(pkt))
		store_fragment_verdict(0, 0);
	return TC_ACT_UNSPEC;
}

/* Handles a later fragment or a repeated first one, which was counted with its datagram. */
static __always_inline int handle_fragment(struct __sk_buff *skb, struct packet *pkt)
{
	pkt->datagrams = 0;
	pkt->payload = 0;
	return handle_later_fragment(skb);
}

__noinline int slow_path(struct __sk_buff *skb)
{
	const struct fanout_listener *listener;
	__u32 listener_id, flags = 0;
	struct outcome outcome = {};
	struct scratch *scratch = current_scratch();
	int verdict = TC_ACT_UNSPEC, repeat;
	struct packet *pkt;
	struct stats *stats;
	bool later = false;

	if (!scratch)
		return TC_ACT_UNSPEC;
	pkt = &scratch->pkt;
	if (parse(skb, pkt) != PARSE_OK || already_processed(skb))
		return TC_ACT_UNSPEC;
	if (is_reinjected(skb) && finish_reinjected(skb, pkt, &verdict))
		return mark_processed(skb, verdict);
	if (pkt->part == LATER_FRAGMENT) {
		later = true;
	} else {
		listener = find_listener(pkt);
		if (!listener || is_orphaned(scratch))
			return pass_foreign(pkt);
		listener_id = listener->id;
		flags = listener->flags;
		if (pkt->part) {
			repeat = lookup_first_fragment();
			later = repeat == FIRST_IS_REPEATED;
			pkt->needs_socket |= repeat == FIRST_AFTER_LATER;
		}
	}
	if (later) {
		verdict = handle_fragment(skb, pkt);
		if (verdict < COPY_TO_ALL)
			return mark_processed(skb, verdict);
		listener_id = verdict - COPY_TO_ALL;
	}
	stats = bpf_map_lookup_elem(&STATS, &listener_id);
	/* Never: the map has an entry for every listener. */
	if (!stats)
		return TC_ACT_UNSPEC;
	verdict = handle_datagram(skb, listener_id, flags, pkt, stats, later, &outcome);
	if (later)
		return outcome.kind == EVENT_FORWARDED ? mark_processed(skb, verdict)
						       : drop_fragment();
	account(skb, listener_id, stats, pkt, &outcome);
	if (pkt->part) {
		pkt->fragment_verdict = fragment_verdict_of(&outcome);
		store_fragment_verdict(listener_id, outcome.to_id);
	}
	return mark_processed(skb, verdict);
}

SEC("tc")
int udp_fanout(struct __sk_buff *skb)
{
	int verdict = fast_path(skb);

	return verdict == SLOW_PATH ? slow_path(skb) : verdict;
}

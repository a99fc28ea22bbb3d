// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The path of one datagram, top to bottom: parse, match, admit, select, rewrite, deliver. One header a stage. This is
 * the long way, which knows every case; most datagrams take a shorter one through the same stages (short_way.h).
 *
 * Attached at TC ingress (clsact or TCX) by src/datapath/kernel/attach.rs. What is not ours, and what only the listener's
 * socket can do justice, continues as if this program were not there: TC_ACT_UNSPEC lets later filters see it too,
 * where TC_ACT_OK would end their turn.
 */
#include "vmlinux.h"

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_core_read.h>

#define TC_ACT_UNSPEC (-1)
#define TC_ACT_SHOT 2
#define TC_ACT_REDIRECT 7

#include "fanout_abi.h"
#include "packet.h"
#include "maps.h"
#include "parse.h"
#include "match.h"
#include "lease.h"
#include "admit.h"
#include "hash.h"
#include "select.h"
#include "rewrite.h"
#include "events.h"
#include "deliver.h"
#include "count.h"
#include "replicate.h"
#include "fragments.h"
#include "seen.h"
#include "short_way.h"

char LICENSE[] SEC("license") = "GPL";

/* What becomes of a datagram, told by the stages below and booked in one place, settle(). */
struct outcome {
	const struct downstream *to; /* NULL: none, or all */
	struct downstream_stats *to_stats; /* likewise */
	__u32 to_id;
	__u32 kind; /* enum event_kind */
	__u32 reason; /* enum drop_reason, of one that is dropped */
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

/* To a socket on this host: the journey ends here, so the TTL is not touched. */
static __always_inline int forward_local(struct __sk_buff *skb, struct packet *pkt,
					 struct outcome *outcome)
{
	if (rewrite(skb, pkt, outcome->to, NULL, pkt->ttl))
		return drop(outcome, DROP_REWRITE_FAILED);
	pkt->way = WAY_LOCAL;
	return forwarded(outcome, TC_ACT_UNSPEC);
}

static __always_inline int forward_out(struct __sk_buff *skb, struct packet *pkt,
				       struct outcome *outcome)
{
	const struct downstream *to = outcome->to;
	struct next_hop *known = &outcome->to_stats->known;
	int verdict;

	if (!may_travel(pkt))
		return drop(outcome, DROP_TTL_EXPIRED);
	/* Too long for the way out: redirecting would lose it silently, the socket's stack can fragment it. */
	if (pkt->ip_len > to->mtu)
		return pass(outcome);
	if (!has_way_out(skb, pkt, to, known))
		return pass(outcome);
	verdict = deliver_out(skb, pkt, to, known, true);
	if (verdict == NOT_REWRITTEN)
		return drop(outcome, DROP_REWRITE_FAILED);
	if (verdict != TC_ACT_REDIRECT)
		return drop(outcome, DROP_REDIRECT_FAILED);
	return forwarded(outcome, TC_ACT_REDIRECT);
}

/*
 * To all downstreams. A later fragment goes by the table as it is now: whoever was in it and still is gets all of them.
 */
static __always_inline int replicate(struct __sk_buff *skb, __u32 listener_id,
				     const struct packet *pkt, const struct table *table,
				     struct outcome *outcome)
{
	int verdict = TC_ACT_SHOT;

	if (!may_travel(pkt))
		return drop(outcome, DROP_TTL_EXPIRED);
	if (pkt->ip_len > table->least_mtu)
		return pass(outcome);
	if (!send_copies(skb, listener_id, table, &verdict))
		return drop(outcome, DROP_NO_ROUTE);
	return forwarded(outcome, verdict);
}

/* A datagram of a listener's: whole, its first fragment, or a later one that is for all downstreams. */
static __always_inline int take(struct __sk_buff *skb, __u32 listener_id, __u32 flags,
				struct packet *pkt, struct stats *stats, bool later,
				struct outcome *outcome)
{
	const struct listener_state *state = bpf_map_lookup_elem(&listener_states, &listener_id);
	enum drop_reason why_not;
	struct table table;

	if (!state)
		return drop(outcome, DROP_NO_DOWNSTREAM);
	if (!later) {
		why_not = is_guarded(state) ? refusal(state, pkt) : DROP_REASONS;
		if (why_not != DROP_REASONS)
			return drop(outcome, why_not);
		if (pkt->exotic || flags & LISTENER_SOCKET_ONLY)
			return pass(outcome);
	}
	if (!read_table(stats, state, &table))
		return drop(outcome, DROP_NO_DOWNSTREAM);
	if (table.policy == POLICY_REPLICATE)
		return replicate(skb, listener_id, pkt, &table, outcome);
	if (later)
		return drop(outcome, DROP_NO_DOWNSTREAM);
	outcome->to = downstream_at(table.first + place(skb, pkt, &table), &outcome->to_id);
	outcome->to_stats = bpf_map_lookup_elem(&DOWNSTREAM_STAT, &outcome->to_id);
	if (!outcome->to || !outcome->to_stats)
		return drop(outcome, DROP_NO_DOWNSTREAM);
	if (outcome->to->delivery == DELIVER_NEIGHBOUR)
		return forward_out(skb, pkt, outcome);
	if (outcome->to->delivery == DELIVER_LOCAL)
		return forward_local(skb, pkt, outcome);
	return drop(outcome, DROP_NO_ROUTE);
}

/* Writes down what has become of a datagram, and tells whoever wants to know. */
static __always_inline void settle(struct __sk_buff *skb, __u32 listener_id, struct stats *stats,
				   const struct packet *pkt, const struct outcome *outcome)
{
	if (outcome->kind == EVENT_DROPPED) {
		count_dropped(stats, listener_id, outcome->reason, pkt);
		note_drop(skb, pkt, &pkt->dst, outcome->to, listener_id, EVENT_DROPPED,
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
	note(skb, pkt, &pkt->dst, outcome->to, listener_id, outcome->kind);
}

/* What is to become of the other fragments of a datagram. */
static __always_inline enum fragments_fate fate_of(const struct outcome *outcome)
{
	if (outcome->kind == EVENT_DROPPED)
		return FRAGMENTS_DROPPED;
	if (outcome->kind == EVENT_PASSED)
		return FRAGMENTS_PASSED;
	return outcome->to ? FRAGMENTS_FORWARDED : FRAGMENTS_COPIED;
}

/*
 * A datagram or first fragment of somebody else's, or that no daemon is there for. The later fragments, which do not tell
 * whose they are, shall be left alone too.
 */
static __always_inline int leave(struct packet *pkt)
{
	pkt->fate = FRAGMENTS_PASSED;
	if (pkt->part && is_listened_on(pkt))
		remember_fate(0, 0);
	return TC_ACT_UNSPEC;
}

/* A later fragment, or a first one that has come before: counted with the datagram already. */
static __always_inline int follow_up(struct __sk_buff *skb, struct packet *pkt)
{
	pkt->datagrams = 0;
	pkt->payload = 0;
	return follow(skb);
}

__noinline int long_way(struct __sk_buff *skb)
{
	const struct fanout_listener *listener;
	__u32 listener_id, flags = 0;
	struct outcome outcome = {};
	struct work *work = current_work();
	int verdict = TC_ACT_UNSPEC, before;
	struct packet *pkt;
	struct stats *stats;
	bool later = false;

	if (!work)
		return TC_ACT_UNSPEC;
	pkt = &work->pkt;
	if (parse(skb, pkt) != PARSE_OK || was_seen(skb))
		return TC_ACT_UNSPEC;
	if (came_around(skb) && finish_round(skb, pkt, &verdict))
		return seen(skb, verdict);
	if (pkt->part == LATER_FRAGMENT) {
		later = true;
	} else {
		listener = listener_of(pkt);
		if (!listener || is_headless(work))
			return leave(pkt);
		listener_id = listener->id;
		flags = listener->flags;
		if (pkt->part) {
			before = look_back();
			later = before == FIRST_REPEATED;
			pkt->exotic |= before == FIRST_OF_PASSED;
		}
	}
	if (later) {
		verdict = follow_up(skb, pkt);
		if (verdict < TO_ALL)
			return seen(skb, verdict);
		listener_id = verdict - TO_ALL;
	}
	stats = bpf_map_lookup_elem(&STATS, &listener_id);
	/* It has as many entries as there are listeners. */
	if (!stats)
		return TC_ACT_UNSPEC;
	verdict = take(skb, listener_id, flags, pkt, stats, later, &outcome);
	if (later)
		return outcome.kind == EVENT_FORWARDED ? seen(skb, verdict) : lose_fragment();
	settle(skb, listener_id, stats, pkt, &outcome);
	if (pkt->part) {
		pkt->fate = fate_of(&outcome);
		remember_fate(listener_id, outcome.to_id);
	}
	return seen(skb, verdict);
}

SEC("tc")
int udp_fanout(struct __sk_buff *skb)
{
	int verdict = short_way(skb);

	return verdict == LONG_WAY ? long_way(skb) : verdict;
}

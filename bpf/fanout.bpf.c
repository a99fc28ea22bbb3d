// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The path of one datagram, top to bottom: parse, match, admit, select, rewrite, deliver. One header a stage.
 *
 * Attached at TC ingress (clsact) by src/datapath/kernel/attach.rs. What is not ours, and what only the listener's
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
#include "admit.h"
#include "hash.h"
#include "select.h"
#include "rewrite.h"
#include "events.h"
#include "deliver.h"
#include "count.h"
#include "replicate.h"

char LICENSE[] SEC("license") = "GPL";

static __always_inline int pass(struct __sk_buff *skb, const struct fanout_listener *listener,
				const struct packet *pkt, const struct downstream *to)
{
	count_passed(listener->id, pkt);
	note(skb, pkt, &pkt->dst, to, listener->id, EVENT_PASSED);
	return TC_ACT_UNSPEC;
}

static __always_inline int drop(struct __sk_buff *skb, const struct fanout_listener *listener,
				const struct packet *pkt, const struct downstream *to,
				enum drop_reason reason)
{
	count_dropped(listener->id, reason, pkt);
	note_drop(skb, pkt, &pkt->dst, to, listener->id, EVENT_DROPPED, reason);
	return TC_ACT_SHOT;
}

static __always_inline int forwarded(struct __sk_buff *skb, const struct fanout_listener *listener,
				     const struct packet *pkt, const struct downstream *to,
				     __u32 to_id, int verdict)
{
	count_forwarded(listener->id, pkt);
	count_copy(to_id, pkt);
	note(skb, pkt, &pkt->dst, to, listener->id, EVENT_FORWARDED);
	return verdict;
}

/* To a socket on this host: the journey ends here, so the TTL is not touched. */
static __always_inline int forward_local(struct __sk_buff *skb,
					 const struct fanout_listener *listener, struct packet *pkt,
					 const struct downstream *to, __u32 to_id)
{
	if (rewrite_destination(skb, pkt, to))
		return drop(skb, listener, pkt, to, DROP_REWRITE_FAILED);
	pkt->way = WAY_LOCAL;
	return forwarded(skb, listener, pkt, to, to_id, TC_ACT_UNSPEC);
}

static __always_inline int forward_out(struct __sk_buff *skb,
				       const struct fanout_listener *listener, struct packet *pkt,
				       const struct downstream *to, __u32 to_id)
{
	if (pkt->ttl <= 1)
		return drop(skb, listener, pkt, to, DROP_TTL_EXPIRED);
	/* Too long for the way out: redirecting would lose it silently, the socket's stack can fragment it. */
	if (pkt->ip_len > to->mtu)
		return pass(skb, listener, pkt, to);
	if (!has_way_out(skb, pkt, to, to_id))
		return pass(skb, listener, pkt, to);
	if (rewrite_destination(skb, pkt, to) || decrement_ttl(skb, pkt))
		return drop(skb, listener, pkt, to, DROP_REWRITE_FAILED);
	if (deliver_out(skb, pkt, to, to_id, true) != TC_ACT_REDIRECT)
		return drop(skb, listener, pkt, to, DROP_REDIRECT_FAILED);
	return forwarded(skb, listener, pkt, to, to_id, TC_ACT_REDIRECT);
}

/* To all downstreams. Every copy is one hop older, also one that stays on this host. */
static __always_inline int replicate(struct __sk_buff *skb, const struct fanout_listener *listener,
				     const struct packet *pkt, const struct table *table)
{
	int verdict = TC_ACT_SHOT;

	if (pkt->ttl <= 1)
		return drop(skb, listener, pkt, NULL, DROP_TTL_EXPIRED);
	if (pkt->ip_len > table->least_mtu)
		return pass(skb, listener, pkt, NULL);
	if (decrement_ttl(skb, pkt))
		return drop(skb, listener, pkt, NULL, DROP_REWRITE_FAILED);
	if (!send_copies(skb, pkt, listener->id, table, &verdict))
		return drop(skb, listener, pkt, NULL, DROP_NO_ROUTE);
	count_forwarded(listener->id, pkt);
	note(skb, pkt, &pkt->dst, NULL, listener->id, EVENT_FORWARDED);
	return verdict;
}

SEC("tc")
int udp_fanout(struct __sk_buff *skb)
{
	const struct fanout_listener *listener;
	const struct listener_state *state;
	const struct downstream *to;
	struct packet pkt = {};
	struct table table;
	int verdict = TC_ACT_UNSPEC;
	enum drop_reason why_not;
	__u32 to_id = 0;

	if (parse(skb, &pkt) != PARSE_OK)
		return TC_ACT_UNSPEC;
	if (has_redirects && came_around(skb) && finish_round(skb, &pkt, &verdict))
		return verdict;
	listener = bpf_map_lookup_elem(&listeners, &pkt.dst);
	if (!listener)
		return TC_ACT_UNSPEC;
	state = bpf_map_lookup_elem(&listener_states, &listener->id);
	if (!state)
		return TC_ACT_UNSPEC;
	why_not = refusal(state, &pkt);
	if (why_not != DROP_REASONS)
		return drop(skb, listener, &pkt, NULL, why_not);
	if (pkt.exotic || listener->flags & LISTENER_SOCKET_ONLY)
		return pass(skb, listener, &pkt, NULL);
	if (!read_table(listener->id, state, &table))
		return drop(skb, listener, &pkt, NULL, DROP_NO_DOWNSTREAM);
	if (table.policy == POLICY_REPLICATE)
		return replicate(skb, listener, &pkt, &table);
	to = downstream_at(table.first + place(skb, &pkt, &table), &to_id);
	if (!to)
		return drop(skb, listener, &pkt, NULL, DROP_NO_DOWNSTREAM);
	if (to->delivery == DELIVER_NEIGHBOUR)
		return forward_out(skb, listener, &pkt, to, to_id);
	if (to->delivery == DELIVER_LOCAL)
		return forward_local(skb, listener, &pkt, to, to_id);
	return drop(skb, listener, &pkt, to, DROP_NO_ROUTE);
}

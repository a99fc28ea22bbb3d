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
#include "deliver.h"
#include "count.h"
#include "replicate.h"

char LICENSE[] SEC("license") = "GPL";

static __always_inline int pass(const struct fanout_listener *listener, const struct packet *pkt)
{
	count_passed(listener->id, pkt);
	return TC_ACT_UNSPEC;
}

static __always_inline int drop(const struct fanout_listener *listener, enum drop_reason reason,
				const struct packet *pkt)
{
	count_dropped(listener->id, reason, pkt);
	return TC_ACT_SHOT;
}

/* To a socket on this host: the journey ends here, so the TTL is not touched. */
static __always_inline int forward_local(struct __sk_buff *skb,
					 const struct fanout_listener *listener,
					 const struct packet *pkt, const struct downstream *to,
					 __u32 to_id)
{
	if (rewrite_destination(skb, pkt, to))
		return drop(listener, DROP_REWRITE_FAILED, pkt);
	count_forwarded(listener->id, pkt);
	count_copy(to_id, pkt);
	return TC_ACT_UNSPEC;
}

static __always_inline int forward_out(struct __sk_buff *skb,
				       const struct fanout_listener *listener,
				       const struct packet *pkt, const struct downstream *to,
				       __u32 to_id)
{
	if (pkt->ttl <= 1)
		return drop(listener, DROP_TTL_EXPIRED, pkt);
	/* Too long for the way out: redirecting would lose it silently, the socket's stack can fragment it. */
	if (pkt->ip_len > to->mtu)
		return pass(listener, pkt);
	if (rewrite_destination(skb, pkt, to) || decrement_ttl(skb, pkt))
		return drop(listener, DROP_REWRITE_FAILED, pkt);
	if (deliver_out(skb, pkt, to, to_id) != TC_ACT_REDIRECT)
		return drop(listener, DROP_REDIRECT_FAILED, pkt);
	count_forwarded(listener->id, pkt);
	count_copy(to_id, pkt);
	return TC_ACT_REDIRECT;
}

/* To all downstreams. Every copy is one hop older, also one that stays on this host. */
static __always_inline int replicate(struct __sk_buff *skb, const struct fanout_listener *listener,
				     const struct packet *pkt, const struct table *table)
{
	int verdict = TC_ACT_SHOT;

	if (pkt->ttl <= 1)
		return drop(listener, DROP_TTL_EXPIRED, pkt);
	if (pkt->ip_len > table->least_mtu)
		return pass(listener, pkt);
	if (decrement_ttl(skb, pkt))
		return drop(listener, DROP_REWRITE_FAILED, pkt);
	if (!send_copies(skb, pkt, listener->id, table, &verdict))
		return drop(listener, DROP_NO_ROUTE, pkt);
	count_forwarded(listener->id, pkt);
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
	if (came_around(skb) && finish_round(skb, &pkt, &verdict))
		return verdict;
	listener = bpf_map_lookup_elem(&listeners, &pkt.dst);
	if (!listener)
		return TC_ACT_UNSPEC;
	state = bpf_map_lookup_elem(&listener_states, &listener->id);
	if (!state)
		return TC_ACT_UNSPEC;
	why_not = refusal(state, &pkt);
	if (why_not != DROP_REASONS)
		return drop(listener, why_not, &pkt);
	if (pkt.exotic || listener->flags & LISTENER_SOCKET_ONLY)
		return pass(listener, &pkt);
	if (!read_table(listener->id, state, &table))
		return drop(listener, DROP_NO_DOWNSTREAM, &pkt);
	if (table.policy == POLICY_REPLICATE)
		return replicate(skb, listener, &pkt, &table);
	to = downstream_at(table.first + place(skb, &pkt, &table), &to_id);
	if (!to)
		return drop(listener, DROP_NO_DOWNSTREAM, &pkt);
	if (to->delivery == DELIVER_NEIGHBOUR)
		return forward_out(skb, listener, &pkt, to, to_id);
	if (to->delivery == DELIVER_LOCAL)
		return forward_local(skb, listener, &pkt, to, to_id);
	return drop(listener, DROP_NO_ROUTE, &pkt);
}

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The fast path. On most hosts nearly every datagram is whole, has no options, is for a listener
 * that admits everyone, and goes to a downstream whose neighbour is resolved. Those need few of the
 * stages' branches, and nothing stored for later stages, so this file combines the parts they need.
 * It is a third of the code, laid out contiguously. A packet's path through the kernel fills the
 * CPU's instruction cache, so fetching code costs more than computing.
 *
 * Anything unusual goes unmodified and uncounted to the slow path (fanout.bpf.c), which reaches the
 * same verdict. Plain foreign traffic is passed here.
 *
 * The heartbeat (heartbeat.h) is not checked here: the slow path checked it when it resolved the
 * neighbour, at most NEXT_HOP_TICKS ago.
 */
#ifndef FANOUT_FAST_PATH_H
#define FANOUT_FAST_PATH_H

#include "base.h"
#include "address.h"
#include "admission.h"
#include "counters.h"
#include "deliver.h"
#include "events.h"
#include "fanout_abi.h"
#include "hook_marker.h"
#include "l3_ingress.h"
#include "maps.h"
#include "match.h"
#include "packet.h"
#include "parse.h"
#include "reinject.h"
#include "rewrite.h"
#include "select.h"
#include "skb.h"

/* Results besides verdicts. */
#define SLOW_PATH -3
#define MATCHED -4

#define IPV4_PLAIN 0x45 /* version 4, header without options */

/*
 * True if this is an Ethernet frame to this host that was not reinjected. `first` is its first
 * byte.
 */
static __always_inline bool is_plain_frame(struct __sk_buff *skb, __u8 first, __u8 version)
{
	return !skb->vlan_present && CTX_FIELD(__u32, skb, pkt_type) == PACKET_HOST &&
	       !is_reinjected(skb) && (likely(first >> 4 != version) || !is_l3_device(skb));
}

/* Matches a datagram by destination: MATCHED, TC_ACT_UNSPEC for foreign traffic, or SLOW_PATH. */
static __always_inline int fast_match(struct __sk_buff *skb, const struct packet *pkt,
				      __u32 *listener_id)
{
	__u16 state;
	const struct cached_listener *entry = cache_lookup(&pkt->dst, &state);

	if (unlikely(!entry || state == CACHE_COLLISION))
		return SLOW_PATH;
	if (state == CACHE_EMPTY || !cache_entry_matches(entry, &pkt->dst))
		return TC_ACT_UNSPEC;
	*listener_id = entry->listener.id;
	return entry->listener.flags || already_processed(skb) ? SLOW_PATH : MATCHED;
}

/*
 * Fills in what parse_udp() does, for an IP packet of `total` bytes. False if the stack would
 * refuse it or it is a super-packet.
 */
static __always_inline bool read_plain_udp(struct __sk_buff *skb, struct packet *pkt,
					   const struct udphdr *udp, __u32 total)
{
	__u32 udp_len = bpf_ntohs(udp->len);

	pkt->sport_be = udp->source;
	pkt->datagrams = 1;
	pkt->payload = udp_len - sizeof(*udp);
	pkt->ip_len = pkt->l4_off - L3_OFF + udp_len;
	return udp_len >= sizeof(*udp) && pkt->ip_len <= total && L3_OFF + total <= skb->len &&
	       !skb->gso_size;
}

/* Computes the index into the table and the next cursor. False if it needs the slow path. */
static __always_inline bool fast_index(const struct packet *pkt, __u32 policy, __u32 slots,
				       __u32 *cursor, __u32 *index)
{
	if (likely(policy == POLICY_ROUND_ROBIN)) {
		/* First datagram on this CPU, or the table became shorter. */
		if (unlikely(*cursor - 1 >= slots))
			return false;
		*index = *cursor == slots ? 0 : *cursor;
		*cursor = *index + 1;
		return true;
	}
	if (policy > POLICY_HASH_FLOW || !slots)
		return false;
	*index = table_index(flow_hash(pkt, policy), slots);
	return true;
}

/*
 * True if the cached next hop can be used. Downstreams on this host, on L3 devices or without a
 * route never have one.
 */
static __always_inline bool has_fresh_hop(const struct packet *pkt, const struct downstream *to,
					  const struct next_hop *cached_hop)
{
	return is_fresh(cached_hop) && pkt->ip_len <= to->mtu;
}

/* Selects a downstream, delivers and counts a datagram of this listener. */
static __always_inline int fast_forward(struct __sk_buff *skb, struct packet *pkt,
					__u32 listener_id)
{
	const struct listener_state *state = bpf_map_lookup_elem(&listener_states, &listener_id);
	struct stats *stats = bpf_map_lookup_elem(&STATS, &listener_id);
	struct downstream_stats *to_stats;
	const struct downstream *to;
	__u32 cursor, index, to_id;
	struct table table;
	__u8 ttl;

	if (unlikely(!state || !stats || has_admission(state) || trace.on || pkt->ttl <= 1))
		return SLOW_PATH;
	read_table(stats, state, &table);
	cursor = stats->cursor;
	if (unlikely(!fast_index(pkt, table.policy, table.slots, &cursor, &index)))
		return SLOW_PATH;
	to = downstream_at(table.first + index, &to_id);
	if (unlikely(!to))
		return SLOW_PATH;
	to_stats = bpf_map_lookup_elem(&DOWNSTREAM_STAT, &to_id);
	if (unlikely(!to_stats || !has_fresh_hop(pkt, to, &to_stats->cached_hop)))
		return SLOW_PATH;
	if (unlikely(redirect_resolved(skb, pkt, to, &to_stats->cached_hop, true) !=
		     TC_ACT_REDIRECT))
		return SLOW_PATH;
	/* Only the first write can fail, for lack of memory; after it the packet is writable. */
	ttl = pkt->ttl - 1;
	if (unlikely(pkt->v6 ? rewrite_ipv6(skb, pkt, to, to_stats->cached_hop.macs, ttl)
			     : rewrite_ipv4(skb, pkt, to, to_stats->cached_hop.macs, ttl, L3_OFF)))
		return SLOW_PATH;
	stats->cursor = cursor;
	count_forwarded(stats, pkt);
	count_copy(to_stats, pkt);
	return TC_ACT_REDIRECT;
}

static __always_inline int fast_ipv4(struct __sk_buff *skb)
{
	void *frame = frame_start(skb);
	struct iphdr *ip = frame + L3_OFF;
	struct udphdr *udp = (void *)(ip + 1);
	struct packet pkt = { .l4_off = L3_OFF + sizeof(*ip) };
	__u32 listener_id;
	int match;

	if (unlikely((void *)(udp + 1) > frame_end(skb) || !is_plain_frame(skb, *(__u8 *)frame, 4)))
		return SLOW_PATH;
	if (unlikely(*(__u8 *)ip != IPV4_PLAIN ||
		     ip->frag_off & bpf_htons(IPV4_MORE | IPV4_OFFSET)))
		return SLOW_PATH;
	if (ip->protocol != IPPROTO_UDP)
		return TC_ACT_UNSPEC;
	pkt.dst.addr_be[2] = bpf_htonl(0xffff);
	pkt.dst.addr_be[3] = ip->daddr;
	pkt.dst.port_be = udp->dest;
	match = fast_match(skb, &pkt, &listener_id);
	if (match != MATCHED)
		return match;
	pkt.ttl = ip->ttl;
	pkt.src_be[2] = bpf_htonl(0xffff);
	pkt.src_be[3] = ip->saddr;
	if (unlikely(!read_plain_udp(skb, &pkt, udp, bpf_ntohs(ip->tot_len)) ||
		     is_ipv4_martian(ip->saddr) || is_ipv4_multicast(ip->daddr) ||
		     ipv4_header_sum(ip) != 0xffff))
		return SLOW_PATH;
	return fast_forward(skb, &pkt, listener_id);
}

/* A separate function, so that the code of each family is contiguous. */
static __noinline int fast_ipv6(struct __sk_buff *skb)
{
	void *frame = frame_start(skb);
	struct ipv6hdr *ip = frame + L3_OFF;
	struct udphdr *udp = (void *)(ip + 1);
	struct packet pkt = { .v6 = true, .l4_off = L3_OFF + sizeof(*ip) };
	__u32 listener_id;
	int match;

	if (unlikely((void *)(udp + 1) > frame_end(skb) || !is_plain_frame(skb, *(__u8 *)frame, 6)))
		return SLOW_PATH;
	if (unlikely(ip->version != 6 || ip->nexthdr == NEXTHDR_FRAGMENT ||
		     is_ipv6_martian(&ip->daddr)))
		return SLOW_PATH;
	if (ip->nexthdr != IPPROTO_UDP)
		return TC_ACT_UNSPEC;
	__builtin_memcpy(pkt.dst.addr_be, &ip->daddr, sizeof(pkt.dst.addr_be));
	pkt.dst.port_be = udp->dest;
	match = fast_match(skb, &pkt, &listener_id);
	if (match != MATCHED)
		return match;
	pkt.ttl = ip->hop_limit;
	__builtin_memcpy(pkt.src_be, &ip->saddr, sizeof(pkt.src_be));
	if (unlikely(!read_plain_udp(skb, &pkt, udp, sizeof(*ip) + bpf_ntohs(ip->payload_len)) ||
		     !udp->check || is_ipv6_martian(&ip->saddr) || is_ipv6_link_local(&ip->saddr)))
		return SLOW_PATH;
	return fast_forward(skb, &pkt, listener_id);
}

/* Returns the verdict, or SLOW_PATH. */
static __always_inline int fast_path(struct __sk_buff *skb)
{
	if (likely(skb->protocol == bpf_htons(ETH_P_IP)))
		return fast_ipv4(skb);
	return skb->protocol == bpf_htons(ETH_P_IPV6) ? fast_ipv6(skb) : TC_ACT_UNSPEC;
}

#endif

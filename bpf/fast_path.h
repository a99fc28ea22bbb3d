/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The short way. On most hosts nearly every datagram is like the one before: whole, without options, for a listener that
 * takes everybody's, and for a downstream whose neighbour is known. That needs few of the stages' branches, and nothing
 * written down for later ones, so for it the stages' parts are put together here once more. It is a third of the code, and
 * in a row. A packet's way through the kernel fills the CPU's cache for instructions, so what there is to fetch anew for each
 * packet costs more than what there is to compute.
 *
 * Whatever is unusual is left to the long way (fanout.bpf.c), which decides alike; the packet and the books are as they
 * were. What is plain and somebody else's is seen here too.
 *
 * Nobody asks here whether a daemon is there (heartbeat.h): that was asked when the neighbour was found, at most NEXT_HOP_TICKS
 * ago.
 */
#ifndef FANOUT_FAST_PATH_H
#define FANOUT_FAST_PATH_H

/* What is answered beside verdicts. */
#define SLOW_PATH -3
#define MATCHED -4

#define IPV4_PLAIN 0x45 /* version 4, no options */

/* True if this is an Ethernet frame for this host, for the first time here. `first` is its first byte. */
static __always_inline bool is_plain_frame(struct __sk_buff *skb, __u8 first, __u8 version)
{
	return !skb->vlan_present && CTX_FIELD(__u32, skb, pkt_type) == PACKET_HOST &&
	       !is_reinjected(skb) && (likely(first >> 4 != version) || !is_l3_device(skb));
}

/* The listener of a datagram of which the destination is known: MATCHED, TC_ACT_UNSPEC for somebody else's, SLOW_PATH. */
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
 * Fills in the rest of what parse_udp() would, of an IP packet of `total` bytes. False if the stack would refuse it, or if
 * it is not one datagram.
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

/* The place in the table, and where the cursor is after that. False if only the long way can tell. */
static __always_inline bool fast_index(const struct packet *pkt, __u32 policy, __u32 slots,
				       __u32 *cursor, __u32 *index)
{
	if (likely(policy == POLICY_ROUND_ROBIN)) {
		/* Not the first on this CPU, nor has the table become shorter. */
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
 * True if it can go where the next hop says. Of a downstream on this host, of one on a link that has no neighbours, or of
 * one without a route, none is ever known.
 */
static __always_inline bool has_fresh_hop(const struct packet *pkt, const struct downstream *to,
					  const struct next_hop *cached_hop)
{
	return is_fresh(cached_hop) && pkt->ip_len <= to->mtu;
}

/* From selection to the books, of a datagram of this listener's. */
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
	/* Only the first change can be refused, for want of memory: after that the packet is writable. */
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

/* A function of its own: on a host with both, each has its own code in a row. */
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

/* The verdict, or SLOW_PATH. */
static __always_inline int fast_path(struct __sk_buff *skb)
{
	if (likely(skb->protocol == bpf_htons(ETH_P_IP)))
		return fast_ipv4(skb);
	return skb->protocol == bpf_htons(ETH_P_IPV6) ? fast_ipv6(skb) : TC_ACT_UNSPEC;
}

#endif

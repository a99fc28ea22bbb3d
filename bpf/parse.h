/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Parses a frame into struct packet. A packet that is not a well-formed UDP datagram, or a fragment
 * of one, is foreign traffic: it is passed to the stack, which decides what to do with it.
 */
#ifndef FANOUT_PARSE_H
#define FANOUT_PARSE_H

#include "base.h"
#include "fanout_abi.h"
#include "address.h"
#include "l3_ingress.h"
#include "packet.h"
#include "reinject.h"
#include "skb.h"

#define IPV4_MORE 0x2000 /* more fragments follow */
#define IPV4_OFFSET 0x1fff /* in units of 8 bytes */
#define NEXTHDR_FRAGMENT 44
#define IPV6_MORE 0x0001
#define IPV6_OFFSET 0xfff8 /* in bytes */

enum parse_result {
	PARSE_FOREIGN = 0, /* foreign traffic */
	PARSE_OK = 1,
};

/*
 * RFC 1071 checksum over an IPv4 header without options: 0xffff if it is intact. Summing 32 bits at
 * a time gives the same result as 16.
 */
static __always_inline __u32 ipv4_header_sum(const struct iphdr *ip)
{
	const __u32 *word = (const __u32 *)ip;
	__u64 sum = 0;

#pragma unroll
	for (int i = 0; i < 5; i++)
		sum += word[i];
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/*
 * False for frames to other hosts, which a promiscuous device receives. Packets without a frame are
 * always for this host.
 */
static __always_inline bool is_for_this_host(struct __sk_buff *skb, bool l3_ingress)
{
	__u32 type = CTX_FIELD(__u32, skb, pkt_type);

	return l3_ingress || type == PACKET_HOST || type == PACKET_MULTICAST;
}

/*
 * True if the destination MAC and IP address are both unicast or both multicast. A reinjected clone
 * keeps the MAC address it arrived with.
 */
static __always_inline bool matches_frame_type(struct __sk_buff *skb, const struct packet *pkt)
{
	return pkt->is_multicast == (CTX_FIELD(__u32, skb, pkt_type) == PACKET_MULTICAST) ||
	       pkt->l3_ingress || is_reinjected(skb);
}

/*
 * Parses one fragment: `length` bytes at `offset`. False if the stack would refuse it or the
 * program does not track it; then all fragments of its datagram go to the stack.
 */
static __always_inline bool parse_fragment(struct packet *pkt, __be32 id_be, __u32 offset,
					   bool more, __u32 length)
{
	if (!length || offset + length > 65535 || (more && length % 8) || (!offset && !more))
		return false;
	pkt->part = offset ? LATER_FRAGMENT : FIRST_FRAGMENT;
	pkt->fragment_id_be = id_be;
	pkt->offset = offset;
	pkt->more = more;
	pkt->data_len = length;
	return true;
}

/*
 * Parses the UDP header at `udp`, whose datagram has at most `room` bytes in this packet. Fills in
 * ports and lengths.
 */
static __always_inline enum parse_result parse_udp(struct __sk_buff *skb, struct packet *pkt,
						   const struct udphdr *udp, __u32 room)
{
	__u32 udp_len = bpf_ntohs(udp->len);
	__u32 gso_size = skb->gso_size;

	if (udp_len < sizeof(*udp) || room < sizeof(*udp))
		return PARSE_FOREIGN;
	/* A fragmented datagram ends in a later fragment, a whole one here. */
	if (pkt->part ? udp_len <= room : udp_len > room)
		return PARSE_FOREIGN;
	/*
	 * RFC 8200, 8.1: UDP over IPv6 must carry a checksum; the stack discards datagrams without
	 * one.
	 */
	if (pkt->v6 && !udp->check)
		return PARSE_FOREIGN;
	pkt->sport_be = udp->source;
	pkt->dst.port_be = udp->dest;
	pkt->payload = udp_len - sizeof(*udp);
	pkt->datagrams = 1;
	if (pkt->part) {
		pkt->data_len = room - sizeof(*udp);
		__builtin_memcpy(&pkt->udp_header, udp, sizeof(pkt->udp_header));
		return PARSE_OK;
	}
	pkt->data_len = pkt->payload;
	pkt->ip_len -= room - udp_len;
	if (gso_size) {
		/*
		 * Packets from an untrusted source (a VM's virtio device) carry no count: derive
		 * it.
		 */
		pkt->datagrams = skb->gso_segs ?: (pkt->payload + gso_size - 1) / gso_size;
		pkt->datagrams = pkt->datagrams ?: 1;
		if (gso_size < pkt->payload)
			pkt->ip_len -= pkt->payload - gso_size;
	}
	return PARSE_OK;
}

/* Makes the UDP header at pkt->l4_off readable and parses it. */
static __always_inline enum parse_result pull_udp(struct __sk_buff *skb, struct packet *pkt,
						  __u32 room)
{
	void *data, *data_end;
	struct udphdr *udp;

	if (!pull(skb, pkt->l4_off + sizeof(*udp)))
		return PARSE_FOREIGN;
	data = frame_start(skb);
	data_end = frame_end(skb);
	udp = data + pkt->l4_off;
	if ((void *)(udp + 1) > data_end)
		return PARSE_FOREIGN;
	return parse_udp(skb, pkt, udp, room);
}

/* Clears what the previous packet left. */
static __always_inline void init_packet(struct packet *pkt, bool l3_ingress)
{
	__builtin_memset(pkt, 0, sizeof(*pkt));
	pkt->l3_ingress = l3_ingress;
	pkt->dst.scope = KEY_LISTENER;
}

static __always_inline enum parse_result parse_ipv4(struct __sk_buff *skb, struct packet *pkt,
						    bool l3_ingress)
{
	void *data, *data_end;
	struct iphdr *ip;
	__u32 l3 = l3_ingress ? 0 : L3_OFF;
	__u32 ihl, total, flags;

	if (!is_for_this_host(skb, l3_ingress))
		return PARSE_FOREIGN;
	/*
	 * Together with the UDP header if the frame is long enough: a last fragment may be shorter.
	 */
	if (!pull(skb, l3 + sizeof(*ip) + sizeof(struct udphdr)) && !pull(skb, l3 + sizeof(*ip)))
		return PARSE_FOREIGN;
	data = frame_start(skb);
	data_end = frame_end(skb);
	ip = data + l3;
	if ((void *)(ip + 1) > data_end)
		return PARSE_FOREIGN;
	if (ip->version != 4 || ip->protocol != IPPROTO_UDP)
		return PARSE_FOREIGN;
	ihl = ip->ihl * 4;
	total = bpf_ntohs(ip->tot_len);
	if (ihl < sizeof(*ip) || total < ihl || l3 + total > skb->len || is_ipv4_martian(ip->saddr))
		return PARSE_FOREIGN;
	init_packet(pkt, l3_ingress);
	/*
	 * The stack interprets IP options (source routes, router alert) and verifies headers that
	 * have them.
	 */
	pkt->needs_socket = ihl != sizeof(*ip);
	if (!pkt->needs_socket && ipv4_header_sum(ip) != 0xffff)
		return PARSE_FOREIGN;
	pkt->ttl = ip->ttl;
	pkt->dst.addr_be[2] = bpf_htonl(0xffff);
	pkt->dst.addr_be[3] = ip->daddr;
	__builtin_memcpy(pkt->src_be, pkt->dst.addr_be, 12);
	pkt->src_be[3] = ip->saddr;
	pkt->l4_off = l3 + ihl;
	pkt->ip_len = total;
	pkt->is_multicast = is_ipv4_multicast(ip->daddr);
	if (!matches_frame_type(skb, pkt))
		return PARSE_FOREIGN;
	flags = bpf_ntohs(ip->frag_off);
	if (flags & (IPV4_MORE | IPV4_OFFSET)) {
		if (!parse_fragment(pkt, ip->id, (flags & IPV4_OFFSET) * 8, flags & IPV4_MORE,
				    total - ihl))
			return PARSE_FOREIGN;
		if (pkt->part == LATER_FRAGMENT)
			return PARSE_OK;
	}
	return pull_udp(skb, pkt, total - ihl);
}

/* Packets with other extension headers go to the stack, and so to the listener's socket. */
static __always_inline enum parse_result parse_ipv6(struct __sk_buff *skb, struct packet *pkt,
						    bool l3_ingress)
{
	void *data, *data_end;
	struct frag_hdr *fragment;
	struct ipv6hdr *ip;
	__u32 l3 = l3_ingress ? 0 : L3_OFF;
	__u32 length, flags;

	if (!is_for_this_host(skb, l3_ingress) || !pull(skb, l3 + sizeof(*ip) + sizeof(*fragment)))
		return PARSE_FOREIGN;
	data = frame_start(skb);
	data_end = frame_end(skb);
	ip = data + l3;
	fragment = (void *)(ip + 1);
	if ((void *)(fragment + 1) > data_end)
		return PARSE_FOREIGN;
	length = bpf_ntohs(ip->payload_len);
	if (ip->version != 6 || l3 + sizeof(*ip) + length > skb->len ||
	    is_ipv6_martian(&ip->saddr) || is_ipv6_zero_prefix(&ip->daddr))
		return PARSE_FOREIGN;
	init_packet(pkt, l3_ingress);
	pkt->v6 = true;
	pkt->needs_socket = is_ipv6_link_local(&ip->saddr);
	pkt->is_multicast = ip->daddr.in6_u.u6_addr8[0] == 0xff;
	if (!matches_frame_type(skb, pkt))
		return PARSE_FOREIGN;
	pkt->ttl = ip->hop_limit;
	__builtin_memcpy(pkt->dst.addr_be, &ip->daddr, sizeof(pkt->dst.addr_be));
	__builtin_memcpy(pkt->src_be, &ip->saddr, sizeof(pkt->src_be));
	pkt->l4_off = l3 + sizeof(*ip);
	pkt->ip_len = sizeof(*ip) + length;
	if (ip->nexthdr == NEXTHDR_FRAGMENT) {
		flags = bpf_ntohs(fragment->frag_off);
		if (fragment->nexthdr != IPPROTO_UDP || length < sizeof(*fragment) ||
		    !parse_fragment(pkt, fragment->identification, flags & IPV6_OFFSET,
				    flags & IPV6_MORE, length - sizeof(*fragment)))
			return PARSE_FOREIGN;
		if (pkt->part == LATER_FRAGMENT)
			return PARSE_OK;
		pkt->l4_off += sizeof(*fragment);
		length -= sizeof(*fragment);
	} else if (ip->nexthdr != IPPROTO_UDP) {
		return PARSE_FOREIGN;
	}
	return pull_udp(skb, pkt, length);
}

/*
 * A separate function, so that packets with an Ethernet header, the common case, use constant
 * offsets.
 */
static __noinline enum parse_result parse_l3_ingress(struct __sk_buff *skb, struct packet *pkt)
{
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return parse_ipv4(skb, pkt, true);
	return parse_ipv6(skb, pkt, true);
}

static __always_inline enum parse_result parse(struct __sk_buff *skb, struct packet *pkt)
{
	/* Tagged frames belong to a VLAN device, which will untag them. */
	if (skb->vlan_present)
		return PARSE_FOREIGN;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return is_l3_ingress(skb, 4) ? parse_l3_ingress(skb, pkt)
					     : parse_ipv4(skb, pkt, false);
	if (skb->protocol == bpf_htons(ETH_P_IPV6))
		return is_l3_ingress(skb, 6) ? parse_l3_ingress(skb, pkt)
					     : parse_ipv6(skb, pkt, false);
	return PARSE_FOREIGN;
}

#endif

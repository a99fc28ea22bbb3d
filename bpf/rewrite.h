/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Gives a datagram its new destination. The kernel's checksum helpers are used throughout because they are right
 * for every state an skb's checksum can be in (CHECKSUM_PARTIAL, CHECKSUM_COMPLETE, none yet verified).
 *
 * Of a datagram in fragments, the UDP checksum is in the first, and is changed there by the difference that the new address
 * makes; the later ones have an address only.
 *
 * Whatever else changes is written directly: the helper for it costs more than all of this program's arithmetic. In return
 * the kernel makes every packet's head writable before this program sees it, also of those that are none of ours. That is one
 * byte to look at, except in clones, whose shared heads are copied: packets flooded by a bridge or to a group's
 * receivers. TCP's own clones, all that others send over a link between namespaces, share nothing that is in the head.
 */
#ifndef FANOUT_REWRITE_H
#define FANOUT_REWRITE_H

#define L4_CSUM_OFF (offsetof(struct udphdr, check))

/* A UDP checksum of zero means "none" and stays zero; one that becomes zero is written as 0xffff (RFC 768). */
#define UDP_CSUM BPF_F_MARK_MANGLED_0

/* How long to live a datagram to a group has from here on: as long as one that a host sends (RFC 1340). */
#define DEFAULT_TTL 64

/*
 * True if the datagram may travel on. The time to live of one that was sent to a group says how far the group reaches,
 * most often not beyond its link, and nothing about a single receiver.
 */
static __always_inline bool may_forward(const struct packet *pkt)
{
	return pkt->ttl > 1 || pkt->is_multicast;
}

/* One hop less to live, as any router would have it (RFC 1812, 5.3.1). The caller has seen that it may travel. */
static __always_inline __u8 next_ttl(const struct packet *pkt)
{
	return pkt->is_multicast ? DEFAULT_TTL : pkt->ttl - 1;
}

/* A frame's addresses, destination first. In words, which clang would not take from bytes. */
static __always_inline bool write_macs(void *frame, const void *end, const __u8 *macs)
{
	const __u32 *from = (const __u32 *)macs;
	__u32 *to = frame;

	if ((void *)(to + 3) > end)
		return false;
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	return true;
}

/* The checksum's new value when `sum` is the sum of the words that came and, inverted, of those that went (RFC 1624). */
static __always_inline __u16 csum_replace16(__u16 check, __u32 sum)
{
	sum += (__u16)~check;
	sum = (sum & 0xffff) + (sum >> 16);
	return ~((sum & 0xffff) + (sum >> 16));
}

static __always_inline __u32 sum_words16(__be32 addr_be)
{
	return (addr_be & 0xffff) + (addr_be >> 16);
}

static __always_inline void write_ipv4(struct iphdr *ip, __be32 addr_be, __u8 ttl)
{
	/* The checksum works on 16-bit words: TTL is the high byte of the one it shares with the protocol. */
	__u16 old = bpf_htons(ip->ttl << 8), new = bpf_htons(ttl << 8);

	ip->check = csum_replace16(ip->check, sum_words16(~ip->daddr) + sum_words16(addr_be) +
						      (__u16)~old + new);
	ip->ttl = ttl;
	ip->daddr = addr_be;
}

static __always_inline bool csum_port(struct __sk_buff *skb, const struct packet *pkt,
				      const struct downstream *to, __u32 offset)
{
	return to->port_be == pkt->dst.port_be ||
	       !bpf_l4_csum_replace(skb, offset, pkt->dst.port_be, to->port_be,
				    UDP_CSUM | sizeof(__be16));
}

/* Whether the checksum helper has changed what the new address and port change. A later fragment has neither. */
static __always_inline bool csum_ipv4(struct __sk_buff *skb, const struct packet *pkt,
				      const struct downstream *to)
{
	__u32 offset = pkt->l4_off + L4_CSUM_OFF;

	if (pkt->part == LATER_FRAGMENT)
		return true;
	if (bpf_l4_csum_replace(skb, offset, pkt->dst.addr_be[3], to->addr_be[3],
				BPF_F_PSEUDO_HDR | UDP_CSUM | sizeof(__be32)))
		return false;
	return csum_port(skb, pkt, to, offset);
}

static __always_inline int rewrite_ipv4(struct __sk_buff *skb, const struct packet *pkt,
					const struct downstream *to, const __u8 *macs, __u8 ttl,
					__u32 l3)
{
	void *data, *data_end;
	struct udphdr *udp;
	struct iphdr *ip;

	if (!csum_ipv4(skb, pkt, to))
		return -1;
	data = frame_start(skb);
	data_end = frame_end(skb);
	ip = data + l3;
	if ((void *)(ip + 1) > data_end)
		return -1;
	if (pkt->part != LATER_FRAGMENT) {
		udp = (void *)(ip + 1);
		if ((void *)(udp + 1) > data_end)
			return -1;
		udp->dest = to->port_be;
	}
	write_ipv4(ip, to->addr_be[3], ttl);
	return !macs || write_macs(data, data_end, macs) ? 0 : -1;
}

/* The difference that another address makes to a sum of 16-bit words. */
static __always_inline __u32 addr_csum_diff(const __be32 *old_be, const __be32 *new_be)
{
	__u64 sum = 0;

#pragma unroll
	for (int i = 0; i < 4; i++)
		sum += (__u64)(__u32)~old_be[i] + new_be[i];
	sum = (sum & 0xffffffff) + (sum >> 32);
	return (sum & 0xffffffff) + (sum >> 32);
}

static __always_inline bool csum_ipv6(struct __sk_buff *skb, const struct packet *pkt,
				      const struct downstream *to, __u32 addr_diff)
{
	__u32 offset = pkt->l4_off + L4_CSUM_OFF;

	if (pkt->part == LATER_FRAGMENT)
		return true;
	if (bpf_l4_csum_replace(skb, offset, 0, addr_diff, BPF_F_PSEUDO_HDR | UDP_CSUM))
		return false;
	return csum_port(skb, pkt, to, offset);
}

/*
 * In IPv6 the address is covered by the UDP checksum alone. For CHECKSUM_COMPLETE the two changes cancel out in the
 * sum over the packet; the helper with BPF_F_PSEUDO_HDR accounts for its own, so the address must be accounted for too, as
 * the hop limit must, which nothing cancels out. That sum does not cover the frame's addresses.
 */
static __always_inline int rewrite_ipv6(struct __sk_buff *skb, const struct packet *pkt,
					const struct downstream *to, const __u8 *macs, __u8 ttl)
{
	__u32 addr_diff = addr_csum_diff(pkt->dst.addr_be, to->addr_be);
	void *data, *data_end;
	struct udphdr *udp;
	struct ipv6hdr *ip;
	__u64 sum;

	if (!csum_ipv6(skb, pkt, to, addr_diff))
		return -1;
	data = frame_start(skb);
	data_end = frame_end(skb);
	ip = data + l3_off(pkt);
	if ((void *)(ip + 1) > data_end)
		return -1;
	if (pkt->part != LATER_FRAGMENT) {
		udp = data + pkt->l4_off;
		if ((void *)(udp + 1) > data_end)
			return -1;
		udp->dest = to->port_be;
	}
	/* The hop limit is the low byte of its word. */
	sum = (__u64)addr_diff + (__u16)~bpf_htons(ip->hop_limit) + bpf_htons(ttl);
	ip->hop_limit = ttl;
	__builtin_memcpy(&ip->daddr, to->addr_be, sizeof(ip->daddr));
	/* Refused where there is no such sum. */
	bpf_csum_update(skb, (sum & 0xffffffff) + (sum >> 32));
	return !macs || write_macs(data, data_end, macs) ? 0 : -1;
}

/*
 * Puts a frame's header, yet without addresses, before a packet that has come without: it is to go out of a link that
 * wants one. On an error the packet must be dropped.
 */
static __always_inline bool add_eth_header(struct __sk_buff *skb, struct packet *pkt)
{
	__be16 protocol_be = skb->protocol;

	if (!pkt->l3_ingress)
		return true;
	if (bpf_skb_change_head(skb, L3_OFF, 0) ||
	    bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_proto), &protocol_be,
				sizeof(protocol_be), 0))
		return false;
	pkt->l3_ingress = false;
	pkt->l4_off += L3_OFF;
	return true;
}

/*
 * Writes the downstream's address and port and the time to live; in a later fragment, no port. Also the frame's
 * addresses, destination first, if they are given and there is a frame. On an error the packet may be half changed and must
 * be dropped. A function of its own, since it is called from many places.
 */
static __noinline int rewrite_any(struct __sk_buff *skb, const struct packet *pkt,
				  const struct downstream *to, const __u8 *macs, __u8 ttl)
{
	/* From here on it is for one host, as far as this host's own stack and a pod's are concerned too. */
	if (pkt->is_multicast && bpf_skb_change_type(skb, PACKET_HOST))
		return -1;
	return pkt->v6 ? rewrite_ipv6(skb, pkt, to, macs, ttl)
		       : rewrite_ipv4(skb, pkt, to, macs, ttl, l3_off(pkt));
}

/* The same, in place for what most packets are: the call alone would cost more than many a stage. */
static __always_inline int rewrite(struct __sk_buff *skb, const struct packet *pkt,
				   const struct downstream *to, const __u8 *macs, __u8 ttl)
{
	if (pkt->v6 | pkt->is_multicast | pkt->part | pkt->l3_ingress)
		return rewrite_any(skb, pkt, to, macs, ttl);
	return rewrite_ipv4(skb, pkt, to, macs, ttl, L3_OFF);
}

#endif

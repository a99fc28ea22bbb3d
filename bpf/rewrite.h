/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Gives a datagram its new destination. The kernel's checksum helpers are used throughout because they are right
 * for every state an skb's checksum can be in (CHECKSUM_PARTIAL, CHECKSUM_COMPLETE, none yet verified).
 *
 * Of a datagram in fragments, the UDP checksum is in the first, and is changed there by the difference that the new address
 * makes; the later ones have an address only.
 */
#ifndef FANOUT_REWRITE_H
#define FANOUT_REWRITE_H

#define L4_CSUM_OFF (offsetof(struct udphdr, check))
#define IPV4_OFF(field) (L3_OFF + offsetof(struct iphdr, field))
#define IPV6_OFF(field) (L3_OFF + offsetof(struct ipv6hdr, field))

/* A UDP checksum of zero means "none" and stays zero; one that becomes zero is written as 0xffff (RFC 768). */
#define UDP_CSUM BPF_F_MARK_MANGLED_0

static __always_inline int rewrite_port(struct __sk_buff *skb, const struct packet *pkt,
					__be16 port_be)
{
	if (port_be == pkt->dst.port_be)
		return 0;
	return bpf_l4_csum_replace(skb, pkt->l4_off + L4_CSUM_OFF, pkt->dst.port_be, port_be,
				   UDP_CSUM | sizeof(port_be))
		       ?: bpf_skb_store_bytes(skb, pkt->l4_off + offsetof(struct udphdr, dest),
					      &port_be, sizeof(port_be), 0);
}

static __always_inline int rewrite_ipv4(struct __sk_buff *skb, const struct packet *pkt,
					__be32 addr_be, bool later)
{
	__be32 old_be = pkt->dst.addr_be[3];

	if (!later && bpf_l4_csum_replace(skb, pkt->l4_off + L4_CSUM_OFF, old_be, addr_be,
					  BPF_F_PSEUDO_HDR | UDP_CSUM | sizeof(addr_be)))
		return -1;
	return bpf_l3_csum_replace(skb, IPV4_OFF(check), old_be, addr_be, sizeof(addr_be))
		       ?: bpf_skb_store_bytes(skb, IPV4_OFF(daddr), &addr_be, sizeof(addr_be), 0);
}

/*
 * In IPv6 the address is covered by the UDP checksum alone. For CHECKSUM_COMPLETE the two changes cancel out in the
 * sum over the packet; the helper with BPF_F_PSEUDO_HDR accounts for its own, so the store must for the address.
 */
static __always_inline int rewrite_ipv6(struct __sk_buff *skb, const struct packet *pkt,
					const __be32 *addr_be, bool later)
{
	__s64 diff;

	if (!later) {
		diff = bpf_csum_diff((__be32 *)pkt->dst.addr_be, 16, (__be32 *)addr_be, 16, 0);
		if (bpf_l4_csum_replace(skb, pkt->l4_off + L4_CSUM_OFF, 0, diff,
					BPF_F_PSEUDO_HDR | UDP_CSUM))
			return -1;
	}
	return bpf_skb_store_bytes(skb, IPV6_OFF(daddr), addr_be, 16, BPF_F_RECOMPUTE_CSUM);
}

/*
 * Writes the downstream's address and port; in a later fragment, the address alone. On an error the packet may be half
 * changed and must be dropped.
 */
static __always_inline int rewrite_destination(struct __sk_buff *skb, const struct packet *pkt,
					       const struct downstream *to, bool later)
{
	/* From here on it is for one host, as far as this host's own stack and a pod's are concerned too. */
	int err;

	if (pkt->group && bpf_skb_change_type(skb, PACKET_HOST))
		return -1;
	err = pkt->v6 ? rewrite_ipv6(skb, pkt, to->addr_be, later)
		      : rewrite_ipv4(skb, pkt, to->addr_be[3], later);
	return err || later ? err : rewrite_port(skb, pkt, to->port_be);
}

/* How long to live a datagram to a group has from here on: as long as one that a host sends (RFC 1340). */
#define DEFAULT_TTL 64

/*
 * True if the datagram may travel on. The time to live of one that was sent to a group says how far the group reaches,
 * most often not beyond its link, and nothing about a single receiver.
 */
static __always_inline bool may_travel(const struct packet *pkt)
{
	return pkt->ttl > 1 || pkt->group;
}

/* One hop less to live, as any router would (RFC 1812, 5.3.1). The caller has seen that it may travel. */
static __always_inline int decrement_ttl(struct __sk_buff *skb, const struct packet *pkt)
{
	__u8 ttl = pkt->group ? DEFAULT_TTL : pkt->ttl - 1;

	if (pkt->v6)
		return bpf_skb_store_bytes(skb, IPV6_OFF(hop_limit), &ttl, sizeof(ttl),
					   BPF_F_RECOMPUTE_CSUM);
	/* The checksum works on 16-bit words: TTL is the high byte of the one it shares with the protocol. */
	return bpf_l3_csum_replace(skb, IPV4_OFF(check), bpf_htons(pkt->ttl << 8 | IPPROTO_UDP),
				   bpf_htons(ttl << 8 | IPPROTO_UDP), sizeof(__u16))
		       ?: bpf_skb_store_bytes(skb, IPV4_OFF(ttl), &ttl, sizeof(ttl), 0);
}

#endif

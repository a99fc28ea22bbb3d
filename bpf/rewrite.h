/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Rewrites a datagram's destination. UDP checksums are updated by the kernel's helpers, because
 * they are right for every checksum state of an skb (CHECKSUM_PARTIAL, CHECKSUM_COMPLETE, not yet
 * verified).
 *
 * Of a fragmented datagram, the first fragment has the UDP checksum, which is updated there by the
 * difference of the addresses; later fragments have only an address to rewrite.
 *
 * Everything else is written directly: the helper for it costs more than all arithmetic of this
 * program. In return the kernel makes the head of every packet writable before this program runs,
 * including foreign traffic. That is a check of one byte, except for clones with shared heads,
 * which are copied: packets flooded by a bridge or to the receivers of a multicast group. TCP's own
 * clones, which make up the rest of the traffic between namespaces, do not share their heads.
 */
#ifndef FANOUT_REWRITE_H
#define FANOUT_REWRITE_H

#include "base.h"
#include "fanout_abi.h"
#include "packet.h"
#include "skb.h"

#define L4_CSUM_OFF (offsetof(struct udphdr, check))

/* A UDP checksum of zero means "none" and stays zero; one that becomes zero is written as 0xffff (RFC 768). */
#define UDP_CSUM BPF_F_MARK_MANGLED_0

/* TTL of a datagram that arrived by multicast: that of a datagram a host sends (RFC 1340). */
#define DEFAULT_TTL 64

/*
 * True if the datagram may be forwarded. The TTL of a multicast datagram limits the scope of the
 * group, often to one link; it does not apply to a single receiver.
 */
static __always_inline bool may_forward(const struct packet *pkt)
{
	return pkt->ttl > 1 || pkt->is_multicast;
}

/* One hop less, as at any router (RFC 1812, 5.3.1). Only after may_forward(). */
static __always_inline __u8 next_ttl(const struct packet *pkt)
{
	return pkt->is_multicast ? DEFAULT_TTL : pkt->ttl - 1;
}

/*
 * Writes the frame's addresses, destination first. In words, because clang would copy bytes one by
 * one.
 */
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

/* Updates a checksum by `sum`, the sum of the new words and the inverted old words (RFC 1624). */
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
	/*
	 * The checksum covers 16-bit words: TTL is the high byte of the one it shares with the
	 * protocol.
	 */
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

/* Updates the UDP checksum for the new address and port. A later fragment has none. */
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

/* Difference between two addresses in a sum of 16-bit words. */
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
 * In IPv6 only the UDP checksum covers the address. Under CHECKSUM_COMPLETE the changes of address
 * and UDP checksum cancel out in the sum over the packet. The helper with BPF_F_PSEUDO_HDR accounts
 * for the checksum, so the address must be accounted for too, and the hop limit, which nothing
 * cancels out. That sum does not cover the frame's addresses.
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
	/* Fails without CHECKSUM_COMPLETE, which is fine. */
	bpf_csum_update(skb, (sum & 0xffffffff) + (sum >> 32));
	return !macs || write_macs(data, data_end, macs) ? 0 : -1;
}

/*
 * Adds an Ethernet header, still without addresses, to a packet that arrived without one and leaves
 * by a device that needs one. On failure the packet must be dropped.
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
 * Writes the downstream's address and port and the TTL; in a later fragment, no port. Also writes
 * the frame's addresses, destination first, unless `macs` is NULL. On failure the packet may be
 * half rewritten and must be dropped. A separate function, because it is called from many places.
 */
static __noinline int rewrite_any(struct __sk_buff *skb, const struct packet *pkt,
				  const struct downstream *to, const __u8 *macs, __u8 ttl)
{
	/* From here on it is a unicast packet, also for this host's own stack and a pod's. */
	if (pkt->is_multicast && bpf_skb_change_type(skb, PACKET_HOST))
		return -1;
	return pkt->v6 ? rewrite_ipv6(skb, pkt, to, macs, ttl)
		       : rewrite_ipv4(skb, pkt, to, macs, ttl, l3_off(pkt));
}

/* rewrite_any() with the common case inlined: the call alone would cost more than many a stage. */
static __always_inline int rewrite(struct __sk_buff *skb, const struct packet *pkt,
				   const struct downstream *to, const __u8 *macs, __u8 ttl)
{
	if (pkt->v6 | pkt->is_multicast | pkt->part | pkt->l3_ingress)
		return rewrite_any(skb, pkt, to, macs, ttl);
	return rewrite_ipv4(skb, pkt, to, macs, ttl, L3_OFF);
}

#endif

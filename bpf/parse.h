/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * From bytes to struct packet. Whatever is not a well-formed UDP datagram, or a fragment of one, in an Ethernet frame or, on
 * links that have none, in nothing, is not ours: it is left to the stack, which knows better how to refuse it.
 */
#ifndef FANOUT_PARSE_H
#define FANOUT_PARSE_H

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86DD
#define PACKET_HOST 0
#define PACKET_MULTICAST 2
#define IPV4_MORE 0x2000 /* fragments to come */
#define IPV4_OFFSET 0x1fff /* in 8 bytes */
#define NEXTHDR_FRAGMENT 44
#define IPV6_MORE 0x0001
#define IPV6_OFFSET 0xfff8 /* in bytes */
#define AF_INET 2
#define AF_INET6 10

/* Bytes before the IP header, where there is a frame. */
#define L3_OFF ((__u32)sizeof(struct ethhdr))

static __always_inline __u32 l3_off(const struct packet *pkt)
{
	return pkt->l3_ingress ? 0 : L3_OFF;
}

enum parse_result {
	PARSE_FOREIGN = 0, /* not a datagram this program may touch */
	PARSE_OK = 1,
};

/*
 * A field of the context, such as where the frame's directly readable bytes begin and end. In assembly, because the
 * verifier wants these loads at constant offsets from the unmodified context pointer, and clang would merge those of
 * different branches.
 */
#define CTX_FIELD(type, skb, field)                                                            \
	({                                                                                     \
		type value;                                                                    \
		asm volatile("%0 = *(u32 *)(%1 + %2)"                                          \
			     : "=r"(value)                                                     \
			     : "r"(skb), "i"(offsetof(struct __sk_buff, field)), "m"(*(skb))); \
		value;                                                                         \
	})

/* The mark of a clone that has been sent around (replicate.h): this in the upper byte, the downstream's id below. */
#define REINJECT_MARK 0xfa000000
#define REINJECT_MASK 0xff000000

static __always_inline bool is_reinjected(struct __sk_buff *skb)
{
	return (CTX_FIELD(__u32, skb, mark) & REINJECT_MASK) == REINJECT_MARK;
}

static __always_inline void *frame_start(struct __sk_buff *skb)
{
	return CTX_FIELD(void *, skb, data);
}

static __always_inline void *frame_end(struct __sk_buff *skb)
{
	return CTX_FIELD(void *, skb, data_end);
}

/* Makes the first `need` bytes of the frame directly readable. False if the frame is shorter. */
static __always_inline bool pull(struct __sk_buff *skb, __u32 need)
{
	if (frame_start(skb) + need <= frame_end(skb))
		return true;
	return skb->len >= need && bpf_skb_pull_data(skb, need) == 0;
}

/* RFC 1071 over an option-less IPv4 header, of which 32 bits at a time do as well as 16: 0xffff only when it is intact. */
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

/* Sources that the stack refuses as martians (RFC 1812, 5.3.7): 0/8, 127/8, multicast, broadcast. */
static __always_inline bool is_ipv4_martian(__be32 addr_be)
{
	__u8 first = bpf_ntohl(addr_be) >> 24;

	return (__u8)(first - 1) >= 223 || first == 127;
}

/* 224.0.0.0/4 (RFC 5771). */
static __always_inline bool is_ipv4_multicast(__be32 addr_be)
{
	return (addr_be & bpf_htonl(0xf0000000)) == bpf_htonl(0xe0000000);
}

/* Not on any wire: ::, ::1, and IPv4 addresses in IPv6 notation, which here mean IPv4 (RFC 4291, 2.5.5). */
static __always_inline bool is_non_global_ipv6(const struct in6_addr *addr)
{
	return !addr->in6_u.u6_addr32[0] && !addr->in6_u.u6_addr32[1];
}

/* fe80::/10: means nothing beyond its link, so that no packet with it may leave for another (RFC 4291, 2.5.6). */
static __always_inline bool is_ipv6_link_local(const struct in6_addr *addr)
{
	return (addr->in6_u.u6_addr32[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

static __always_inline bool is_ipv6_martian(const struct in6_addr *addr)
{
	return is_non_global_ipv6(addr) || addr->in6_u.u6_addr8[0] == 0xff;
}

/* Written by user space through a mapping: on most hosts there is no such link, and none needs to be asked about. */
volatile struct link_flags links SEC(".data.links");

/* True if user space has said that the link puts no header before its packets (tun, WireGuard). */
static __always_inline bool is_l3_device(struct __sk_buff *skb)
{
	struct listener_key key = { .scope = KEY_L3_DEVICE };

	if (!links.has_l3_device)
		return false;
	key.addr_be[0] = skb->ifindex;
	return bpf_map_lookup_elem(&listeners, &key);
}

/*
 * True if the packet has no frame's header. One that does not begin with the digit of its IP version has; for the others it
 * is up to their link.
 */
static __always_inline bool is_l3_ingress(struct __sk_buff *skb, __u8 version)
{
	__u8 *first;

	if (!pull(skb, sizeof(*first)))
		return false;
	first = frame_start(skb);
	if ((void *)(first + 1) > frame_end(skb) || *first >> 4 != version)
		return false;
	return is_l3_device(skb);
}

/* False for frames for other hosts, which a promiscuous device lets in. Without a frame nothing is for other hosts. */
static __always_inline bool is_for_this_host(struct __sk_buff *skb, bool l3_ingress)
{
	__u32 type = CTX_FIELD(__u32, skb, pkt_type);

	return l3_ingress || type == PACKET_HOST || type == PACKET_MULTICAST;
}

/*
 * True if the link-layer address, if any, is of the same sort as the IP address. A clone that comes around has the one of
 * before.
 */
static __always_inline bool matches_frame_type(struct __sk_buff *skb, const struct packet *pkt)
{
	return pkt->is_multicast == (CTX_FIELD(__u32, skb, pkt_type) == PACKET_MULTICAST) ||
	       pkt->l3_ingress || is_reinjected(skb);
}

/*
 * One fragment of a datagram, `length` bytes from `offset` on. False if the stack would refuse it, or if nothing about it
 * is worth following: then all of its datagram's fragments are left to the stack.
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

/* The UDP header at `udp`, of which `room` bytes may belong to this packet. Fills ports and lengths. */
static __always_inline enum parse_result parse_udp(struct __sk_buff *skb, struct packet *pkt,
						   const struct udphdr *udp, __u32 room)
{
	__u32 udp_len = bpf_ntohs(udp->len);
	__u32 gso_size = skb->gso_size;

	if (udp_len < sizeof(*udp) || room < sizeof(*udp))
		return PARSE_FOREIGN;
	/* A datagram in fragments ends in a later one, a whole one here. */
	if (pkt->part ? udp_len <= room : udp_len > room)
		return PARSE_FOREIGN;
	/* RFC 8200, 8.1: UDP over IPv6 must carry a checksum; the stack discards those that do not. */
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
		/* Packets from an untrusted source (a VM's virtio device) carry no count: derive it. */
		pkt->datagrams = skb->gso_segs ?: (pkt->payload + gso_size - 1) / gso_size;
		pkt->datagrams = pkt->datagrams ?: 1;
		if (gso_size < pkt->payload)
			pkt->ip_len -= pkt->payload - gso_size;
	}
	return PARSE_OK;
}

/* The UDP header at pkt->l4_off, made readable. */
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

/* A packet of which nothing is known yet, in place of the one before. */
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
	/* With the UDP header at once, if the frame is not shorter: a last fragment may be. */
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
	/* The stack interprets options (source routes, router alert) and checks a header that has them. */
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

/* Packets with other extension headers are left to the stack, and so reach the listener's socket. */
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
	    is_ipv6_martian(&ip->saddr) || is_non_global_ipv6(&ip->daddr))
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

/* A function of its own, so that what comes in frames, as most does, is looked for at constant offsets. */
static __noinline enum parse_result parse_l3_ingress(struct __sk_buff *skb, struct packet *pkt)
{
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return parse_ipv4(skb, pkt, true);
	return parse_ipv6(skb, pkt, true);
}

static __always_inline enum parse_result parse(struct __sk_buff *skb, struct packet *pkt)
{
	/* Tagged frames are for a VLAN device, which will untag them. */
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

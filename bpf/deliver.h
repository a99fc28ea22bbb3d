/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Hands a rewritten datagram on, the fastest way that is safe.
 *
 * Asking the kernel for the neighbour of every packet costs more than all the rest of this program, so each CPU
 * remembers what it was told. It forgets within two clock ticks (2 to 20 ms, after CONFIG_HZ), and the packet that asks
 * again goes through bpf_redirect_neigh(): that keeps the kernel's neighbour entry in its cycle of STALE, DELAY and
 * PROBE, so that a neighbour whose link-layer address has changed silently is found as soon as for any other traffic.
 *
 * With net.ipv4.ip_forward=0 bpf_fib_lookup() refuses to answer. Then the route that user space has resolved serves,
 * and every packet takes bpf_redirect_neigh().
 */
#ifndef FANOUT_DELIVER_H
#define FANOUT_DELIVER_H

/* How many ticks what was found is believed: until the end of the tick after the one it was found in. */
#define NEXT_HOP_TICKS 2

/* Out of a link, to a neighbour whose link-layer address the kernel resolves, holding the packet while it asks. */
static __always_inline int redirect_to_neighbour(__u32 ifindex, __u8 family,
						 const __be32 *next_hop_be)
{
	struct bpf_redir_neigh next_hop = { .nh_family = family };

	__builtin_memcpy(next_hop.ipv6_nh, next_hop_be, sizeof(next_hop.ipv6_nh));
	return bpf_redirect_neigh(ifindex, &next_hop, sizeof(next_hop), 0);
}

/*
 * Out of a link, link-layer address known. Into a local pod the packet goes straight into its namespace; what hangs on
 * the host's end of the pair does not see it, so user space says where nothing does.
 */
static __always_inline int redirect_known(struct __sk_buff *skb, const struct downstream *to,
					  const struct next_hop *known)
{
	if (bpf_skb_store_bytes(skb, 0, known->macs, sizeof(known->macs), 0))
		return TC_ACT_SHOT;
	if (to->flags & DOWNSTREAM_PEER && known->ifindex == to->ifindex)
		return bpf_redirect_peer(known->ifindex, 0);
	return bpf_redirect(known->ifindex, 0);
}

static __always_inline void describe(const struct __sk_buff *skb, const struct packet *pkt,
				     const struct downstream *to, struct bpf_fib_lookup *fib)
{
	fib->ifindex = skb->ifindex;
	fib->l4_protocol = IPPROTO_UDP;
	fib->sport = pkt->sport_be;
	fib->dport = to->port_be;
	if (pkt->v6) {
		fib->family = AF_INET6;
		__builtin_memcpy(fib->ipv6_src, pkt->src_be, sizeof(fib->ipv6_src));
		__builtin_memcpy(fib->ipv6_dst, to->addr_be, sizeof(fib->ipv6_dst));
	} else {
		fib->family = AF_INET;
		fib->ipv4_src = pkt->src_be[3];
		fib->ipv4_dst = to->addr_be[3];
	}
}

static __always_inline void remember(struct next_hop *known, const struct bpf_fib_lookup *fib)
{
	__builtin_memcpy(known->macs, fib->dmac, 6);
	__builtin_memcpy(known->macs + 6, fib->smac, 6);
	known->found = bpf_jiffies64();
	known->ifindex = fib->ifindex;
}

/* Asks the kernel for route and neighbour, remembers them, and lets the kernel deliver this one packet. */
static __always_inline int look_up_and_redirect(struct __sk_buff *skb, const struct packet *pkt,
						const struct downstream *to, struct next_hop *known)
{
	struct bpf_fib_lookup fib = {};
	long err;

	describe(skb, pkt, to, &fib);
	err = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);
	known->ifindex = 0;
	if (err != BPF_FIB_LKUP_RET_SUCCESS && err != BPF_FIB_LKUP_RET_NO_NEIGH)
		return redirect_to_neighbour(to->ifindex, to->next_hop_family, to->next_hop_be);
	if (err == BPF_FIB_LKUP_RET_SUCCESS)
		remember(known, &fib);
	/* The lookup has put the next hop in place of the destination. */
	return redirect_to_neighbour(fib.ifindex, fib.family, (__be32 *)fib.ipv6_dst);
}

static __always_inline int deliver_out(struct __sk_buff *skb, const struct packet *pkt,
				       const struct downstream *to, __u32 to_id)
{
	struct next_hop *known = bpf_map_lookup_elem(&next_hops, &to_id);

	if (!known)
		return TC_ACT_SHOT;
	if (known->ifindex && bpf_jiffies64() - known->found < NEXT_HOP_TICKS)
		return redirect_known(skb, to, known);
	return look_up_and_redirect(skb, pkt, to, known);
}

#endif

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Rewrites a datagram and hands it on, the fastest way that is safe.
 *
 * Asking the kernel for the neighbour of every packet would cost more than all the rest of this program, so each CPU
 * remembers what it was told. It forgets within two clock ticks (2 to 20 ms, after CONFIG_HZ), and the packet that asks
 * again goes through bpf_redirect_neigh(): that keeps the kernel's neighbour entry in its cycle of STALE, DELAY and
 * PROBE, so that a neighbour whose link-layer address has changed silently is found as soon as for any other traffic.
 *
 * With net.ipv4.ip_forward=0 bpf_fib_lookup() refuses to answer. Then the route and the neighbour that user space has
 * seen by netlink serve, in the same way.
 *
 * Into a local pod a packet goes straight, past the queue of the link that leads there. One that took the queue would
 * be overtaken by those behind it, so none does: user space sets DOWNSTREAM_PEER once the neighbour is known, and
 * reminds the kernel of the neighbour in this traffic's place.
 *
 * Kernels before 5.10 have neither way. There the packet's frame is addressed here or, where the neighbour is not known,
 * the datagram is left to the listener's socket, for which the kernel finds it.
 */
#ifndef FANOUT_DELIVER_H
#define FANOUT_DELIVER_H

/* The kernel has bpf_redirect_neigh() and bpf_redirect_peer() (5.10). Set before load; what is not there is never reached. */
const volatile __u32 has_redirects = 1;

/* How many ticks what was found is believed: until the end of the tick after the one it was found in. */
#define NEXT_HOP_TICKS 2

/* bpf_redirect_neigh() takes no frame that is addressed to a group, although it puts another address there. */
static __always_inline int clear_frame_addresses(struct __sk_buff *skb)
{
	static const __u8 nobody[12];

	return bpf_skb_store_bytes(skb, 0, nobody, sizeof(nobody), 0);
}

/* Out of a link, to a neighbour whose link-layer address the kernel resolves, holding the packet while it asks. */
static __always_inline int redirect_via_neighbour(struct __sk_buff *skb, struct packet *pkt,
						  __u32 ifindex, __u8 family,
						  const __be32 *next_hop_be)
{
	struct bpf_redir_neigh next_hop = { .nh_family = family };

	if (!has_redirects || (pkt->is_multicast && clear_frame_addresses(skb)))
		return TC_ACT_SHOT;
	pkt->path = PATH_NEIGHBOUR;
	__builtin_memcpy(next_hop.ipv6_nh, next_hop_be, sizeof(next_hop.ipv6_nh));
	return bpf_redirect_neigh(ifindex, &next_hop, sizeof(next_hop), 0);
}

/*
 * What hangs on the host's end of the pair does not see packets that go straight to the other, so user space says where
 * nothing does. A route that leads elsewhere meanwhile, which the kernel tells first, has its own way.
 */
static __always_inline bool is_pod_peer(const struct downstream *to, const struct next_hop *hop)
{
	return has_redirects && to->flags & DOWNSTREAM_PEER && hop->ifindex == to->ifindex;
}

static __always_inline int redirect_into_pod(struct __sk_buff *skb, struct packet *pkt,
					     const struct next_hop *hop)
{
	pkt->path = PATH_POD;
	/* As when the packet crosses the pair: a mark means something in the host's namespace only. */
	skb->mark = 0;
	return bpf_redirect_peer(hop->ifindex, 0);
}

/* Out of a link, link-layer address known. `straight` if it may go past the queues of others. */
static __always_inline int redirect_resolved(struct __sk_buff *skb, struct packet *pkt,
					     const struct downstream *to,
					     const struct next_hop *hop, bool allow_peer)
{
	if (allow_peer && is_pod_peer(to, hop))
		return redirect_into_pod(skb, pkt, hop);
	pkt->path = PATH_KNOWN;
	return bpf_redirect(hop->ifindex, 0);
}

static __always_inline void fill_fib_params(const struct __sk_buff *skb, const struct packet *pkt,
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

static __always_inline bool is_fresh(const struct next_hop *hop)
{
	return hop->ifindex && bpf_jiffies64() - hop->resolved_at < NEXT_HOP_TICKS;
}

/*
 * Asks the kernel for route and neighbour; what it does not say, user space may have seen. Writes down what is found:
 * known->ifindex is 0 if the neighbour is not known. True if the kernel has told the route; the next hop then stands in
 * place of the destination in *fib.
 */
static __always_inline bool lookup_neighbour(struct __sk_buff *skb, const struct packet *pkt,
					     const struct downstream *to, struct next_hop *hop,
					     struct bpf_fib_lookup *fib)
{
	long err;

	fill_fib_params(skb, pkt, to, fib);
	err = bpf_fib_lookup(skb, fib, sizeof(*fib), 0);
	hop->ifindex = 0;
	hop->resolved_at = bpf_jiffies64();
	if (err == BPF_FIB_LKUP_RET_SUCCESS) {
		__builtin_memcpy(hop->macs, fib->dmac, 6);
		__builtin_memcpy(hop->macs + 6, fib->smac, 6);
		hop->ifindex = fib->ifindex;
		return true;
	}
	/* A neighbour that the kernel has forgotten must be asked for, except in a pod, where packets arrive regardless. */
	if (to->flags & DOWNSTREAM_MACS &&
	    (err != BPF_FIB_LKUP_RET_NO_NEIGH ||
	     (to->flags & DOWNSTREAM_PEER && fib->ifindex == to->ifindex))) {
		__builtin_memcpy(hop->macs, to->macs, sizeof(hop->macs));
		hop->ifindex = to->ifindex;
	}
	return err == BPF_FIB_LKUP_RET_NO_NEIGH;
}

/*
 * Looks up and remembers, and lets the kernel deliver this one packet, unless it goes straight into a pod. A function of
 * its own, since it is needed seldom and takes much of the stack.
 */
static __noinline int resolve_and_redirect(struct __sk_buff *skb, struct packet *pkt,
					   const struct downstream *to, struct next_hop *hop,
					   bool allow_peer)
{
	struct bpf_fib_lookup fib = {};
	bool routed = lookup_neighbour(skb, pkt, to, hop, &fib);

	if (allow_peer && is_pod_peer(to, hop))
		return redirect_resolved(skb, pkt, to, hop, allow_peer);
	if (routed)
		return redirect_via_neighbour(skb, pkt, fib.ifindex, fib.family,
					      (__be32 *)fib.ipv6_dst);
	return redirect_via_neighbour(skb, pkt, to->ifindex, to->next_hop_family, to->next_hop_be);
}

/* Looks up and remembers. A function of its own, as above. */
static __noinline int resolve_next_hop(struct __sk_buff *skb, const struct packet *pkt,
				       const struct downstream *to, struct next_hop *hop)
{
	struct bpf_fib_lookup fib = {};

	return lookup_neighbour(skb, pkt, to, hop, &fib);
}

/*
 * False if the packet has no way out: on a kernel that cannot be asked to find the neighbour, which is not known. To be
 * called before anything about the packet changes, so that the socket can have it.
 */
static __always_inline bool has_egress_path(struct __sk_buff *skb, const struct packet *pkt,
					    const struct downstream *to, struct next_hop *hop)
{
	if (has_redirects || to->flags & DOWNSTREAM_L3_DEVICE)
		return true;
	if (!is_fresh(hop))
		resolve_next_hop(skb, pkt, to, hop);
	return hop->ifindex;
}

/* Chooses the way out. Nothing is sent before the program ends. */
static __always_inline int redirect_egress(struct __sk_buff *skb, struct packet *pkt,
					   const struct downstream *to, struct next_hop *hop,
					   bool allow_peer)
{
	if (is_fresh(hop) || (!has_redirects && hop->ifindex))
		return redirect_resolved(skb, pkt, to, hop, allow_peer);
	return resolve_and_redirect(skb, pkt, to, hop, allow_peer);
}

/* What deliver_egress() answers if the packet could not be written to, beside TC_ACT_REDIRECT and TC_ACT_SHOT. */
#define REWRITE_FAILED -2

/* Rewrites a datagram and sends it out, one hop older. */
static __always_inline int deliver_egress(struct __sk_buff *skb, struct packet *pkt,
					  const struct downstream *to, struct next_hop *hop,
					  bool allow_peer)
{
	const __u8 *macs = NULL;
	int verdict;

	if (to->flags & DOWNSTREAM_L3_DEVICE) {
		pkt->path = PATH_L3_DEVICE;
		verdict = bpf_redirect(to->ifindex, 0);
	} else {
		if (!add_eth_header(skb, pkt))
			return REWRITE_FAILED;
		verdict = redirect_egress(skb, pkt, to, hop, allow_peer);
		if (pkt->path != PATH_NEIGHBOUR)
			macs = hop->macs;
	}
	if (verdict != TC_ACT_REDIRECT)
		return TC_ACT_SHOT;
	return rewrite(skb, pkt, to, macs, next_ttl(pkt)) ? REWRITE_FAILED : verdict;
}

#endif

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Delivers a datagram by the fastest safe path.
 *
 * Asking the kernel for the neighbour of every packet would cost more than the rest of this
 * program, so each CPU caches the next hop. An entry expires within two clock ticks (2 to 20 ms,
 * depending on CONFIG_HZ), and the packet that resolves it anew goes through bpf_redirect_neigh().
 * That keeps the kernel's neighbour entry in its cycle of STALE, DELAY and PROBE, so that a changed
 * link-layer address is noticed as soon as for any other traffic.
 *
 * With net.ipv4.ip_forward=0 bpf_fib_lookup() does not answer. Then the route and neighbour that
 * user space learned by netlink are used in the same way.
 *
 * A packet to a local pod goes directly into the pod, past the queue of the link between. A packet
 * in that queue would be overtaken by later ones, so none takes it: user space sets DOWNSTREAM_PEER
 * only once the neighbour is known, and keeps the kernel's neighbour entry alive in place of this
 * traffic.
 *
 * Kernels before 5.10 have neither helper. There the program writes the frame's addresses itself
 * and, while the neighbour is unknown, passes the datagram to the listener's socket, for which the
 * kernel resolves it.
 */
#ifndef FANOUT_DELIVER_H
#define FANOUT_DELIVER_H

#include "base.h"
#include "fanout_abi.h"
#include "packet.h"
#include "rewrite.h"

/*
 * The kernel has bpf_redirect_neigh() and bpf_redirect_peer() (5.10). Set before load; the verifier
 * removes what is disabled.
 */
const volatile __u32 has_redirects = 1;

/*
 * Lifetime of a cached next hop, ticks: until the end of the tick after the one it was resolved in.
 */
#define NEXT_HOP_TICKS 2

/* bpf_redirect_neigh() refuses frames with a multicast address, although it writes another one. */
static __always_inline int clear_frame_addresses(struct __sk_buff *skb)
{
	static const __u8 zeros[12];

	return bpf_skb_store_bytes(skb, 0, zeros, sizeof(zeros), 0);
}

/* Sends out of a device. The kernel resolves the neighbour and holds the packet meanwhile. */
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
 * True if the next hop is the peer in a pod. Hooks on the host end of the pair do not see packets
 * redirected into the pod; user space sets the flag only where there are none. If the route has
 * changed, which the kernel knows first, the device differs.
 */
static __always_inline bool is_pod_peer(const struct downstream *to, const struct next_hop *hop)
{
	return has_redirects && to->flags & DOWNSTREAM_PEER && hop->ifindex == to->ifindex;
}

static __always_inline int redirect_into_pod(struct __sk_buff *skb, struct packet *pkt,
					     const struct next_hop *hop)
{
	pkt->path = PATH_POD;
	/* As if the packet crossed the pair: a mark is valid only in the host's namespace. */
	skb->mark = 0;
	return bpf_redirect_peer(hop->ifindex, 0);
}

/*
 * Sends out of a device to a resolved neighbour. `allow_peer` permits the path into a pod, past
 * queues.
 */
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
 * Asks the kernel for route and neighbour; if it does not answer, uses what user space learned.
 * Stores the result in *hop; hop->ifindex is 0 if the neighbour is unknown. True if the kernel
 * knows the route; the next hop then replaces the destination in *fib.
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
	/*
	 * A neighbour that the kernel has forgotten must be resolved, except in a pod, which
	 * receives packets regardless.
	 */
	if (to->flags & DOWNSTREAM_MACS &&
	    (err != BPF_FIB_LKUP_RET_NO_NEIGH ||
	     (to->flags & DOWNSTREAM_PEER && fib->ifindex == to->ifindex))) {
		__builtin_memcpy(hop->macs, to->macs, sizeof(hop->macs));
		hop->ifindex = to->ifindex;
	}
	return err == BPF_FIB_LKUP_RET_NO_NEIGH;
}

/*
 * Resolves and caches the next hop, and lets the kernel deliver this packet unless it goes into a
 * pod. A separate function, because it is rare and needs much stack.
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

/* Resolves and caches the next hop. A separate function for the same reason. */
static __noinline int resolve_next_hop(struct __sk_buff *skb, const struct packet *pkt,
				       const struct downstream *to, struct next_hop *hop)
{
	struct bpf_fib_lookup fib = {};

	return lookup_neighbour(skb, pkt, to, hop, &fib);
}

/*
 * False if the neighbour is unknown and the kernel cannot resolve it for the program. Call it
 * before the packet changes, so that it can still go to the socket.
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

/* Redirects to the downstream's device. The packet leaves after the program ends. */
static __always_inline int redirect_egress(struct __sk_buff *skb, struct packet *pkt,
					   const struct downstream *to, struct next_hop *hop,
					   bool allow_peer)
{
	if (is_fresh(hop) || (!has_redirects && hop->ifindex))
		return redirect_resolved(skb, pkt, to, hop, allow_peer);
	return resolve_and_redirect(skb, pkt, to, hop, allow_peer);
}

/*
 * Result of deliver_egress() if the packet could not be written; the others are TC_ACT_REDIRECT and
 * TC_ACT_SHOT.
 */
#define REWRITE_FAILED -2

/* Rewrites a datagram and sends it out of a device, with one hop less. */
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

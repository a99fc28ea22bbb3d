// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Baselines for the production program (benches/kernel.rs): the least work that any program could do, a naive
 * program, and an empty one. Their destinations are constants set at load, which the verifier and the JIT treat as part of
 * the program.
 */
#include "vmlinux.h"

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#define TC_ACT_UNSPEC (-1)
#define TC_ACT_SHOT 2
#define ETH_P_IP 0x0800
#define MAX_DESTINATIONS 8

struct destination {
	__be32 addr_be;
	__u32 ifindex;
	__u8 macs[12]; /* destination, then source */
};

struct references {
	__be32 listener_be;
	__be16 port_be;
	__u16 count; /* number of destinations */
	struct destination destinations[MAX_DESTINATIONS];
};

const volatile struct references constants = {};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} turns SEC(".maps");

#define IP_OFF sizeof(struct ethhdr)
#define UDP_OFF (IP_OFF + sizeof(struct iphdr))

/* True if the packet is a datagram for the listener. Only plain IPv4 packets are handled. */
static __always_inline bool is_for_listener(struct __sk_buff *skb, struct iphdr **found)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct iphdr *ip = data + IP_OFF;
	struct udphdr *udp = data + UDP_OFF;

	if (skb->protocol != bpf_htons(ETH_P_IP) || (void *)(udp + 1) > end)
		return false;
	if (ip->version != 4 || ip->ihl != 5 || ip->protocol != IPPROTO_UDP)
		return false;
	if (ip->daddr != constants.listener_be || udp->dest != constants.port_be)
		return false;
	*found = ip;
	return true;
}

/* Writes the new address, the TTL and both checksums, by helpers. The port stays. */
static __always_inline int rewrite(struct __sk_buff *skb, const struct iphdr *ip, __be32 addr_be)
{
	__be32 old_be = ip->daddr;
	__u8 ttl = ip->ttl, less = ttl - 1;

	return bpf_l4_csum_replace(skb, UDP_OFF + offsetof(struct udphdr, check), old_be, addr_be,
				   BPF_F_PSEUDO_HDR | BPF_F_MARK_MANGLED_0 | sizeof(addr_be)) ?:
	       bpf_l3_csum_replace(skb, IP_OFF + offsetof(struct iphdr, check), old_be, addr_be,
				   sizeof(addr_be)) ?:
	       bpf_skb_store_bytes(skb, IP_OFF + offsetof(struct iphdr, daddr), &addr_be,
				   sizeof(addr_be), 0) ?:
	       bpf_l3_csum_replace(skb, IP_OFF + offsetof(struct iphdr, check),
				   bpf_htons(ttl << 8 | IPPROTO_UDP), bpf_htons(less << 8 | IPPROTO_UDP), 2) ?:
	       bpf_skb_store_bytes(skb, IP_OFF + offsetof(struct iphdr, ttl), &less, sizeof(less), 0);
}

/* The same, and the frame's addresses, with as few helper calls as possible. */
static __always_inline int rewrite_directly(struct __sk_buff *skb)
{
	const volatile struct destination *to = &constants.destinations[0];
	__be32 addr_be = to->addr_be, old_be;
	struct iphdr *ip;
	__u32 sum, *frame;

	if (!is_for_listener(skb, &ip))
		return TC_ACT_UNSPEC;
	old_be = ip->daddr;
	/* RFC 1624. TTL is the first byte of its word on the wire. */
	sum = (__u16)~ip->check + (__u16)~old_be + (__u16) ~(old_be >> 16) + (__u16)addr_be +
	      (addr_be >> 16) + (__u16)~bpf_htons(ip->ttl << 8) + bpf_htons((ip->ttl - 1) << 8);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	if (bpf_l4_csum_replace(skb, UDP_OFF + offsetof(struct udphdr, check), old_be, addr_be,
				BPF_F_PSEUDO_HDR | BPF_F_MARK_MANGLED_0 | sizeof(addr_be)))
		return TC_ACT_SHOT;
	frame = (void *)(long)skb->data;
	ip = (void *)frame + IP_OFF;
	if ((void *)(ip + 1) > (void *)(long)skb->data_end)
		return TC_ACT_SHOT;
	ip->check = ~sum;
	ip->ttl--;
	ip->daddr = addr_be;
	for (int i = 0; i < 3; i++)
		frame[i] = ((const volatile __u32 *)to->macs)[i];
	return 0;
}

/* The minimum into a pod: one destination with a known neighbour. */
SEC("tc")
int floor_pod(struct __sk_buff *skb)
{
	return rewrite_directly(skb) ?: bpf_redirect_peer(constants.destinations[0].ifindex, 0);
}

/* The minimum out of a device. */
SEC("tc")
int floor_device(struct __sk_buff *skb)
{
	return rewrite_directly(skb) ?: bpf_redirect(constants.destinations[0].ifindex, 0);
}

/* The naive program: round robin, and the kernel resolves the neighbour of each packet. */
SEC("tc")
int obvious(struct __sk_buff *skb)
{
	__u32 zero = 0, at, *turn = bpf_map_lookup_elem(&turns, &zero);
	struct iphdr *ip;

	if (!turn || !is_for_listener(skb, &ip))
		return TC_ACT_UNSPEC;
	at = (*turn)++ % (constants.count ?: 1);
	if (at >= MAX_DESTINATIONS)
		return TC_ACT_UNSPEC;
	if (rewrite(skb, ip, constants.destinations[at].addr_be))
		return TC_ACT_SHOT;
	return bpf_redirect_neigh(constants.destinations[at].ifindex, NULL, 0, 0);
}

SEC("tc")
int nothing(struct __sk_buff *skb)
{
	return TC_ACT_UNSPEC;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The receiver of every benchmark: counts the datagrams that arrive for the benchmark's port and drops them, so that
 * nothing behind it can be the bottleneck. Everything else continues, so that neighbours are resolved.
 *
 * With `inspect`, it also reads the number and the time that the generator puts into each datagram, and records
 * duplicates, order and latency. benches/support/sink.rs is the userspace side.
 */
#include "vmlinux.h"

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#define TC_ACT_UNSPEC (-1)
#define TC_ACT_SHOT 2
#define ETH_P_IP 0x0800

#define RECEIVERS 65536
/* Numbers that are watched for duplicates, in words of 64. */
#define SEEN_WORDS (1 << 20)
/* 32 buckets for each power of two: a quantile is accurate to 3 per cent. */
#define BUCKET_BITS 5
#define BUCKETS 1280

struct settings {
	__u32 inspect; /* read numbers and times */
	__u32 copies; /* receivers that get a copy of each datagram; 1 if one of them gets it */
	__u16 port_be;
	__u16 stamp_at; /* bytes of payload before the number and the time */
	__u16 unused[2];
};

struct counts {
	__u64 datagrams;
	__u64 bytes; /* of UDP payload */
	__u64 duplicated;
	__u64 reordered; /* a lower number than the one before it at this receiver */
};

struct stamp {
	__u64 number;
	__u64 sent; /* CLOCK_MONOTONIC, nanoseconds */
};

struct head {
	struct ethhdr eth;
	struct iphdr ip;
	struct udphdr udp;
} __attribute__((packed));

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
} settings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counts);
} totals SEC(".maps");

/* By the last two bytes of the receiver's address. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, RECEIVERS);
	__type(key, __u32);
	__type(value, __u64);
} receivers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, RECEIVERS);
	__type(key, __u32);
	__type(value, __u64);
} newest SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SEEN_WORDS);
	__type(key, __u32);
	__type(value, __u64);
} seen SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, BUCKETS);
	__type(key, __u32);
	__type(value, __u64);
} latencies SEC(".maps");

static __always_inline __u32 bucket_of(__u64 value)
{
	__u32 power = 0, bits = 32;

	if (value < (1 << BUCKET_BITS))
		return (__u32)value;
#pragma unroll
	for (int step = 0; step < 6; step++) {
		if (value >> (power + bits))
			power += bits;
		bits >>= 1;
	}
	return ((power - BUCKET_BITS + 1) << BUCKET_BITS) +
	       ((value >> (power - BUCKET_BITS)) & ((1 << BUCKET_BITS) - 1));
}

static __always_inline void note_duplicate(struct counts *counts, const struct stamp *stamp,
					   __u32 receiver, __u32 copies)
{
	__u64 number =
		copies > 1 ? stamp->number * copies + (receiver - 1) % copies : stamp->number;
	__u32 word = (number >> 6) & (SEEN_WORDS - 1);
	__u64 bit = 1ULL << (number & 63), *bits = bpf_map_lookup_elem(&seen, &word);

	if (!bits)
		return;
	/* Not atomic: two CPUs at once can hide a duplicate, never invent one. */
	if (*bits & bit)
		counts->duplicated++;
	*bits |= bit;
}

static __always_inline void inspect(struct __sk_buff *skb, struct counts *counts, __u32 receiver,
				    const struct settings *set)
{
	__u64 now = bpf_ktime_get_ns(), *last, *bucket;
	struct stamp stamp;
	__u32 index;

	if (bpf_skb_load_bytes(skb, sizeof(struct head) + set->stamp_at, &stamp, sizeof(stamp)))
		return;
	index = bucket_of(now > stamp.sent ? now - stamp.sent : 0);
	bucket = bpf_map_lookup_elem(&latencies, &index);
	if (bucket)
		(*bucket)++;
	last = bpf_map_lookup_elem(&newest, &receiver);
	if (last) {
		if (stamp.number < *last)
			counts->reordered++;
		else
			*last = stamp.number;
	}
	note_duplicate(counts, &stamp, receiver, set->copies);
}

SEC("tc")
int sink(struct __sk_buff *skb)
{
	__u32 zero = 0, receiver, datagrams;
	struct settings *set = bpf_map_lookup_elem(&settings, &zero);
	struct counts *counts = bpf_map_lookup_elem(&totals, &zero);
	struct head head;
	__u64 *count;

	if (!set || !counts || bpf_skb_load_bytes(skb, 0, &head, sizeof(head)) ||
	    head.eth.h_proto != bpf_htons(ETH_P_IP) || head.ip.protocol != IPPROTO_UDP ||
	    head.ip.ihl != 5 || head.udp.dest != set->port_be)
		return TC_ACT_UNSPEC;
	/* A GSO packet counts as the datagrams that it contains. */
	datagrams = skb->gso_segs ? skb->gso_segs : 1;
	counts->datagrams += datagrams;
	counts->bytes += skb->len - sizeof(head);
	receiver = bpf_ntohl(head.ip.daddr) & (RECEIVERS - 1);
	count = bpf_map_lookup_elem(&receivers, &receiver);
	if (count)
		*count += datagrams;
	if (set->inspect)
		inspect(skb, counts, receiver, set);
	return TC_ACT_SHOT;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";

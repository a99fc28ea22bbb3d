/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Access to the context and to the packet's bytes. */
#ifndef FANOUT_SKB_H
#define FANOUT_SKB_H

#include "base.h"

/* Offset of the IP header behind an Ethernet header, bytes. */
#define L3_OFF ((__u32)sizeof(struct ethhdr))

/*
 * Loads a field of the context. In assembly, because the verifier requires constant offsets from
 * the unmodified context pointer, and clang would merge the loads of different branches.
 */
#define CTX_FIELD(type, skb, field)                                                            \
	({                                                                                     \
		type value;                                                                    \
		asm volatile("%0 = *(u32 *)(%1 + %2)"                                          \
			     : "=r"(value)                                                     \
			     : "r"(skb), "i"(offsetof(struct __sk_buff, field)), "m"(*(skb))); \
		value;                                                                         \
	})

static __always_inline void *frame_start(struct __sk_buff *skb)
{
	return CTX_FIELD(void *, skb, data);
}

static __always_inline void *frame_end(struct __sk_buff *skb)
{
	return CTX_FIELD(void *, skb, data_end);
}

/* Makes the first `need` bytes of the packet directly readable. False if the packet is shorter. */
static __always_inline bool pull(struct __sk_buff *skb, __u32 need)
{
	if (frame_start(skb) + need <= frame_end(skb))
		return true;
	return skb->len >= need && bpf_skb_pull_data(skb, need) == 0;
}

#endif

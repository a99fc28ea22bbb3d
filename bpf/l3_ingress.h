/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Packets that arrive without an Ethernet header, from L3 devices such as tun and WireGuard. */
#ifndef FANOUT_L3_INGRESS_H
#define FANOUT_L3_INGRESS_H

#include "base.h"
#include "fanout_abi.h"
#include "maps.h"
#include "skb.h"

/* Written by user space through a mapping. Most hosts have no L3 device and need no lookup. */
volatile struct link_flags links SEC(".data.links");

/* True if user space has registered the device as an L3 device. */
static __always_inline bool is_l3_device(struct __sk_buff *skb)
{
	struct listener_key key = { .scope = KEY_L3_DEVICE };

	if (!links.has_l3_device)
		return false;
	key.addr_be[0] = skb->ifindex;
	return bpf_map_lookup_elem(&listeners, &key);
}

/*
 * True if the packet begins with the IP header. Its first nibble is then the IP version; if it is,
 * the device decides.
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

#endif

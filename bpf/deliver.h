/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Hands a rewritten datagram on. User space has resolved the route, so this works with net.ipv4.ip_forward=0 too,
 * where bpf_fib_lookup() answers BPF_FIB_LKUP_RET_FWD_DISABLED.
 */
#ifndef FANOUT_DELIVER_H
#define FANOUT_DELIVER_H

/*
 * Out of a link, to a neighbour. The kernel resolves its link-layer address, holding the packet while it asks, and
 * keeps the neighbour entry's state machine going.
 */
static __always_inline int deliver_to_neighbour(const struct downstream *to)
{
	struct bpf_redir_neigh next_hop = { .nh_family = to->next_hop_family };

	__builtin_memcpy(next_hop.ipv6_nh, to->next_hop_be, sizeof(next_hop.ipv6_nh));
	return bpf_redirect_neigh(to->ifindex, &next_hop, sizeof(next_hop), 0);
}

#endif

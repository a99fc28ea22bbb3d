/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Classes of IP addresses. */
#ifndef FANOUT_ADDRESS_H
#define FANOUT_ADDRESS_H

#include "base.h"

/*
 * Source addresses that the stack refuses as martians (RFC 1812, 5.3.7): 0/8, 127/8, multicast,
 * broadcast.
 */
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

/*
 * ::, ::1 and IPv4 addresses in IPv6 notation. None of them is valid on the wire (RFC 4291, 2.5.5).
 */
static __always_inline bool is_ipv6_zero_prefix(const struct in6_addr *addr)
{
	return !addr->in6_u.u6_addr32[0] && !addr->in6_u.u6_addr32[1];
}

/*
 * fe80::/10: valid on its own link only, so no packet with it may be forwarded (RFC 4291, 2.5.6).
 */
static __always_inline bool is_ipv6_link_local(const struct in6_addr *addr)
{
	return (addr->in6_u.u6_addr32[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

static __always_inline bool is_ipv6_martian(const struct in6_addr *addr)
{
	return is_ipv6_zero_prefix(addr) || addr->in6_u.u6_addr8[0] == 0xff;
}

#endif

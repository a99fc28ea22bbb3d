/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A datagram of ours, as the stages after parse.h know it. */
#ifndef FANOUT_PACKET_H
#define FANOUT_PACKET_H

struct packet {
	struct listener_key dst;
	__be32 src_be[4]; /* like dst.addr_be */
	__be16 sport_be;
	__u32 l4_off; /* from the start of the frame */
	__u32 datagrams; /* 1, or what a GRO/GSO super-packet holds */
	__u32 payload; /* UDP payload, bytes, of all of them */
	__u32 ip_len; /* the longest IP packet that will leave, bytes */
	__u8 ttl;
	bool v6;
	bool exotic; /* ours, but only the socket can do it justice */
	__u8 way; /* enum way: how it was delivered, for events.h */
	__u8 macs[12]; /* as they came in, destination first; filled in by replicate.h alone */
	struct listener_key
		came_to; /* dst as it came in; filled in by replicate.h alone, which changes dst */
};

#endif

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A parsed datagram, and the state of one that arrives in fragments. */
#ifndef FANOUT_PACKET_H
#define FANOUT_PACKET_H

#include "base.h"
#include "fanout_abi.h"
#include "skb.h"

enum part {
	WHOLE = 0,
	FIRST_FRAGMENT = 1, /* has the ports */
	LATER_FRAGMENT = 2, /* dst.port_be, sport_be, datagrams and payload are 0 */
};

/* Verdict on the fragments of a datagram. */
enum fragment_verdict {
	FRAGMENT_VERDICT_DROP = 0,
	FRAGMENT_VERDICT_PASS = 1, /* to the stack, which reassembles the datagram */
	FRAGMENT_VERDICT_FORWARD = 2, /* to one downstream */
	FRAGMENT_VERDICT_COPY = 3, /* to every downstream */
};

struct packet {
	struct listener_key dst;
	__be32 src_be[4]; /* like dst.addr_be */
	__be16 sport_be;
	__u8 l4_off; /* from the start of the packet data, bytes */
	__u32 datagrams; /* 1, or those in a GRO/GSO super-packet */
	__u32 payload; /* UDP payload of all of them, bytes; in a first fragment, of the whole datagram */
	__u32 ip_len; /* longest IP packet that will leave, bytes */
	__u8 ttl;
	bool v6;
	bool needs_socket; /* for a listener, but needs the socket path */
	bool is_multicast; /* sent to a multicast group */
	bool l3_ingress; /* arrived without an Ethernet header: see l3_off() */
	__u8 path; /* enum delivery_path, for events.h */
	__u8 part; /* enum part */
	__u8 fragment_verdict; /* enum fragment_verdict, of a first fragment */
	bool more; /* fragment: not the last */
	__u16 offset; /* fragment: offset in the datagram, bytes */
	__u16 data_len; /* bytes after the UDP header in this packet; in a later fragment, after the IP header */
	__be32 fragment_id_be;
	__u64 udp_header; /* first fragment: its UDP header as it arrived */
};

static __always_inline __u32 l3_off(const struct packet *pkt)
{
	return pkt->l3_ingress ? 0 : L3_OFF;
}

/* One branch, because the addresses are mostly equal. */
static __always_inline bool same_address(const __be32 *one_be, const __be32 *other_be)
{
	return !((one_be[0] ^ other_be[0]) | (one_be[1] ^ other_be[1]) | (one_be[2] ^ other_be[2]) |
		 (one_be[3] ^ other_be[3]));
}

/* Per-CPU memory: the packet being processed, and the last check of the heartbeat. */
struct scratch {
	struct packet pkt;
	__u8 macs[12]; /* as they arrived, destination first */
	struct listener_key orig_dst; /* pkt.dst as it arrived; each copy rewrites pkt.dst */
	__u64 heartbeat_tick; /* jiffies of the last check that found a live daemon */
	__u64 heartbeat_deadline; /* the deadline that check compared with */
};

/* Identifies the fragments of one datagram. */
struct fragment_key {
	__be32 src_be[4];
	__be32 dst_be[4];
	__be32 id_be;
};

/* State of a datagram that arrives in fragments. See fragments.h. */
struct fragment_state {
	__u64 last_seen; /* ns: when the latest fragment arrived */
	__u64 udp_header; /* UDP header of the first fragment; 0 until it arrives */
	__u64 kib_seen; /* bit per KiB of the datagram in which a fragment begins */
	__u32 unique_bytes; /* bytes that arrived, without repetitions */
	__u32 total_bytes; /* bytes that arrived */
	__u32 length; /* length of the datagram, bytes; 0 until the last fragment arrives */
	__u32 verdict; /* enum fragment_verdict */
	__u32 listener; /* listener id, for FRAGMENT_VERDICT_COPY */
	__u32 to_id; /* downstream id, for FRAGMENT_VERDICT_FORWARD */
	struct listener_key to; /* its address: the id may have been reused */
	__u32 ttl; /* of the first fragment */
};

#endif

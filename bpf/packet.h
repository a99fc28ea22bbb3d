/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A datagram of ours, as the stages after parse.h know it, and what is known of one that comes in fragments. */
#ifndef FANOUT_PACKET_H
#define FANOUT_PACKET_H

enum part {
	WHOLE = 0,
	FIRST_FRAGMENT = 1, /* the one with the ports */
	LATER_FRAGMENT =
		2, /* any other: dst.port_be and sport_be are 0, datagrams and payload too */
};

/* What becomes of a datagram's fragments. */
enum fragment_verdict {
	FRAGMENT_VERDICT_DROP = 0,
	FRAGMENT_VERDICT_PASS =
		1, /* left to the stack, which puts them together for whoever they are for */
	FRAGMENT_VERDICT_FORWARD = 2, /* to one downstream */
	FRAGMENT_VERDICT_COPY = 3, /* to every downstream */
};

struct packet {
	struct listener_key dst;
	__be32 src_be[4]; /* like dst.addr_be */
	__be16 sport_be;
	__u8 l4_off; /* from the start of the frame, or of what there is, bytes */
	__u32 datagrams; /* 1, or what a GRO/GSO super-packet holds */
	__u32 payload; /* UDP payload, bytes, of all of them; of a first fragment, of the whole datagram */
	__u32 ip_len; /* the longest IP packet that will leave, bytes */
	__u8 ttl;
	bool v6;
	bool needs_socket; /* ours, but only the socket can do it justice */
	bool is_multicast; /* sent to a multicast group */
	bool l3_ingress; /* begins with the IP header, with no frame around it: see l3_off() */
	__u8 path; /* enum way: how it was delivered, for events.h */
	__u8 part; /* enum part */
	__u8 fragment_verdict; /* enum fragment_verdict, of a first fragment */
	bool more; /* of a fragment: not the last */
	__u16 offset; /* of a fragment: where it belongs, bytes */
	__u16 data_len; /* bytes behind the UDP header in this packet; of a later fragment, behind the IP header */
	__be32 fragment_id_be;
	__u64 udp_header; /* of a first fragment, as it came in */
};

/* In one branch, for it is most often true. */
static __always_inline bool same_address(const __be32 *one_be, const __be32 *other_be)
{
	return !((one_be[0] ^ other_be[0]) | (one_be[1] ^ other_be[1]) | (one_be[2] ^ other_be[2]) |
		 (one_be[3] ^ other_be[3]));
}

/* A packet that functions which take only numbers are at work on. */
struct scratch {
	struct packet pkt;
	__u8 macs[12]; /* as they came in, destination first */
	struct listener_key orig_dst; /* pkt.dst as it came in: each copy has another */
	__u64 heartbeat_tick; /* jiffies: when there last was a daemon, as its lease says */
	__u64 heartbeat_deadline; /* that lease */
};

/* Fragments of one datagram share these. */
struct fragment_key {
	__be32 src_be[4];
	__be32 dst_be[4];
	__be32 id_be;
};

/* What is known of a datagram of which fragments have come. See fragments.h. */
struct fragment_state {
	__u64 last_seen; /* ns: when the last of them came */
	__u64 udp_header; /* the UDP header of the udp_header; 0 before that has come */
	__u64 kib_seen; /* a bit for each KiB of the datagram in which one begins */
	__u32 unique_bytes; /* bytes that have come, repetitions left out */
	__u32 total_bytes; /* bytes that have come */
	__u32 length; /* the datagram's length, bytes; 0 before the last fragment has come */
	__u32 verdict; /* enum fragment_verdict */
	__u32 listener; /* its id, for FRAGMENT_VERDICT_COPY */
	__u32 to_id; /* of the downstream, for FRAGMENT_VERDICT_FORWARD */
	struct listener_key to; /* its address: the id may have become another's */
	__u32 ttl; /* of the first */
};

#endif

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the kernel program and user space agree on: the only structs and enums that both see.
 *
 * Fixed widths, explicit padding, network-order fields end in _be. User space reads these types out of the
 * program's BTF; src/datapath/kernel/skel.rs asserts their sizes and offsets.
 */
#ifndef FANOUT_ABI_H
#define FANOUT_ABI_H

/* Destination of a datagram; the key of `listeners`. IPv4 addresses are v4-mapped (RFC 4291, 2.5.5.2). */
struct listener_key {
	__be32 addr_be[4];
	__be16 port_be;
	__u16 scope; /* enum key_scope */
};

enum key_scope {
	KEY_LISTENER = 0,
	/* The address is some listener's, whatever the port, which is 0: later fragments have none. The value means nothing. */
	KEY_ADDRESS = 1,
	/* The link whose index is the first word of the address puts no header before its IP packets. The value means nothing. */
	KEY_L3_DEVICE = 2,
};

enum listener_flag {
	/* Leave every datagram to the listener's socket. */
	LISTENER_SOCKET_ONLY = 1,
};

struct fanout_listener {
	__u32 id; /* index into STATS, DROPS, listener_states */
	__u32 flags; /* enum listener_flag */
};

/*
 * A place of `first_look`, which most often saves asking `listeners`. What is behind `found` belongs to CACHE_SINGLE; user
 * space changes it only while nobody looks at it.
 */
struct cached_listener {
	__be32 addr_be[4]; /* like listener_key's */
	__be16 port_be;
	__u16 state; /* enum cache_state */
	__u32 unused;
	struct fanout_listener listener;
};

enum cache_state {
	CACHE_EMPTY = 0, /* no listener's destination has this place */
	CACHE_SINGLE = 1, /* one has, this one */
	CACHE_COLLISION = 2, /* ask `listeners` */
};

#define LISTENER_CACHE_BITS 10 /* of a place's number */
#define LISTENER_CACHE_FACTOR 0x9e3779b1

/* How the place in a listener's table is computed. */
enum policy {
	POLICY_ROUND_ROBIN = 0,
	POLICY_HASH_SOURCE_IP = 1,
	POLICY_HASH_SOURCE = 2,
	POLICY_HASH_FLOW = 3,
	POLICY_GELF_MESSAGE = 4, /* chunks by message ID, the rest round robin */
	POLICY_REPLICATE = 5, /* a copy to every slot of the table */
};

/* Slots of a replicating listener's table that get copies; the configuration allows no more. */
#define MAX_COPIES 64

/*
 * A listener's current table: first slot << 32 | number of slots. One aligned 64-bit store by user space
 * publishes a new table; one load here sees the old or the new one, never a mixture. Any policy works with any table,
 * so the two need not change together.
 */
struct listener_state {
	__u64 table;
	__u32 policy; /* enum policy */
	__u32 min_mtu; /* the smallest of the table's downstreams, bytes; for POLICY_REPLICATE */
	__u32 rules; /* number of the rules in `sources`; 0: everybody may send */
	__u32 meter; /* number of the buckets in `buckets`; 0: as fast as they like */
	__u64 interval; /* what a datagram costs, in ticks of the meter's clock */
	__u64 depth; /* what a full bucket holds, in the same */
	__be32 sender_mask_be
		[4]; /* the bits of an address that tell senders apart, for the meter */
};

/*
 * Key of `sources`. Rules are never changed while a listener names them: a change takes a new number, which one store
 * to the listener's state puts in force. Each number has a prefix of no address bits, for all whom no other names.
 */
struct source_key {
	__u32 prefixlen; /* the number's 32 bits and those of the address that count */
	__u32 rules;
	__be32 addr_be[4]; /* like listener_key's */
};

enum source_verdict {
	SOURCE_DENIED = 0,
	SOURCE_ALLOWED = 1,
};

/* Ticks of the meters' clock in a nanosecond: fine enough for ten million datagrams a second. */
#define METER_TICKS_SHIFT 4

/* Key of `buckets`. The value is the tick at which the sender's bucket is full again. */
struct bucket_key {
	__u32 meter;
	__be32 sender_be[4]; /* like listener_key's, masked */
};

enum delivery {
	DELIVER_UNREACHABLE = 0, /* no route: drop and count */
	DELIVER_LOCAL = 1, /* up this host's own stack */
	DELIVER_NEIGHBOUR = 2, /* to next_hop on ifindex */
};

enum downstream_flag {
	/* ifindex is the host's end of a pair whose other end is in a pod, and nothing on this end wants to see packets. */
	DOWNSTREAM_PEER = 1,
	/* macs holds what user space has last seen of the neighbour. */
	DOWNSTREAM_MACS = 2,
	/* ifindex carries IP packets without a link-layer header: there are no neighbours to find. */
	DOWNSTREAM_L3_DEVICE = 4,
};

/*
 * A receiver. Never changed while a table names it: a change takes a new id, so that no packet sees half of one.
 */
struct downstream {
	__be32 addr_be[4]; /* like listener_key's */
	__be32 next_hop_be[4]; /* an IPv4 next hop is in the first word */
	__be16 port_be;
	__u8 delivery; /* enum delivery */
	__u8 next_hop_family; /* AF_INET or AF_INET6 of this kernel's numbering */
	__u32 ifindex; /* of the outgoing link */
	__u32 mtu; /* largest IP packet on the way out, bytes */
	__u32 flags; /* enum downstream_flag */
	__u32 sample; /* under POLICY_REPLICATE, of 2^32 - 1 datagrams how many are copied here */
	__u8 macs[12]; /* the neighbour's and the link's own: the start of the frame */
};

/*
 * Counters of one listener on one CPU. pkts_received = pkts_forwarded + pkts_dropped + pkts_passed after every
 * packet. Packets are datagrams: a GRO super-packet counts as those it holds. Bytes are UDP payload. A datagram that is
 * replicated is forwarded if at least one copy is on its way; the copies themselves are counted in DOWNSTREAM_STAT and
 * COPY_DROPS.
 */
struct stats {
	__u64 pkts_received;
	__u64 pkts_forwarded;
	__u64 pkts_dropped;
	__u64 pkts_passed; /* left to the listener's socket */
	__u64 bytes_received;
	__u64 bytes_forwarded;
	__u32 cursor; /* next place in the round, 0 before the first datagram */
	__u32 unused;
};

/*
 * Where one CPU last found a downstream's neighbour. Good for a moment only, see deliver.h.
 */
struct next_hop {
	__u64 resolved_at; /* jiffies */
	__u32 ifindex; /* 0: nothing found yet */
	__u8 macs[12]; /* destination, source: the start of the frame */
};

/*
 * What one CPU handed to a downstream, and where: in one entry because both are needed for every datagram, and another
 * entry would take two more cache lines.
 */
struct downstream_stats {
	__u64 pkts;
	__u64 bytes;
	struct next_hop cached_hop;
};

/* What `FRAGMENT_STAT` counts. */
enum fragment_count {
	/* Later fragments at a listener's address, of datagrams whose first one is not known. Left to the stack. */
	FRAGMENT_STRAY = 0,
	/* Later fragments of a datagram that is being forwarded, which could not follow the first. Dropped. */
	FRAGMENT_LOST = 1,
	FRAGMENT_COUNTS = 2,
};

/* Why a datagram of ours was dropped. The numbers of DropReason in src/model.rs; a test compares the two. */
enum drop_reason {
	DROP_NO_DOWNSTREAM = 0,
	DROP_TTL_EXPIRED = 1,
	DROP_NO_ROUTE = 2,
	DROP_REWRITE_FAILED = 3,
	DROP_REDIRECT_FAILED = 4,
	DROP_SOURCE_DENIED = 5,
	DROP_RATE_LIMITED = 6,
	DROP_REASONS = 7,
};

/* What has become of a datagram, or of one copy of it. */
enum event_kind {
	EVENT_FORWARDED = 0,
	EVENT_PASSED = 1, /* left to the listener's socket */
	EVENT_DROPPED = 2,
	EVENT_COPIED = 3, /* one copy; EVENT_FORWARDED comes when all have been made */
	EVENT_COPY_DROPPED = 4,
};

/* How a datagram is delivered. */
enum delivery_path {
	PATH_NONE = 0,
	PATH_LOCAL = 1, /* up this host's own stack */
	PATH_NEIGHBOUR = 2, /* the kernel has been told to find the neighbour */
	PATH_KNOWN = 3, /* out of a link, to a neighbour that was known */
	PATH_POD = 4, /* straight into another namespace */
	PATH_L3_DEVICE = 5, /* out of a link without link-layer addresses */
};

enum event_flag {
	EVENT_LOGGED = 1, /* the first of its sort for a while: for the log */
	EVENT_TRACED = 2, /* somebody wants to see it */
};

/* What the program tells through the ring buffer `events`. */
struct event {
	__u64 time; /* nanoseconds, CLOCK_MONOTONIC */
	__u64 suppressed; /* under EVENT_LOGGED: datagrams since the last such event on this CPU that were not told of */
	__be32 src_be[4];
	__be32 dst_be[4]; /* as the datagram came in */
	__be32 to_be[4]; /* the downstream chosen; all zeros for none */
	__be16 sport_be;
	__be16 dport_be;
	__be16 to_port_be;
	__u8 kind; /* enum event_kind */
	__u8 path; /* enum way */
	__u32 listener;
	__u32 reason; /* enum drop_reason, for what was dropped */
	__u32 ifindex; /* of the link it came in by */
	__u32 out_ifindex; /* of the downstream's link; 0 for none */
	__u32 datagrams;
	__u32 bytes; /* UDP payload */
	__u32 flags; /* enum event_flag */
	__u32 pad;
};

/* The first drop of a reason for a while has been told of; those after it on this CPU are counted. */
struct drop_log {
	__u64 next; /* nanoseconds, CLOCK_MONOTONIC: when one is told of again */
	__u64 suppressed; /* datagrams */
};

/*
 * The daemon's sign of life: until when the program acts without another one. After that it leaves everything alone, as if
 * it were not there.
 */
struct heartbeat {
	__u64 deadline; /* nanoseconds, CLOCK_MONOTONIC; HEARTBEAT_FOREVER */
};

#define HEARTBEAT_FOREVER 0xffffffffffffffffULL

/* The links that the program hangs on. */
struct link_flags {
	__u32 has_l3_device; /* 0 only while none is marked with KEY_L3_DEVICE */
};

/*
 * What follows is of user space alone, for its successor: what ids mean, and what was counted before the maps were made.
 * The program never looks at it.
 */

/*
 * PINS_VERSION changes when a pinned map gets another meaning; with other sizes a map is refused anyway, except that what is
 * behind the counters of STATS and DOWNSTREAM_STAT may change.
 */
#define PINS_VERSION 3

#define NAME_LENGTH 64

/* Listener id -> its name in the configuration, zeros behind it. Empty: nobody's. */
struct listener_name {
	char name[NAME_LENGTH];
};

/*
 * What was inherited from earlier programs counts only once `absorbed` says whose it is: a daemon that is killed while it
 * writes that down has inherited nothing, and the next one still finds those programs.
 */
enum carried_kind {
	CARRIED_LISTENER = 0, /* inherited */
	CARRIED_FOLDED_DOWNSTREAM =
		1, /* counted by this program under ids that have been given to others since */
	CARRIED_FRAGMENTS = 2, /* inherited */
	CARRIED_DOWNSTREAM = 3,
};

struct carried_key {
	__be32 addr_be[4]; /* of the downstream; like listener_key's */
	__be16 port_be;
	__u16 kind; /* enum carried_kind */
	__u32 listener;
};

#define CARRIED_WORDS (4 + 2 * DROP_REASONS)

/*
 * Of a listener: forwarded, passed, bytes received, bytes forwarded, drops by reason, copies dropped by reason. Of a
 * downstream: packets, bytes; of CARRIED_FOLDED_DOWNSTREAM then 1 + the id whose counts have just been added and do not count
 * themselves any more. Of fragments: by enum fragment_count. To be added to what the maps count.
 */
struct carried_entry {
	__u64 words[CARRIED_WORDS];
};

#define MAX_IMPORTED 64

/* Whose pins these are. Version and network namespace stay where they are in all versions. */
struct pins_about {
	__u32 version; /* PINS_VERSION */
	__u32 imported_count;
	__u64 netns_device; /* of the network namespace, as stat(2) tells of /proc/self/ns/net */
	__u64 netns_inode;
	__u32 imported[MAX_IMPORTED]; /* programs whose counts this ledger has already */
};

#define TRACE_ALL_LISTENERS 0xffffffff

/* Which datagrams are told of beside drops. Written by user space, `on` last when it goes on and first when it goes off. */
struct trace_control {
	__u32 on;
	__u32 listener; /* or TRACE_ALL_LISTENERS */
	__be32 source_be[4]; /* a prefix */
	__be32 mask_be[4];
	__u64 lost; /* events for which the ring buffer had no room; written by the program */
};

#endif

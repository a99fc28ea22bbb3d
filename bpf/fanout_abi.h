/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The ABI between the kernel program and user space: the only structs and enums that both see.
 *
 * Fixed widths, explicit padding; network-order fields end in _be. User space reads these types
 * from the program's BTF; src/datapath/kernel/skel.rs asserts their sizes and offsets.
 */
#ifndef FANOUT_ABI_H
#define FANOUT_ABI_H

#include "vmlinux.h"

/*
 * Destination of a datagram; key of `listeners`. IPv4 addresses are v4-mapped (RFC 4291, 2.5.5.2).
 */
struct listener_key {
	__be32 addr_be[4];
	__be16 port_be;
	__u16 scope; /* enum key_scope */
};

enum key_scope {
	KEY_LISTENER = 0,
	/*
	 * The address belongs to a listener, on any port. Later fragments carry no port; port_be is
	 * 0 here. The value is unused.
	 */
	KEY_ADDRESS = 1,
	/*
	 * The device whose index is the first word of the address is an L3 device: its packets
	 * begin with the IP header. The value is unused.
	 */
	KEY_L3_DEVICE = 2,
};

enum listener_flag {
	/* Pass every datagram to the listener's socket. */
	LISTENER_SOCKET_ONLY = 1,
};

struct fanout_listener {
	__u32 id; /* index into STATS, DROPS, listener_states */
	__u32 flags; /* enum listener_flag */
};

/*
 * Entry of `listener_cache`, which answers most lookups without `listeners`. The fields other than
 * `state` are valid in CACHE_SINGLE; user space changes them only while no CPU reads them.
 */
struct cached_listener {
	__be32 addr_be[4]; /* like listener_key's */
	__be16 port_be;
	__u16 state; /* enum cache_state */
	__u32 unused;
	struct fanout_listener listener;
};

enum cache_state {
	CACHE_EMPTY = 0, /* no destination hashes to this entry */
	CACHE_SINGLE = 1, /* one destination does: this one */
	CACHE_COLLISION = 2, /* several do, or an update is in progress: look in `listeners` */
};

#define LISTENER_CACHE_BITS 10 /* of an entry's index */
#define LISTENER_CACHE_FACTOR 0x9e3779b1

/* How the index into a listener's table is computed. */
enum policy {
	POLICY_ROUND_ROBIN = 0,
	POLICY_HASH_SOURCE_IP = 1,
	POLICY_HASH_SOURCE = 2,
	POLICY_HASH_FLOW = 3,
	POLICY_GELF_MESSAGE = 4, /* chunks by message ID, other datagrams round robin */
	POLICY_REPLICATE = 5, /* one copy to every slot of the table */
};

/* Most slots in a replicating listener's table. The configuration allows no more. */
#define MAX_COPIES 64

/*
 * A listener's table: first slot << 32 | number of slots. User space publishes a new table by one
 * aligned 64-bit store; a load sees the old table or the new one, never a mixture. Every policy
 * works with every table, so policy and table need not change together.
 */
struct listener_state {
	__u64 table;
	__u32 policy; /* enum policy */
	__u32 min_mtu; /* smallest downstream MTU in the table, bytes; for POLICY_REPLICATE */
	__u32 rules; /* number of its rules in `sources`; 0: every sender is allowed */
	__u32 meter; /* number of its buckets in `buckets`; 0: no rate limit */
	__u64 interval; /* cost of a datagram, in ticks of the meter's clock */
	__u64 depth; /* depth of a bucket, in the same ticks */
	__be32 sender_mask_be[4]; /* the address bits that identify a sender to the meter */
};

/*
 * Key of `sources`. Rules are immutable while a listener names them: a change gets a new number,
 * which one store to the listener's state puts in force. Each number also has an entry with no
 * address bits, the default verdict.
 */
struct source_key {
	__u32 prefixlen; /* the 32 bits of the number plus the significant bits of the address */
	__u32 rules;
	__be32 addr_be[4]; /* like listener_key's */
};

enum source_verdict {
	SOURCE_DENIED = 0,
	SOURCE_ALLOWED = 1,
};

/*
 * log2 of the meter clock's ticks per nanosecond: fine enough for ten million datagrams a second.
 */
#define METER_TICKS_SHIFT 4

/* Key of `buckets`. The value is the tick at which the sender's bucket is full again. */
struct bucket_key {
	__u32 meter;
	__be32 sender_be[4]; /* like listener_key's, masked */
};

enum delivery {
	DELIVER_UNREACHABLE = 0, /* no route: drop and count */
	DELIVER_LOCAL = 1, /* to this host's own stack */
	DELIVER_NEIGHBOUR = 2, /* to next_hop on ifindex */
};

enum downstream_flag {
	/*
	 * ifindex is the host end of a pair whose other end is in a pod, and no hook on the host
	 * end needs to see the packets.
	 */
	DOWNSTREAM_PEER = 1,
	/* macs holds the neighbour's addresses as user space last saw them. */
	DOWNSTREAM_MACS = 2,
	/*
	 * ifindex is an L3 device: packets leave it without a link-layer header, so there is no
	 * neighbour to resolve.
	 */
	DOWNSTREAM_L3_DEVICE = 4,
};

/*
 * A receiver. Immutable while a table names it: a change gets a new id, so no packet sees half an
 * update.
 */
struct downstream {
	__be32 addr_be[4]; /* like listener_key's */
	__be32 next_hop_be[4]; /* an IPv4 next hop is in the first word */
	__be16 port_be;
	__u8 delivery; /* enum delivery */
	__u8 next_hop_family; /* AF_INET or AF_INET6 */
	__u32 ifindex; /* of the egress device */
	__u32 mtu; /* largest IP packet on the egress path, bytes */
	__u32 flags; /* enum downstream_flag */
	__u32 sample; /* under POLICY_REPLICATE: how many of 2^32 - 1 datagrams are copied here */
	__u8 macs[12]; /* destination, then source: the first bytes of the Ethernet header */
};

/*
 * Counters of one listener on one CPU. After every packet, pkts_received = pkts_forwarded +
 * pkts_dropped + pkts_passed. Packets are datagrams: a GRO super-packet counts as the datagrams it
 * holds. Bytes are UDP payload. A replicated datagram counts as forwarded if at least one copy is
 * on its way; the copies are counted in DOWNSTREAM_STAT and COPY_DROPS.
 */
struct stats {
	__u64 pkts_received;
	__u64 pkts_forwarded;
	__u64 pkts_dropped;
	__u64 pkts_passed; /* passed to the listener's socket */
	__u64 bytes_received;
	__u64 bytes_forwarded;
	__u32 cursor; /* next index of the round robin; 0 before the first datagram */
	__u32 unused;
};

/*
 * A downstream's neighbour as one CPU last resolved it. Expires after NEXT_HOP_TICKS, see
 * deliver.h.
 */
struct next_hop {
	__u64 resolved_at; /* jiffies */
	__u32 ifindex; /* 0: not resolved */
	__u8 macs[12]; /* destination, source: the first bytes of the Ethernet header */
};

/*
 * What one CPU sent to a downstream, and its cached next hop. One entry, because every datagram
 * needs both and a second entry would cost two more cache lines.
 */
struct downstream_stats {
	__u64 pkts;
	__u64 bytes;
	struct next_hop cached_hop;
};

/* Index into FRAGMENT_STAT. */
enum fragment_count {
	/*
	 * Later fragments to a listener's address whose first fragment is unknown. Passed to the
	 * stack.
	 */
	FRAGMENT_STRAY = 0,
	/* Later fragments of a forwarded datagram that could not follow the first. Dropped. */
	FRAGMENT_LOST = 1,
	FRAGMENT_COUNTS = 2,
};

/*
 * Why a datagram was dropped. The numbers are those of DropReason in src/model.rs; a test compares
 * them.
 */
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

/* What became of a datagram, or of one copy of it. */
enum event_kind {
	EVENT_FORWARDED = 0,
	EVENT_PASSED = 1, /* to the listener's socket */
	EVENT_DROPPED = 2,
	EVENT_COPIED = 3, /* one copy; EVENT_FORWARDED follows once all copies are made */
	EVENT_COPY_DROPPED = 4,
};

/* How a datagram was delivered. */
enum delivery_path {
	PATH_NONE = 0,
	PATH_LOCAL = 1, /* to this host's own stack */
	PATH_NEIGHBOUR = 2, /* the kernel resolves the neighbour */
	PATH_KNOWN = 3, /* out of a device, to a neighbour already resolved */
	PATH_POD = 4, /* redirected into a pod's network namespace */
	PATH_L3_DEVICE = 5, /* out of an L3 device */
};

enum event_flag {
	EVENT_LOGGED = 1, /* first of its kind in this interval: for the log */
	EVENT_TRACED = 2, /* matches the trace filter */
};

/* Record in the ring buffer `events`. */
struct event {
	__u64 time; /* nanoseconds, CLOCK_MONOTONIC */
	__u64 suppressed; /* with EVENT_LOGGED: datagrams since the last logged event on this CPU that were not logged */
	__be32 src_be[4];
	__be32 dst_be[4]; /* as the datagram arrived */
	__be32 to_be[4]; /* the chosen downstream; all zeros for none */
	__be16 sport_be;
	__be16 dport_be;
	__be16 to_port_be;
	__u8 kind; /* enum event_kind */
	__u8 path; /* enum delivery_path */
	__u32 listener;
	__u32 reason; /* enum drop_reason, if it was dropped */
	__u32 ifindex; /* ingress device */
	__u32 out_ifindex; /* egress device of the downstream; 0 for none */
	__u32 datagrams;
	__u32 bytes; /* UDP payload */
	__u32 flags; /* enum event_flag */
	__u32 pad;
};

/*
 * Rate limit of logged drops: the first drop of a reason in an interval is logged, the following
 * ones on this CPU are counted.
 */
struct drop_log {
	__u64 next; /* nanoseconds, CLOCK_MONOTONIC: end of the interval */
	__u64 suppressed; /* datagrams not logged since */
};

/*
 * The daemon's heartbeat: until when the program acts without another renewal. After the deadline
 * it passes all traffic untouched.
 */
struct heartbeat {
	__u64 deadline; /* nanoseconds, CLOCK_MONOTONIC; or HEARTBEAT_FOREVER */
};

#define HEARTBEAT_FOREVER 0xffffffffffffffffULL

/* Properties of the devices that the program is attached to. */
struct link_flags {
	__u32 has_l3_device; /* 0 only while no KEY_L3_DEVICE entry exists */
};

/*
 * The types below are for user space only: the daemon leaves them for its successor. They say what
 * ids mean and what was counted before these maps existed. The program never reads them.
 */

/*
 * PINS_VERSION changes whenever a pinned map changes its name or meaning. A map of another size is
 * refused anyway, except that the part behind the counters of STATS and DOWNSTREAM_STAT may change.
 */
#define PINS_VERSION 3

#define NAME_LENGTH 64

/* Listener id -> its name in the configuration, padded with zeros. Empty: the id is unused. */
struct listener_name {
	char name[NAME_LENGTH];
};

/*
 * Inherited counts are valid only once `imported` names the programs they came from. A daemon
 * killed while it writes them has inherited nothing, and its successor still finds those programs.
 */
enum carried_kind {
	CARRIED_LISTENER = 0, /* inherited */
	CARRIED_FOLDED_DOWNSTREAM =
		1, /* counted by this program under ids that were reused since */
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
 * Values to add to the counters in the maps. For a listener: forwarded, passed, bytes received,
 * bytes forwarded, drops by reason, copies dropped by reason. For a downstream: packets, bytes; for
 * CARRIED_FOLDED_DOWNSTREAM then 1 + the id whose counts were just added here and no longer count
 * themselves. For fragments: by enum fragment_count.
 */
struct carried_entry {
	__u64 words[CARRIED_WORDS];
};

#define MAX_IMPORTED 64

/*
 * Identifies a set of pins. `version` and the network namespace keep their offsets in every
 * version.
 */
struct pins_about {
	__u32 version; /* PINS_VERSION */
	__u32 imported_count;
	__u64 netns_device; /* of the network namespace: st_dev of /proc/self/ns/net */
	__u64 netns_inode;
	__u32 imported[MAX_IMPORTED]; /* ids of the programs whose counts were imported */
};

#define TRACE_ALL_LISTENERS 0xffffffff

/*
 * Which datagrams are traced, in addition to logged drops. Written by user space: `on` last when
 * tracing starts, first when it stops.
 */
struct trace_control {
	__u32 on;
	__u32 listener; /* or TRACE_ALL_LISTENERS */
	__be32 source_be[4]; /* a prefix */
	__be32 mask_be[4];
	__u64 lost; /* events lost because the ring buffer was full; written by the program */
};

#endif

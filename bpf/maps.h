/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Every map: what it is for and who writes it. Sizes marked "set at load" come from the configuration's limits
 * (src/datapath/kernel/skel.rs). Names have at most 15 characters, the kernel's limit.
 */
#ifndef FANOUT_MAPS_H
#define FANOUT_MAPS_H

/* Which destinations are ours. Written by user space when listeners or the host's addresses change. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct listener_key);
	__type(value, struct fanout_listener);
} listeners SEC(".maps");

/*
 * The same for most datagrams at much less cost: an array, which needs no call, whose place follows from address and
 * port. Written by user space through a mapping.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1 << LISTENER_CACHE_BITS);
	__type(key, __u32);
	__type(value, struct cached_listener);
} listener_cache SEC(".maps");

/* Listener id -> its current table. Written by user space through a mapping, one atomic store a table. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* set at load */
	__type(key, __u32);
	__type(value, struct listener_state);
} listener_states SEC(".maps");

/* The slots of all tables: downstream ids. Written by user space before a table over them is published. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* set at load */
	__type(key, __u32);
	__type(value, __u32);
} table_slots SEC(".maps");

/* Downstream id -> receiver. Written by user space before a table names the id. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* set at load */
	__type(key, __u32);
	__type(value, struct downstream);
} downstreams SEC(".maps");

/* Rules and prefix of a sender's address -> whether the datagram is taken. Written by user space, see source_key. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1); /* set at load */
	__type(key, struct source_key);
	__type(value, __u32); /* enum source_verdict */
} sources SEC(".maps");

/* Sender -> when its bucket is full again, for rate limits. Written by the program; the longest unused make room. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1); /* set at load */
	__type(key, struct bucket_key);
	__type(value, __u64);
} buckets SEC(".maps");

/*
 * Listener id -> counters, and the next place in the round. Written by the program. The name is part of the user interface
 * (`bpftool map dump`).
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1); /* set at load */
	__type(key, __u32);
	__type(value, struct stats);
} STATS SEC(".maps");

/* Listener id * DROP_REASONS + reason -> datagrams dropped. Written by the program. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1); /* set at load */
	__type(key, __u32);
	__type(value, __u64);
} DROPS SEC(".maps");

/* Listener id * DROP_REASONS + reason -> copies of replicated datagrams that failed. Written by the program. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1); /* set at load */
	__type(key, __u32);
	__type(value, __u64);
} COPY_DROPS SEC(".maps");

/*
 * Downstream id -> what was handed to it, and where its neighbour was found, a few milliseconds ago. Written by the
 * program; zeroed by user space when an id is reused.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1); /* set at load */
	__type(key, __u32);
	__type(value, struct downstream_stats);
} DOWNSTREAM_STAT SEC(".maps");

/*
 * What has been decided about datagrams of which more fragments are to come. Written by the program; the longest
 * unused make room, so that a flood of fragments cannot take more memory than this.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct fragment_key);
	__type(value, struct fragment_state);
} fragments SEC(".maps");

/* enum fragment_count -> fragments. Written by the program. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, FRAGMENT_COUNTS);
	__type(key, __u32);
	__type(value, __u64);
} FRAGMENT_STAT SEC(".maps");

/* The packet that this CPU is at work on: see current_packet(). */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratch_buf SEC(".maps");

static __always_inline struct scratch *current_scratch(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratch_buf, &zero);
}

/*
 * The packet is in a map and not on the stack. Functions that take only numbers, as on Linux 5.10 those must that the
 * verifier checks once and not at each call, find it there; and the verifier, which knows nothing of what is in a map, need not
 * follow every kind of packet through all of the program.
 */
static __always_inline struct packet *current_packet(void)
{
	struct scratch *scratch = current_scratch();

	return scratch ? &scratch->pkt : NULL;
}

/* Single datagrams that user space is told of. Written by the program. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 256 * 1024); /* bytes */
} events SEC(".maps");

/*
 * (Listener id * DROP_REASONS + reason) * 2, + 1 for single copies -> when a drop is told of again. Written by the
 * program.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1); /* set at load */
	__type(key, __u32);
	__type(value, struct drop_log);
} drop_log SEC(".maps");

/* Listener id -> its name. Written by user space, for its successor; so are the next three. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1); /* set at load */
	__type(key, __u32);
	__type(value, struct listener_name);
} listener_names SEC(".maps");

/* Downstream id -> 1 + the id of the listener that it counts for; 0 for nobody's. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* set at load */
	__type(key, __u32);
	__type(value, __u32);
} stat_owners SEC(".maps");

/* What was counted before: by predecessors, and under downstream ids that have been used again. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1); /* set at load */
	__type(key, struct carried_key);
	__type(value, struct carried_entry);
} carried_counts SEC(".maps");

/* Whose pins these are. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pins_about);
} about SEC(".maps");

/*
 * Never read. User space updates it to wait until no CPU still runs the program with an older table: the kernel
 * returns from an update of a map of maps only after an RCU grace period (kernel/bpf/syscall.c,
 * maybe_wait_bpf_programs). It begins empty, or loading would wait as well.
 */
struct barrier_inner {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} barrier_inner SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct barrier_inner);
} rcu_barrier SEC(".maps");

#endif

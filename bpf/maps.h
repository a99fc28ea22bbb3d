/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * All maps: what each is for and who writes it. Sizes marked "set at load" come from the
 * configuration's limits (src/datapath/kernel/skel.rs). The kernel keeps 15 characters of a name.
 */
#ifndef FANOUT_MAPS_H
#define FANOUT_MAPS_H

#include "base.h"
#include "fanout_abi.h"
#include "packet.h"

/*
 * Destinations of the listeners. Written by user space when listeners or the host's addresses
 * change.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct listener_key);
	__type(value, struct fanout_listener);
} listeners SEC(".maps");

/*
 * Cache in front of `listeners`: an array indexed by a hash of address and port, so that most
 * lookups need no call. Written by user space through a mapping.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1 << LISTENER_CACHE_BITS);
	__type(key, __u32);
	__type(value, struct cached_listener);
} listener_cache SEC(".maps");

/*
 * Listener id -> its current table. Written by user space through a mapping, one atomic store per
 * table.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* set at load */
	__type(key, __u32);
	__type(value, struct listener_state);
} listener_states SEC(".maps");

/*
 * Slots of all tables: downstream ids. Written by user space before a table that uses them is
 * published.
 */
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

/* Rules and sender prefix -> verdict. Written by user space, see struct source_key. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1); /* set at load */
	__type(key, struct source_key);
	__type(value, __u32); /* enum source_verdict */
} sources SEC(".maps");

/*
 * Sender -> when its token bucket is full again. Written by the program; least recently used
 * entries are evicted.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1); /* set at load */
	__type(key, struct bucket_key);
	__type(value, __u64);
} buckets SEC(".maps");

/*
 * Listener id -> counters and round-robin cursor. Written by the program. The name is part of the
 * user interface (`bpftool map dump`).
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

/*
 * Listener id * DROP_REASONS + reason -> copies of replicated datagrams dropped. Written by the
 * program.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1); /* set at load */
	__type(key, __u32);
	__type(value, __u64);
} COPY_DROPS SEC(".maps");

/*
 * Downstream id -> datagrams sent to it, and its cached next hop. Written by the program; zeroed by
 * user space when an id is reused.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1); /* set at load */
	__type(key, __u32);
	__type(value, struct downstream_stats);
} DOWNSTREAM_STAT SEC(".maps");

/*
 * Verdicts on datagrams whose fragments are still arriving. Written by the program; least recently
 * used entries are evicted, so a flood of fragments uses no more memory than this.
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

/* The packet that this CPU is processing: see scratch.h. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratch_buf SEC(".maps");

/* Events about single datagrams. Written by the program. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 256 * 1024); /* bytes */
} events SEC(".maps");

/*
 * (Listener id * DROP_REASONS + reason) * 2, + 1 for single copies -> when a drop is logged again.
 * Written by the program.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1); /* set at load */
	__type(key, __u32);
	__type(value, struct drop_log);
} drop_log SEC(".maps");

/* Listener id -> its name. Written by user space for its successor, like the next three maps. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1); /* set at load */
	__type(key, __u32);
	__type(value, struct listener_name);
} listener_names SEC(".maps");

/* Downstream id -> 1 + the id of the listener whose counters it belongs to; 0 for none. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* set at load */
	__type(key, __u32);
	__type(value, __u32);
} stat_owners SEC(".maps");

/* Counts from before: of earlier programs, and of downstream ids that were reused. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1); /* set at load */
	__type(key, struct carried_key);
	__type(value, struct carried_entry);
} carried_counts SEC(".maps");

/* Version and network namespace of these pins, and the programs whose counts were imported. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pins_about);
} about SEC(".maps");

/*
 * Never read. User space updates it to wait for an RCU grace period, after which no CPU still runs
 * the program with an older table: an update of a map of maps returns only then
 * (kernel/bpf/syscall.c, maybe_wait_bpf_programs). It starts empty, because filling it at load
 * would wait as well.
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

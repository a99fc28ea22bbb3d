/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Selects a downstream. User space has compiled the policy into the listener's table; what is left
 * is computing an index.
 */
#ifndef FANOUT_SELECT_H
#define FANOUT_SELECT_H

#include "base.h"
#include "fanout_abi.h"
#include "hash.h"
#include "maps.h"
#include "packet.h"

/*
 * Next index of the round robin over `slots` slots. It starts at random, so that CPUs do not move
 * in lockstep.
 */
static __always_inline __u32 round_robin(__u32 *cursor, __u32 slots)
{
	__u32 next = *cursor;

	if (next == slots)
		next = 0;
	else if (next == 0 ||
		 next > slots) /* first datagram on this CPU, or the table became shorter */
		next = bpf_get_prandom_u32() % slots;
	*cursor = next + 1;
	return next;
}

/* A GELF chunk begins with these two bytes and the message's ID (Graylog, "GELF via UDP"). */
#define GELF_CHUNK_MAGIC 0x1e0f

struct gelf_chunk {
	__be16 magic_be;
	__u8 message_id[8];
} __attribute__((packed));

/* Maps a hash evenly onto the slots of a table. */
static __always_inline __u32 table_index(__u32 hash, __u32 slots)
{
	return (__u64)hash * slots >> 32;
}

static __always_inline __u32 flow_hash(const struct packet *pkt, __u32 policy)
{
	__u32 hash = hash_words4(0, pkt->src_be);

	if (policy == POLICY_HASH_SOURCE_IP)
		return hash_end(hash, 16);
	if (policy == POLICY_HASH_SOURCE)
		return hash_end(hash_word(hash, pkt->sport_be), 20);
	hash = hash_words4(hash, pkt->dst.addr_be);
	return hash_end(hash_word(hash, (__u32)pkt->sport_be << 16 | pkt->dst.port_be), 36);
}

/*
 * True if the datagram is a GELF chunk; stores the hash of its message ID. A super-packet goes by
 * its first datagram.
 */
static __always_inline bool gelf_message_hash(const struct __sk_buff *skb, const struct packet *pkt,
					      __u32 *hash)
{
	struct gelf_chunk chunk;
	__u32 words[2];

	if (pkt->data_len < sizeof(chunk) ||
	    bpf_skb_load_bytes(skb, pkt->l4_off + sizeof(struct udphdr), &chunk, sizeof(chunk)) ||
	    chunk.magic_be != bpf_htons(GELF_CHUNK_MAGIC))
		return false;
	__builtin_memcpy(words, chunk.message_id, sizeof(words));
	*hash = hash_end(hash_word(hash_word(0, words[0]), words[1]), 8);
	return true;
}

/* A listener's table as this packet sees it. */
struct table {
	__u32 first; /* index of the first slot in `table_slots` */
	__u32 slots;
	__u32 policy;
	__u32 min_mtu;
	__u32 *cursor;
};

/* Returns the index into the table according to the listener's policy. */
static __always_inline __u32 choose_index(const struct __sk_buff *skb, const struct packet *pkt,
					  const struct table *table)
{
	__u32 hash;

	if (table->policy == POLICY_ROUND_ROBIN)
		return round_robin(table->cursor, table->slots);
	if (table->policy != POLICY_GELF_MESSAGE)
		return table_index(flow_hash(pkt, table->policy), table->slots);
	if (gelf_message_hash(skb, pkt, &hash))
		return table_index(hash, table->slots);
	return round_robin(table->cursor, table->slots);
}

/* Reads the listener's table. False if it is empty. */
static __always_inline bool read_table(struct stats *stats, const struct listener_state *state,
				       struct table *table)
{
	__u64 choose_index = *(const volatile __u64 *)&state->table;

	table->cursor = &stats->cursor;
	table->first = choose_index >> 32;
	table->slots = (__u32)choose_index;
	table->policy = state->policy;
	table->min_mtu = state->min_mtu;
	return table->slots != 0;
}

/* Returns the downstream in a slot, and its id. */
static __always_inline struct downstream *downstream_at(__u32 slot, __u32 *downstream_id)
{
	__u32 *id = bpf_map_lookup_elem(&table_slots, &slot);

	if (!id)
		return NULL;
	*downstream_id = *id;
	return bpf_map_lookup_elem(&downstreams, downstream_id);
}

#endif

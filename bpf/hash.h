/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * MurmurHash3_x86_32 over 32-bit words, seed 0. src/plan/hash.rs is the counterpart: both datapaths
 * must send a sender to the same downstream.
 */
#ifndef FANOUT_HASH_H
#define FANOUT_HASH_H

#include "base.h"

static __always_inline __u32 rotate_left(__u32 value, int by)
{
	return value << by | value >> (32 - by);
}

static __always_inline __u32 hash_word(__u32 hash, __u32 word)
{
	hash ^= rotate_left(word * 0xcc9e2d51, 15) * 0x1b873593;
	return rotate_left(hash, 13) * 5 + 0xe6546b64;
}

static __always_inline __u32 hash_words4(__u32 hash, const __be32 *words)
{
	hash = hash_word(hash, words[0]);
	hash = hash_word(hash, words[1]);
	hash = hash_word(hash, words[2]);
	return hash_word(hash, words[3]);
}

static __always_inline __u32 hash_end(__u32 hash, __u32 bytes)
{
	hash ^= bytes;
	hash = (hash ^ hash >> 16) * 0x85ebca6b;
	hash = (hash ^ hash >> 13) * 0xc2b2ae35;
	return hash ^ hash >> 16;
}

#endif

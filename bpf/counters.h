/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Counters. Each datagram of a listener passes through exactly one of count_forwarded(),
 * count_passed() and count_dropped(), and each keeps received = forwarded + dropped + passed. Plain
 * additions suffice: a TC program does not interrupt itself on one CPU.
 */
#ifndef FANOUT_COUNTERS_H
#define FANOUT_COUNTERS_H

#include "base.h"
#include "fanout_abi.h"
#include "maps.h"
#include "packet.h"

static __always_inline void count_received(struct stats *stats, const struct packet *pkt)
{
	stats->pkts_received += pkt->datagrams;
	stats->bytes_received += pkt->payload;
}

static __always_inline void count_copy(struct downstream_stats *to, const struct packet *pkt)
{
	to->pkts += pkt->datagrams;
	to->bytes += pkt->payload;
}

static __always_inline void count_copy_dropped(__u32 listener_id, enum drop_reason reason,
					       const struct packet *pkt)
{
	__u32 index = listener_id * DROP_REASONS + reason;
	__u64 *drops = bpf_map_lookup_elem(&COPY_DROPS, &index);

	if (drops)
		*drops += pkt->datagrams;
}

static __always_inline void count_forwarded(struct stats *stats, const struct packet *pkt)
{
	count_received(stats, pkt);
	stats->pkts_forwarded += pkt->datagrams;
	stats->bytes_forwarded += pkt->payload;
}

static __always_inline void count_passed(struct stats *stats, const struct packet *pkt)
{
	count_received(stats, pkt);
	stats->pkts_passed += pkt->datagrams;
}

static __always_inline void count_dropped(struct stats *stats, __u32 listener_id,
					  enum drop_reason reason, const struct packet *pkt)
{
	__u32 index = listener_id * DROP_REASONS + reason;
	__u64 *drops = bpf_map_lookup_elem(&DROPS, &index);

	count_received(stats, pkt);
	stats->pkts_dropped += pkt->datagrams;
	if (drops)
		*drops += pkt->datagrams;
}

#endif

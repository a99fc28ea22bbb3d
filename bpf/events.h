/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Reports single datagrams to user space through a ring buffer: the first drop of each reason per
 * listener, CPU and second, for the log; and every datagram that matches the trace filter. Counters
 * (counters.h) are independent of this.
 */
#ifndef FANOUT_EVENTS_H
#define FANOUT_EVENTS_H

#include "base.h"
#include "fanout_abi.h"
#include "maps.h"
#include "packet.h"

/* The kernel has ring buffers (5.8). Set before load; the verifier removes what is disabled. */
const volatile __u32 has_events = 1;

/* Written by user space through a mapping. Read for every datagram, so without a lookup. */
volatile struct trace_control trace SEC(".data.trace");

#define LOG_INTERVAL_NS 1000000000ULL

static __always_inline bool is_traced(__u32 listener, const struct packet *pkt)
{
	if (!trace.on || (trace.listener != TRACE_ALL_LISTENERS && trace.listener != listener))
		return false;
	return (pkt->src_be[0] & trace.mask_be[0]) == trace.source_be[0] &&
	       (pkt->src_be[1] & trace.mask_be[1]) == trace.source_be[1] &&
	       (pkt->src_be[2] & trace.mask_be[2]) == trace.source_be[2] &&
	       (pkt->src_be[3] & trace.mask_be[3]) == trace.source_be[3];
}

/*
 * True once per second for each index of drop_log. Then *suppressed is the number of datagrams
 * since the last time.
 */
static __always_inline bool should_log(__u32 index, __u64 now, const struct packet *pkt,
				       __u64 *suppressed)
{
	struct drop_log *log = bpf_map_lookup_elem(&drop_log, &index);

	if (!log)
		return false;
	if (now < log->next) {
		log->suppressed += pkt->datagrams;
		return false;
	}
	*suppressed = log->suppressed;
	log->suppressed = 0;
	log->next = now + LOG_INTERVAL_NS;
	return true;
}

static __noinline int fill_event(struct event *event, const struct __sk_buff *skb,
				 const struct packet *pkt, const struct listener_key *dst,
				 const struct downstream *to)
{
	event->ifindex = skb->ifindex;
	__builtin_memcpy(event->src_be, pkt->src_be, sizeof(event->src_be));
	__builtin_memcpy(event->dst_be, dst->addr_be, sizeof(event->dst_be));
	event->sport_be = pkt->sport_be;
	event->dport_be = dst->port_be;
	event->datagrams = pkt->datagrams;
	event->bytes = pkt->payload;
	event->path = pkt->path;
	if (to) {
		__builtin_memcpy(event->to_be, to->addr_be, sizeof(event->to_be));
		event->to_port_be = to->port_be;
		event->out_ifindex = to->ifindex;
	} else {
		__builtin_memset(event->to_be, 0, sizeof(event->to_be));
		event->to_port_be = 0;
		event->out_ifindex = 0;
	}
	return 0;
}

/*
 * `packed` is listener << 32 | enum event_kind << 8 | enum drop_reason: a BPF function takes at
 * most five arguments.
 */
static __noinline int emit_event(struct __sk_buff *skb, const struct packet *pkt,
				 const struct listener_key *dst, const struct downstream *to,
				 __u64 packed)
{
	__u32 listener = packed >> 32, kind = packed >> 8 & 0xff, reason = packed & 0xff;
	__u32 flags = is_traced(listener, pkt) ? EVENT_TRACED : 0;
	__u64 now = bpf_ktime_get_ns(), suppressed = 0;
	bool copy = kind == EVENT_COPY_DROPPED;
	struct event *event;

	if ((copy || kind == EVENT_DROPPED) &&
	    should_log((listener * DROP_REASONS + reason) * 2 + copy, now, pkt, &suppressed))
		flags |= EVENT_LOGGED;
	if (!flags)
		return 0;
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event) {
		__sync_fetch_and_add(&trace.lost, 1);
		return 0;
	}
	event->time = now;
	event->suppressed = suppressed;
	event->listener = listener;
	event->reason = reason;
	event->kind = kind;
	event->flags = flags;
	fill_event(event, skb, pkt, dst, to);
	bpf_ringbuf_submit(event, 0);
	return 0;
}

/* Reports a drop to the log and to a trace. `to` is NULL if no downstream had been chosen. */
static __always_inline void trace_drop(struct __sk_buff *skb, const struct packet *pkt,
				       const struct listener_key *dst, const struct downstream *to,
				       __u64 listener, enum event_kind kind,
				       enum drop_reason reason)
{
	if (has_events)
		emit_event(skb, pkt, dst, to, listener << 32 | kind << 8 | reason);
}

/* Reports an event to a trace. */
static __always_inline void trace_event(struct __sk_buff *skb, const struct packet *pkt,
					const struct listener_key *dst, const struct downstream *to,
					__u64 listener, enum event_kind kind)
{
	if (has_events && trace.on)
		emit_event(skb, pkt, dst, to, listener << 32 | kind << 8);
}

#endif

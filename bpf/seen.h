/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * While the program moves from one hook of an interface to another it hangs on both, TCX first, and must not take for a
 * new datagram what it has left to the stack a moment ago. The control buffer lasts from hook to hook, and no longer.
 */
#ifndef FANOUT_SEEN_H
#define FANOUT_SEEN_H

#define SEEN_FIRST_WORD 0x5a17fa0d
#define SEEN_SECOND_WORD 0xc3d20e91

static __always_inline bool was_seen(const struct __sk_buff *skb)
{
	return skb->cb[0] == SEEN_FIRST_WORD && skb->cb[1] == SEEN_SECOND_WORD;
}

static __always_inline int seen(struct __sk_buff *skb, int verdict)
{
	if (verdict == TC_ACT_UNSPEC) {
		skb->cb[0] = SEEN_FIRST_WORD;
		skb->cb[1] = SEEN_SECOND_WORD;
	}
	return verdict;
}

#endif

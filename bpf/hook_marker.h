/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * While the program moves between the TCX and clsact hooks of an interface it is attached to both,
 * TCX first. The marker keeps the second from handling a datagram that the first has just passed.
 * It is in the control buffer, which is valid from hook to hook only.
 */
#ifndef FANOUT_HOOK_MARKER_H
#define FANOUT_HOOK_MARKER_H

#include "base.h"

#define HOOK_MARKER_WORD0 0x5a17fa0d
#define HOOK_MARKER_WORD1 0xc3d20e91

static __always_inline bool already_processed(const struct __sk_buff *skb)
{
	return skb->cb[0] == HOOK_MARKER_WORD0 && skb->cb[1] == HOOK_MARKER_WORD1;
}

static __always_inline int mark_processed(struct __sk_buff *skb, int verdict)
{
	if (verdict == TC_ACT_UNSPEC) {
		skb->cb[0] = HOOK_MARKER_WORD0;
		skb->cb[1] = HOOK_MARKER_WORD1;
	}
	return verdict;
}

#endif

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * While the program moves from one hook of an interface to another it hangs on both, TCX first, and must not take for a
 * new datagram what it has left to the stack a moment ago. The control buffer lasts from hook to hook, and no longer.
 */
#ifndef FANOUT_HOOK_MARKER_H
#define FANOUT_HOOK_MARKER_H

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

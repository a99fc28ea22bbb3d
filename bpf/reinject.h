/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Clones that replicate.h sends into the ingress once more, and how the program recognises them. */
#ifndef FANOUT_REINJECT_H
#define FANOUT_REINJECT_H

#include "base.h"
#include "skb.h"

/* skb->mark of a reinjected clone: this value in the upper byte, the downstream's id below. */
#define REINJECT_MARK 0xfa000000
#define REINJECT_MASK 0xff000000

static __always_inline bool is_reinjected(struct __sk_buff *skb)
{
	return (CTX_FIELD(__u32, skb, mark) & REINJECT_MASK) == REINJECT_MARK;
}

#endif

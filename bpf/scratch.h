/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* This CPU's scratch memory, which holds the packet that the program is processing. */
#ifndef FANOUT_SCRATCH_H
#define FANOUT_SCRATCH_H

#include "base.h"
#include "maps.h"
#include "packet.h"

static __always_inline struct scratch *current_scratch(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratch_buf, &zero);
}

/*
 * The packet lives in a map instead of on the stack. On Linux 5.10, functions that the verifier
 * checks once rather than at every call may take only numbers, so they fetch the packet here. The
 * verifier also does not track map contents, so it explores fewer states.
 */
static __always_inline struct packet *current_packet(void)
{
	struct scratch *scratch = current_scratch();

	return scratch ? &scratch->pkt : NULL;
}

#endif

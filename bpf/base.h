/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What every other header needs: the kernel's types, libbpf's helpers, and constants that BTF does not carry. */
#ifndef FANOUT_BASE_H
#define FANOUT_BASE_H

#include "vmlinux.h"

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_core_read.h>

#define TC_ACT_UNSPEC (-1)
#define TC_ACT_SHOT 2
#define TC_ACT_REDIRECT 7

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86DD
#define PACKET_HOST 0
#define PACKET_MULTICAST 2
#define AF_INET 2
#define AF_INET6 10

#endif

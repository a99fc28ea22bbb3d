/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Preloaded into the daemon, simulates a kernel older than 5.8: bpf() calls for features that such a kernel lacks fail with the
 * errors of such a kernel. The daemon's own probes detect this.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/bpf.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>

#define TCX_INGRESS 46
#define TCX_EGRESS 47
/* Longer programs are not probes: they call the helper only if a constant says that it exists. */
#define PROBE_INSTRUCTIONS 16

static int is_tcx(uint32_t attach_type)
{
	return attach_type == TCX_INGRESS || attach_type == TCX_EGRESS;
}

/* True for a probe of bpf_redirect_neigh(). Writes the message of an old kernel's verifier into its log. */
static int asks_for_redirect_neigh(const union bpf_attr *attr)
{
	static const char refusal[] = "invalid func unknown#152";
	const struct bpf_insn *instructions = (const struct bpf_insn *)(uintptr_t)attr->insns;

	if (attr->insn_cnt > PROBE_INSTRUCTIONS)
		return 0;
	for (uint32_t i = 0; i < attr->insn_cnt; i++) {
		if (instructions[i].code != (BPF_JMP | BPF_CALL) ||
		    instructions[i].imm != BPF_FUNC_redirect_neigh)
			continue;
		if (attr->log_buf && attr->log_size > sizeof(refusal))
			memcpy((void *)(uintptr_t)attr->log_buf, refusal, sizeof(refusal));
		return 1;
	}
	return 0;
}

static int is_unknown(long command, const union bpf_attr *attr)
{
	switch (command) {
	case BPF_PROG_LOAD:
		return asks_for_redirect_neigh(attr);
	case BPF_MAP_CREATE:
		return attr->map_type == BPF_MAP_TYPE_RINGBUF;
	case BPF_PROG_QUERY:
		return is_tcx(attr->query.attach_type);
	case BPF_LINK_CREATE:
		return is_tcx(attr->link_create.attach_type);
	default:
		return 0;
	}
}

long syscall(long number, ...)
{
	static long (*next)(long, ...);
	long arguments[6];
	va_list list;

	va_start(list, number);
	for (int i = 0; i < 6; i++)
		arguments[i] = va_arg(list, long);
	va_end(list);
	if (number == SYS_bpf && is_unknown(arguments[0], (const union bpf_attr *)arguments[1])) {
		errno = EINVAL;
		return -1;
	}
	if (!next)
		next = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
	return next(number, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4],
		    arguments[5]);
}

// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * For tcpdump inside the container. Debian's tcpdump changes to another user before it reads packets, to limit what a bug
 * in it can do. That needs CAP_SETUID and CAP_SETGID, which the container lacks. It does not need the change: it has four
 * capabilities and a read-only file system. The script `tcpdump` in this directory preloads this library.
 */
#include <grp.h>
#include <sys/types.h>
#include <unistd.h>

int initgroups(const char *user, gid_t group)
{
	(void)user;
	(void)group;
	return 0;
}

int setgid(gid_t group)
{
	(void)group;
	return 0;
}

int setuid(uid_t user)
{
	(void)user;
	return 0;
}

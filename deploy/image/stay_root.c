// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * For tcpdump inside the container. Debian's becomes another user before it reads packets, so that a fault in it finds
 * no privileges; that takes CAP_SETUID and CAP_SETGID, which the container does not have and need not have: with four
 * capabilities and a read-only file system there is little to give up. Loaded by the script `tcpdump` beside this file.
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

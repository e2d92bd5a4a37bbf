// bus.h - what becomes of a process whose mapped file is truncated under it.
#ifndef GGD_BUS_H
#define GGD_BUS_H

#include <stddef.h>

// From now on a read past the end that a mapped file has come to have ends the process with one line and exit code 2; nothing else about
// SIGBUS changes. Not watched where memory is short: the process is then killed, as it would be without.
void ggd_bus_watch(const void *data, size_t bytes, const char *path);
// Before it is unmapped.
void ggd_bus_forget(const void *data);

#endif

// bus.h - what becomes of a process whose mapped file is truncated under it.
#ifndef GGD_BUS_H
#define GGD_BUS_H

#include "ggd.h"  // ggd_bus_watch, ggd_bus_forget

// Nothing else about SIGBUS changes. Not watched where memory is short: the process is then killed, as it would be without.

#endif

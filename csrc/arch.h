// arch.h - what the core has to know about an architecture, one table row each.
#ifndef GGD_ARCH_H
#define GGD_ARCH_H

#include "model.h"

typedef struct {
    const char *name;                   // general.architecture
    const char *linear[GGD_N_TARGETS];  // "blk.%d." + this + ".weight"
    const char *attn_norm, *ffn_norm;
} ggd_arch;

const ggd_arch *ggd_arch_find(const char *name);  // NULL if it is not supported
const char *ggd_arch_names(void);

#endif

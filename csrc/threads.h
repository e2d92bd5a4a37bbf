// threads.h - a fixed pool of workers that run the items of one loop at a time.
//
// Every item writes its own part of the output and computes it in a fixed order, so the result has the same bits for any number of
// threads and any schedule.
#ifndef GGD_THREADS_H
#define GGD_THREADS_H

#include <stddef.h>

typedef struct ggd_threads ggd_threads;

// An item of a loop. `thread` in [0, n_threads) names the scratch memory that the item may use.
typedef void (*ggd_item_fn)(void *context, size_t item, size_t thread);

ggd_threads *ggd_threads_create(size_t n_threads);  // NULL on failure, with the message set
void ggd_threads_free(ggd_threads *threads);
size_t ggd_threads_count(const ggd_threads *threads);

// Runs fn for items 0 .. n_items - 1 on all threads, the caller's included, and returns when all are done. The loop's time is added to
// its part, a string constant.
void ggd_parallel(ggd_threads *threads, const char *part, size_t n_items, ggd_item_fn fn, void *context);

// Seconds in each part's loops since the pool was made or reset. NULL past the last part.
const char *ggd_threads_part(const ggd_threads *threads, size_t index, double *time_s);
void ggd_threads_reset_parts(ggd_threads *threads);

#endif

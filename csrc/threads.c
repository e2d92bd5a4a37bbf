// threads.c - the worker pool of threads.h: items are handed out by an atomic counter; workers spin briefly between loops, because a
// training step starts thousands of short ones, then sleep on a condition variable.
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "error.h"

enum { SPIN_ROUNDS = 20000, MAX_PARTS = 32 };

typedef struct {
    const char *name;
    double time_s;
} part_time;

struct ggd_threads {
    size_t n_threads;
    pthread_t *workers;  // (n_threads - 1)
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    atomic_size_t generation;  // counts loops; a change wakes the workers
    atomic_size_t next_item;
    atomic_size_t n_running;  // workers that have not finished the loop
    atomic_bool stop;
    ggd_item_fn fn;
    void *context;
    size_t n_items;
    part_time parts[MAX_PARTS];  // used by the caller's thread only
};

typedef struct {
    ggd_threads *pool;
    size_t index;
} worker_start;

static inline void cpu_relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void run_items(ggd_threads *pool, size_t thread) {
    for (;;) {
        size_t item = atomic_fetch_add_explicit(&pool->next_item, 1, memory_order_relaxed);
        if (item >= pool->n_items) {
            return;
        }
        pool->fn(pool->context, item, thread);
    }
}

static size_t wait_for_loop(ggd_threads *pool, size_t seen) {
    for (int round = 0; round < SPIN_ROUNDS; round++) {
        size_t generation = atomic_load_explicit(&pool->generation, memory_order_acquire);
        if (generation != seen) {
            return generation;
        }
        cpu_relax();
    }
    pthread_mutex_lock(&pool->mutex);
    while (atomic_load_explicit(&pool->generation, memory_order_acquire) == seen) {
        pthread_cond_wait(&pool->wake, &pool->mutex);
    }
    size_t generation = atomic_load_explicit(&pool->generation, memory_order_acquire);
    pthread_mutex_unlock(&pool->mutex);
    return generation;
}

static void *worker_main(void *argument) {
    worker_start start = *(worker_start *)argument;
    free(argument);
    size_t seen = 0;
    for (;;) {
        seen = wait_for_loop(start.pool, seen);
        if (atomic_load_explicit(&start.pool->stop, memory_order_acquire)) {
            return NULL;
        }
        run_items(start.pool, start.index);
        atomic_fetch_sub_explicit(&start.pool->n_running, 1, memory_order_release);
    }
}

static void start_loop(ggd_threads *pool) {
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add_explicit(&pool->generation, 1, memory_order_release);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
}

static bool start_worker(ggd_threads *pool, size_t index) {
    worker_start *start = malloc(sizeof *start);
    if (start == NULL) {
        return false;
    }
    *start = (worker_start){pool, index};
    if (pthread_create(&pool->workers[index - 1], NULL, worker_main, start) != 0) {
        free(start);
        return false;
    }
    return true;
}

ggd_threads *ggd_threads_create(size_t n_threads) {
    ggd_threads *pool = calloc(1, sizeof *pool);
    if (pool == NULL) {
        ggd_fail("out of memory for the thread pool");
        return NULL;
    }
    pool->n_threads = 1;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->workers = calloc(n_threads, sizeof *pool->workers);
    for (size_t index = 1; pool->workers != NULL && index < n_threads; index++) {
        if (!start_worker(pool, index)) {
            break;
        }
        pool->n_threads = index + 1;
    }
    if (pool->n_threads != n_threads) {
        ggd_fail("could not start %zu threads", n_threads);
        ggd_threads_free(pool);
        return NULL;
    }
    return pool;
}

void ggd_threads_free(ggd_threads *pool) {
    if (pool == NULL) {
        return;
    }
    atomic_store_explicit(&pool->stop, true, memory_order_release);
    start_loop(pool);
    for (size_t index = 1; index < pool->n_threads; index++) {
        pthread_join(pool->workers[index - 1], NULL);
    }
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->workers);
    free(pool);
}

size_t ggd_threads_count(const ggd_threads *pool) { return pool->n_threads; }

static double now_s(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void add_time(ggd_threads *pool, const char *name, double time_s) {
    for (size_t i = 0; i < MAX_PARTS; i++) {
        if (pool->parts[i].name == NULL || strcmp(pool->parts[i].name, name) == 0) {
            pool->parts[i].name = name;
            pool->parts[i].time_s += time_s;
            return;
        }
    }
}

const char *ggd_threads_part(const ggd_threads *pool, size_t index, double *time_s) {
    if (index >= MAX_PARTS || pool->parts[index].name == NULL) {
        return NULL;
    }
    *time_s = pool->parts[index].time_s;
    return pool->parts[index].name;
}

void ggd_threads_reset_parts(ggd_threads *pool) { memset(pool->parts, 0, sizeof pool->parts); }

static void run_loop(ggd_threads *pool, size_t n_items, ggd_item_fn fn, void *context) {
    if (pool->n_threads == 1 || n_items <= 1) {
        for (size_t item = 0; item < n_items; item++) {
            fn(context, item, 0);
        }
        return;
    }
    pool->fn = fn;
    pool->context = context;
    pool->n_items = n_items;
    atomic_store_explicit(&pool->next_item, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->n_running, pool->n_threads - 1, memory_order_relaxed);
    start_loop(pool);
    run_items(pool, 0);
    for (int round = 0; atomic_load_explicit(&pool->n_running, memory_order_acquire) != 0; round++) {
        if (round < SPIN_ROUNDS) {
            cpu_relax();
        } else {
            sched_yield();
        }
    }
}

void ggd_parallel(ggd_threads *pool, const char *part, size_t n_items, ggd_item_fn fn, void *context) {
    double start_s = now_s();
    run_loop(pool, n_items, fn, context);
    add_time(pool, part, now_s() - start_s);
}

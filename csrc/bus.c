// bus.c - see bus.h. A page behind the end of a file cannot be read: the kernel answers with SIGBUS, on whichever thread reads. There is
// nothing to go on with, so the handler says why and leaves; it calls nothing but what a signal handler may. Source: POSIX mmap,
// "References within the address range starting at pa ... beyond the end of the object shall result in delivery of a SIGBUS signal".
#include "bus.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LINE_SIZE = 1024 };

// Nodes are used again, never freed: the handler may be looking at one.
typedef struct node {
    struct node *next;
    _Atomic(uintptr_t) start, end;  // end 0: free
    char line[LINE_SIZE];
} node;

static _Atomic(node *) maps;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction before;
static int installed;

static void say(const char *text) {
    ssize_t written = write(STDERR_FILENO, text, strlen(text));
    (void)written;
}

static void on_bus(int number, siginfo_t *info, void *context) {
    (void)context;
    uintptr_t at = (uintptr_t)info->si_addr;
    for (const node *map = atomic_load(&maps); map != NULL; map = map->next) {
        if (at < atomic_load(&map->end) && at >= atomic_load(&map->start)) {
            if (isatty(STDERR_FILENO)) {
                say("\r\x1b[2K\x1b[?25h");  // over a progress bar, and with the cursor that it hid
            }
            say(map->line);
            _exit(2);
        }
    }
    sigaction(number, &before, NULL);  // not ours: the instruction runs again, into what was there before
}

static void install(void) {
    struct sigaction action = {.sa_sigaction = on_bus, .sa_flags = SA_SIGINFO};
    sigemptyset(&action.sa_mask);
    installed = sigaction(SIGBUS, &action, &before) == 0;
}

void ggd_bus_watch(const void *data, size_t bytes, const char *path) {
    pthread_mutex_lock(&lock);
    if (!installed) {
        install();
    }
    node *map = atomic_load(&maps);
    while (map != NULL && atomic_load(&map->end) != 0) {
        map = map->next;
    }
    int is_new = map == NULL;
    if (is_new) {
        map = calloc(1, sizeof *map);
    }
    if (map != NULL) {
        snprintf(map->line, sizeof map->line, "error: %.900s: the file was truncated or replaced while it was in use\n", path);
        for (char *letter = map->line; *letter != '\0' && letter[1] != '\0'; letter++) {  // one line, whatever the file's name is
            *letter = (unsigned char)*letter < ' ' || *letter == 0x7f ? '?' : *letter;
        }
        atomic_store(&map->start, (uintptr_t)data);
        atomic_store(&map->end, (uintptr_t)data + bytes);
        if (is_new) {
            map->next = atomic_load(&maps);
            atomic_store(&maps, map);
        }
    }
    pthread_mutex_unlock(&lock);
}

void ggd_bus_forget(const void *data) {
    pthread_mutex_lock(&lock);
    for (node *map = atomic_load(&maps); map != NULL; map = map->next) {
        if (atomic_load(&map->start) == (uintptr_t)data && atomic_load(&map->end) != 0) {
            atomic_store(&map->end, 0);
            break;
        }
    }
    pthread_mutex_unlock(&lock);
}

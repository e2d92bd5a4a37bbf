// faults.c - a library to be preloaded (LD_PRELOAD) that lets the file operations of a process fail, or kills the process in one.
//
// It counts the calls named in GGD_FAULT_CALLS on paths that hold GGD_FAULT_PATH; where it is not set, all that change files. Those that
// only read have to be named: "look" opens a file for reading, "read" reads it. From the one with the
// number GGD_FAULT_AT on (counted from 0) each fails with the error number GGD_FAULT, as a disk that is full or broken does; or the
// process is killed in that one, a write half done, where GGD_FAULT is "kill". GGD_FAULT_LOG names a file to which all counted calls
// are written, a line each. For Linux; compiled by tools/torture.py and by the tests.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static atomic_long count;

static void log_call(const char *call, const char *path) {
    const char *name = getenv("GGD_FAULT_LOG");
    if (name == NULL) {
        return;
    }
    char line[4200];
    int length = snprintf(line, sizeof line, "%s %s\n", call, path);
    long fd = syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_CREAT | O_APPEND, 0644);
    if (fd >= 0) {
        syscall(SYS_write, fd, line, length);
        syscall(SYS_close, fd);
    }
}

static int is_watched(const char *call, const char *path) {
    const char *part = getenv("GGD_FAULT_PATH"), *calls = getenv("GGD_FAULT_CALLS");
    if (part == NULL || path == NULL || strstr(path, part) == NULL) {
        return 0;
    }
    char wanted[64], all[256];
    snprintf(wanted, sizeof wanted, ",%s,", call);
    snprintf(all, sizeof all, ",%s,", calls != NULL ? calls : "");
    int changes = strcmp(call, "look") != 0 && strcmp(call, "read") != 0;
    return calls == NULL ? changes : strstr(all, wanted) != NULL;
}

// 0 = go on; 1 = kill the process now; else the error number that the call fails with.
static int strike(const char *call, const char *path) {
    const char *fault = getenv("GGD_FAULT"), *at = getenv("GGD_FAULT_AT");
    if (!is_watched(call, path)) {
        return 0;
    }
    log_call(call, path);
    long number = atomic_fetch_add(&count, 1);
    if (fault == NULL || at == NULL || number < atol(at)) {
        return 0;
    }
    return strcmp(fault, "kill") == 0 ? 1 : atoi(fault);
}

static _Noreturn void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) {
        pause();
    }
}

static int fails(const char *call, const char *path) {
    int fault = strike(call, path);
    if (fault == 1) {
        die();
    }
    errno = fault != 0 ? fault : errno;
    return fault != 0;
}

static const char *path_of(int fd, char *path, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, size - 1);
    path[length < 0 ? 0 : length] = '\0';
    return path;
}

static int path_at(int folder, const char *name, char *path, size_t size) {
    if (name[0] == '/' || folder == AT_FDCWD) {
        return snprintf(path, size, "%s", name);
    }
    char above[4096];
    return snprintf(path, size, "%s/%s", path_of(folder, above, sizeof above), name);
}

#define OPEN(function)                                                                                                           \
    int function(const char *path, int flags, ...) {                                                                             \
        va_list arguments;                                                                                                       \
        va_start(arguments, flags);                                                                                              \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0;                                             \
        va_end(arguments);                                                                                                       \
        return fails(flags & (O_WRONLY | O_RDWR) ? "open" : "look", path) ? -1 : REAL(function)(path, flags, mode);              \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(function)                                                                                                         \
    int function(int folder, const char *name, int flags, ...) {                                                                 \
        va_list arguments;                                                                                                       \
        va_start(arguments, flags);                                                                                              \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0;                                             \
        va_end(arguments);                                                                                                       \
        char path[8192];                                                                                                         \
        path_at(folder, name, path, sizeof path);                                                                                \
        return fails(flags & (O_WRONLY | O_RDWR) ? "open" : "look", path) ? -1 : REAL(function)(folder, name, flags, mode);      \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t read(int fd, void *bytes, size_t size) {
    char path[4096];
    return fd > 2 && fails("read", path_of(fd, path, sizeof path)) ? -1 : REAL(read)(fd, bytes, size);
}

ssize_t write(int fd, const void *bytes, size_t size) {
    char path[4096];
    int fault = fd > 2 ? strike("write", path_of(fd, path, sizeof path)) : 0;
    if (fault == 1) {
        syscall(SYS_write, fd, bytes, size / 2);
        die();
    }
    if (fault != 0) {
        errno = fault;
        return -1;
    }
    return REAL(write)(fd, bytes, size);
}

ssize_t writev(int fd, const struct iovec *parts, int n_parts) {
    char path[4096];
    return fd > 2 && fails("write", path_of(fd, path, sizeof path)) ? -1 : REAL(writev)(fd, parts, n_parts);
}

#define FLUSH(function)                                                                                                          \
    int function(int fd) {                                                                                                       \
        char path[4096];                                                                                                         \
        return fails("fsync", path_of(fd, path, sizeof path)) ? -1 : REAL(function)(fd);                                         \
    }
FLUSH(fsync)
FLUSH(fdatasync)

int ftruncate(int fd, off_t size) {
    char path[4096];
    return fails("truncate", path_of(fd, path, sizeof path)) ? -1 : REAL(ftruncate)(fd, size);
}

int rename(const char *from, const char *to) { return fails("rename", from) ? -1 : REAL(rename)(from, to); }

int unlink(const char *path) { return fails("unlink", path) ? -1 : REAL(unlink)(path); }

int rmdir(const char *path) { return fails("rmdir", path) ? -1 : REAL(rmdir)(path); }

int mkdir(const char *path, mode_t mode) { return fails("mkdir", path) ? -1 : REAL(mkdir)(path, mode); }

int unlinkat(int folder, const char *name, int flags) {
    char path[8192];
    path_at(folder, name, path, sizeof path);
    return fails(flags & AT_REMOVEDIR ? "rmdir" : "unlink", path) ? -1 : REAL(unlinkat)(folder, name, flags);
}

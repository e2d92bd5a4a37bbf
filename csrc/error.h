// error.h - one message per thread, for the last call that failed on it.
#ifndef GGD_ERROR_H
#define GGD_ERROR_H

// Formats the message and returns -1, so that a function can `return ggd_fail(...)`.
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
int ggd_fail(const char *format, ...);

#endif

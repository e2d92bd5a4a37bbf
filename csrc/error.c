// error.c - see error.h. Never prints, never exits.
#include "error.h"

#include <stdarg.h>
#include <stdio.h>

#include "include/ggd.h"

static _Thread_local char last_error[512];

int ggd_fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return -1;
}

const char *ggd_last_error(void) { return last_error; }

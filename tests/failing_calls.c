// LD_PRELOAD: the n-th call from now of those that write, sync, make or rename fails with `error`.
// gcc -shared -fPIC failing_calls.c -o failing_calls.so
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static long left = -1;  // calls until one fails; negative: none does
static int error_number;
static char last[64];

void fail_in(long calls, int error) { left = calls, error_number = error, last[0] = 0; }
const char *failed(void) { return last; }

static int fails(const char *name) {
  if (left < 0 || left-- > 0) return 0;
  snprintf(last, sizeof last, "%s", name);
  errno = error_number;
  return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(type, name, parameters, arguments) \
  type name parameters { return fails(#name) ? -1 : REAL(name) arguments; }

WRAP(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
WRAP(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
WRAP(int, ftruncate64, (int fd, off64_t size), (fd, size))
WRAP(int, ftruncate, (int fd, off_t size), (fd, size))
WRAP(int, fsync, (int fd), (fd))
WRAP(int, rename, (const char *from, const char *to), (from, to))
WRAP(int, mkdir, (const char *path, mode_t mode), (path, mode))
WRAP(int, chmod, (const char *path, mode_t mode), (path, mode))

static int makes(int flags) { return flags & O_CREAT; }

#define WRAP_OPEN(name, parameters, ...)                       \
  int name parameters {                                        \
    mode_t mode = 0;                                           \
    if (makes(flags)) {                                        \
      va_list list;                                            \
      va_start(list, flags);                                   \
      mode = va_arg(list, mode_t);                             \
      va_end(list);                                            \
      if (fails(#name)) return -1;                             \
    }                                                          \
    return REAL(name)(__VA_ARGS__, mode);                      \
  }

WRAP_OPEN(open, (const char *path, int flags, ...), path, flags)
WRAP_OPEN(open64, (const char *path, int flags, ...), path, flags)
WRAP_OPEN(openat, (int at, const char *path, int flags, ...), at, path, flags)

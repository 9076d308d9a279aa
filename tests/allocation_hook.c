/* Preloaded by test_allocations.py: counts heap allocations made by the code of one shared library.
 *
 * An allocation belongs to the library when the innermost caller that is neither this hook, nor libc, nor
 * libstdc++ (operator new) lies in it. So what BLAS or the OpenMP runtime allocate for themselves is not counted
 * even when the library called them, and neither is what the Python interpreter allocates. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <stddef.h>
#include <string.h>

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);

static const char* watched; /* part of the library's file name */
static long ours, all;
static __thread int inside;

static void note(void) {
  if (!watched || inside) return;
  inside = 1;
  void* frames[16];
  const int depth = backtrace(frames, 16);
  __atomic_add_fetch(&all, 1, __ATOMIC_RELAXED);
  for (int i = 1; i < depth; ++i) {
    Dl_info info;
    if (!dladdr(frames[i], &info) || !info.dli_fname) break;
    if (strstr(info.dli_fname, "allocation_hook") || strstr(info.dli_fname, "libc.so") ||
        strstr(info.dli_fname, "libstdc++")) {
      continue;
    }
    if (strstr(info.dli_fname, watched)) __atomic_add_fetch(&ours, 1, __ATOMIC_RELAXED);
    break;
  }
  inside = 0;
}

void* malloc(size_t size) { return note(), __libc_malloc(size); }
void* calloc(size_t count, size_t size) { return note(), __libc_calloc(count, size); }
void* realloc(void* old, size_t size) { return note(), __libc_realloc(old, size); }
void* memalign(size_t align, size_t size) { return note(), __libc_memalign(align, size); }
void* aligned_alloc(size_t align, size_t size) { return note(), __libc_memalign(align, size); }
int posix_memalign(void** out, size_t align, size_t size) {
  note();
  *out = __libc_memalign(align, size);
  return *out ? 0 : ENOMEM;
}

void allocation_hook_start(const char* library) {
  void* warm[1];
  inside = 1;
  backtrace(warm, 1); /* loads libgcc on first use */
  inside = 0;
  ours = all = 0;
  watched = library;
}

void allocation_hook_stop(long* out) {
  watched = NULL;
  out[0] = ours;
  out[1] = all;
}

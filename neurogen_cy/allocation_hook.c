/* Preloaded (LD_PRELOAD) into a process of its own by allocations.py: counts, between start and stop,
 *
 *   allocations of one native library, and of all other native code (drivers, BLAS, OpenMP);
 *   allocations of the Python interpreter, by its own allocator hooks, which see what its pools hide from malloc;
 *   data of NumPy arrays, by NumPy's handler, which sees what its cache of small arrays hides from malloc;
 *   what that library copies by memcpy.
 *
 * An allocation belongs to the library when the innermost caller that is neither this hook, nor libc, nor
 * libstdc++ (operator new) lies in it. So what BLAS or the OpenMP runtime allocate for themselves is not counted
 * even when the library called them, and neither is what the Python interpreter allocates.
 * No Python or NumPy header is needed: the few structures are written out here. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <link.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);
extern void __libc_free(void*);

/* The order of allocations.py. */
enum { NATIVE, ALL, NATIVE_BYTES, PYTHON, PYTHON_BYTES, ARRAYS, ARRAY_BYTES, COPIES, COPIED_BYTES, COUNTS };

static const char* watched; /* part of the library's file name; null: nothing is counted */
static uintptr_t code_begin, code_end;
static long counts[COUNTS];
static __thread int inside; /* the hook itself, the interpreter's allocator or NumPy's is at work */

static void add(int what, size_t bytes) {
  __atomic_add_fetch(&counts[what], 1, __ATOMIC_RELAXED);
  __atomic_add_fetch(&counts[what + 1], (long)bytes, __ATOMIC_RELAXED);
}

static void note(size_t bytes) {
  if (!watched || inside) return;
  inside = 1;
  void* frames[16];
  const int depth = backtrace(frames, 16);
  __atomic_add_fetch(&counts[ALL], 1, __ATOMIC_RELAXED);
  for (int i = 1; i < depth; ++i) {
    Dl_info info;
    if (!dladdr(frames[i], &info) || !info.dli_fname) break;
    if (strstr(info.dli_fname, "allocation_hook") || strstr(info.dli_fname, "libc.so") ||
        strstr(info.dli_fname, "libstdc++")) {
      continue;
    }
    if (strstr(info.dli_fname, watched)) {
      __atomic_add_fetch(&counts[NATIVE], 1, __ATOMIC_RELAXED);
      __atomic_add_fetch(&counts[NATIVE_BYTES], (long)bytes, __ATOMIC_RELAXED);
    }
    break;
  }
  inside = 0;
}

void* malloc(size_t size) { return note(size), __libc_malloc(size); }
void* calloc(size_t count, size_t size) { return note(count * size), __libc_calloc(count, size); }
void* realloc(void* old, size_t size) { return note(size), __libc_realloc(old, size); }
void* memalign(size_t align, size_t size) { return note(size), __libc_memalign(align, size); }
void* aligned_alloc(size_t align, size_t size) { return note(size), __libc_memalign(align, size); }
int posix_memalign(void** out, size_t align, size_t size) {
  note(size);
  *out = __libc_memalign(align, size);
  return *out ? 0 : ENOMEM;
}

static void* (*libc_memcpy)(void*, const void*, size_t);

__attribute__((constructor)) static void find_memcpy(void) {
  libc_memcpy = (void* (*)(void*, const void*, size_t))dlsym(RTLD_NEXT, "memcpy");
}

void* memcpy(void* restrict to, const void* restrict from, size_t size) {
  const uintptr_t caller = (uintptr_t)__builtin_return_address(0);
  void* out = to;
  if (watched && caller >= code_begin && caller < code_end) add(COPIES, size);
  if (libc_memcpy) return libc_memcpy(to, from, size);
  /* Before the constructor ran: by one instruction, which calls nobody. */
  __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
  return out;
}

/* ---- the interpreter's allocators: PyMemAllocatorEx of the domains RAW, MEM and OBJ ---- */

typedef struct {
  void* ctx;
  void* (*malloc)(void*, size_t);
  void* (*calloc)(void*, size_t, size_t);
  void* (*realloc)(void*, void*, size_t);
  void (*free)(void*, void*);
} Allocator;

enum { DOMAINS = 3 };
static Allocator original[DOMAINS];

/* A large object's memory comes from another domain and from malloc: the outermost call alone counts. */
static int enter(size_t bytes) {
  const int outermost = !inside;
  if (outermost && watched) add(PYTHON, bytes);
  inside = 1;
  return outermost;
}

static void* python_malloc(void* ctx, size_t size) {
  Allocator* to = ctx;
  const int outermost = enter(size);
  void* out = to->malloc(to->ctx, size);
  if (outermost) inside = 0;
  return out;
}
static void* python_calloc(void* ctx, size_t count, size_t size) {
  Allocator* to = ctx;
  const int outermost = enter(count * size);
  void* out = to->calloc(to->ctx, count, size);
  if (outermost) inside = 0;
  return out;
}
static void* python_realloc(void* ctx, void* old, size_t size) {
  Allocator* to = ctx;
  const int outermost = enter(size);
  void* out = to->realloc(to->ctx, old, size);
  if (outermost) inside = 0;
  return out;
}
static void python_free(void* ctx, void* memory) {
  Allocator* to = ctx;
  to->free(to->ctx, memory);
}

/* Called once, with the GIL held. 0: this is no Python that exports its allocators. */
int allocation_hook_python(void) {
  void (*get)(int, Allocator*) = (void (*)(int, Allocator*))dlsym(RTLD_DEFAULT, "PyMem_GetAllocator");
  void (*set)(int, Allocator*) = (void (*)(int, Allocator*))dlsym(RTLD_DEFAULT, "PyMem_SetAllocator");
  if (!get || !set) return 0;
  for (int domain = 0; domain < DOMAINS; ++domain) {
    get(domain, &original[domain]);
    Allocator hook = {&original[domain], python_malloc, python_calloc, python_realloc, python_free};
    set(domain, &hook);
  }
  return 1;
}

/* ---- NumPy's array data: PyDataMem_Handler, which allocations.py hands to NumPy ---- */

static void* array_malloc(void* ctx, size_t size) {
  (void)ctx;
  if (watched) add(ARRAYS, size);
  return __libc_malloc(size);
}
static void* array_calloc(void* ctx, size_t count, size_t size) {
  (void)ctx;
  if (watched) add(ARRAYS, count * size);
  return __libc_calloc(count, size);
}
static void* array_realloc(void* ctx, void* old, size_t size) {
  (void)ctx;
  if (watched) add(ARRAYS, size);
  return __libc_realloc(old, size);
}
static void array_free(void* ctx, void* memory, size_t size) {
  (void)ctx;
  (void)size;
  __libc_free(memory);
}

struct {
  char name[127];
  uint8_t version;
  void* ctx;
  void* (*malloc)(void*, size_t);
  void* (*calloc)(void*, size_t, size_t);
  void* (*realloc)(void*, void*, size_t);
  void (*free)(void*, void*, size_t);
} allocation_hook_arrays = {"neurogen_counting", 1, NULL, array_malloc, array_calloc, array_realloc, array_free};

/* ---- start and stop ---- */

static int find_code(struct dl_phdr_info* info, size_t size, void* name) {
  (void)size;
  if (!info->dlpi_name || !strstr(info->dlpi_name, name)) return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr)* part = &info->dlpi_phdr[i];
    if (part->p_type != PT_LOAD || !(part->p_flags & PF_X)) continue;
    code_begin = info->dlpi_addr + part->p_vaddr;
    code_end = code_begin + part->p_memsz;
  }
  return 1;
}

void allocation_hook_start(const char* library) {
  void* warm[1];
  inside = 1;
  backtrace(warm, 1); /* loads libgcc on first use */
  code_begin = code_end = 0;
  dl_iterate_phdr(find_code, (void*)library);
  inside = 0;
  for (int i = 0; i < COUNTS; ++i) counts[i] = 0;
  watched = library;
}

void allocation_hook_stop(long* out) {
  watched = NULL;
  for (int i = 0; i < COUNTS; ++i) out[i] = counts[i];
}

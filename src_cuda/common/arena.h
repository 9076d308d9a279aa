// One allocation for everything a model or state owns, in host or device memory. The same layout function runs twice:
// first to measure, then to hand out pointers, so the memory plan cannot drift from what is allocated.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)  // what lies between two parts of one allocation shall not be touched either
#include <sanitizer/asan_interface.h>
#define NG_POISON(address, bytes) __asan_poison_memory_region(address, bytes)
#else
#define NG_POISON(address, bytes) ((void)0)
#endif

namespace neurogen {

class Arena {
 public:
  static constexpr size_t kAlign = 256;
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kGap = kAlign;
#else
  static constexpr size_t kGap = 0;
#endif

  // Counts `count` values under `part`; returns memory once allocate() was called, null while measuring.
  template <class T>
  T* take(const char* part, size_t count) {
    const size_t bytes = (count * sizeof(T) + kAlign - 1) / kAlign * kAlign + kGap;
    T* pointer = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    if (owner_) NG_POISON(base_ + used_ + count * sizeof(T), bytes - count * sizeof(T));
    used_ += bytes;
    if (!base_) note(part, bytes);
    return pointer;
  }

  // Ends measuring: the caller's memory, bytes() of it, aligned, is handed out from the start.
  void bind(void* memory) {
    base_ = static_cast<char*>(memory);
    used_ = 0;
  }

  // The same with zeroed host memory of the arena's own.
  void allocate() {
    void* memory = std::calloc(used_ + kAlign, 1);  // calloc: pages that are never touched cost nothing
    if (!memory) throw std::bad_alloc();
    owner_.reset(memory);
    bind(reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory) + kAlign - 1) / kAlign * kAlign));
  }

  size_t bytes() const { return used_; }
  const std::vector<std::pair<std::string, int64_t>>& parts() const { return parts_; }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  void note(const char* part, size_t bytes) {
    for (auto& known : parts_) {
      if (known.first == part) {
        known.second += static_cast<int64_t>(bytes);
        return;
      }
    }
    parts_.emplace_back(part, static_cast<int64_t>(bytes));
  }

  std::unique_ptr<void, Free> owner_;
  char* base_ = nullptr;
  size_t used_ = 0;
  std::vector<std::pair<std::string, int64_t>> parts_;
};

}  // namespace neurogen

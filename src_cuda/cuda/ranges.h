// Names of a call's stages (forward, decoder, backward, optimizer) on the timeline of Nsight Systems and other tools
// that listen to NVTX. Without one a range is a test of a pointer. The range is of the host's launches; the tool shows
// the kernels that they started.
#pragma once

#if __has_include(<nvtx3/nvToolsExt.h>)  // a toolkit may come without
#include <nvtx3/nvToolsExt.h>
#define NG_HAS_NVTX 1
#endif

namespace neurogen::cuda {

class Range {
 public:
#ifdef NG_HAS_NVTX
  explicit Range(const char* name) { nvtxRangePushA(name); }
  ~Range() { nvtxRangePop(); }
#else
  explicit Range(const char*) {}
  ~Range() {}
#endif
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
};

// body() inside a range.
template <class Body>
void in_range(const char* name, Body body) {
  const Range range(name);
  body();
}

}  // namespace neurogen::cuda

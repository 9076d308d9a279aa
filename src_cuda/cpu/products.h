// Products of 32 x 32 blocks: dense ones for errors and embeddings, event-driven ones for spikes, whose work goes
// with the number of spikes (about one in ten). Only for kernels.cpp, like simd.h.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace neurogen::cpu {
namespace {

// Rows held in registers at once: accumulators (rows x kVectors) plus the panel's vectors fit the register file.
constexpr int kRowsHeld = kLanes == 16 ? 8 : kLanes == 8 ? 3 : 1;
constexpr int kDstHeld = kLanes == 16 ? 8 : 2;  // rows of dw held by outer_product

template <int ROWS>
inline __attribute__((always_inline)) void product_rows(const BlockProduct& p, int64_t row, int64_t first,
                                                        int64_t last) {
  const bool add = p.add || first > 0;
  vec acc[ROWS][kVectors];
  float* out = p.out + row * p.ldo;
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) acc[m][c] = add ? load(out + m * p.ldo + c * kLanes) : vec{};
  }
  for (int64_t q = first; q < last; ++q) {
    const float* panel = p.panels + static_cast<int64_t>(p.block[q]) * 1024;
    const float* x = p.x.data + row * p.x.row + p.col[q] * p.x.tile;
    for (int j = 0; j < 32; ++j) {
      vec weight[kVectors];
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) weight[c] = load(panel + j * 32 + c * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m) {
        const float value = x[m * p.x.row + j];
#pragma GCC unroll 8
        for (int c = 0; c < kVectors; ++c) acc[m][c] += weight[c] * value;
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) store(out + m * p.ldo + c * kLanes, acc[m][c]);
  }
}

// Two blocks and 32 rows at a time: 8 KB of weights, 8 KB of input and 4 KB of sums stay in the L1 cache.
void block_product(const BlockProduct& p) {
  constexpr int64_t kRows = 32, kBlocks = 2;
  for (int64_t begin = 0; begin < p.rows; begin += kRows) {
    const int64_t end = begin + kRows < p.rows ? begin + kRows : p.rows;
    for (int64_t first = 0; first < p.k || first == 0; first += kBlocks) {
      const int64_t last = first + kBlocks < p.k ? first + kBlocks : p.k;
      int64_t row = begin;
      for (; row + kRowsHeld <= end; row += kRowsHeld) product_rows<kRowsHeld>(p, row, first, last);
      if constexpr (kRowsHeld > 4) {
        for (; row + 4 <= end; row += 4) product_rows<4>(p, row, first, last);
      }
      for (; row < end; ++row) product_rows<1>(p, row, first, last);
    }
  }
}

inline __attribute__((always_inline)) void outer_rows(const OuterProduct& p, int64_t first, int64_t count, int i0,
                                                      bool add) {
  vec acc[kDstHeld][kVectors];
  float* dw = p.dw + i0 * 32;
#pragma GCC unroll 8
  for (int i = 0; i < kDstHeld; ++i) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) acc[i][c] = add ? load(dw + i * 32 + c * kLanes) : vec{};
  }
  const float* e = p.e + first * 32 + i0;
  const float* x = p.x + first * p.ldx;
  for (int64_t m = 0; m < count; ++m, e += 32, x += p.ldx) {
    vec source[kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) source[c] = load(x + c * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kDstHeld; ++i) {
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) acc[i][c] += source[c] * e[i];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kDstHeld; ++i) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) store(dw + i * 32 + c * kLanes, acc[i][c]);
  }
}

void outer_product(const OuterProduct& p) {
  constexpr int64_t kRows = 128;  // 128 rows of e and x (32 KB) stay in L1 over the passes below
  for (int64_t first = 0; first < p.rows || first == 0; first += kRows) {
    const int64_t count = p.rows - first < kRows ? p.rows - first : kRows;
    for (int i0 = 0; i0 < 32; i0 += kDstHeld) outer_rows(p, first, count, i0, p.add || first > 0);
  }
}

// Tiles of 32 receivers whose sums stay in registers while a row's spikes are walked.
constexpr int kTilesHeld = kLanes == 16 ? 4 : kLanes == 8 ? 2 : 1;

template <int TILES>
inline __attribute__((always_inline)) void spike_tiles(const SpikeProduct& p, int64_t tile) {
  const int64_t tile_stride = p.k * 1024;
  for (int64_t m = 0; m < p.rows; ++m) {
    float* out = p.out.data + m * p.out.row + tile * p.out.tile;
    vec acc[TILES][kVectors];
#pragma GCC unroll 4
    for (int g = 0; g < TILES; ++g) {
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) acc[g][c] = p.add ? load(out + g * p.out.tile + c * kLanes) : vec{};
    }
    for (int64_t q = 0; q < p.k; ++q) {
      const float* x = p.x.data + m * p.x.row + p.col[q] * p.x.tile;
      const float* panel = p.panels + tile * tile_stride + q * 1024;
      for (uint32_t active = nonzero(x); active; active &= active - 1) {
        const int j = __builtin_ctz(active);
        const float value = x[j];
#pragma GCC unroll 4
        for (int g = 0; g < TILES; ++g) {
#pragma GCC unroll 8
          for (int c = 0; c < kVectors; ++c) acc[g][c] += load(panel + g * tile_stride + j * 32 + c * kLanes) * value;
        }
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < TILES; ++g) {
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) store(out + g * p.out.tile + c * kLanes, acc[g][c]);
    }
  }
}

void spike_product(const SpikeProduct& p) {
  int64_t tile = 0;
  for (; tile + kTilesHeld <= p.tiles; tile += kTilesHeld) spike_tiles<kTilesHeld>(p, tile);
  for (; tile < p.tiles; ++tile) spike_tiles<1>(p, tile);
}

void list_spikes(const float* x, int64_t ldx, int64_t rows, SpikeList* list) {
  for (int j = 0; j < 32; ++j) list->count[j] = 0;
  for (int64_t m = 0; m < rows; ++m, x += ldx) {
    for (uint32_t active = nonzero(x); active; active &= active - 1) {
      const int j = __builtin_ctz(active), at = list->count[j]++;
      list->row[j][at] = static_cast<uint8_t>(m);
      list->value[j][at] = x[j];
    }
  }
}

void spike_outer(const SpikeOuter& p) {
  for (int j = 0; j < 32; ++j) {
    const uint8_t* row = p.list->row[j];
    const float* value = p.list->value[j];
    int count = p.list->count[j];
    while (count > 0 && row[count - 1] >= p.rows) --count;
    vec even[kVectors], odd[kVectors];  // two sums: one would wait for its own last product
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      even[c] = load(p.dw + j * 32 + c * kLanes);
      odd[c] = vec{};
    }
    int i = 0;
    for (; i + 2 <= count; i += 2) {
      const float *e0 = p.e + row[i] * 32, *e1 = p.e + row[i + 1] * 32;
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) {
        even[c] += load(e0 + c * kLanes) * value[i];
        odd[c] += load(e1 + c * kLanes) * value[i + 1];
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      if (i < count) even[c] += load(p.e + row[i] * 32 + c * kLanes) * value[i];
      store(p.dw + j * 32 + c * kLanes, even[c] + odd[c]);
    }
  }
}

}  // namespace
}  // namespace neurogen::cpu

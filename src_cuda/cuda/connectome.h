// The connectome as kernels read it: regions, lists of blocks by receiver and by source, and what a block of threads of
// the brain launch owns (connectome.cpp makes them).
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "neurogen/spec.h"

namespace neurogen::cuda {

// What a region looks like to a kernel.
struct RegionView {
  int32_t n, rank, gated;
  int32_t history;                          // K
  int32_t first_tile;                       // number of its first tile among all regions' tiles
  int32_t hears_delayed;                    // a delayed projection ends here
  int64_t stride;                           // values from a panel to the next
  const float *bias, *alpha, *rho, *a, *b;  // [n]
  float* constants;                         // [n/32][5][32] alpha, sqrt(1-alpha^2), rho, (1-rho) a, (1-rho) b
  void *u, *s, *emitted;                    // panels; emitted = s through dropout (s itself without)
  void *d, *g;                              // panels; g only where gated. Forward: drive and G; backward: dg and dd
  void* delta;                              // panels: L, then dE/dI (if anyone reads it); shares d without a gate
  int* spike_count;                         // [n] spikes of this call
  float *dbias, *dbias_part;                // [n], [B, n]
};

// One 32 x 32 block of a sum: block * (32 columns of source), for a warp's rows.
constexpr int kStreamed = 1 << 30;

struct Term {
  const void* source;  // row 0 of a panel
  int32_t block;       // number of the weight block
  int32_t slot;        // brain launch: where in shared memory it may stay, kStreamed = nowhere
  int32_t delay;       // rows of source are read `delay` tokens back; 0 for everything outside the brain launch
  int32_t region;      // source region (delayed terms: its carried spikes)
  int32_t panel;       // of that region
  int32_t reserved;
};

constexpr size_t kNearTermBytes = 16;  // of shared memory: a term as the brain launch keeps it (NearTerm, brain.cuh)

// Terms of consecutive receivers (tiles of 32): receiver i has terms[begin[i] .. begin[i + 1]).
struct TermList {
  Term* terms = nullptr;
  int32_t* begin = nullptr;
};

// Four neighbouring receivers that hear the same sources in the same order. The first one's terms are [begin, begin +
// terms), the others' the three times as many that follow.
constexpr int kQuartet = 4;
struct Quartet {
  int32_t receiver, begin, terms;
};

// A list for batched_product.cuh, which receivers are worked on in quartets, and which alone; both in order.
struct ProductList : TermList {
  Quartet* quartets = nullptr;
  int32_t* soloists = nullptr;
  std::vector<int32_t> quartets_before;  // [receivers + 1], on the host
};

// Tile of 32 neurons; tiles are numbered in order of level.
struct TileName {
  int32_t region, offset;  // neurons offset .. offset + 31 of the region
};

// The same for the brain launch, in the order of shares. Its terms, counted from the share's first: gates
// [terms[0], terms[1]), drives [terms[1], terms[2]), delayed [terms[2], terms[3]).
struct BrainTile {
  void *u, *s, *emitted, *d, *g;  // row 0 of its panels
  const float *constants, *bias;  // [5][32], [32]; both may be in shared memory
  const void* heard[2];           // row 0 of panels of the embedding that it hears by terms of its own, null = none
  int32_t region, offset, rank, gated;
  int32_t terms[4];
  int32_t reach, reserved;  // the longest delay of its terms
};

// What one block of threads of the brain launch owns.
struct Share {
  int32_t tile_begin, tiles, term_begin, terms, resident_begin, residents;
};

// The brain launch's tables on the device, and what bounds a share's part of them.
struct BrainPlan {
  bool usable = false;
  BrainTile* tiles = nullptr;  // share by share
  Term* terms = nullptr;
  Share* shares = nullptr;
  int32_t* resident = nullptr;  // blocks that stay in shared memory
  int most_tiles = 0, most_slots = 0;
  int64_t most_terms = 0;
  size_t table_bytes = 0;
  bool near = false;  // constants of neurons are in the tables
  // Whether its tiles fit the launches with weights in registers: of few streams, and then the blocks of a share that
  // are not in registers, at most; of many.
  bool in_registers = false, wide = false;
  int most_near = 0;
  std::vector<std::pair<size_t, int>> wide_shares;  // of each: bytes of shared memory but for v and w; tiles
};

// What the gradients of blocks are made of, see multiply_errors_kernel: panels of sources and of errors.
struct GroupPanel {
  const void* row0;
  int32_t delay;          // of errors: tokens from a source's row to theirs
  int32_t region, panel;  // of sources: their carried spikes, where some block is delayed; region -1: the embedding
};

// Blocks whose gradients a block of threads computes, and all panels that they need: those of sources first.
constexpr int kGroupBlocks = 26, kGroupPanels = 28, kGroupsAtOnce = 2;  // kGroupsAtOnce: of a multiprocessor
struct GroupBlock {
  int32_t block;
  int16_t source, error;  // panels of the group
};
struct BlockGroup {
  int32_t sources, panels, blocks, longest_delay;
  GroupPanel panel[kGroupPanels];
  GroupBlock block[kGroupBlocks];
};

// A block to be put into a group.
struct LearntBlock {
  GroupPanel source, error;
  int32_t block;
};

// Groups of up to `most` blocks that have few panels (block_groups.cpp).
std::vector<BlockGroup> group_blocks(const std::vector<LearntBlock>& blocks, int most);

// That makes no more groups than these.
constexpr int kLeastGroup = 5;
constexpr int64_t most_groups(int64_t blocks) { return blocks / kLeastGroup + 2; }

// Neighbouring blocks of a dense projection, whose gradients are computed together: up to kRectangleRows x
// kRectangleColumns of them.
constexpr int kRectangleRows = 4, kRectangleColumns = 8;
struct Rectangle {
  const void *error, *source;    // row 0 of the first panel of each
  int32_t region, panel;         // where carried spikes of the first source panel are, where delay > 0
  int32_t delay, rows, columns;  // of blocks
  int32_t block, row_blocks;     // number of the first block; from a row of blocks to the next
};

}  // namespace neurogen::cuda

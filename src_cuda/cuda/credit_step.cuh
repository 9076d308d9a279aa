// What a token of a walk with credit computes (credit.cuh, bulk_credit.cuh): the learning signal L of eight streams of
// a tile, as a product left it, becomes their errors. In the layout of block_product.cuh: a lane has four neighbouring
// neurons of two streams (or of one: Columns). Both kernels compute a cell here, so that their bits are the same.
#pragma once

#include "adjoint.cuh"
#include "block_product.cuh"
#include "dropout.cuh"

namespace neurogen::cuda {

constexpr int kCreditTerms = 12;      // of a tile, at most
constexpr int kCreditReserve = 2048;  // bytes of shared memory of a block of threads that are not its blocks and rings
constexpr int kBlockPieces = kBlockArea * sizeof(bf16) / sizeof(uint4);

struct Credit {
  Scan scan;
  TermList list;
  const bf16* weights;  // transposed blocks
  Dropout dropout;
  int room;  // terms of a tile of this level, at most
  int own;   // slots of a token in the ring that are the tile's own: u, and d and g where a region is gated
};

// Of a tile's neurons: RegionView::constants, alpha - 1 and the rate term. Loaded in fours.
using CreditConstants = float[7][kBlock];

// A warp's work.
__device__ inline void fetch_constants(CreditConstants& to, const Scan& p, const RegionView& region, int offset) {
  const int lane = threadIdx.x % 32;
  for (int k = 0; k < 5; ++k) to[k][lane] = region.constants[offset * 5 + k * kBlock + lane];
  to[5][lane] = to[0][lane] - 1.0f;
  to[6][lane] = rate_error(p, region, offset + lane);
}

// The tile's blocks into shared memory, by all threads.
__device__ inline void keep_blocks(uint4* to, const Credit& p, int begin, int terms) {
  for (int i = threadIdx.x; i < terms * kKeepParts; i += blockDim.x) {
    const int k = i / kKeepParts;
    const uint4* block =
        reinterpret_cast<const uint4*>(p.weights) + int64_t{p.list.terms[begin + k].block} * kBlockPieces;
    keep_block(to + k * kBlockPieces, block, i % kKeepParts);
  }
}

__device__ inline void spread(float4 x, float (&out)[4]) { out[0] = x.x, out[1] = x.y, out[2] = x.z, out[3] = x.w; }

// x of this lane, in a register: what comes out of a shuffle is not computed again wherever it is used.
template <class T>
__device__ inline T held(T x) {
  return __shfl_sync(0xffffffffu, x, threadIdx.x % 32);
}
// Pointers, known to point into global or shared memory as before.
template <class T>
__device__ inline T* held_global(T* x) {
  return static_cast<T*>(__cvta_global_to_generic(held(__cvta_generic_to_global(x))));
}
template <class T>
__device__ inline T* held_shared(T* x) {
  return static_cast<T*>(__cvta_shared_to_generic(held(static_cast<unsigned>(__cvta_generic_to_shared(x)))));
}

// What dropout silenced gets no credit. stream[c]: those of the lane.
template <int Columns>
__device__ inline void silence(Sums& signal, const Dropout& dropout, int region, int neuron, int token,
                               const int (&stream)[Columns]) {
  float (&x)[4][2] = signal.x;
#pragma unroll
  for (int c = 0; c < Columns; ++c) {
    const float4 mask = dropout_mask(dropout, region, neuron, token, stream[c]);
    x[0][c] *= mask.x, x[1][c] *= mask.y, x[2][c] *= mask.z, x[3][c] *= mask.w;
  }
}

// What a lane carries from token to token.
template <int Columns>
struct CreditCells {
  float lv[Columns][4], lw[Columns][4], dbias[Columns][4];
};

enum OwnSlot { kMembrane, kDrive, kGate };

// Row 0 of the tile's panels; gated: it has d and g; keep_delta: somebody reads dE/dI.
struct OwnPanels {
  bf16 *u, *delta, *d, *g;
  int gated, keep_delta;
};

__device__ inline OwnPanels own_panels(const RegionView& region, int offset) {
  const int64_t panel = offset / kBlock * region.stride;
  return {held_global(in_global<bf16>(region.u) + panel),
          held_global(in_global<bf16>(region.delta) + panel),
          held_global(in_global<bf16>(region.d) + panel),
          held_global(in_global<bf16>(region.g) + panel),
          region.gated,
          !region.gated || region.hears_delayed};
}

// One token. stored(slot, c, values) gives what the forward pass left, store(to, c, values) takes the errors: dE/dI to
// delta, dE/dd where the gate was, dE/dg where the drive was. constants: those of the lane's first neuron. cut[c]:
// nothing flows to the token before.
template <bool Resets, int Columns, class Stored, class Store>
__device__ inline void step_cells(const Scan& p, const float* constants, const OwnPanels& own, const Sums& signal,
                                  const bool (&cut)[Columns], CreditCells<Columns>& cells, Stored stored, Store store) {
  float constant[7][4], errors[Columns][4];
#pragma unroll
  for (int k = 0; k < 7; ++k) spread(load4(constants + k * kBlock), constant[k]);
#pragma unroll
  for (int c = 0; c < Columns; ++c) {
    float (&lv)[4] = cells.lv[c], (&lw)[4] = cells.lw[c];
    float membrane[4];
    stored(kMembrane, c, membrane);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const OwnPart part = own_part(p, membrane[j], signal.x[j][c], constant[6][j], constant[3][j], constant[4][j]);
      step_back(part, constant[0][j], constant[5][j], constant[2][j], lv[j], lw[j]);
      errors[c][j] = constant[1][j] * lv[j];
      if (Resets && cut[c]) lv[j] = lw[j] = 0.0f;
    }
  }
  if (own.keep_delta) {
#pragma unroll
    for (int c = 0; c < Columns; ++c) store(own.delta, c, errors[c]);
  }
  if (own.gated) {
#pragma unroll
    for (int c = 0; c < Columns; ++c) {
      float drive[4], gate[4], gate_errors[4];
      stored(kDrive, c, drive);
      stored(kGate, c, gate);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        errors[c][j] *= gate[j];
        gate_errors[j] = gate_error(errors[c][j], drive[j], gate[j]);
      }
      store(own.g, c, errors[c]);
      store(own.d, c, gate_errors);
    }
  }
#pragma unroll
  for (int c = 0; c < Columns; ++c) {
#pragma unroll
    for (int j = 0; j < 4; ++j) cells.dbias[c][j] += errors[c][j];
  }
}

}  // namespace neurogen::cuda

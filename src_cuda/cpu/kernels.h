// The inner loops of the CPU backend, one table of functions per instruction set. kernels.cpp is compiled once
// per set; kernels() picks the best one this machine runs, so one build serves SSE2, AVX2 and AVX-512 machines.
//
// Every function handles one tile of 32 neurons (or one row of values) on the calling thread, and sums in an
// order that depends neither on the number of rows nor on the number of threads: same inputs, same bits.
#pragma once

#include <cstdint>

namespace neurogen::cpu {

// Values of many neurons in many rows: neuron 32*c + j of row m is data[m*row + c*tile + j]. Whole calls are kept
// tile by tile (row = 32, tile = 32*M): a tile's rows are contiguous, and no power-of-two stride fights for the
// same cache sets. State and readout are kept row by row (row = width, tile = 32).
struct Source {
  const float* data;
  int64_t row, tile;
  Source from_row(int64_t m) const { return {data + m * row, row, tile}; }
};
struct Sink {
  float* data;
  int64_t row, tile;
};

// out[m][0:32] (+)= sum over q < k, j < 32 of x[m][32*col[q] + j] * panels[block[q]][j][0:32]
struct BlockProduct {
  float* out;  // [rows, 32], row stride ldo
  int64_t ldo;
  Source x;
  int64_t rows;
  const float* panels;   // blocks of [32, 32]
  const int32_t* block;  // [k]
  const int32_t* col;    // [k]
  int64_t k;
  bool add;  // false: overwrite
};

// dw[i][j] (+)= sum over m of e[m][i] * x[m][j], i, j < 32
struct OuterProduct {
  float* dw;       // [32, 32]
  const float* e;  // [rows, 32]
  const float* x;  // [rows, 32], row stride ldx
  int64_t ldx;
  int64_t rows;
  bool add;
};

// out[m][32*tile + i] (+)= sum over q < k and spikes x[m][32*col[q] + j] != 0 of that spike * panels[tile*k + q][j][i]
// for `tiles` rows of blocks, which all hold the columns `col`.
struct SpikeProduct {
  Sink out;
  Source x;
  int64_t rows;
  const float* panels;
  const int32_t* col;  // [k]
  int64_t k, tiles;
  bool add;
};

// The spikes of 32 sources in at most kListRows rows, source by source, rows ascending.
constexpr int kListRows = 128;
struct SpikeList {
  uint8_t count[32];
  uint8_t row[32][kListRows];
  float value[32][kListRows];
};

// dw[j][i] += sum over the listed rows m < rows of value * e[m][i]. dw: one block, transposed ([src, dst]).
struct SpikeOuter {
  float* dw;
  const float* e;  // [rows, 32]
  int64_t rows;
  const SpikeList* list;
};

// One token of 32 neurons in S streams (equations in forward.cpp).
struct NeuronTick {
  int64_t streams;
  const float *alpha, *rho, *a, *b, *input_gain;  // [32]; input_gain = sqrt(1 - alpha^2)
  float *v, *w;                                   // [S, 32] in place, row stride n
  int64_t n;
  const float* drive;    // d_t, [S, 32]
  const float* gate;     // G_t, [S, 32], or null where the region has no gate
  const float* delayed;  // delayed input, [S, 32]
  float *u, *s;          // out, [S, 32]
  bool graded;
  float max_spike;
};

// The adjoint walk of one tile, t from T-1 down (equations in backward.cpp).
struct AdjointScan {
  int64_t streams, tokens;
  const float *alpha, *rho, *a, *b, *input_gain;  // [32]
  const float* u;                                 // [T, S, 32]
  const float* learning;                          // L, [T, S, 32]
  const float* rate_signal;                       // [32]: c_rate * 2 * (rate - target) / (n * S * T)
  const uint8_t* resets;                          // [T, S] or null
  float* lv;                                      // scratch [S, 32]
  float* lw;                                      // scratch [S, 32]
  float* delta;                                   // out [T, S, 32]
  float* drive;                                   // gated regions: in d, out dg = delta*d*G*(1-G/2); null otherwise
  float* gate;                                    // gated regions: in G, out dd = delta*G; null otherwise
  float* dbias;                                   // [32], += sum of dd
  float surrogate_k;
  bool graded;
  float max_spike;
};

// One row of logits: adds the bias, finds the most probable token, and turns the row into
// scale * (softmax - onehot(target)) when scale is given.
struct SoftmaxRow {
  float* logits;  // [V] in place
  const float* bias;
  int64_t vocab;
  int32_t target;
  float scale;
  bool want_gradient;
  double loss;   // out: cross-entropy, nats
  int32_t best;  // out: most probable token, lowest id on ties
};

struct AdamChunk {
  float *value, *m, *v;
  const float* gradient;
  int64_t count;
  float clip_scale, beta1, beta2, step_size, second_scale, eps, decay;  // see adam in kernels.cpp
};

struct Kernels {
  const char* name;
  void (*block_product)(const BlockProduct&);
  void (*outer_product)(const OuterProduct&);
  void (*spike_product)(const SpikeProduct&);
  void (*list_spikes)(const float* x, int64_t ldx, int64_t rows, SpikeList*);  // x: [rows, 32]
  void (*spike_outer)(const SpikeOuter&);
  void (*neuron_tick)(const NeuronTick&);
  void (*adjoint_scan)(const AdjointScan&);
  void (*softmax_row)(SoftmaxRow&);
  void (*gate_row)(float* g, int64_t count);  // g <- 2*sigmoid(g), in place
  void (*adam)(const AdamChunk&);
  double (*sum_of_squares)(const float*, int64_t count);
};

const Kernels& kernels();

}  // namespace neurogen::cpu

// Inner loops, compiled once per instruction set with NG_ISA naming it (see setup.py and dispatch.cpp).
// No standard containers here: an inline function compiled for AVX-512 must never be linked into other code.
#include "kernels.h"

#include <cmath>

#include "products.h"
#include "simd.h"

namespace neurogen::cpu {
namespace {

// s = H(u) * min(1 + u, largest) graded, H(u) binary.
inline vec spike(vec u, bool graded, vec largest) {
  return u > 0 ? (graded ? min(u + 1.0f, largest) : splat(1.0f)) : vec{};
}

void neuron_tick(const NeuronTick& p) {
  const vec largest = splat(p.max_spike);
  for (int c = 0; c < 32; c += kLanes) {
    const vec alpha = load(p.alpha + c), rho = load(p.rho + c), a = load(p.a + c), b = load(p.b + c);
    const vec gain = load(p.input_gain + c);
    for (int64_t stream = 0; stream < p.streams; ++stream) {
      const int64_t at = stream * 32 + c;
      float *v_at = p.v + stream * p.n + c, *w_at = p.w + stream * p.n + c;
      vec input = load(p.drive + at);
      if (p.gate) input *= load(p.gate + at);
      input += load(p.delayed + at);
      const vec v_old = load(v_at), w_old = load(w_at);
      const vec v = alpha * v_old - (1.0f - alpha) * w_old + gain * input - spike(v_old - 1.0f, p.graded, largest);
      const vec u = v - 1.0f;
      const vec s = spike(u, p.graded, largest);
      store(v_at, v);
      store(w_at, rho * w_old + (1.0f - rho) * (a * v + b * s));
      store(p.u + at, u);
      store(p.s + at, s);
    }
  }
}

void adjoint_scan(const AdjointScan& p) {
  const vec largest = splat(p.max_spike);
  for (int64_t i = 0; i < p.streams * 32; ++i) p.lv[i] = p.lw[i] = 0.0f;
  for (int c = 0; c < 32; c += kLanes) {
    const vec alpha = load(p.alpha + c), rho = load(p.rho + c), a = load(p.a + c), b = load(p.b + c);
    const vec gain = load(p.input_gain + c), rate = load(p.rate_signal + c);
    vec dbias = load(p.dbias + c);
    for (int64_t t = p.tokens - 1; t >= 0; --t) {
      for (int64_t stream = 0; stream < p.streams; ++stream) {
        const int64_t row = t * p.streams + stream, at = row * 32 + c;
        float* lv_at = p.lv + stream * 32 + c;
        float* lw_at = p.lw + stream * 32 + c;
        const vec lv_next = load(lv_at), lw_next = load(lw_at);
        const vec u = load(p.u + at);
        const vec slope = 1.0f + p.surrogate_k * abs(u);
        const vec psi = 1.0f / (slope * slope);
        const vec rises = u > 0 ? (u + 1.0f < largest ? splat(1.0f) : vec{}) : vec{};
        const vec ds_du = p.graded ? psi * min(1.0f + max(u, vec{}), largest) + rises : psi;
        const vec lw = rho * lw_next - (1.0f - alpha) * lv_next;
        const vec ls = load(p.learning + at) + (1.0f - rho) * b * lw;
        const vec lv = alpha * lv_next + (1.0f - rho) * a * lw + ls * ds_du + rate * psi;
        const vec delta = gain * lv;
        store(p.delta + at, delta);
        vec dd = delta;
        if (p.gate) {
          const vec gate = load(p.gate + at);
          dd = delta * gate;
          store(p.drive + at, dd * load(p.drive + at) * (1.0f - 0.5f * gate));
          store(p.gate + at, dd);
        }
        dbias += dd;
        // A reset cleared v and w before this token: nothing flows to the token before it.
        const bool cut = p.resets && p.resets[row];
        store(lv_at, cut ? vec{} : lv);
        store(lw_at, cut ? vec{} : lw);
      }
    }
    store(p.dbias + c, dbias);
  }
}

// Calls body(offset, lanes in use) over `count` values.
template <class Body>
inline void for_lanes(int64_t count, Body body) {
  for (int64_t i = 0; i < count; i += kLanes) body(i, count - i < kLanes ? static_cast<int>(count - i) : kLanes);
}

inline vec load_some(const float* p, int lanes, float rest) {
  if (lanes == kLanes) return load(p);
  vec x = splat(rest);
  for (int i = 0; i < lanes; ++i) x[i] = p[i];
  return x;
}

inline void store_some(float* p, vec x, int lanes) {
  if (lanes == kLanes) return store(p, x);
  for (int i = 0; i < lanes; ++i) p[i] = x[i];
}

void softmax_row(SoftmaxRow& p) {
  const float lowest = -INFINITY;
  vec top = splat(lowest);
  for_lanes(p.vocab, [&](int64_t i, int lanes) {
    const vec x = load_some(p.logits + i, lanes, lowest) + load_some(p.bias + i, lanes, 0.0f);
    store_some(p.logits + i, x, lanes);
    top = max(top, x);
  });
  float largest = lowest;
  for (int i = 0; i < kLanes; ++i) largest = top[i] > largest ? top[i] : largest;
  p.best = 0;
  while (p.best < p.vocab - 1 && p.logits[p.best] != largest) ++p.best;
  // Two-level sum: at most 64 vectors in one float accumulator, the rest in double.
  const float target_logit = p.logits[p.target];
  double total = 0;
  for (int64_t first = 0; first < p.vocab; first += 64 * kLanes) {
    vec partial = {};
    const int64_t count = p.vocab - first < 64 * kLanes ? p.vocab - first : 64 * kLanes;
    for_lanes(count, [&](int64_t i, int lanes) {
      const vec x = exp(load_some(p.logits + first + i, lanes, lowest) - largest);
      if (p.want_gradient) store_some(p.logits + first + i, x, lanes);
      if (lanes == kLanes) {
        partial += x;
      } else {
        for (int lane = 0; lane < lanes; ++lane) total += static_cast<double>(x[lane]);
      }
    });
    total += static_cast<double>(sum(partial));
  }
  p.loss = std::log(total) + static_cast<double>(largest) - static_cast<double>(target_logit);
  if (!p.want_gradient) return;
  const float scale = static_cast<float>(p.scale / total);
  for_lanes(p.vocab, [&](int64_t i, int lanes) {
    store_some(p.logits + i, load_some(p.logits + i, lanes, 0.0f) * scale, lanes);
  });
  p.logits[p.target] -= p.scale;
}

void gate_row(float* g, int64_t count) {
  for_lanes(count, [&](int64_t i, int lanes) {
    store_some(g + i, 2.0f / (1.0f + exp(-load_some(g + i, lanes, 0.0f))), lanes);
  });
}

inline vec square_root(vec x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

// m <- beta1 m + (1-beta1) g, v <- beta2 v + (1-beta2) g^2, value <- decay value - step_size m / (sqrt(v c) + eps)
// with g already clipped, decay = 1 - lr*weight_decay, step_size = lr/(1-beta1^t), c = second_scale = 1/(1-beta2^t).
void adam(const AdamChunk& p) {
  for_lanes(p.count, [&](int64_t i, int lanes) {
    const vec g = load_some(p.gradient + i, lanes, 0.0f) * p.clip_scale;
    const vec m = p.beta1 * load_some(p.m + i, lanes, 0.0f) + (1.0f - p.beta1) * g;
    const vec v = p.beta2 * load_some(p.v + i, lanes, 0.0f) + (1.0f - p.beta2) * g * g;
    const vec value = load_some(p.value + i, lanes, 0.0f);
    store_some(p.m + i, m, lanes);
    store_some(p.v + i, v, lanes);
    store_some(p.value + i, p.decay * value - p.step_size * m / (square_root(v * p.second_scale) + p.eps), lanes);
  });
}

double sum_of_squares(const float* x, int64_t count) {
  double total = 0;
  for (int64_t first = 0; first < count; first += 64 * kLanes) {
    const int64_t size = count - first < 64 * kLanes ? count - first : 64 * kLanes;
    vec partial = {};
    for_lanes(size, [&](int64_t i, int lanes) {
      const vec v = load_some(x + first + i, lanes, 0.0f);
      partial += v * v;
    });
    total += static_cast<double>(sum(partial));
  }
  return total;
}

}  // namespace

#define NG_TABLE_NAME(isa) kernels_##isa
#define NG_TABLE(isa) NG_TABLE_NAME(isa)
#define NG_TEXT_OF(isa) #isa
#define NG_TEXT(isa) NG_TEXT_OF(isa)
extern const Kernels NG_TABLE(NG_ISA);
const Kernels NG_TABLE(NG_ISA) = {NG_TEXT(NG_ISA), block_product, outer_product, spike_product,
                                  list_spikes,     spike_outer,   neuron_tick,   adjoint_scan,
                                  softmax_row,     gate_row,      adam,          sum_of_squares};

}  // namespace neurogen::cpu

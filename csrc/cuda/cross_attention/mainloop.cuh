// The main loop of one consumer warpgroup: online softmax(Q K^T) V over the KV blocks of its split.
// The product Q K^T of the next block and P V of the current one are issued together. A warp is held at products with an
// operand in registers until they are nearly done, so the softmax behind them runs under the other warpgroup's products.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/dtype.cuh"
#include "ptx.cuh"
#include "traits.h"
#include "wgmma.cuh"

namespace slowfast::cuda {

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Position in a ring of stages; the phase flips each time round.
template <int kNumStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kNumStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// A warpgroup's accumulators cover 64 rows; a thread holds two of them, lane / 4 and lane / 4 + 8 of its warp's 16.
template <typename Traits>
struct RowState {
  float out[Traits::kHeadDim / 2];
  float max[2] = {-INFINITY, -INFINITY};  // raw scores
  float sum[2] = {0.0f, 0.0f};            // this thread's columns only, until the end
};

// Q as the left operand of Q K^T: fragments of the warpgroup's 64 rows, or the tile in shared memory.
template <typename Traits>
struct QueryOperand {
  static constexpr bool kInRegisters = Traits::kQueryInRegisters;
  static constexpr int kSteps = Traits::kHeadDim / 16;
  uint32_t fragments[kInRegisters ? kSteps : 1][4];
  uint64_t tile;

  __device__ __forceinline__ QueryOperand(const typename Traits::Element* q, int thread) {
    tile = ptx::wgmma_descriptor(q, 0, 1024);
    if constexpr (kInRegisters) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8, vector = step % 4 * 2 + i / 2;
          const auto* span = q + (step / 4 * 64 + row) * Traits::kSpan;
          const auto* pair = span + (vector ^ row % 8) * 8 + thread % 4 * 2;
          fragments[step][i] = *reinterpret_cast<const uint32_t*>(pair);
        }
      }
    }
  }
};

// A warpgroup's share of every KV block, kColumns tokens. It is the whole block where each warpgroup has 64 rows of its own
// (and with kTakeTurns they issue their products in turn, so that one's softmax runs under the other's products), and half
// of it where both hold the same rows.
template <typename Traits, int kColumns, bool kTakeTurns>
struct Mainloop {
  using T = typename Traits::Element;
  using Shared = typename Traits::SharedStorage;
  static constexpr int kBlockN = Traits::kBlockN;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kSteps = kColumns / 16;
  static_assert(kColumns % 16 == 0);
  using Scores = float[kColumns / 2];
  using Probs = uint32_t[kSteps][4];

  // `k` and `v` are the first row of the warpgroup's share in the first column block of a tile.
  static __device__ __forceinline__ void issue_qk(Scores& scores, const QueryOperand<Traits>& q, const T* k) {
    ptx::wgmma_fence();
    const uint64_t tile = ptx::wgmma_descriptor(k, 0, 1024);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int span = step / 4, column = step % 4;  // 16 columns are 32 bytes of a 128-byte row
      const uint64_t b = tile + ((span * kBlockN * 128 + column * 32) >> 4);
      if constexpr (Traits::kQueryInRegisters) {
        ptx::wgmma_rs<T, kColumns, 0>(scores, q.fragments[step], b, step != 0);
      } else {
        ptx::wgmma_ss<T, kColumns>(scores, q.tile + ((span * 64 * 128 + column * 32) >> 4), b, step != 0);
      }
    }
    ptx::wgmma_commit();
  }

  template <typename Hook>
  static __device__ __forceinline__ void issue_pv(RowState<Traits>& rows, const Probs& probs, const T* v,
                                                  const Hook& before_last_step) {
    ptx::wgmma_fence_operand(rows.out);
    ptx::wgmma_fence();
    const uint64_t b = ptx::wgmma_descriptor(v, kBlockN * 128, 1024);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step == kSteps - 1) before_last_step();
      ptx::wgmma_rs<T, kHeadDim, 1>(rows.out, probs[step], b + ((step * 16 * 128) >> 4), 1);
    }
    ptx::wgmma_commit();
  }

  // Scores become probabilities in place; alpha is what earlier sums and outputs must be scaled by.
  static __device__ __forceinline__ void softmax(Scores& scores, RowState<Traits>& rows, float (&alpha)[2],
                                                 float scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float peak = rows.max[r];
#pragma unroll
      for (int i = 0; i < kColumns / 8; ++i) {
        peak = fmaxf(peak, fmaxf(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]));
      }
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
      // A part of a block may have no token of the sequence at all; a whole block has one.
      const float base = kColumns < kBlockN && peak == -INFINITY ? 0.0f : peak;
      alpha[r] = exp2_approx((rows.max[r] - base) * scale_log2);
      rows.max[r] = peak;
      const float offset = base * scale_log2;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kColumns / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = scores[4 * i + 2 * r + j];
          x = exp2_approx(fmaf(x, scale_log2, -offset));
          sum += x;
        }
      }
      rows.sum[r] = rows.sum[r] * alpha[r] + sum;
    }
  }

  // The accumulator layout of S is the operand layout of P: no shuffle.
  static __device__ __forceinline__ void pack(const Scores& scores, Probs& probs) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) probs[step][i] = pack2<T>(scores[8 * step + 2 * i], scores[8 * step + 2 * i + 1]);
    }
  }

  static __device__ __forceinline__ void mask(Scores& scores, int valid, int lane) {
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (8 * i + 2 * (lane % 4) + (j & 1) >= valid) scores[4 * i + j] = -INFINITY;
      }
    }
  }

  // Rows of V past the sequence belong to the next video and may hold Inf: 0 * Inf is NaN, so they become 0.
  static __device__ __forceinline__ void clear_rows(T* v, int valid, int thread) {
    constexpr int kVectors = kHeadDim / 8;
    for (int i = thread; i < (kColumns - valid) * kVectors; i += 128) {
      const int row = valid + i / kVectors, vector = i % kVectors;
      T* span = v + (vector / 8) * kBlockN * Traits::kSpan;
      *reinterpret_cast<uint4*>(span + row * Traits::kSpan + (vector % 8) * 8) = make_uint4(0, 0, 0, 0);
    }
    ptx::fence_proxy_async();
  }

  // The share begins at `first_column` of a block. `last_valid` tokens of the first block are the sequence's.
  // `under_last_pv` runs when Q is no longer read.
  template <typename Hook>
  static __device__ __forceinline__ void run(Shared& shared, RowState<Traits>& rows, int warpgroup, int thread,
                                             int num_blocks, int first_column, int last_valid, float scale_log2,
                                             const Hook& under_last_pv) {
    const int valid = min(max(last_valid - first_column, 0), kColumns), share = first_column * Traits::kSpan;
    const QueryOperand<Traits> q(shared.q + warpgroup * 64 * kHeadDim, thread);
    Ring<Traits::kNumStages> k_ring, v_ring;
    Scores scores;
    Probs probs;
    float alpha[2];
    constexpr int kTurnBarrier = 4;  // and 5
    const auto wait_v = [&] {
      if (!Traits::kLoadsTogether) ptx::mbarrier_wait(&shared.v_full[v_ring.stage], v_ring.phase);
    };
    const auto release = [&](uint64_t* empty) {
      if (thread == 0) ptx::mbarrier_arrive(empty);
    };
    const auto wait_turn = [&] {
      if (kTakeTurns) ptx::named_barrier_sync(kTurnBarrier + warpgroup, 256);
    };
    const auto pass_turn = [&] {
      if (kTakeTurns) ptx::named_barrier_arrive(kTurnBarrier + 1 - warpgroup, 256);
    };
    const auto no_hook = [] {};

#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) rows.out[i] = 0.0f;
    if (num_blocks == 0) return under_last_pv();
    if (warpgroup == 1 && num_blocks > 1) pass_turn();

    ptx::mbarrier_wait(&shared.k_full[k_ring.stage], 0);
    issue_qk(scores, q, shared.kv[k_ring.stage].k + share);
    ptx::wgmma_wait<0>();
    ptx::wgmma_fence_operand(scores);
    if (!Traits::kLoadsTogether) release(&shared.k_empty[k_ring.stage]);
    k_ring.advance();
    if (valid < kColumns) mask(scores, valid, thread % 32);
    softmax(scores, rows, alpha, scale_log2);
    pack(scores, probs);
    if (valid < kColumns) {
      wait_v();
      clear_rows(shared.kv[0].v + share, valid, thread);
      ptx::named_barrier_sync(1 + warpgroup, 128);
    }

    for (int block = 1; block < num_blocks; ++block) {
      ptx::mbarrier_wait(&shared.k_full[k_ring.stage], k_ring.phase);
      wait_turn();
      issue_qk(scores, q, shared.kv[k_ring.stage].k + share);
      wait_v();
      // The turn passes one step early, so that the other's first product is there when this one's last ends.
      issue_pv(rows, probs, shared.kv[v_ring.stage].v + share, [&] {
        if (warpgroup == 0 || block + 1 < num_blocks) pass_turn();
      });
      ptx::wgmma_wait<1>();
      ptx::wgmma_fence_operand(scores);
      if (!Traits::kLoadsTogether) release(&shared.k_empty[k_ring.stage]);
      k_ring.advance();
      softmax(scores, rows, alpha, scale_log2);
      ptx::wgmma_wait<0>();
      ptx::wgmma_fence_operand(rows.out);
      release(Traits::kLoadsTogether ? &shared.k_empty[v_ring.stage] : &shared.v_empty[v_ring.stage]);
      v_ring.advance();
      pack(scores, probs);
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) rows.out[i] *= alpha[(i / 2) % 2];
    }

    wait_v();
    issue_pv(rows, probs, shared.kv[v_ring.stage].v + share, no_hook);
    under_last_pv();
    ptx::wgmma_wait<0>();
    ptx::wgmma_fence_operand(rows.out);
  }
};

}  // namespace slowfast::cuda

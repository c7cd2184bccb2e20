// The main loop of one consumer warpgroup: online softmax(Q K^T) V over the KV blocks of its split.
// The product Q K^T of the next block and P V of the current one are in flight together while neither is waited for;
// softmax of the next block may then run under P V (but ptxas moves the wait for P V ahead of it: bench/NOTES.md, 12) and,
// with two warpgroups, runs under the other one's products.
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

// A warpgroup's share of every KV block: kColumns tokens from kFirstColumn on. It is the whole block where each warpgroup
// has 64 rows of its own (and with kTakeTurns they issue their products in turn, so that one's softmax runs under the
// other's products), and a part of it where both hold the same rows.
template <typename Traits, int kColumns, int kFirstColumn, bool kTakeTurns>
struct Mainloop {
  using T = typename Traits::Element;
  using Shared = typename Traits::SharedStorage;
  static constexpr int kBlockN = Traits::kBlockN;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kSteps = kColumns / 16;
  static constexpr int kOffset = kFirstColumn * Traits::kSpan;  // elements, in a column block of a tile
  static_assert(kColumns % 16 == 0 && kFirstColumn % 8 == 0);
  using Scores = float[kColumns / 2];
  using Probs = uint32_t[kSteps][4];

  static __device__ __forceinline__ void issue_qk(Scores& scores, const T* q, const T* k) {
    ptx::wgmma_fence();
    const uint64_t a = ptx::wgmma_descriptor(q, 0, 1024);
    const uint64_t b = ptx::wgmma_descriptor(k + kOffset, 0, 1024);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int span = step / 4, column = step % 4;  // 16 columns are 32 bytes of a 128-byte row
      ptx::wgmma_ss<T, kColumns>(scores, a + ((span * 64 * 128 + column * 32) >> 4),
                                 b + ((span * kBlockN * 128 + column * 32) >> 4), step != 0);
    }
    ptx::wgmma_commit();
  }

  static __device__ __forceinline__ void issue_pv(RowState<Traits>& rows, const Probs& probs, const T* v) {
    ptx::wgmma_fence_operand(rows.out);
    ptx::wgmma_fence();
    const uint64_t b = ptx::wgmma_descriptor(v + kOffset, kBlockN * 128, 1024);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      ptx::wgmma_rs<T, kHeadDim>(rows.out, probs[step], b + ((step * 16 * 128) >> 4), 1);
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
      const int row = kFirstColumn + valid + i / kVectors, vector = i % kVectors;
      T* span = v + (vector / 8) * kBlockN * Traits::kSpan;
      *reinterpret_cast<uint4*>(span + row * Traits::kSpan + (vector % 8) * 8) = make_uint4(0, 0, 0, 0);
    }
    ptx::fence_proxy_async();
  }

  // `last_valid` tokens of the first block are the sequence's. `before_last_pv` runs when Q is no longer read.
  template <typename Hook>
  static __device__ __forceinline__ void run(Shared& shared, RowState<Traits>& rows, int warpgroup, int thread,
                                             int num_blocks, int last_valid, float scale_log2,
                                             const Hook& before_last_pv) {
    const T* q = shared.q + warpgroup * 64 * kHeadDim;
    const int valid = min(max(last_valid - kFirstColumn, 0), kColumns);
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

#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) rows.out[i] = 0.0f;
    if (num_blocks == 0) return before_last_pv();
    if (warpgroup == 1 && num_blocks > 1) pass_turn();

    ptx::mbarrier_wait(&shared.k_full[k_ring.stage], 0);
    issue_qk(scores, q, shared.kv[k_ring.stage].k);
    ptx::wgmma_wait<0>();
    ptx::wgmma_fence_operand(scores);
    if (!Traits::kLoadsTogether) release(&shared.k_empty[k_ring.stage]);
    k_ring.advance();
    if (valid < kColumns) mask(scores, valid, thread % 32);
    softmax(scores, rows, alpha, scale_log2);
    pack(scores, probs);
    if (valid < kColumns) {
      wait_v();
      clear_rows(shared.kv[0].v, valid, thread);
      ptx::named_barrier_sync(1 + warpgroup, 128);
    }

    for (int block = 1; block < num_blocks; ++block) {
      ptx::mbarrier_wait(&shared.k_full[k_ring.stage], k_ring.phase);
      wait_turn();
      issue_qk(scores, q, shared.kv[k_ring.stage].k);
      wait_v();
      issue_pv(rows, probs, shared.kv[v_ring.stage].v);
      if (warpgroup == 0 || block + 1 < num_blocks) pass_turn();
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

    before_last_pv();
    wait_v();
    issue_pv(rows, probs, shared.kv[v_ring.stage].v);
    ptx::wgmma_wait<0>();
    ptx::wgmma_fence_operand(rows.out);
  }
};

}  // namespace slowfast::cuda

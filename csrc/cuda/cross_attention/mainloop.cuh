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

// `size` slots from `first` on, used one after another from `start`; the phase flips each time round.
struct Ring {
  int first;
  int size;
  int start;
  int index = start;
  uint32_t phase = 0;

  struct Turn {
    int slot;
    uint32_t phase;
  };
  __device__ __forceinline__ Turn next() {
    const Turn turn = {first + index, phase};
    if (++index == size) index = 0;
    if (index == start) phase ^= 1;
    return turn;
  }
  __device__ __forceinline__ int slot_of(int load) const {  // one of the first
    return first + start + load - (start + load < size ? 0 : size);
  }
};

// K and V of the blocks go through a ring in the order of their use: K of a block, then V of the one before. Both warpgroups
// use each block, or, with half tiles of two KV heads, each warpgroup has blocks and a ring of its own. The last load comes
// into the ring's last slot, so that the first two, where parts of a cluster are received, are free early. The second
// warpgroup's ring has none of these, and Q in its last slot to begin with.
template <typename Traits>
__device__ __forceinline__ Ring make_ring(bool own_blocks, int warpgroup, int num_blocks) {
  const int size = own_blocks ? Traits::kHalfRingSlots : Traits::kRingSlots;
  const int rest = (Traits::kLoadsTogether ? 1 : 2) * num_blocks % size;
  return own_blocks && warpgroup == 1 ? Ring{size, size, 0} : Ring{0, size, rest == 0 ? 0 : size - rest};
}

// A warpgroup's accumulators cover 64 rows; a thread holds two of them, lane / 4 and lane / 4 + 8 of its warp's 16.
template <typename Traits>
struct RowState {
  float out[Traits::kHeadDim / 2];
  float max[2] = {-INFINITY, -INFINITY};  // raw scores; of the blocks so far, or of fewer: see Mainloop::kMaxSum
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
      for (int step = 0; step < kSteps; ++step) {  // a warp's 16 rows; 16 columns are vectors 2 step and 2 step + 1
        const int row = thread / 32 * 16 + thread % 16, vector = thread % 32 / 16;
        const uint32_t cell = shared_address(q + row * Traits::kSpan + (vector ^ row % 8) * 8);
        ptx::load_matrices(fragments[step], (cell ^ step % 4 * 32) + step / 4 * 64 * 128);
      }
    }
  }
};

// With two warpgroups they issue their products in turn, so that one's softmax runs under the other's products.
template <typename Traits>
struct Mainloop {
  using T = typename Traits::Element;
  using Shared = typename Traits::SharedStorage;
  static constexpr int kBlockN = Traits::kBlockN;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kSteps = kBlockN / 16;
  static constexpr bool kTakeTurns = Traits::kConsumers == 2;

  // Probabilities are exp2 of the distance to a row's reference, its maximum over some of the blocks: any reference gives the
  // same result as long as nothing overflows. So most blocks need no maximum, no shuffle and no scaling of O. Only where a
  // thread's sum over its columns exceeds this, and hence perhaps a probability, do its warp's references move to the maxima
  // so far. Well within half precision, which P is rounded to.
  static constexpr float kMaxSum = 4096.0f;

  using Scores = float[kBlockN / 2];
  using Probs = uint32_t[kSteps][4];

  static __device__ __forceinline__ void issue_qk(Scores& scores, const QueryOperand<Traits>& q, const T* k) {
    ptx::wgmma_fence();
    const uint64_t tile = ptx::wgmma_descriptor(k, 0, 1024);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int span = step / 4, column = step % 4;  // 16 columns are 32 bytes of a 128-byte row
      const uint64_t b = tile + ((span * kBlockN * 128 + column * 32) >> 4);
      if constexpr (Traits::kQueryInRegisters) {
        ptx::wgmma_rs<T, kBlockN, 0>(scores, q.fragments[step], b, step != 0);
      } else {
        ptx::wgmma_ss<T, kBlockN>(scores, q.tile + ((span * 64 * 128 + column * 32) >> 4), b, step != 0);
      }
    }
    ptx::wgmma_commit();
  }

  static __device__ __forceinline__ void issue_pv(RowState<Traits>& rows, const Probs& probs, const T* v) {
    ptx::wgmma_fence_operand(rows.out);
    ptx::wgmma_fence();
    const uint64_t b = ptx::wgmma_descriptor(v, kBlockN * 128, 1024);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      ptx::wgmma_rs<T, kHeadDim, 1>(rows.out, probs[step], b + ((step * 16 * 128) >> 4), 1);
    }
    ptx::wgmma_commit();
  }

  // Probabilities against the references as they are, and their sums over this thread's columns. The accumulator layout of S
  // is the operand layout of P: no shuffle.
  static __device__ __forceinline__ void exponentiate(const Scores& scores, const RowState<Traits>& rows, float scale_log2,
                                                      Probs& probs, float (&sum)[2]) {
    const auto offset_of = [&](float max) {
      if (Traits::kGeneral && max == -INFINITY) return 0.0f;  // a row that has seen nothing yet, and does not here
      return max * scale_log2;
    };
    const float offset[2] = {offset_of(rows.max[0]), offset_of(rows.max[1])};
#pragma unroll
    for (int i = 0; i < kBlockN / 2; i += 2) {
      const int r = i / 2 % 2;
      const float x = exp2_approx(fmaf(scores[i], scale_log2, -offset[r]));
      const float y = exp2_approx(fmaf(scores[i + 1], scale_log2, -offset[r]));
      sum[r] += x;
      sum[r] += y;
      probs[i / 8][i / 2 % 4] = pack2<T>(x, y);
    }
  }

  // The rows' references become their maxima so far; what was summed, after the first block, is scaled to them.
  static __device__ __forceinline__ void move_references(const Scores& scores, RowState<Traits>& rows, float scale_log2,
                                                         bool is_first) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float peak = rows.max[r];
#pragma unroll
      for (int i = 0; i < kBlockN / 8; ++i) peak = fmaxf(peak, fmaxf(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]));
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
      float alpha = exp2_approx((rows.max[r] - peak) * scale_log2);
      if (Traits::kGeneral && rows.max[r] == -INFINITY) alpha = 0.0f;
      rows.max[r] = peak;  // finite, if the row has seen a token: without ranges, each block has one
      if (is_first) continue;
      rows.sum[r] *= alpha;
#pragma unroll
      for (int i = 0; i < kHeadDim / 4; ++i) rows.out[i / 2 * 4 + 2 * r + i % 2] *= alpha;
    }
  }

  static __device__ __forceinline__ void mask(Scores& scores, int valid, int lane) {
#pragma unroll
    for (int i = 0; i < kBlockN / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (8 * i + 2 * (lane % 4) + (j & 1) >= valid) scores[4 * i + j] = -INFINITY;
      }
    }
  }

  // Of a block in which not all rows see all tokens.
  static __device__ __forceinline__ void mask(Scores& scores, const int (&begin)[2], const int (&end)[2], int lane) {
    const int shift = 2 * (lane % 4);
    const int first[2] = {begin[0] - shift, begin[1] - shift}, limit[2] = {end[0] - shift, end[1] - shift};
#pragma unroll
    for (int i = 0; i < kBlockN / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = 8 * i + (j & 1);
        if (column < first[j / 2] || column >= limit[j / 2]) scores[4 * i + j] = -INFINITY;
      }
    }
  }

  // Hides what rows do not see of a block in which not all rows see all. True where a row of the warp sees its first token,
  // and needs a reference.
  template <typename RowSight>
  static __device__ __forceinline__ bool hide(Scores& scores, const RowState<Traits>& rows, const RowSight& sight,
                                              int block_begin, int block_end, int lane) {
    int begin[2], end[2];
    bool starts = false, is_partial = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      begin[r] = max(0, sight.rows[r].begin - block_begin);
      end[r] = min(sight.rows[r].end, block_end) - block_begin;
      starts |= rows.max[r] == -INFINITY && begin[r] < end[r];
      is_partial |= begin[r] < end[r] && end[r] - begin[r] < kBlockN;
    }
    // Most blocks that rows of a warp see differently are all or nothing to each of them: a third of the instructions, and
    // CTAs that walk over the same tokens stay together, within reach of L2.
    if (__any_sync(0xffffffffu, is_partial)) {
      mask(scores, begin, end, lane);
    } else {
#pragma unroll
      for (int i = 0; i < kBlockN / 2; ++i) {
        if (begin[i / 2 % 2] >= end[i / 2 % 2]) scores[i] = -INFINITY;
      }
    }
    return __any_sync(0xffffffffu, starts);
  }
  static __device__ __forceinline__ bool have_all_started(const RowState<Traits>& rows) {
    return !__any_sync(0xffffffffu, rows.max[0] == -INFINITY || rows.max[1] == -INFINITY);
  }

  // Rows of V that no row of the tile sees: as below.
  static __device__ __forceinline__ void clear_unseen(T* v, const uint32_t (&seen)[kBlockN / 32], int thread) {
    constexpr int kVectors = kHeadDim / 8;
    for (int i = thread; i < kBlockN * kVectors; i += 128) {
      const int row = i / kVectors, vector = i % kVectors;
      if (seen[row / 32] >> row % 32 & 1) continue;
      T* span = v + (vector / 8) * kBlockN * Traits::kSpan;
      *reinterpret_cast<uint4*>(span + row * Traits::kSpan + (vector % 8) * 8) = make_uint4(0, 0, 0, 0);
    }
    ptx::fence_proxy_async();
  }

  // Rows of V past the sequence belong to the next video and may hold Inf: 0 * Inf is NaN, so they become 0.
  static __device__ __forceinline__ void clear_rows(T* v, int valid, int thread) {
    constexpr int kVectors = kHeadDim / 8;
    for (int i = thread; i < (kBlockN - valid) * kVectors; i += 128) {
      const int row = valid + i / kVectors, vector = i % kVectors;
      T* span = v + (vector / 8) * kBlockN * Traits::kSpan;
      *reinterpret_cast<uint4*>(span + row * Traits::kSpan + (vector % 8) * 8) = make_uint4(0, 0, 0, 0);
    }
    ptx::fence_proxy_async();
  }

  // `valid` tokens of the first block are the sequence's; if kGeneral, `sight` and each block's own entry tell instead.
  // `under_last_pv` runs when Q is no longer read.
  template <typename RowSight, typename Hook>
  static __device__ __forceinline__ void run(Shared& shared, RowState<Traits>& rows, const RowSight& sight, bool own_blocks,
                                             int warpgroup, int thread, int num_blocks, int valid, float scale_log2,
                                             const Hook& under_last_pv) {
    const QueryOperand<Traits> q(shared.query(warpgroup), thread);
    if (own_blocks) {
      __syncwarp();
      // V of a block comes into its place.
      if (thread % (128 / Traits::kQueryReaders) == 0) ptx::mbarrier_arrive(&shared.query_read);
    }
    Ring ring = make_ring<Traits>(own_blocks, warpgroup, num_blocks);
    Scores scores;
    Probs probs;
    const auto wait = [&](Ring::Turn turn) { ptx::mbarrier_wait(&shared.full[turn.slot], turn.phase); };
    const auto release = [&](Ring::Turn turn) {  // for both warpgroups, where the ring is this one's own
      if (thread == 0) ptx::mbarrier_arrive(&shared.empty[turn.slot], own_blocks ? Traits::kConsumers : 1);
    };
    const auto keys = [&](Ring::Turn turn) { return shared.slots[turn.slot]; };
    const auto values = [&](Ring::Turn turn) {
      return shared.slots[turn.slot] + (Traits::kLoadsTogether ? kBlockN * kHeadDim : 0);
    };
    const auto wait_turn = [&] {
      if (kTakeTurns) ptx::named_barrier_sync(kTurnBarrier + warpgroup, 256);
    };
    const auto pass_turn = [&] {
      if (kTakeTurns) ptx::named_barrier_arrive(kTurnBarrier + 1 - warpgroup, 256);
    };

    // What a warp knows of the block whose K it waited for last, if kGeneral; of V's block before `look`.
    int block_begin = 0, block_end = 0;
    bool is_seen = true, has_started = true;  // by all rows that see anything
    const auto look = [&](int number) {
      const auto& block = shared.blocks[number % Traits::kBlockEntries];
      block_begin = block.begin;
      block_end = block.end;
      is_seen = block.is_seen;
    };
    const auto clear = [&](Ring::Turn turn, int number) {
      clear_unseen(values(turn), shared.blocks[number % Traits::kBlockEntries].seen, thread);
      ptx::named_barrier_sync(kWarpgroupBarrier + warpgroup, 128);
    };

#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) rows.out[i] = 0.0f;
    if (num_blocks == 0) return under_last_pv();
    if (warpgroup == 1 && num_blocks > 1) pass_turn();

    Ring::Turn k = ring.next(), v = k;
    wait(k);
    issue_qk(scores, q, keys(k));
    ptx::wgmma_wait<0>();
    ptx::wgmma_fence_operand(scores);
    if constexpr (Traits::kGeneral) {
      look(0);
      if (!sight.all_see(block_begin, block_end)) hide(scores, rows, sight, block_begin, block_end, thread % 32);
    }
    if (!Traits::kLoadsTogether) release(k);
    if (!Traits::kGeneral && valid < kBlockN) mask(scores, valid, thread % 32);
    move_references(scores, rows, scale_log2, true);
    if constexpr (Traits::kGeneral) has_started = have_all_started(rows);
    exponentiate(scores, rows, scale_log2, probs, rows.sum);
    if (!Traits::kGeneral && valid < kBlockN) {
      if (!Traits::kLoadsTogether) {
        v.slot = ring.slot_of(num_blocks > 1 ? 2 : 1);  // K of the second block comes first
        wait(v);
      }
      // V may lie in the place of Q, which both warpgroups have read then.
      if (own_blocks) ptx::named_barrier_sync(kConsumersBarrier, 256);
      clear_rows(values(v), valid, thread);
      ptx::named_barrier_sync(kWarpgroupBarrier + warpgroup, 128);
    }

    for (int block = 1; block < num_blocks; ++block) {
      v = k;
      k = ring.next();
      wait(k);
      if constexpr (Traits::kGeneral) {
        if (!is_seen) {  // before the products are issued, which nothing must come between
          Ring ahead = ring;
          const Ring::Turn of_v = Traits::kLoadsTogether ? v : ahead.next();
          wait(of_v);
          clear(of_v, block - 1);
        }
        look(block);
      }
      wait_turn();
      issue_qk(scores, q, keys(k));
      if (!Traits::kLoadsTogether) {
        v = ring.next();
        wait(v);
      }
      issue_pv(rows, probs, values(v));
      // Not before the last product: the other's would go ahead of it, and then this warpgroup's softmax would wait for all of
      // them. Now and then a CTA got into that rhythm and kept to it, 24% slower.
      if (warpgroup == 0 || block + 1 < num_blocks) pass_turn();
      ptx::wgmma_wait<1>();
      ptx::wgmma_fence_operand(scores);
      if (!Traits::kLoadsTogether) release(k);
      ptx::wgmma_wait<0>();
      ptx::wgmma_fence_operand(rows.out);
      release(v);
      float sum[2] = {0.0f, 0.0f};
      bool moves = false;
      if constexpr (Traits::kGeneral) {
        if (!sight.all_see(block_begin, block_end)) {
          moves = hide(scores, rows, sight, block_begin, block_end, thread % 32);
        } else {
          moves = !has_started;
        }
      }
      if (!moves) {
        exponentiate(scores, rows, scale_log2, probs, sum);
        moves = __any_sync(0xffffffffu, !(sum[0] + sum[1] <= kMaxSum));  // or not a number
      }
      if (moves) {
        move_references(scores, rows, scale_log2, false);
        if constexpr (Traits::kGeneral) has_started = have_all_started(rows);
        sum[0] = sum[1] = 0.0f;
        exponentiate(scores, rows, scale_log2, probs, sum);
      }
      rows.sum[0] += sum[0];
      rows.sum[1] += sum[1];
    }

    v = k;
    if (!Traits::kLoadsTogether) {
      v = ring.next();
      wait(v);
    }
    if (Traits::kGeneral && !is_seen) clear(v, num_blocks - 1);
    issue_pv(rows, probs, values(v));
    under_last_pv();
    ptx::wgmma_wait<0>();
    ptx::wgmma_fence_operand(rows.out);
  }
};

}  // namespace slowfast::cuda

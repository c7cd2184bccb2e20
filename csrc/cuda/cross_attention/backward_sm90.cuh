// Backward pass of the text-to-slow-token cross-attention for Hopper.
//
//   P = exp(scale Q K^T - lse)    dV = P^T dO    dS = P (dO V^T - delta)    dK = scale dS^T Q    dQ = scale dS K
//
// Roofline: 10 Nt Hq D Ns FLOP. A CTA owns a block of 128 slow tokens of a KV head, 64 a warpgroup, and walks over all packed
// rows of the head, 64 at a time: dK and dV stay in registers, as do P^T and dS^T, which are computed in the layout of the
// left operand. dQ is a sum over blocks: it leaves by reductions in L2 whose order is fixed (backward_schedule.cuh).
// A step is a tile: S and dP, under which P is formed, then dS, then dV, dQ and dK, and dQ leaves under dK.
// Where rows see ranges, tiles that see nothing of a block are left out of its walk; it is an instantiation of its own, as is
// that of sequences in pieces, whose blocks are of tokens as they lie in memory.
#pragma once
#include "../common/memory.cuh"
#include "backward_producer.cuh"
#include "backward_rows.cuh"
#include "mainloop.cuh"

namespace slowfast::cuda {

// What a CTA holds of what rows see, where they see ranges.
template <int kStages, bool kRanges, bool kPieces>
struct SharedSight {};
template <int kStages>
struct SharedSight<kStages, true, false> {
  BackwardOrder orders[2];                     // of two blocks,
  uint4 tokens[2];                             // and which of their tokens somebody sees
  uint32_t rows[kStages][kBackwardBlockM / 2];  // see sight_of_rows
  bool is_masked[kStages];                     // not all rows of the tile that see anything see all of the block
};

template <int kStages>
struct SharedSight<kStages, true, true> {
  BackwardLapOrder orders[2];
  uint4 tokens[2];
  uint32_t rows[kStages][kBackwardBlockM / 2];   // see LapRuns
  uint32_t ranks[kStages][kBackwardBlockN / 4];
  bool is_masked[kStages];
  bool is_first_lap[2], is_last_lap[2];  // of a block
};

template <typename T, int kHeadDim_, bool kWithQ_, bool kWithKV_, bool kRanges_, bool kPieces_>
struct BackwardTraits {
  using Element = T;
  using Record = RowTile<T, kHeadDim_>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kWithQ = kWithQ_, kWithKV = kWithKV_;  // dQ; dK and dV
  static constexpr bool kRanges = kRanges_;                    // otherwise rows see all of their sequence
  static constexpr bool kPieces = kPieces_;                    // of sequences; rows may see ranges of them, as kRanges says
  static_assert(kRanges || !kPieces);
  static constexpr int kBlockM = kBackwardBlockM, kBlockN = kBackwardBlockN;
  static constexpr int kThreads = 384, kProducerRegisters = 56, kConsumerRegisters = 224;
  static constexpr int kStages = 2, kTurnSlots = 4;

  // Of a block of slow tokens.
  struct Block {
    int num_tiles;  // row tiles, those that see something of it; -1: no more blocks
    int first_tile;  // that the CTA begins with
    int pair;        // of CTAs that share the block, half of the row tiles each; -1: it is this CTA's
    int num_tokens;
    int token;       // its first among all
    int kv_head;
    BackwardTurns turns;
    int64_t first_sum;  // of the group
  };
  struct Turn {
    int64_t sum;
    int before;  // CTAs that add before this one; if kRanges, the mark of what is added before this, plus 1
  };
  struct SharedStorage {
    alignas(1024) T keys[2][kBlockN * kHeadDim];  // of two blocks, column blocks of 64
    T values[kBlockN * kHeadDim];
    T rows[kStages][2][kBlockM * kHeadDim];  // Q and dO
    T grad_scores[2][kBlockN * kBlockM];     // dS^T, or dV of a block on its way out
    float grad_query[kBlockM * kHeadDim];    // dQ on its way out
    float stats[kStages][2][kBlockM];                  // lse and delta
    Block blocks[2];
    Turn turns[kTurnSlots];
    bool is_second[2];
    uint64_t keys_full[2], keys_empty[2], values_full, values_empty, query_full[kStages], grad_full[kStages], rows_empty[kStages];
    uint64_t may_add[kTurnSlots], passed[kTurnSlots], grad_query_full, grad_query_empty;
    SharedSight<kStages, kRanges, kPieces> sight;
  };
  static constexpr int kSharedBytes = sizeof(SharedStorage) + 1024;
  static_assert(kSharedBytes <= 227 * 1024);
};

// Each is a row of barriers: of warpgroups, and of stages times warpgroups. 0 is __syncthreads.
enum BackwardBarrier { kBackwardWarpgroup = 1, kBackwardConsumers = 3, kBackwardGradScores = 4 };

// The thread in its warpgroup, read anew: what is addressed by it once a block is not kept in registers all along.
__device__ __forceinline__ int read_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread % 128;
}

// A warpgroup's fragments of 64 rows, as a left operand has them, to its rows of a tile of kRows rows.
template <typename T, int kRows, int kSteps>
__device__ __forceinline__ void store_fragments(T* tile, int first_row, const uint32_t (&x)[kSteps][4], int thread) {
  const int lane = thread % 32, row = first_row + thread / 32 * 16 + lane % 16;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    ptx::store_matrices(shared_address(tile + swizzled<kRows>(row, 2 * i + lane / 16)), x[i]);
  }
}

template <typename Traits>
struct BackwardConsumer {
  using T = typename Traits::Element;
  using Shared = typename Traits::SharedStorage;
  static constexpr int kHeadDim = Traits::kHeadDim, kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  static constexpr int kSteps = kBlockM / 16;
  static constexpr float kUnit = Traits::Record::kUnit;
  using Scores = float[kBlockM / 2];
  using Operand = uint32_t[kSteps][4];
  using Gradient = float[kHeadDim / 2];
  using QueryGradient = float[kHeadDim / 4];

  Shared& shared;
  const CrossAttentionBackwardParams& p;
  const BackwardPlan& plan;
  const int warpgroup, thread;

  // 64 tokens x D times (64 rows x D)^T.
  __device__ __forceinline__ void issue_scores(Scores& scores, const T* tokens, const T* rows) const {
    const uint64_t a = ptx::wgmma_descriptor(tokens + warpgroup * 64 * 64, 0, 1024), b = ptx::wgmma_descriptor(rows, 0, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int span = step / 4, column = step % 4;
      const uint64_t x = a + ((span * kBlockN * 128 + column * 32) >> 4), y = b + ((span * kBlockM * 128 + column * 32) >> 4);
      step == 0 ? ptx::wgmma_ss_first<T, kBlockM>(scores, x, y) : ptx::wgmma_ss<T, kBlockM>(scores, x, y, 1);
    }
    ptx::wgmma_commit();
  }
  // 64 tokens x 64 rows times 64 rows x D.
  __device__ __forceinline__ void issue_gradient(Gradient& gradient, const Operand& a, const T* rows) const {
    ptx::wgmma_fence_operand(gradient);
    ptx::wgmma_fence();
    const uint64_t b = ptx::wgmma_descriptor(rows, kBlockM * 128, 1024);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      ptx::wgmma_rs<T, kHeadDim, 1>(gradient, a[step], b + ((step * 16 * 128) >> 4), 1);
    }
    ptx::wgmma_commit();
  }
  // 64 rows x 128 tokens times 128 tokens x half of D.
  __device__ __forceinline__ void issue_query_gradient(QueryGradient& gradient, const T* grad_scores, const T* keys) const {
    const T* half = kHeadDim == 128 ? keys + warpgroup * kBlockN * 64 : keys + warpgroup * 32;
    const uint64_t a = ptx::wgmma_descriptor(grad_scores, kBlockN * 128, 1024), b = ptx::wgmma_descriptor(half, kBlockN * 128, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kBlockN / 16; ++step) {
      const uint64_t x = a + ((step * 16 * 128) >> 4), y = b + ((step * 16 * 128) >> 4);
      step == 0 ? ptx::wgmma_ss_first<T, kHeadDim / 2, 1, 1>(gradient, x, y) : ptx::wgmma_ss<T, kHeadDim / 2, 1, 1>(gradient, x, y, 1);
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void hide_rows(Scores& scores, int num_tokens) const {
    const int thread = read_thread(), row = warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int i = 0; i < kBlockM / 2; ++i) {
      if (row + i / 2 % 2 * 8 >= num_tokens) scores[i] = -INFINITY;
    }
  }
  // Tokens past the sequence: 0 times what they hold may be NaN.
  __device__ __forceinline__ void clear_tokens(T* tokens, int num_tokens) const {
    constexpr int kVectors = kHeadDim / 8;
    for (int i = num_tokens * kVectors + warpgroup * 128 + thread; i < kBlockN * kVectors; i += 256) {
      *reinterpret_cast<uint4*>(tokens + swizzled<kBlockN>(i / kVectors, i % kVectors)) = make_uint4(0, 0, 0, 0);
    }
  }

  // `tokens`: the place of each in what `rows` are ranges of, where that is not its place in the block.
  __device__ __forceinline__ void hide_unseen(Scores& scores, const uint32_t* rows, [[maybe_unused]] const uint8_t* tokens) const {
    const int thread = read_thread();
    const int token = warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4;
    int places[2] = {token, token + 8};
    if constexpr (Traits::kPieces) {
      places[0] = tokens[token];
      places[1] = tokens[token + 8];
    }
#pragma unroll
    for (int j = 0; j < kBlockM / 8; ++j) {
      const uint32_t sight = rows[4 * j + thread % 4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int begin = sight >> 16 * (k % 2) & 255, end = sight >> (16 * (k % 2) + 8) & 255, mine = places[k / 2];
        if (mine < begin || mine >= end) scores[4 * j + k] = -INFINITY;
      }
    }
  }
  // Tokens that no row sees, likewise.
  __device__ __forceinline__ void clear_unseen(T* tokens, const uint32_t* seen) const {
    constexpr int kVectors = kHeadDim / 8;
#pragma unroll 1
    for (int i = warpgroup * 128 + thread; i < kBlockN * kVectors; i += 256) {
      const int row = i / kVectors;
      if (seen[row / 32] >> row % 32 & 1) continue;
      *reinterpret_cast<uint4*>(tokens + swizzled<kBlockN>(row, i % kVectors)) = make_uint4(0, 0, 0, 0);
    }
  }

  // Of a thread's pairs of rows in a tile of S^T, the first; ranges leave no register for it.
  __device__ __forceinline__ int column() const { return (Traits::kRanges ? read_thread() : thread) % 4; }

  // `change(x, row, i)` in the place of each number x, by its row's statistic; in `operand` as a left operand has them.
  template <typename Change>
  __device__ __forceinline__ void change_by_row(Scores& scores, Operand& operand, const float* rows, const Change& change) const {
    const float2* mine = reinterpret_cast<const float2*>(rows) + column();
#pragma unroll
    for (int j = 0; j < kBlockM / 8; ++j) {
      const float2 x = mine[4 * j];
      float* y = scores + 4 * j;
#pragma unroll
      for (int k = 0; k < 4; ++k) y[k] = change(y[k], k % 2 == 0 ? x.x : x.y, 4 * j + k);
      operand[j / 2][j % 2 * 2] = pack2<T>(y[0], y[1]);
      operand[j / 2][j % 2 * 2 + 1] = pack2<T>(y[2], y[3]);
    }
  }
  // S becomes P.
  __device__ __forceinline__ void exponentiate(Scores& scores, Operand& operand, const float* lse) const {
    const float scale_log2 = p.forward.softmax_scale * 1.4426950408889634f;
    change_by_row(scores, operand, lse, [&](float score, float row, int) { return exp2_approx(fmaf(score, scale_log2, -row)); });
  }
  // P becomes dS.
  __device__ __forceinline__ void differentiate(Scores& probs, const Scores& grad_probs, Operand& operand, const float* delta) const {
    change_by_row(probs, operand, delta, [&](float prob, float row, int i) {
      return prob * (kUnit == 1.0f ? grad_probs[i] - row : fmaf(grad_probs[i], kUnit, -row));
    });
  }

  // To the warpgroup's tokens of the tile, as store_fragments would, for whose addresses there are no registers left.
  __device__ __forceinline__ void store_grad_scores(T* tile, const Operand& x) const {
    const int lane = thread % 32, row = warpgroup * 64 + thread / 32 * 16 + lane % 16;
    const uint32_t first = shared_address(tile + swizzled<kBlockN>(row, lane / 16));
#pragma unroll
    for (int i = 0; i < kSteps; ++i) ptx::store_matrices(first ^ i * 32, x[i]);
    ptx::fence_proxy_async();
  }

  // By fragments: half of the columns, four floats a thread at a time.
  __device__ __forceinline__ void store_query_gradient(const QueryGradient& gradient) const {
    const float scale = p.forward.softmax_scale;
    float4* mine = reinterpret_cast<float4*>(shared.grad_query) + warpgroup * (kHeadDim / 16) * 128 + thread;
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      const float* x = gradient + 4 * i;
      mine[i * 128] = make_float4(x[0] * scale, x[1] * scale, x[2] * scale, x[3] * scale);
    }
    ptx::fence_proxy_async();
  }

  // Into the place of the block's own tokens, and from there to memory, where `out` is set.
  __device__ __forceinline__ void store_gradient(const Gradient& gradient, float scale, T* staged, void* out,
                                                 const typename Traits::Block& block) const {
    const int thread = read_thread();
    uint32_t x[kHeadDim / 16][4];
#pragma unroll
    for (int i = 0; i < kHeadDim / 4; ++i) x[i / 4][i % 4] = pack2<T>(gradient[2 * i] * scale, gradient[2 * i + 1] * scale);
    store_fragments<T, kBlockN>(staged, warpgroup * 64, x, thread);
    ptx::named_barrier_sync(kBackwardWarpgroup + warpgroup, 128);
    if (out == nullptr) return;
    constexpr int kVectors = kHeadDim / 8, kRows = 128 / kVectors;
    const int vector = thread % kVectors;
#pragma unroll
    for (int i = 0; i < 64; i += kRows) {
      const int row = warpgroup * 64 + i + thread / kVectors;
      if (row < block.num_tokens) {
        T* at = static_cast<T*>(out) + (int64_t{block.token} + row) * p.grad_kv_token_stride + block.kv_head * p.grad_kv_head_stride + vector * 8;
        *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(staged + swizzled<kBlockN>(row, vector));
      }
    }
  }

  // Of a block that two CTAs share: the first to come leaves its part, the other adds it to its own and returns true.
  __device__ __forceinline__ bool join(Gradient& dk, Gradient& dv, int pair) const {
    constexpr int kVectors = kHeadDim / 8;
    const int thread = read_thread();
    const int place = 2 * pair + warpgroup;
    int32_t* arrived = plan.pair_turns + 2 * place;
    float4* part = reinterpret_cast<float4*>(plan.pair_parts) + int64_t{place} * (2 * kVectors * 128) + thread;
    if (thread == 0) {
      const bool is_second = ptx::add_acquire_release(arrived, 1) == 1;
      while (is_second && ptx::load_acquire(arrived + 1) == 0) {
      }
      shared.is_second[warpgroup] = is_second;
    }
    ptx::named_barrier_sync(kBackwardWarpgroup + warpgroup, 128);
    const bool is_second = shared.is_second[warpgroup];
    const auto each = [&](Gradient& gradient, float4* at) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        float* x = gradient + 4 * i;
        if (is_second) {
          const float4 y = __ldcg(at + i * 128);
          x[0] += y.x, x[1] += y.y, x[2] += y.z, x[3] += y.w;
        } else {
          at[i * 128] = make_float4(x[0], x[1], x[2], x[3]);
        }
      }
    };
    each(dk, part);
    each(dv, part + kVectors * 128);
    if (!is_second) {
      ptx::named_barrier_sync(kBackwardWarpgroup + warpgroup, 128);
      if (thread == 0) ptx::store_release(arrived + 1, 1);
    }
    return is_second;
  }

  __device__ __forceinline__ void run() const {
    const int lane = thread % 32;
    RingPlace<2> place;
    RingPlace<Traits::kStages> stage;
    uint32_t values_phase = 0, dq_phase = 0;
    Gradient dk, dv;
    while (true) {
      ptx::mbarrier_wait(&shared.keys_full[place.slot], place.phase);
      const int num_tiles = shared.blocks[place.slot].num_tiles;
      if (num_tiles < 0) return;
      T* keys = shared.keys[place.slot];
      const int num_tokens = shared.blocks[place.slot].num_tokens;
      bool is_first_lap = true;
      if constexpr (Traits::kPieces) is_first_lap = shared.sight.is_first_lap[place.slot];
      if (is_first_lap) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) dk[i] = dv[i] = 0.0f;
      }
      if (num_tiles > 0) {
        bool clears = num_tokens < kBlockN;
        if constexpr (Traits::kRanges) {
          const uint4 seen = shared.sight.tokens[place.slot];
          clears = (seen.x & seen.y & seen.z & seen.w) != ~0u;
        }
        if (clears) {
          ptx::mbarrier_wait(&shared.values_full, values_phase);
          if constexpr (Traits::kRanges) {
            const uint32_t* seen = &shared.sight.tokens[place.slot].x;
            clear_unseen(keys, seen);
            clear_unseen(shared.values, seen);
          } else {
            clear_tokens(keys, num_tokens);
            clear_tokens(shared.values, num_tokens);
          }
          ptx::fence_proxy_async();
          ptx::named_barrier_sync(kBackwardConsumers, 256);
        }
        Operand probs, grad_scores;
        const auto issue_next_scores = [&](Scores& scores) {
          ptx::mbarrier_wait(&shared.query_full[stage.slot], stage.phase);
          issue_scores(scores, keys, shared.rows[stage.slot][0]);
        };
        // P and dS of the tile whose S is in flight.
        const auto form_grad_scores = [&](Scores& scores, bool is_last) {
          uint64_t* grad_full = &shared.grad_full[stage.slot];
          Scores grad_probs;
          ptx::mbarrier_wait(grad_full, stage.phase);
          issue_scores(grad_probs, shared.values, shared.rows[stage.slot][1]);
          ptx::wgmma_wait<1>();
          ptx::wgmma_fence_operand(scores);
          if constexpr (Traits::kRanges) {
            if (shared.sight.is_masked[stage.slot]) {
              const uint8_t* ranks = nullptr;
              if constexpr (Traits::kPieces) ranks = reinterpret_cast<const uint8_t*>(shared.sight.ranks[stage.slot]);
              hide_unseen(scores, shared.sight.rows[stage.slot], ranks);
            }
          } else {
            if (num_tokens < kBlockN) hide_rows(scores, num_tokens);
          }
          exponentiate(scores, probs, shared.stats[stage.slot][0]);
          ptx::mbarrier_wait(grad_full, stage.phase);  // passed already: for its branch, above which ptxas would wait for dP
          ptx::wgmma_wait<0>();
          ptx::wgmma_fence_operand(grad_probs);
          if (is_last && lane == 0) ptx::mbarrier_arrive(&shared.values_empty);
          differentiate(scores, grad_probs, grad_scores, shared.stats[stage.slot][1]);
          if constexpr (Traits::kWithQ) {
            store_grad_scores(shared.grad_scores[stage.slot], grad_scores);
            ptx::named_barrier_arrive(kBackwardGradScores + 2 * stage.slot + (warpgroup ^ 1), 256);
          }
        };
        // Of the tile that is formed: dV, then dQ, for which the other warpgroup's dS has come meanwhile and which leaves
        // under dK.
        const auto add_gradients = [&] {
          QueryGradient dq;
          if constexpr (Traits::kWithKV) issue_gradient(dv, probs, shared.rows[stage.slot][1]);
          if constexpr (Traits::kWithQ) {
            ptx::named_barrier_sync(kBackwardGradScores + 2 * stage.slot + warpgroup, 256);
            issue_query_gradient(dq, shared.grad_scores[stage.slot], keys);
          }
          if constexpr (Traits::kWithKV) {
            issue_gradient(dk, grad_scores, shared.rows[stage.slot][0]);
            ptx::wgmma_wait<1 + Traits::kWithQ>();
            ptx::wgmma_fence_operand(dv);
          }
          if constexpr (Traits::kWithQ) {
            ptx::wgmma_wait<Traits::kWithKV>();
            ptx::wgmma_fence_operand(dq);
            ptx::mbarrier_wait(&shared.grad_query_empty, dq_phase ^ 1);
            store_query_gradient(dq);
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(&shared.grad_query_full);
            dq_phase ^= 1;
          }
          if constexpr (Traits::kWithKV) {
            ptx::wgmma_wait<0>();
            ptx::wgmma_fence_operand(dk);
          }
          __syncwarp();
          if (lane == 0) ptx::mbarrier_arrive(&shared.rows_empty[stage.slot]);
          stage.advance();
        };
        for (int i = 0; i < num_tiles; ++i) {
          Scores scores;
          issue_next_scores(scores);
          if (i == 0) ptx::mbarrier_wait(&shared.values_full, values_phase);
          form_grad_scores(scores, i + 1 == num_tiles);
          add_gradients();
        }
        values_phase ^= 1;
        if constexpr (Traits::kWithQ && Traits::kWithKV) ptx::named_barrier_sync(kBackwardConsumers, 256);  // no K, no dS is read any more
      }
      bool is_last_lap = true;
      if constexpr (Traits::kPieces) is_last_lap = shared.sight.is_last_lap[place.slot];
      if (Traits::kWithKV && is_last_lap) {
        const auto block = shared.blocks[place.slot];
        if (block.pair < 0 || join(dk, dv, block.pair)) {
          store_gradient(dv, kUnit, shared.grad_scores[0], p.grad_values, block);
          store_gradient(dk, p.forward.softmax_scale, keys, p.grad_keys, block);
          ptx::fence_proxy_async();
        }
      }
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(&shared.keys_empty[place.slot]);
      place.advance();
    }
  }
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    cross_attention_backward_kernel(const __grid_constant__ BackwardMaps maps, const __grid_constant__ CrossAttentionBackwardParams p,
                                    const __grid_constant__ BackwardPlan plan) {
  extern __shared__ char raw[];
  using Shared = typename Traits::SharedStorage;
  Shared& shared = *reinterpret_cast<Shared*>(raw + ((1024 - (shared_address(raw) & 1023)) & 1023));
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  const int thread = threadIdx.x % 128;
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&maps.keys);
    ptx::prefetch_tensor_map(&maps.values);
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(&shared.keys_full[i], 1);
      ptx::mbarrier_init(&shared.keys_empty[i], (Traits::kWithQ ? 10 : 8) + Traits::kPieces);  // consumers' warps, those of the turns, that of masks
    }
    for (int i = 0; i < Traits::kStages; ++i) {
      ptx::mbarrier_init(&shared.query_full[i], 1 + Traits::kPieces);
      ptx::mbarrier_init(&shared.grad_full[i], 1);
      ptx::mbarrier_init(&shared.rows_empty[i], 8);
    }
    for (int i = 0; i < Traits::kTurnSlots; ++i) {
      ptx::mbarrier_init(&shared.may_add[i], 1);
      ptx::mbarrier_init(&shared.passed[i], 1);
    }
    ptx::mbarrier_init(&shared.values_full, 1);
    ptx::mbarrier_init(&shared.values_empty, 8);
    ptx::mbarrier_init(&shared.grad_query_full, 8);
    ptx::mbarrier_init(&shared.grad_query_empty, 1);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (Traits::kRanges || threadIdx.x != 0) ptx::wait_for_previous_kernel();  // thread 0: in produce
  if (warpgroup == 0) {
    ptx::register_dealloc<Traits::kProducerRegisters>();
    const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);
    if (thread % 32 == 0 || (Traits::kRanges && warp < 2) || (Traits::kPieces && warp == 3)) {
      if (warp == 0) {
        produce<Traits>(maps, p, plan, shared);
        ptx::let_next_kernel_start();
      } else if (Traits::kWithQ && warp == 1) {
        if constexpr (Traits::kRanges) {
          wait_for_turns_in_order<Traits>(p, plan, shared);
        } else {
          wait_for_turns<Traits>(plan, shared);
        }
      } else if (Traits::kWithQ && warp == 2) {
        add_to_sums<Traits>(plan, shared);
      } else if (Traits::kPieces && warp == 3) {
        if constexpr (Traits::kPieces) find_masks<Traits>(p, plan, shared);
      }
    }
  } else {
    ptx::register_alloc<Traits::kConsumerRegisters>();
    BackwardConsumer<Traits>{shared, p, plan, warpgroup - 1, thread}.run();
  }
}

}  // namespace slowfast::cuda

// Text-to-slow-token cross-attention for Hopper, with gate and mix: one launch.
//
//   out[r] = state[r] + g(state[r]) * softmax(scale q[r] K^T) V      for every text row r of every sequence
//
// Roofline: 4 Nt Hq D Ns FLOP over 4 Ns Hkv D bytes of K and V, so Nt Hq / Hkv FLOP a byte: decode (7) is bytes, 64 text
// rows (448) and more are tensor cores. Packing the query heads of a KV head into the rows of one tile is what makes
// either limit reachable, K and V being read once a tile.
//
// A CTA is a producer warpgroup (one thread issues TMA for the KV blocks, three warps form the gates) and one or two
// consumer warpgroups of 64 rows. K and V tiles come straight from [Ns, Hkv, 2, D]. The slow tokens of a tile are split
// over the CTAs of a cluster and over groups of clusters (launch.h), added up in fixed order by epilogue_cluster.cuh, or
// without clusters by epilogue_direct.cuh.
#pragma once
#include "../common/memory.cuh"
#include "epilogue_cluster.cuh"
#include "epilogue_direct.cuh"

namespace slowfast::cuda {

// Which rows a tile index means. Sequences are scanned a warp at a time: every warp does so, no shared memory.
template <typename Traits>
__device__ __forceinline__ bool find_tile(const CrossAttentionParams& p, int heads, int tile_index, int lane,
                                          Tile& tile) {
  int num_text = static_cast<int>(p.num_text);
  tile = {0, tile_index * Traits::kBlockM, 0, 0, static_cast<int>(p.num_slow)};
  if (p.batch > 1) {  // one sequence owns everything: nothing to read, and the first TMA can go
    int passed = 0;
    bool found = false;
    for (int first = 0; first < p.batch && !found; first += 32) {
      const int b = min(first + lane, p.batch - 1);
      const int text_begin = p.cu_text[b], text_end = p.cu_text[b + 1];
      const int slow_begin = p.cu_slow[b], slow_end = p.cu_slow[b + 1];
      const int count = first + lane < p.batch ? text_end - text_begin : 0;
      const int tiles = (count * heads + Traits::kBlockM - 1) / Traits::kBlockM;
      int inclusive = tiles;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, inclusive, offset);
        if (lane >= offset) inclusive += other;
      }
      const unsigned past = __ballot_sync(0xffffffffu, passed + inclusive > tile_index);
      found = past != 0;
      const int source = found ? __ffs(past) - 1 : 0;
      const auto of_source = [&](int x) { return __shfl_sync(0xffffffffu, x, source); };
      tile.row_begin = (tile_index - passed - of_source(inclusive - tiles)) * Traits::kBlockM;
      tile.text_begin = of_source(text_begin);
      num_text = of_source(count);
      tile.slow_begin = of_source(slow_begin);
      tile.num_slow = of_source(slow_end - slow_begin);
      passed += __shfl_sync(0xffffffffu, inclusive, 31);
    }
    if (!found) return false;
  }
  tile.num_rows = min(Traits::kBlockM, num_text * heads - tile.row_begin);
  return tile.num_rows > 0;
}

// The KV blocks of a CTA.
struct BlockRange {
  int begin, end;
};

__device__ __forceinline__ BlockRange find_blocks(const SplitPlan& plan, const Unit& unit, int total) {
  if (plan.long_blocks > 0 && unit.num_groups > 1) {
    const int begin = min(total, unit.group * plan.long_blocks);
    return {begin, unit.group + 1 == unit.num_groups ? total : min(total, begin + plan.long_blocks)};
  }
  const int64_t splits = unit.size * unit.num_groups, split = unit.group * unit.size + unit.rank;
  return {static_cast<int>(total * split / splits), static_cast<int>(total * (split + 1) / splits)};
}

// Issues the KV blocks of a CTA, from the last to the first, so that the one block with a mask is peeled off the consumers'
// loop.
template <typename Traits>
struct Producer {
  using T = typename Traits::Element;
  static constexpr bool kLoadsTogether = Traits::kLoadsTogether;
  const CUtensorMap& kv_map;
  typename Traits::SharedStorage& shared;
  const int kv_head, first_token, num_blocks;  // token of the first block
  const uint64_t policy;
  Ring<Traits::kNumStages> k_ring = {}, v_ring = {};

  __device__ __forceinline__ void load(int pair, int i, T* dst, uint64_t* full) const {
    ptx::mbarrier_expect_tx(full, Traits::kBlockN * Traits::kHeadDim * sizeof(T) * (kLoadsTogether ? 2 : 1));
    ptx::tma_load_5d(&kv_map, full, dst, 0, first_token + (num_blocks - 1 - i) * Traits::kBlockN, 0, pair, kv_head, policy);
  }
  __device__ __forceinline__ void load_k(int i) {  // with kLoadsTogether, K and V
    ptx::mbarrier_wait(&shared.k_empty[k_ring.stage], k_ring.phase ^ 1);
    load(0, i, shared.kv[k_ring.stage].k, &shared.k_full[k_ring.stage]);
    k_ring.advance();
  }
  __device__ __forceinline__ void load_v(int i) {
    ptx::mbarrier_wait(&shared.v_empty[v_ring.stage], v_ring.phase ^ 1);
    load(1, i, shared.kv[v_ring.stage].v, &shared.v_full[v_ring.stage]);
    v_ring.advance();
  }

  // One block ahead of the loads of Q, which would wait for microseconds behind a full stream.
  __device__ __forceinline__ void start() {
    if (num_blocks > 0) load_k(0);
  }
  __device__ __forceinline__ void finish() {
    for (int i = 1; i < num_blocks; ++i) {
      load_k(i);
      if (!kLoadsTogether) load_v(i - 1);  // after the K of the next block, as they are needed
    }
    if (!kLoadsTogether && num_blocks > 0) load_v(num_blocks - 1);
  }
};

// Rows of Q by index, first into registers, then into the swizzled tile: 16-byte vector v of row r of a column block
// lies at v ^ (r % 8). The loads are issued before the KV stream starts, behind which they would wait for microseconds.
template <typename Traits>
struct QueryRows {
  using T = typename Traits::Element;
  static constexpr int kVectors = Traits::kHeadDim / 8, kLoads = 64 * kVectors / 128;
  uint4 loaded[kLoads];

  __device__ __forceinline__ void load(const CrossAttentionParams& p, const SplitPlan& plan, const Tile& tile,
                                       int kv_head, int first_row, int thread) {
    const int vector = thread % kVectors;
    int text_row[kLoads], head[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int packed = tile.row_begin + min(first_row + (thread + i * 128) / kVectors, tile.num_rows - 1);
      const int text = text_of(plan, packed);
      text_row[i] = p.text_rows[tile.text_begin + text];
      head[i] = kv_head * plan.heads + packed - text * plan.heads;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const T* row = static_cast<const T*>(p.q) + text_row[i] * p.q_row_stride + head[i] * p.q_head_stride;
      loaded[i] = make_uint4(0, 0, 0, 0);
      if (first_row + (thread + i * 128) / kVectors < tile.num_rows) loaded[i] = load_once(row + vector * 8);
    }
  }

  __device__ __forceinline__ void store(T* q, int thread) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int row = (thread + i * 128) / kVectors, vector = (thread + i * 128) % kVectors;
      T* span = q + (vector / 8) * 64 * Traits::kSpan;
      *reinterpret_cast<uint4*>(span + row * Traits::kSpan + ((vector % 8) ^ (row % 8)) * 8) = loaded[i];
    }
    ptx::fence_proxy_async();
  }
};

// Grid: CTA of the cluster, tile, KV head, group, the first fastest: tiles that share K and V run side by side. Whole units
// come first. The units of a last tile with half its rows (plan.half_groups > 0) come after all others, with paired halves
// two KV heads to a cluster. False: this CTA has nothing to do.
__device__ __forceinline__ bool find_unit(const CrossAttentionParams& p, const SplitPlan& plan, Unit& unit, int& tile) {
  const int cluster_rank = blockIdx.x % plan.cluster_size;
  int cluster = blockIdx.x / plan.cluster_size;
  const int full_tiles = plan.max_tiles - (plan.half_groups > 0), full_units = full_tiles * p.num_kv_heads;
  const int split_units = full_units - plan.whole_units, in_groups = cluster - plan.whole_units;
  unit.first_rank = unit.group = 0;
  unit.size = plan.cluster_size;
  if (in_groups < split_units * plan.num_groups) {
    int number = cluster;
    unit.num_groups = 1;
    if (in_groups >= 0) {
      unit.num_groups = plan.num_groups;
      unit.group = in_groups / split_units;
      number = plan.whole_units + in_groups % split_units;
    }
    tile = number % full_tiles;
    unit.kv_head = number / full_tiles;
    unit.index = number - plan.whole_units;
  } else {
    cluster = in_groups - split_units * plan.num_groups;
    tile = full_tiles;
    unit.num_groups = plan.half_groups;
    if (plan.paired_halves) {
      const int pairs = (p.num_kv_heads + 1) / 2, half = cluster_rank / (unit.size / 2);
      unit.size /= 2;
      unit.first_rank = half * unit.size;
      unit.group = cluster / pairs;
      unit.kv_head = cluster % pairs * 2 + half;
    } else {
      unit.group = cluster / p.num_kv_heads;
      unit.kv_head = cluster % p.num_kv_heads;
    }
    unit.index = split_units + unit.kv_head;
  }
  unit.rank = cluster_rank - unit.first_rank;
  return unit.kv_head < p.num_kv_heads;
}

// Small inputs that everything else waits for, into L2 while the previous kernel ends. What is in L2 is what a later read
// sees, so nothing is read too early.
template <typename T>
__device__ __forceinline__ void prefetch_inputs(const CrossAttentionParams& p, int thread) {
  const auto prefetch = [&](const void* data, int64_t bytes) {
    for (int64_t i = thread * 128; i < min(bytes, int64_t{1} << 16); i += 96 * 128) {
      ptx::prefetch_l2(static_cast<const char*>(data) + i);
    }
  };
  prefetch(p.text_rows, p.num_text * 4);
  if (p.batch > 1) {
    prefetch(p.cu_text, (p.batch + 1) * 4);
    prefetch(p.cu_slow, (p.batch + 1) * 4);
  }
  if (p.state != nullptr) {
    prefetch(p.gate.weight, int64_t{p.num_q_heads} * p.head_dim * (p.gate.dtype == DType::kFloat32 ? 4 : sizeof(T)));
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSM)
    cross_attention_kernel(const __grid_constant__ CUtensorMap kv_map, const __grid_constant__ CrossAttentionParams p,
                           const __grid_constant__ SplitPlan plan) {
  extern __shared__ char raw[];
  using T = typename Traits::Element;
  using Shared = typename Traits::SharedStorage;
  Shared& shared = *reinterpret_cast<Shared*>(raw + ((1024 - (ptx::smem_address(raw) & 1023)) & 1023));
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  const int thread = threadIdx.x % 128, lane = thread % 32;

  if (threadIdx.x == 0) ptx::prefetch_tensor_map(&kv_map);
  if (warpgroup == 0 && thread >= 32) prefetch_inputs<T>(p, thread - 32);
  ptx::wait_for_previous_kernel();
  Unit unit;
  Tile tile;
  int tile_number;
  bool works = find_unit(p, plan, unit, tile_number);
  works = works && find_tile<Traits>(p, plan.heads, tile_number, lane, tile);
  if (!works) return;  // all CTAs of a unit alike; no other CTA of the cluster reads this one's memory
  // Both warpgroups hold the same rows of a half-filled tile where a cluster adds them up. Otherwise one has none, and works
  // on zeros: that keeps it abreast of the full tiles beside it, which read the same K and V, so that L2 has them.
  const bool shares_rows = Traits::kConsumers == 2 && plan.cluster_size > 1 && tile.num_rows <= 64;
  unit.parts_per_cta = shares_rows ? 2 : 1;

  const int total_blocks = (tile.num_slow + Traits::kBlockN - 1) / Traits::kBlockN;
  const BlockRange blocks = find_blocks(plan, unit, total_blocks);
  const int num_blocks = blocks.end - blocks.begin;
  const int last_valid = min(Traits::kBlockN, tile.num_slow - (blocks.end - 1) * Traits::kBlockN);

  const Gates<Traits> gates = Gates<Traits>::make(p, plan, shared, tile, unit);
  Producer<Traits> producer = {kv_map, shared, unit.kv_head, tile.slow_begin + blocks.begin * Traits::kBlockN, num_blocks,
                               plan.kv_evict_first ? ptx::kEvictFirst : ptx::kEvictNormal};
  const int consumer = warpgroup - 1;
  QueryRows<Traits> query;
  if (warpgroup > 0) {
    query.load(p, plan, tile, unit.kv_head, shares_rows ? 0 : consumer * 64, thread);
  } else if (thread >= 32 && p.state != nullptr && gates.are_few()) {
    gates.prefetch(thread - 32);
  } else if (thread == 0) {
    for (int i = 0; i < Traits::kNumStages; ++i) {
      ptx::mbarrier_init(&shared.k_full[i], 1);
      ptx::mbarrier_init(&shared.v_full[i], 1);
      ptx::mbarrier_init(&shared.k_empty[i], Traits::kConsumers);
      ptx::mbarrier_init(&shared.v_empty[i], Traits::kConsumers);
    }
    ptx::mbarrier_init(&shared.gate_full, 32 * Traits::kGateWarps);
    ptx::mbarrier_init_fence();
    producer.start();
  }
  __syncthreads();

  if (warpgroup == 0) {
    if constexpr (Traits::kConsumers == 2) ptx::register_dealloc<Traits::kProducerRegisters>();
    const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);
    if (warp > 0) {
      if (p.state != nullptr && !gates.are_few()) gates.prefetch(thread - 32);
      gates.prepare(warp - 1, lane);
    } else if (lane == 0) {
      producer.finish();
      ptx::let_next_kernel_start();
    }
  } else {
    if constexpr (Traits::kConsumers == 2) ptx::register_alloc<Traits::kConsumerRegisters>();
    const float scale_log2 = p.softmax_scale * 1.4426950408889634f;
    RowState<Traits> rows;
    // A warpgroup without rows (its Q is zero) keeps its CTA abreast of its neighbours; with P zero too it costs less power.
    if (!shares_rows && consumer * 64 >= tile.num_rows) rows.max[0] = rows.max[1] = 1e30f;
    query.store(shared.q + consumer * 64 * Traits::kHeadDim, thread);
    ptx::named_barrier_sync(1 + consumer, 128);
    const DirectEpilogue<Traits> direct = {gates, consumer, thread};
    const auto under_last_pv = [&] {
      if (plan.cluster_size == 1) direct.prepare();
    };
    const auto attend = [&](auto mainloop, int first_column) {
      mainloop.run(shared, rows, consumer, thread, num_blocks, first_column, last_valid, scale_log2, under_last_pv);
    };
    constexpr int kBlockN = Traits::kBlockN;
    if constexpr (Traits::kConsumers == 1) {
      attend(Mainloop<Traits, kBlockN, false>(), 0);
    } else if (!shares_rows) {
      attend(Mainloop<Traits, kBlockN, true>(), 0);
    } else {
      attend(Mainloop<Traits, kBlockN / 2, false>(), consumer * kBlockN / 2);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows.max[r] *= scale_log2;
      rows.sum[r] += __shfl_xor_sync(0xffffffffu, rows.sum[r], 1);
      rows.sum[r] += __shfl_xor_sync(0xffffffffu, rows.sum[r], 2);
    }
    if (plan.cluster_size == 1) {
      direct.run(rows);
    } else {
      ClusterEpilogue<Traits>{gates}.run(rows, consumer, thread);
    }
  }
}

}  // namespace slowfast::cuda

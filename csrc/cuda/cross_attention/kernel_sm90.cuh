// Text-to-slow-token cross-attention for Hopper, with gate and mix: one launch, or two (gates_sm90.cu).
//
//   out[r] = state[r] + g(state[r]) * softmax(scale q[r] K^T) V      for every text row r of every sequence
//
// Roofline: 4 Nt Hq D Ns FLOP over 4 Ns Hkv D bytes of K and V, so Nt Hq / Hkv FLOP a byte: decode (7) is bytes, 64 text
// rows (448) and more are tensor cores. Packing the query heads of a KV head into the rows of one tile is what makes
// either limit reachable, K and V being read once a tile.
//
// A CTA is a producer warpgroup (one thread issues TMA for the KV blocks, three warps form the gates) and one or two
// consumer warpgroups of 64 rows. K and V tiles come straight from where they lie. The slow tokens of a tile are split
// over groups and the CTAs of each (launch.h), added up in fixed order: groups that are clusters by epilogue_cluster.cuh,
// groups of one CTA by epilogue_direct.cuh.
#pragma once
#include "../common/memory.cuh"
#include "epilogue_cluster.cuh"
#include "epilogue_direct.cuh"
#include "deal.cuh"
#include "producer.cuh"
#include "shares.cuh"

namespace slowfast::cuda {

// Which rows a tile index means. Sequences are scanned a warp at a time: every warp does so, no shared memory. `sequence` is
// load_sequence(p, 0, lane), where that reads anything.
template <typename Traits>
__device__ __forceinline__ bool find_tile(const CrossAttentionParams& p, int heads_per_kv, int tile_index, int lane,
                                          const Sequence& sequence, Tile& tile) {
  int num_text = static_cast<int>(p.num_text);
  // One sequence owns everything, but perhaps not all pieces: nothing to read, and the first TMA can go.
  tile = {0, tile_index * Traits::kBlockM, 0, 0, static_cast<int>(p.num_slow)};
  if (Traits::kGeneral && p.slow_pieces != nullptr && p.batch == 1) tile.num_slow = __ldg(p.cu_slow + 1);
  if (p.batch > 1) {
    int passed = 0;
    bool found = false;
    for (int first = 0; first < p.batch && !found; first += 32) {
      const Sequence mine = first == 0 ? sequence : load_sequence(p, first, lane);
      const int tiles = (mine.num_text * heads_per_kv + Traits::kBlockM - 1) / Traits::kBlockM;
      const int inclusive = inclusive_sum_of_warp(tiles, lane);
      const unsigned past = __ballot_sync(0xffffffffu, passed + inclusive > tile_index);
      found = past != 0;
      const int source = found ? __ffs(past) - 1 : 0;
      const auto of_source = [&](int x) { return __shfl_sync(0xffffffffu, x, source); };
      tile.row_begin = (tile_index - passed - of_source(inclusive - tiles)) * Traits::kBlockM;
      tile.text_begin = of_source(mine.text_begin);
      num_text = of_source(mine.num_text);
      tile.slow_begin = of_source(mine.slow_begin);
      tile.num_slow = of_source(mine.num_slow);
      passed += __shfl_sync(0xffffffffu, inclusive, 31);
    }
    if (!found) return false;
  }
  tile.num_rows = min(Traits::kBlockM, num_text * heads_per_kv - tile.row_begin);
  return tile.num_rows > 0;
}

// Grid: x is the CTA of the cluster and the tile, y the KV head, z the group: tiles that share K and V run side by side.
// What has no work are all CTAs of a cluster.
template <typename Traits>
__device__ __forceinline__ bool find_work(const CrossAttentionParams& p, const SplitPlan& plan,
                                          typename Traits::SharedStorage& shared, int lane, Unit& unit, Tile& tile) {
  Sequence sequence = {0, 0, 0, 0};
  if (p.batch > 1) sequence = load_sequence(p, 0, lane);
  if constexpr (Traits::kDeals) {
    if (plan.dealt_ctas > 0) {
      int tile_index = 0;
      unit.size = 1;
      unit.rank = 0;
      unit.is_cut_alike = false;
      if (!Deal<Traits>::find(p, plan, reinterpret_cast<int*>(shared.slots), lane, unit, tile_index)) return false;
      find_tile<Traits>(p, plan.heads_per_kv, tile_index, lane, sequence, tile);
      unit.paired = tile.num_rows <= 64 && unit.kv_head + 1 < p.num_kv_heads;
      return true;
    }
  }
  unit.size = plan.cluster_size;
  unit.rank = ptx::cluster_rank();
  if (Traits::kShares && plan.share_slots > 0 && !look_even<Traits>(p, plan, sequence, lane)) {
    const Shares<Traits> shares(p, plan, sequence, lane);
    if (!shares.are_even()) {
      static_assert(Shares<Traits>::kScratch * sizeof(int) <= sizeof(shared.state));
      const int length = shares.choose_length(reinterpret_cast<int*>(shared.state));
      if (length > 0) return shares.find(length, unit, tile);
    }
  }
  if (Traits::kShares && blockIdx.y >= p.num_kv_heads) return false;
  const int tile_index = ptx::cluster_index(), number = blockIdx.y * plan.max_tiles + tile_index;
  const bool is_whole = number < plan.whole_units;
  unit.index = number - plan.whole_units;
  unit.kv_head = blockIdx.y;
  unit.group = blockIdx.z;
  unit.num_groups = is_whole ? 1 : plan.num_groups;
  unit.first_part = unit.index * plan.num_groups;
  unit.long_blocks = plan.long_blocks;
  unit.is_cut_alike = true;
  unit.paired = false;
  if (unit.group >= unit.num_groups || !find_tile<Traits>(p, plan.heads_per_kv, tile_index, lane, sequence, tile)) return false;
  // Two KV heads with half a tile each share a CTA, a warpgroup for each: the CTAs of the second have nothing to do.
  if (Traits::kConsumers == 2 && tile.num_rows <= 64) {
    if (unit.kv_head % 2 == 1) return false;
    unit.paired = unit.kv_head + 1 < p.num_kv_heads;
  }
  return true;
}

// The result of a tile in which no row sees a token, by one CTA of the unit: the others have nothing to do.
template <typename Traits>
__device__ __forceinline__ void leave_empty(const CrossAttentionParams& p, const SplitPlan& plan, const Tile& tile,
                                            const Unit& unit) {
  using T = typename Traits::Element;
  if (unit.group > 0 || unit.rank > 0) return;
  constexpr int kChunks = Traits::kHeadDim / 8;
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.num_rows * (unit.paired ? 2 : 1) * kChunks; i += Traits::kThreads) {
    const int row = i / kChunks, column = i % kChunks * 8, next_kv_head = row >= tile.num_rows;
    const auto place = place_of<Traits>(p, plan, tile, unit.kv_head + next_kv_head,
                                        tile.row_begin + row - next_kv_head * tile.num_rows);
    const auto chunk = [&](const void* base, int64_t offset) {
      return reinterpret_cast<uint4*>(const_cast<T*>(static_cast<const T*>(base)) + offset + column);
    };
    if (p.context != nullptr) *chunk(p.context, place.context) = make_uint4(0, 0, 0, 0);
    if (p.lse != nullptr && column == 0) p.lse[place.lse] = -INFINITY;
    if (p.state != nullptr) *chunk(p.out, place.out) = *chunk(p.state, place.state);
  }
}

// Rows of Q by index, into the swizzled tile of a warpgroup: 16-byte vector v of row r of a column block lies at v ^ (r % 8).
// A warp loads 16 rows, and with Q in registers they are those it reads. The constructor reads no memory.
template <typename Traits>
struct QueryLoader {
  using T = typename Traits::Element;
  const CrossAttentionParams& p;
  const Tile& tile;
  const int first_row, warp_row, lane;
  // Each lane finds one row's place.
  int64_t text;    // index into text_rows
  int64_t column;  // the head's element offset in a row of q

  __device__ __forceinline__ QueryLoader(const CrossAttentionParams& p, const SplitPlan& plan, const Tile& tile, int kv_head,
                                         int first_row, int thread)
      : p(p), tile(tile), first_row(first_row), warp_row(thread / 32 * 16), lane(thread % 32) {
    const int packed = tile.row_begin + min(first_row + warp_row + lane % 16, tile.num_rows - 1);
    const int text_of_sequence = text_of(plan, packed), head = kv_head * plan.heads_per_kv + packed - text_of_sequence * plan.heads_per_kv;
    text = tile.text_begin + text_of_sequence;
    column = head * p.q_head_stride;
  }

  __device__ __forceinline__ void load(T* q) const {
    constexpr int kVectors = Traits::kHeadDim / 8, kRows = 32 / kVectors;  // that a warp loads at once
    const int vector = lane % kVectors;
    const T* start = static_cast<const T*>(p.q) + p.text_rows[text] * p.q_row_stride + column;
#pragma unroll
    for (int i = 0; i < 16; i += kRows) {
      const int source = i + lane / kVectors, row = warp_row + source;
      const auto row_start = reinterpret_cast<const T*>(__shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(start), source));
      T* cell = q + (vector / 8 * 64 + row) * Traits::kSpan + ((vector ^ row) % 8) * 8;
      cp_async_16_or_zeros(shared_address(cell), row_start + vector * 8, first_row + row < tile.num_rows);
    }
    cp_async_commit();
  }
};

// Rows that see nothing went along with the others.
template <typename Traits>
__device__ __forceinline__ void forget_empty(RowState<Traits>& rows, const RowSight<Traits>& sight) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (!sight.is_empty(r)) continue;
    rows.max[r] = -INFINITY;
    rows.sum[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < Traits::kHeadDim / 4; ++i) rows.out[i / 2 * 4 + 2 * r + i % 2] = 0.0f;
  }
}

template <typename Traits>
__device__ __forceinline__ void init_barriers(typename Traits::SharedStorage& shared, int cluster_size) {
  for (int i = 0; i < Traits::kNumSlots; ++i) {
    ptx::mbarrier_init(&shared.full[i], 1);
    ptx::mbarrier_init(&shared.empty[i], Traits::kConsumers);
  }
  ptx::mbarrier_init(&shared.query_read, Traits::kQueryReaders * Traits::kConsumers);
  ptx::mbarrier_init(&shared.places_full, 32 * Traits::kGateWarps);
  ptx::mbarrier_init(&shared.gate_full, 32 * Traits::kGateWarps);
  ptx::mbarrier_init(&shared.peers_ready, cluster_size * 4 * Traits::kConsumers);
  ptx::mbarrier_init(&shared.parts_full, 1);
  ptx::mbarrier_init(&shared.looked, 1);
  shared.gate_items = shared.gate_items_done = 0;
  ptx::mbarrier_init_fence();
}

// Small inputs that everything else waits for, into L2 while the previous kernel ends. What is in L2 is what a later read
// sees, so nothing is read too early.
template <typename Traits>
__device__ __forceinline__ void prefetch_inputs(const CrossAttentionParams& p, int thread) {
  const auto prefetch = [&](const void* data, int64_t bytes) {
    const int end = static_cast<int>(min(bytes, int64_t{1} << 16));
#pragma unroll 1
    for (int i = thread * 128; i < end; i += 96 * 128) {
      ptx::prefetch_l2(static_cast<const char*>(data) + i);
    }
  };
  prefetch(p.text_rows, p.num_text * 4);
  if (p.batch > 1 || Traits::kGeneral) {
    prefetch(p.cu_text, (p.batch + 1) * 4);
    prefetch(p.cu_slow, (p.batch + 1) * 4);
  }
  if constexpr (Traits::kGeneral) {
    if (p.slow_begin != nullptr) prefetch(p.slow_begin, p.num_text * 4);
    if (p.slow_end != nullptr) prefetch(p.slow_end, p.num_text * 4);
    if (p.slow_pieces != nullptr) prefetch(p.slow_pieces, p.num_pieces * 8);
  }
  if (p.state != nullptr && p.gate.weight != nullptr) {
    prefetch(p.gate.weight, int64_t{p.num_q_heads} * p.head_dim * (p.gate.dtype == DType::kFloat32 ? 4 : 2));
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSM)
    cross_attention_kernel(const __grid_constant__ SlowMaps<Traits> maps, const __grid_constant__ SplitPlan plan,
                           const __grid_constant__ CrossAttentionParams p) {
  extern __shared__ char raw[];
  using T = typename Traits::Element;
  using Shared = typename Traits::SharedStorage;
  Shared& shared = *reinterpret_cast<Shared*>(raw + ((1024 - (shared_address(raw) & 1023)) & 1023));
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  const int thread = threadIdx.x % 128, lane = thread % 32;
  constexpr int kQueryThreads = 32 + 128 * Traits::kConsumers;  // the producer's warp and the consumers

  // What comes before wait_for_previous_kernel is done while that kernel ends. With one sequence this is all but the loads;
  // with more of them, their lengths are read first.
  if (threadIdx.x == 0) {
    for (const CUtensorMap& map : maps.maps) ptx::prefetch_tensor_map(&map);
    init_barriers<Traits>(shared, plan.cluster_size);
  }
  if (warpgroup == 0 && thread >= 32) prefetch_inputs<Traits>(p, thread - 32);
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
  Tile tile;
  Unit unit;
  const bool waits_early = Traits::kGeneral || p.batch > 1;
  if (waits_early) ptx::wait_for_previous_kernel();
  if (!find_work<Traits>(p, plan, shared, lane, unit, tile)) return;
  typename Traits::template Choose<GeneralProducer, Producer>::type producer(maps, p, plan, shared, tile, unit, lane);
  if (Traits::kGeneral && producer.is_idle) return leave_empty<Traits>(p, plan, tile, unit);
  const int num_blocks = producer.num_blocks;
  const Gates<Traits> gates = Gates<Traits>::make(p, plan, shared, tile, unit);

  if (warpgroup == 0) {
    if (!waits_early) ptx::wait_for_previous_kernel();
    if constexpr (Traits::kConsumers == 2) ptx::register_dealloc<Traits::kProducerRegisters>();
    const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);
    if (warp > 0) {
      gates.prepare(warp - 1, lane);
    } else {
      if (Traits::kGeneral || lane == 0) producer.start();
      __syncwarp();
      ptx::named_barrier_sync(kQueryBarrier, kQueryThreads);
      if (lane == 0 && unit.size > 1) {
        ptx::mbarrier_expect_tx(&shared.parts_full, ClusterEpilogue<Traits>::received_bytes(gates));
      }
      if (Traits::kGeneral || lane == 0) producer.finish();
      if (lane == 0) {
        ptx::let_next_kernel_start();
        if (unit.size == 1) DirectEpilogue<Traits>::look(gates);
      }
    }
  } else {
    const int consumer = warpgroup - 1;
    const int kv_head = unit.kv_head + (unit.paired ? consumer : 0), first_row = unit.paired ? 0 : consumer * 64;
    const QueryLoader<Traits> query(p, plan, tile, kv_head, first_row, thread);
    if (!waits_early) ptx::wait_for_previous_kernel();
    query.load(shared.query(consumer));
    ptx::named_barrier_arrive(kQueryBarrier, kQueryThreads);  // asked for: the stream may follow
    if constexpr (Traits::kConsumers == 2) ptx::register_alloc<Traits::kConsumerRegisters>();
    const float scale_log2 = p.softmax_scale * 1.4426950408889634f;
    const auto sight = producer.row_sight(first_row, thread);
    RowState<Traits> rows;
    // A warpgroup without rows keeps its CTA abreast of the full tiles beside it, which read the same K and V, so that L2 has
    // them. Its Q is zero; with P zero too it costs less power.
    if (!unit.paired && consumer * 64 >= tile.num_rows) rows.max[0] = rows.max[1] = 1e30f;
    if constexpr (Traits::kGeneral) {  // likewise, in a tile where others see something
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (sight.is_empty(r)) rows.max[r] = 1e30f;
      }
    }
    cp_async_wait<0>();
    if constexpr (Traits::kQueryInRegisters) {
      __syncwarp();
    } else {
      ptx::fence_proxy_async();
      ptx::named_barrier_sync(kWarpgroupBarrier + consumer, 128);
    }
    const DirectEpilogue<Traits> direct = {gates, consumer, thread, num_blocks};
    typename DirectEpilogue<Traits>::Neighbour neighbour;
    const ClusterEpilogue<Traits> cluster = {gates, consumer, thread};
    Mainloop<Traits>::run(shared, rows, sight, unit.paired, consumer, thread, num_blocks, producer.last_valid, scale_log2, [&] {
      if (unit.size == 1) {
        direct.prepare(neighbour);
      } else {
        cluster.prepare();
      }
    });
    if constexpr (Traits::kGeneral) forget_empty(rows, sight);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows.max[r] *= scale_log2;
      rows.sum[r] += __shfl_xor_sync(0xffffffffu, rows.sum[r], 1);
      rows.sum[r] += __shfl_xor_sync(0xffffffffu, rows.sum[r], 2);
    }
    if (unit.size == 1) {
      direct.run(rows, neighbour);
    } else {
      cluster.run(rows);
    }
  }
}

}  // namespace slowfast::cuda

// Tile shapes of the Hopper kernel and its shared memory, one specialisation a (dtype, head dimension, consumers).
#pragma once
#include <cstdint>

#include "../common/gate.cuh"

namespace slowfast::cuda {

// Named barriers; those of a warpgroup are two in a row, 0 is __syncthreads.
enum Barrier { kWarpgroupBarrier = 1, kConsumersBarrier = 3, kTurnBarrier = 4, kGatesBarrier = 6, kQueryBarrier = 7 };

struct TokensAndBlocks {
  int tokens, blocks;
};

// kConsumers = 2: 128 packed rows, for prefill: the softmax of one warpgroup runs under the products of the other.
// kConsumers = 1: 64 packed rows and small KV blocks, for decode, where bytes in flight and a short tail matter: two CTAs
// share an SM, so that one streams while the other starts or ends.
// kGeneral: slow tokens in pieces, rows that see ranges of them, K and V apart. Its loop asks at every block what the rows
// see; without it all of them see all tokens of one run.
// kShares: of sequences whose lengths may be uneven, see shares.cuh. Without it nothing asks: instructions run from a cold
// cache, and a jump over so many costs a quarter of a microsecond.
template <typename T, int kHeadDim_, int kConsumers_, bool kGeneral_ = false, bool kShares_ = false>
struct Traits {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kConsumers = kConsumers_;
  static constexpr bool kGeneral = kGeneral_;
  static constexpr bool kShares = kShares_;
  static constexpr bool kDeals = kGeneral && kConsumers == 2;  // work among CTAs, if the plan says so: deal.cuh
  static constexpr int kBlockM = 64 * kConsumers;
  static constexpr int kBlockN = kConsumers == 1 ? 32 : 128;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kCtasPerSM = kConsumers == 1 ? 2 : 1;
  static constexpr bool kCutsOnDevice = kShares || kDeals;
  // 64 columns of a row are the 128 bytes of one swizzle span; a tile is kHeadDim / 64 such column blocks.
  static constexpr int kSpan = 64;
  static constexpr int kSpans = kHeadDim / kSpan;
  static_assert(kHeadDim % kSpan == 0, "a last, narrower column block would be left out of every tile and tensor map");
  // Two warpgroups of 128 threads hold Q, S, P and O (32 + 64 + 32 + 64 registers); the producer's threads give theirs up.
  // One warpgroup has too few for Q, and reads it from shared memory in every block.
  static constexpr bool kQueryInRegisters = kConsumers == 2;
  // Threads of a warpgroup that tell when Q is read. General kernels write to its place with their own stores, and racecheck
  // follows arrivals thread by thread: there it is all of them.
  static constexpr int kQueryReaders = kGeneral ? 128 : 4;
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168, "more than a CTA is launched with: it would wait for ever");
  static constexpr int kGateWarps = 3;

  // With one consumer, which waits for memory, K and V of a block come in one TMA instruction and under one barrier.
  static constexpr bool kLoadsTogether = kConsumers == 1;

  // A slot of shared memory holds K or V of a block (with kLoadsTogether one behind the other), as column blocks of 64, each
  // [kBlockN][64]. Q is as large and has the last slot; the others are a ring. In a CTA of two half tiles each warpgroup has
  // a ring of its own, half of all slots, which takes in that of Q once it is read.
  static constexpr int kSlotSize = kBlockN * kHeadDim * (kLoadsTogether ? 2 : 1);
  static constexpr int kNumSlotsOfD64 = kConsumers == 1 ? 10 : 12;
  static constexpr int kNumSlots = kHeadDim == 128 ? 6 : kNumSlotsOfD64;
  static_assert(kHeadDim == 64 || kHeadDim == 128, "kNumSlots is chosen by the shared memory of these two");
  static constexpr int kRingSlots = kNumSlots - 1, kHalfRingSlots = kNumSlots / 2;
  static_assert(kSlotSize == kBlockM * kHeadDim);

  // Unnormalised rows of O by vectors, from the CTAs of a cluster: of row i of the CTA's share from part j, row j * share + i
  // here. What a warp stores at once, 4 vectors of 8 rows, is one piece. They lie over the first two slots.
  struct Received {
    float4 out[kBlockM * kHeadDim / 4];

    static __device__ __forceinline__ int cell(int row, int vector) {
      return (row / 8 * (kHeadDim / 16) + vector / 4) * 32 + row % 8 * 4 + vector % 4;
    }
  };
  // Where a packed row of this CTA's share goes.
  struct RowPlace {
    int64_t state, out, context;  // element offsets
    int64_t lse;
    int gate;                     // text row in the tile
  };
  // A KV block, if kGeneral: tokens begin .. end - 1 of the sequence, from the block's first on. Tokens of the block without
  // a bit are seen by no row of the tile, and may hold anything.
  struct Block {
    int begin, end;
    bool is_seen;  // all of it, by some row each
    uint32_t seen[kBlockN / 32];
  };
  // Block i of a CTA is described in entry i % kBlockEntries, before the producer waits for a slot for its K, and the
  // entry is written anew for block i + kBlockEntries. So far ahead the producer gets only when V of block i is used up,
  // and hence all warps have read the entry: V of block i is load 2 i + 2 of its ring, load n waits for the release of
  // load n - kRingSlots, and load 2 i - 2 has been asked for when block i is described; where K and V come together,
  // load i - 1.
  static constexpr int kBlockEntries = 16;
  static_assert(kLoadsTogether ? kBlockEntries > kRingSlots : 2 * kBlockEntries - 4 >= kRingSlots);
  static constexpr int kSummedWindows = 64;  // of 32 pieces each: see slow_tokens.cuh
  template <template <typename> class General, template <typename> class Plain>
  using Choose = std::conditional<kGeneral, General<Traits>, Plain<Traits>>;
  struct SharedStorage {
    union {
      alignas(1024) T slots[kNumSlots][kSlotSize];
      Received received;
    };
    T state[kBlockM / 2 * kHeadDim];  // of the rows that a CTA of a cluster owns
    float2 received_stats[kBlockM];   // maximum (log2 units) and sum of the rows received
    RowPlace place[kBlockM];
    float gate_parts[kBlockM][kGateWarps];
    float gate[kBlockM];  // by text row of the tile; without clusters, where groups share them out, 64 for each warpgroup
    Gate gate_function;   // read by the gate warps while the consumers attend
    uint64_t full[kNumSlots], empty[kNumSlots];
    uint64_t query_read, places_full, gate_full, peers_ready, parts_full, looked;
    int gate_items, gate_items_done;  // taken, and formed: see Gates::take_items
    int has_arrived[kConsumers], is_neighbour_there[kConsumers];  // of the other groups
    Block blocks[kGeneral ? kBlockEntries : 1];
    TokensAndBlocks windows[kGeneral ? kSummedWindows : 1];

    __device__ __forceinline__ T* query(int warpgroup) { return slots[kRingSlots] + warpgroup * 64 * kHeadDim; }
  };
  static_assert(sizeof(Received) == 2 * kSlotSize * sizeof(T));
  static constexpr int kSharedBytes = sizeof(SharedStorage) + 1024;  // the base is aligned to 1024 by hand
  static_assert(kSharedBytes <= 227 * 1024 / kCtasPerSM - 1024 * (kCtasPerSM - 1));
};

}  // namespace slowfast::cuda

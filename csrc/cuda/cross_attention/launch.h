// Host entry point of the Hopper attention and how a call is cut into CTAs; free of CUDA headers.
#pragma once
#include "../../params.h"

namespace slowfast::cuda {

// A unit is a tile of kBlockM packed rows (text row, head of the group) of one KV head. Its slow tokens are split over
// cluster_size * num_groups CTAs: a cluster adds up through distributed shared memory, groups through `partial`.
// kConsumers below is `consumers`, and kBlockM is 64 of it.
struct SplitPlan {
  int32_t consumers;     // 1 or 2 warpgroups of 64 rows
  int32_t cluster_size;  // 1, 2, 4, 8 or 16
  int32_t num_groups;    // >= 1
  int32_t max_tiles;     // upper bound over any distribution of the text rows over the sequences
  int32_t whole_units;   // the first units (by KV head, then tile), a CTA each without a split; 0 unless cluster_size is 1
  int32_t long_blocks;   // KV blocks of every group but the last, which gets the rest; 0: equal groups
  bool kv_evict_first;   // each KV byte is read once
  // Workspace, for more than one group. Its units are those that groups share: max_tiles * Hkv - whole_units.
  float* partial_out;    // [units, num_groups, kBlockM * D]
  float* partial_stats;  // [units, num_groups, kBlockM, 2]
  float* partial_gates;  // [units, cluster_size, kBlockM, 3]
  int32_t* counters;     // [units, cluster_size == 1 ? kConsumers * num_groups : cluster_size]; zero before and after a
                         // launch
  int32_t heads;              // query heads of a KV head, and
  uint32_t heads_reciprocal;  // 2^32 / heads, rounded up (0 for one head): see text_of
  uint32_t splits_reciprocal;  // the same of cluster_size * num_groups
};

void cross_attention_sm90_d64(const CrossAttentionParams& params, const SplitPlan& plan, void* stream);
void cross_attention_sm90_d128(const CrossAttentionParams& params, const SplitPlan& plan, void* stream);

}  // namespace slowfast::cuda

// Host entry point of the Hopper attention and how a call is cut into CTAs; free of CUDA headers.
#pragma once
#include "../../params.h"

namespace slowfast::cuda {

// A packed row is a text row and one of the query heads that share a KV head. A unit is a tile of kBlockM packed rows of one
// KV head. Its slow tokens are split over num_groups groups of cluster_size CTAs: a group is a cluster, which adds up through
// distributed shared memory, and groups add up through global memory. kConsumers below is `consumers`; kBlockM is 64 of it.
struct SplitPlan {
  // A general call (see below) with two consumers and clusters of one may leave it to the device how blocks are dealt out
  // (deal.cuh): to as many of dealt_ctas CTAs, at least max_tiles * Hkv, as it likes; 0: as below. Its workspace
  // has dealt_ctas parts in the place of [units, num_groups], gates of max_tiles * Hkv units, dealt_ctas * kConsumers counters.
  int32_t dealt_ctas;
  int32_t num_sms;       // of the device; where blocks are dealt out
  // The plan below is for sequences of equal lengths. Where the device sees others, it may cut units into groups of its own
  // (shares.cuh), for share_slots groups that run at once; 0: never. They find room in a grid of max_tiles by grid_heads
  // >= Hkv by grid_groups >= num_groups, of max_tiles * Hkv + share_slots / 2 groups at least, and in a workspace of
  // 2 * share_slots parts.
  int32_t share_slots;
  int32_t grid_heads;
  int32_t grid_groups;
  int32_t even_units;    // what the plan is for: units with something to do,
  int32_t even_blocks;   // and blocks of each; 0: any number
  int32_t consumers;     // 1 or 2 warpgroups of 64 rows
  int32_t cluster_size;  // 1, 2, 4 or 8
  int32_t num_groups;    // groups a unit, >= 1
  int32_t max_tiles;     // upper bound over any distribution of the text rows over the sequences
  int32_t whole_units;   // the first units (by KV head, then tile), a CTA each without a split; 0 unless cluster_size is 1
  int32_t long_blocks;   // KV blocks of every group but the last, which gets the rest; 0: equal groups
  bool kv_evict_first;   // each KV byte is read once
  bool gates_first;      // a launch before forms the gates of all text rows, which have a weight (form_gates)
  // Workspace, for more than one group. Its units are those that groups share: max_tiles * Hkv - whole_units.
  // A part is a group's; with share_slots there are 2 * share_slots at least, and as many units.
  float* partial_out;    // [units, num_groups, kBlockM * D]
  float* partial_stats;  // [units, num_groups, kBlockM, 2]
  float* partial_gates;  // [units, cluster_size, kBlockM, 3]; with gates_first [Nt], for any number of groups
  int32_t* counters;     // [units, cluster_size == 1 ? kConsumers * num_groups : cluster_size]; zero before and after a
                         // launch
  // Set by the launch. The reciprocals are 2^32 / x, rounded up (0 for x = 1), for a division by one multiplication.
  int32_t heads_per_kv;              // query heads that share a KV head
  uint32_t heads_per_kv_reciprocal;  // see text_of
  uint32_t splits_reciprocal;        // of cluster_size * num_groups
};

// With gates_first: leaves the gates in partial_gates, and returns the call that takes them from there.
CrossAttentionParams form_gates(const CrossAttentionParams& params, const SplitPlan& plan, void* stream);

void cross_attention_sm90_d64(const CrossAttentionParams& params, const SplitPlan& plan, void* stream);
void cross_attention_sm90_d128(const CrossAttentionParams& params, const SplitPlan& plan, void* stream);
// Of these, calls with share_slots that are not general.
void cross_attention_sm90_shares_d64(const CrossAttentionParams& params, const SplitPlan& plan, void* stream);
void cross_attention_sm90_shares_d128(const CrossAttentionParams& params, const SplitPlan& plan, void* stream);
// Of these, the general calls, which with two consumers take no share_slots: with ranges, with pieces, with K and V so far apart or so unlike that one tensor map cannot hold
// both, or dealt out. With even_blocks, long_blocks is so much of that many, and as large a share of how many there are.
void cross_attention_sm90_general_d64(const CrossAttentionParams& params, const SplitPlan& plan, void* stream);
void cross_attention_sm90_general_d128(const CrossAttentionParams& params, const SplitPlan& plan, void* stream);

}  // namespace slowfast::cuda

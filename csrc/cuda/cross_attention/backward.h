// Host entry point of the Hopper attention's backward pass and how a call is cut; free of CUDA headers.
#pragma once
#include "../../params.h"

namespace slowfast::cuda {

// A piece of a sequence's slow tokens.
struct PieceUse {
  int32_t begin, end;  // in memory
  int32_t number;      // of its first token in the sequence
  int32_t sequence;
};
// Who has tokens of a block.
struct BlockUses {
  int32_t laps;                     // times that a CTA goes over the row tiles, at least 1
  int32_t first_piece, last_piece;  // those that have tokens of it are among first_piece .. last_piece - 1
  int32_t first_tile, num_tiles;    // row tiles from the first to the last sequence that has tokens of it, among all sequences'
  int32_t unused[3];
};
static_assert(sizeof(BlockUses) == 32);  // as the host counts its workspace

// A row tile is 64 packed rows of a KV head, a block 128 slow tokens of one. Sequences follow one another; of a sequence,
// block n of KV head h is number n * Hkv + h. CTA c works on blocks c, c + num_ctas, ... of all: a round is num_ctas blocks.
// The blocks of a KV head in a round are cut into groups. A group adds its share of dQ into sums of its own, in a fixed
// order (backward_schedule.cuh); groups of the next round go on with the sums of this one.
//
// Where sequences are in pieces, blocks are of tokens as they lie in memory, whoever's they are: block n of KV head h is
// number n * Hkv + h of all, and whoever has tokens of it adds to the dK and dV of its CTA.
// A launch may be of some of a call's KV heads alone: its pointers then begin with theirs, and num_q_heads and num_kv_heads are
// how many they are.
struct BackwardPlan {
  int32_t num_ctas;    // that the GPU holds at once, at most
  int32_t max_tiles;   // row tiles of a KV head: a bound over any distribution of the text rows over the sequences
  int32_t max_sums;    // row tiles times groups of a KV head, max_tiles at least: sequences share what is more by their slow tokens
  int32_t max_groups;  // of a KV head in a round
  int32_t spread;      // row tiles between those that the CTAs of a group begin with, where it is not too large for that
  int32_t heads_a_row;  // query heads of the whole call, of which rows of context, lse and grad_q have one after another
  bool splits_last_round;  // a last round that leaves half of the CTAs without a block gives each block to two
  // Workspace.
  void* tiles;         // [Hkv, max_tiles] records of q, grad_context and statistics, see backward_rows.cuh
  float* sums;         // [Hkv, max_sums, 64 * D] of dQ, by wgmma fragments
  int32_t* turns;      // [Hkv, max_sums], and behind them
  int32_t* pair_turns;  // [num_ctas / 2, 2 warpgroups, 2]
  float* pair_parts;   // [num_ctas / 2, 2 warpgroups, 2, 64 * D] of dK and dV, by fragments
  // Where rows see ranges, bits that say which (backward_sights.cuh); for as many blocks of a KV head as there may be.
  uint32_t* seen_tokens;   // [max_blocks, 4]: tokens that some row of the sequence sees
  uint32_t* seeing_tiles;  // [max_blocks, tile_words]: row tiles of the sequence that see some token of the block
  uint32_t* masked_tiles;  // the same, of those in which not all rows that see anything see all of the block
  int32_t* row_ranges;     // [max_tiles, 64, 2]: the tokens of its sequence that a packed row sees, begin and end
  int32_t tile_words;
  // Where sequences are in pieces (backward_pieces.cuh).
  PieceUse* uses;           // [P]
  BlockUses* block_uses;    // [max_blocks]
  int32_t* tile_sequences;  // [max_tiles]: the sequence of each row tile
  uint64_t* reach;          // [2]: row tiles of the sequences that have tokens of a block, summed up over blocks; these blocks
};

void cross_attention_backward_sm90_d64(const CrossAttentionBackwardParams& params, const BackwardPlan& plan, void* stream);
void cross_attention_backward_sm90_d128(const CrossAttentionBackwardParams& params, const BackwardPlan& plan, void* stream);

}  // namespace slowfast::cuda

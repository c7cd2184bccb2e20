// The slow tokens that a unit's steps work on. Tiles lie on one grid of places along the sequence, whatever pieces hold
// their tokens, so that a row's bits do not depend on where the tokens lie; tiles that no row of the unit sees are left
// out. Compiled for the baseline, apart from the kernels: once a tile, this costs them nothing.
#pragma once
#include <vector>

#include "kernels.h"

namespace slowfast::cpu {

struct TokenTile {
  int64_t place;                // of its first token
  int64_t count;                // of its tokens; 0: there is no tile
  int64_t token[kTokenTile];    // where in the cache they lie
  uint64_t breaks;              // bit t: token t does not lie behind token t - 1
  uint64_t seen;                // bit t: some row sees token t
  bool masked;                  // some row does not see all of them
};

// What text row `text` sees of a sequence of `length` slow tokens; begin >= end: nothing.
Interval seen_by(const CrossAttentionParams& p, int64_t text, int64_t length);

bool has_ranges(const CrossAttentionParams& p);   // not inline: no level's instructions may reach another level

// Appends sequence `b`'s runs, see AttentionUnit. Pieces that lie one behind another in memory, too, are one run.
void append_runs(const CrossAttentionParams& p, int b, std::vector<TokenRun>* runs);

// Appends the text rows of sequence `b`, of `length` slow tokens, that see something, as indices into text_rows;
// returns how many. Neighbours by what they see come together.
int64_t append_texts(const CrossAttentionParams& p, int b, int64_t length, std::vector<int32_t>* texts);

class TileWalk {
 public:
  TileWalk(const CrossAttentionParams& p, const AttentionUnit& unit, int64_t tile_tokens);
  void next(TokenTile* tile);
  // What row `row` (of the sequence, in the unit) sees.
  Interval of_row(int64_t row) const;

 private:
  int64_t nearest() const;   // the next place that some row sees
  void mask(TokenTile* tile) const;

  const AttentionUnit& unit_;
  const int64_t tile_tokens_, group_, first_text_;
  const TokenRun* run_;
  int64_t place_;
  int num_ranges_ = 0;             // 0: every row sees everything
  Interval ranges_[kMaxRows];      // of the unit's text rows
};

}  // namespace slowfast::cpu

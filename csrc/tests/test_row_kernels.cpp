// Launch geometry of the kernels that work row by row, and their share of the tokens.
#include "core/row_kernels.h"

#include <set>
#include <utility>
#include <vector>

#include "core/rotary.h"
#include "core/token_tile.h"
#include "tests/check.h"

using namespace fa;

namespace {

void test_lanes_of_row_kernels() {
  for (int head_dim = 1; head_dim <= kMaxRowHeadDim; ++head_dim)
    for (int vec : {1, 2, 4, 8}) {
      const int lanes = combine_lanes_per_row(head_dim, vec);
      CHECK(1 <= lanes && lanes <= kCombineThreads, "head_dim=%d", head_dim);
      CHECK(lanes == kCombineThreads || lanes * vec >= head_dim, "head_dim=%d", head_dim);
      CHECK((lanes - 1) * vec < head_dim, "idle lanes: head_dim=%d", head_dim);
      const int rows = combine_rows_per_cta(head_dim, vec);
      CHECK(rows >= 1 && rows * lanes <= kCombineThreads, "head_dim=%d rows=%d", head_dim, rows);
      const RowShare share = bwd_preprocess_row_share(head_dim, vec);
      CHECK(kWarpSize % share.lanes == 0, "head_dim=%d lanes=%d", head_dim, share.lanes);
      const int step = share.lanes * share.vectors * vec;
      CHECK(share.lanes == kWarpSize || step >= head_dim, "steps: head_dim=%d", head_dim);
      CHECK(share.lanes == 1 || step < 2 * head_dim, "idle lanes: head_dim=%d", head_dim);
      CHECK(bwd_preprocess_rows_per_cta(head_dim, vec) % (kBwdPreprocessThreads / kWarpSize) == 0,
            "whole warps: head_dim=%d", head_dim);
    }
}

// The units of a row hold each element once, and both elements of a pair lie in one unit: in one
// vector if interleaved, so that its thread reads whole cosines and sines.
void test_units_of_a_row() {
  for (int vec : {1, 2, 4, 8})
    for (int head_dim : {2 * vec, 3 * vec, 8 * vec, 13 * vec})
      for (int rotary_dim = 0; rotary_dim <= head_dim; rotary_dim += 2 * vec)
        for (bool interleaved : {false, true}) {
          std::vector<int> unit_of(head_dim, -1);
          for (int unit = 0; unit < row_units(head_dim, rotary_dim, vec); ++unit) {
            const UnitColumns c = unit_columns(head_dim, rotary_dim, interleaved, vec, unit);
            CHECK(c.rotates == (unit < rotated_units(rotary_dim, vec)), "rotates unit=%d", unit);
            for (int column : {c.first, c.second})
              for (int i = 0; i < vec && (column == c.first || c.has_second); ++i) {
                const int element = column + i;
                CHECK(0 <= element && element < head_dim && unit_of[element] == -1,
                      "vec=%d head_dim=%d rotary_dim=%d element=%d", vec, head_dim, rotary_dim,
                      element);
                if (0 <= element && element < head_dim) unit_of[element] = unit;
                CHECK(c.rotates == (element < rotary_dim), "rotates element=%d", element);
              }
            CHECK(!c.rotates || interleaved || c.second == c.first + rotary_dim / 2, "partners");
          }
          for (int pair = 0; pair < rotary_dim / 2; ++pair) {
            const RotaryPair p = rotary_pair(pair, rotary_dim, interleaved);
            CHECK(unit_of[p.first] == unit_of[p.second], "pair torn: vec=%d rotary_dim=%d pair=%d",
                  vec, rotary_dim, pair);
          }
          for (int element = 0; element < head_dim; ++element)
            CHECK(unit_of[element] >= 0, "not covered: vec=%d head_dim=%d rotary_dim=%d element=%d",
                  vec, head_dim, rotary_dim, element);
        }
  for (int num_heads = 1; num_heads < 20; ++num_heads) {
    const int groups = units_per_token(num_heads, 3) / 3;
    CHECK(groups <= num_heads, "a group without a head: heads=%d", num_heads);
    CHECK(groups * kHeadsPerThread >= num_heads, "heads=%d", num_heads);
  }
}

// Every token of every sequence belongs to one tile, fixed length and varlen.
void test_token_tiles() {
  // Rows that belong to no sequence: cu_seqlens[1] and lengths of "sequence 0" are not there.
  for (bool varlen : {false, true})
    CHECK(num_token_tiles(varlen, 0, 7, 3) == 0, "varlen=%d", varlen);
  for (const std::vector<int>& lengths :
       std::vector<std::vector<int>>{{5, 5, 5}, {0}, {7}, {3, 0, 9, 1}, {0, 0, 64}})
    for (bool varlen : {false, true})
      for (int tile_tokens : {1, 3, 4, 100}) {
        std::vector<int> cu_seqlens{0};
        for (int length : lengths) cu_seqlens.push_back(cu_seqlens.back() + length);
        const int batch_size = static_cast<int>(lengths.size());
        const int seqlen = varlen ? cu_seqlens.back() : lengths[0];
        std::multiset<std::pair<int, int>> expected, seen;
        for (int batch = 0; batch < batch_size; ++batch)
          for (int token = 0; token < (varlen ? lengths[batch] : lengths[0]); ++token)
            expected.insert({batch, token});
        const int64_t tiles = num_token_tiles(varlen, batch_size, seqlen, tile_tokens);
        for (int tile = 0; tile < tiles; ++tile) {
          const TokenTile t = token_tile(varlen ? cu_seqlens.data() : nullptr, batch_size, seqlen,
                                         tile_tokens, tile);
          CHECK(t.end - t.begin <= tile_tokens, "too long: tile=%d", tile);
          for (int token = t.begin; token < t.end; ++token) seen.insert({t.batch, token});
          if (t.end > t.begin)
            CHECK(t.first_row == (varlen ? cu_seqlens[t.batch] : 0), "row: tile=%d", tile);
        }
        CHECK(seen == expected, "varlen=%d tile_tokens=%d", varlen, tile_tokens);
      }
  for (int units = 0; units < 3000; ++units) {
    for (const bool varlen : {false, true}) {
      const int steps = varlen ? kVarlenSteps : 1;
      const int tokens = tokens_per_tile(units, 256, varlen);
      CHECK(tokens >= 1 && (tokens == 1 || tokens * units <= steps * 256), "too many: units=%d",
            units);
      CHECK(units == 0 || (tokens + 1) * units > steps * 256, "threads idle: units=%d", units);
    }
  }
}

}  // namespace

int main() {
  test_lanes_of_row_kernels();
  test_units_of_a_row();
  test_token_tiles();
  return report();
}
